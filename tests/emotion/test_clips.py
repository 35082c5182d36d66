from pathlib import Path

import numpy as np
import pytest
import torch

from emotion.audio.clips import RANGE, Normalisation, in_db, normalisation_of, normalised, some_of, spread_starts
from emotion.audio.feature_store import FRAMES_PER_BLOCK, Features, FeatureWriter
from emotion.config import MelConfig
from emotion.data.songs import SongLabels
from emotion.gan.density import draw_labels, kernel_shape
from tests.emotion.trainings import clips_of

MEL = MelConfig(mels=16)


@pytest.fixture
def features(tmp_path: Path) -> Features:
    """Song 0 is 10 frames of -20 dB and -40 dB in turn; song 1 is 30 frames of 0 dB."""
    with FeatureWriter(tmp_path, MEL) as writer:
        first = np.where(np.arange(10)[:, None] % 2 == 0, -20.0, -40.0) * np.ones((10, 16))
        writer.append(SongLabels(1, 0.1, 0.2, 0.0, 0.0, "a"), first.astype(np.float32))
        writer.append(SongLabels(2, -0.5, 0.5, 0.0, 0.0, "b"), np.zeros((30, 16), np.float32))
    return Features(tmp_path)


def test_normalisation_is_fitted_on_the_given_songs_only(features: Features) -> None:
    constants = normalisation_of(features.only([0]))
    assert np.allclose(constants.mean_db, -30)
    assert np.allclose(constants.sd_db, 10)
    both = normalisation_of(features)
    assert np.allclose(both.mean_db, -7.5)


def test_normalisation_of_long_songs_in_any_number_of_threads_is_that_of_all_frames(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    songs = [rng.normal(-40, 9, (frames, 16)).astype(np.float16) for frames in (30, FRAMES_PER_BLOCK + 1, 2 * FRAMES_PER_BLOCK)]
    with FeatureWriter(tmp_path, MEL) as writer:
        for number, song in enumerate(songs):
            writer.append(SongLabels(number, 0.0, 0.0, 0.0, 0.0, "a"), song)
    frames = np.concatenate(songs).astype(np.float64)
    for threads in (1, 3):
        found = normalisation_of(Features(tmp_path), threads)
        np.testing.assert_allclose(found.mean_db, frames.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(found.sd_db, frames.std(axis=0), rtol=1e-6)


def test_noise_in_a_constant_band_is_not_amplified(features: Features) -> None:
    assert np.allclose(normalisation_of(features.only([1])).sd_db, 1.0)


def test_normalisation_can_be_inverted_inside_the_range_and_clips_outside() -> None:
    mean_db, sd_db = torch.linspace(-50, -20, 16), torch.linspace(5, 20, 16)
    inside = mean_db + 3.9 * sd_db * torch.linspace(-1, 1, 24).reshape(2, 12, 1)
    again = in_db(normalised(inside, mean_db, sd_db), mean_db, sd_db)
    assert again.dtype == torch.float32
    assert torch.allclose(again, inside, rtol=0, atol=1e-4)
    assert normalised(torch.full((1, 1, 16), 90.0), mean_db, sd_db).max() == RANGE


def test_normalisation_is_read_from_json_as_written() -> None:
    constants = Normalisation(np.linspace(-50, 0, 16, dtype=np.float32), np.full(16, 0.1, np.float32))
    again = Normalisation.from_json(constants.to_json())
    assert np.array_equal(again.mean_db, constants.mean_db)
    assert np.array_equal(again.sd_db, constants.sd_db)


def test_a_batch_has_mels_as_rows_and_frames_as_columns(features: Features) -> None:
    constants = Normalisation(np.zeros(16, np.float32), np.full(16, 10, np.float32))
    batch = clips_of(features, [0, 1], [1, 4], 6, constants)
    assert batch.shape == (2, 1, 16, 6)
    # Song 0 from frame 1 on: -40, -20, ... dB over 10.
    assert batch[0, 0, 5].tolist() == [-4, -2, -4, -2, -4, -2]
    assert batch[1].abs().max() == 0


def test_crops_cover_a_song_evenly() -> None:
    assert spread_starts(100, 100, 9) == [0]
    assert spread_starts(30, 100, 9) == [0]
    assert spread_starts(250, 100, 9) == [0, 75, 150]
    assert spread_starts(1000, 100, 4) == [0, 300, 600, 900]
    assert spread_starts(1000, 100, 1) == [450]


def test_of_fewer_crops_each_is_the_middle_one_of_its_part_of_the_song() -> None:
    crops = [0, 10, 20, 30, 40, 50]
    assert some_of(crops, 1) == [30]
    assert some_of(crops, 2) == [10, 40]
    assert some_of(crops, 3) == [10, 30, 50]
    assert some_of(crops[:5], 2) == [10, 30]
    assert some_of(crops, 6) == some_of(crops, 9) == crops


def test_the_label_kernel_has_the_covariance_of_the_labels() -> None:
    rng = np.random.default_rng(0)
    labels = rng.multivariate_normal([0, 0], [[0.09, 0.05], [0.05, 0.09]], 2000)
    kernel = kernel_shape(labels)
    # Scott: covariance times n^(-2/6).
    assert np.allclose(kernel @ kernel.T * 2000 ** (1 / 3), [[0.09, 0.05], [0.05, 0.09]], atol=0.01)


def test_drawn_labels_follow_the_real_ones_and_stay_on_the_scale() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([[0.9, 0.9], [-0.9, -0.9], [0.8, 0.7], [-0.7, -0.8]])
    drawn = draw_labels(labels, 1000, 0.5, rng)
    assert np.abs(drawn).max() <= 1
    assert np.corrcoef(drawn.T)[0, 1] > 0.8
    again = draw_labels(labels, 1000, 0.5, np.random.default_rng(0))
    assert np.array_equal(drawn, again)
