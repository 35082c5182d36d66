import math

import numpy as np
import pytest

from emotion.audio.feature_store import FRAMES_PER_BLOCK
from emotion.audio.song_vectors import (
    BANDS,
    CENTRE,
    FLATNESS,
    LEVEL,
    ONSET,
    SPREAD,
    frame_measures,
    pooled_statistics,
    rhythm_of,
    song_vector,
)
from emotion.audio.tonality import TONALITY_NUMBERS
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


def test_level_centre_spread_and_flatness_of_hand_worked_frames():
    # Two mels of -20 dB among silence; then every mel alike.
    frames = np.full((2, 28), -1000.0)
    frames[0, [4, 8]] = -20
    frames[1] = -30
    two, flat = frame_measures(frames)
    assert two[LEVEL] == pytest.approx(-20 + 10 * math.log10(2))
    assert (two[CENTRE], two[SPREAD]) == (pytest.approx(6), pytest.approx(2))
    assert flat[LEVEL] == pytest.approx(-30 + 10 * math.log10(28))
    assert flat[FLATNESS] == pytest.approx(-10 * math.log10(28))
    assert (flat[5:] == 0).all()
    # Bands of four mels: the loudest of each minus the quietest.
    np.testing.assert_allclose(two[5:], [0, 980, 980, 0, 0, 0, 0])


def test_an_onset_is_the_mean_rise_and_falls_do_not_count():
    frames = np.full((4, 14), -50.0)
    frames[2, :7] += 10
    frames[2, 7:] -= 30
    assert frame_measures(frames)[:, ONSET].tolist() == [0, 0, 5, 15]


@pytest.mark.parametrize("frames", [FRAMES_PER_BLOCK, FRAMES_PER_BLOCK + 1, 2 * FRAMES_PER_BLOCK + 7])
def test_the_measures_of_a_long_song_are_those_of_its_parts(frames):
    song = np.random.default_rng(1).normal(-40, 5, (frames, 16))
    whole = frame_measures(song)
    middle = frame_measures(song[FRAMES_PER_BLOCK - 3 :])
    np.testing.assert_allclose(whole[FRAMES_PER_BLOCK - 2 :], middle[1:], rtol=1e-12)
    assert whole.shape == (frames, 5 + BANDS)


def test_the_tempo_of_a_click_track_is_found():
    onsets = np.zeros(2000)
    onsets[::50] = 1.0  # every half second at 100 frames a second: two beats a second
    tempo, clarity, deviation, strong = rhythm_of(onsets, 100)
    assert tempo == pytest.approx(1.0)
    assert clarity > 0.95
    assert deviation == pytest.approx(7.0, abs=0.01)  # of 0.02 of the frames: sqrt(0.02 x 0.98) / 0.02
    assert strong == pytest.approx(0.02)


@pytest.mark.parametrize("onsets", [np.zeros(1), np.zeros(5), np.zeros(2000), np.full(2000, 0.1)])
def test_a_song_without_onsets_has_no_beat(onsets):
    tempo, clarity, *_ = rhythm_of(onsets, 43.0)
    assert (tempo, clarity) == (0, 0)


@pytest.mark.parametrize("frames", [1, 2, 30])
def test_the_vector_of_a_short_or_silent_song_is_finite(frames):
    vector = song_vector(np.full((frames, 40), -100, np.float16), 43.0, np.zeros(TONALITY_NUMBERS, np.float32))
    assert vector.shape == (3 * 40 + 2 * (5 + BANDS) + 4 + TONALITY_NUMBERS,)
    assert np.isfinite(vector).all()
