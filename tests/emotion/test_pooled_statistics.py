import math

import numpy as np
import pytest

from emotion.audio.feature_store import FRAMES_PER_BLOCK
from emotion.audio.pooled_statistics import pooled_statistics
from emotion.errors import DataError


def test_pooled_statistics_of_a_hand_worked_song():
    song = np.array([[0, 5], [2, 5], [1, 5]], np.float16)  # changes 2, -1 and 0, 0
    expected = [1, 5, math.sqrt(2 / 3), 0, 1.5, 0]
    np.testing.assert_allclose(pooled_statistics(song), expected)


def test_pooled_statistics_of_a_long_float16_song_neither_overflow_nor_round():
    song = np.full((5000, 3), -80, np.float16)
    song[1::2] = -79.5
    np.testing.assert_allclose(pooled_statistics(song), [-79.75] * 3 + [0.25] * 3 + [0.5] * 3, rtol=1e-6)


@pytest.mark.parametrize("frames", [FRAMES_PER_BLOCK, FRAMES_PER_BLOCK + 1, 2 * FRAMES_PER_BLOCK + 700])
def test_pooled_statistics_of_a_long_song_are_those_of_all_its_frames_and_changes(frames):
    song = np.random.default_rng(60).normal(size=(frames, 2)) * [3, 0.5] - 40
    song[frames // 2 :, 1] += 5
    expected = [song.mean(axis=0), song.std(axis=0), np.diff(song, axis=0).std(axis=0)]
    np.testing.assert_allclose(pooled_statistics(song), np.concatenate(expected), rtol=1e-12)


@pytest.mark.parametrize("song", [np.zeros((1, 4)), np.zeros(4), np.zeros((0, 4)), np.array([[0.0], [np.nan]])])
def test_pooled_statistics_refuse_other_shapes_and_nan(song):
    with pytest.raises(DataError, match="log-mel"):
        pooled_statistics(song)
