import math

import numpy as np
import pytest

from emotion.audio.feature_store import FRAMES_PER_BLOCK
from emotion.errors import DataError
from emotion.gan.notebook_score import Profile, notebook_score, profile_of, sums_of


def array(*values):
    return np.array(values, np.float64)


def test_profile_of_clips_of_two_lengths():
    clips = [array(0, 10, 2, 10).reshape(2, 2), array(1, 10, 1, 11, 2, 12).reshape(3, 2)]
    spectrum, roughness = profile_of(map(sums_of, clips))
    np.testing.assert_allclose(spectrum, [6 / 5, 53 / 5])
    assert roughness == pytest.approx((2 + 0 + 0 + 1 + 1 + 1) / 6)


def test_the_spectrum_of_long_float16_clips_does_not_overflow():
    assert profile_of([sums_of(np.full((2000, 1), -80, np.float16))]).spectrum[0] == -80


@pytest.mark.parametrize("clips", [[], [np.zeros((1, 4))], [np.zeros((3, 4)), np.zeros((3, 5))], [np.full((3, 4), np.nan)]])
def test_no_clips_other_shapes_and_nan_are_refused(clips):
    with pytest.raises(DataError):
        profile_of(map(sums_of, clips))


@pytest.mark.parametrize("frames", [FRAMES_PER_BLOCK, FRAMES_PER_BLOCK + 1, 2 * FRAMES_PER_BLOCK + 5])
def test_a_long_clip_counts_every_frame_and_every_change(frames):
    clip = np.random.default_rng(0).normal(size=(frames, 2))
    spectrum, roughness = profile_of([sums_of(clip)])
    np.testing.assert_allclose(spectrum, clip.mean(axis=0))
    assert roughness == pytest.approx(np.abs(np.diff(clip, axis=0)).mean())


def test_notebook_score_of_a_case_worked_out_by_hand():
    spectrum = array(-60, -40, -20, -30)
    result = notebook_score(real=Profile(spectrum, 2.0), synthetic=Profile(0.5 * spectrum + 3, 1.6), frechet=3.0)
    assert result == pytest.approx({"fd_score": 70, "freq_score": 100, "smooth_score": 80, "overall": 84})


def test_the_correlation_may_be_negative_and_the_other_terms_may_not():
    spectrum = array(1, 2, 3)
    result = notebook_score(real=Profile(spectrum, 1.0), synthetic=Profile(-spectrum, 5.0), frechet=50.0)
    assert result == pytest.approx({"fd_score": 0, "freq_score": -100, "smooth_score": 0, "overall": -40})


@pytest.mark.parametrize("swapped", [False, True])
def test_a_flat_spectrum_and_constant_clips_count_as_zero(swapped):
    flat, rising = Profile(np.full(5, 0.1), 0.0), Profile(array(1, 2, 3, 4, 5), 0.0)
    result = notebook_score(real=rising if swapped else flat, synthetic=flat if swapped else rising, frechet=0.0)
    assert result == {"fd_score": 100.0, "freq_score": 0.0, "smooth_score": 0.0, "overall": 40.0}


@pytest.mark.parametrize(
    ("real", "synthetic", "frechet"),
    [
        (Profile(array(1, 2), math.nan), Profile(array(1, 2), 1), 1),
        (Profile(array(1, 2), 1), Profile(array(1, 2), math.inf), 1),
        (Profile(array(1, 2), 1), Profile(array(1, 2), 1), math.nan),
        (Profile(array(1, 2), 1), Profile(array(1, 2), 1), -1),
        (Profile(array(1, math.nan), 1), Profile(array(1, 2), 1), 1),
        (Profile(array(1, 2, 3), 1), Profile(array(1, 2), 1), 1),
    ],
)
def test_nan_infinity_a_negative_distance_and_spectra_of_two_lengths_are_refused(real, synthetic, frechet):
    with pytest.raises(DataError, match="notebook score: expected"):
        notebook_score(real=real, synthetic=synthetic, frechet=frechet)
