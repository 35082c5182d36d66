"""The quality score of the original notebook of this project, so that its published values of 50 to 70 can be compared."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from emotion.audio.feature_store import FRAMES_PER_BLOCK
from emotion.errors import DataError
from emotion.evaluation.metrics import Array, metric


class Profile(NamedTuple):
    """Profile of a set of clips. spectrum: [mels], mean over all frames; roughness: mean |difference of consecutive frames|."""

    spectrum: Array
    roughness: float


class ClipSums(NamedTuple):
    """Sums over one clip, for `profile_of`. spectrum: [mels], sum over the frames; change: sum of |differences|."""

    frames: int
    spectrum: Array
    change: float


def sums_of(clip: npt.NDArray[Any]) -> ClipSums:
    """Sums over a clip, a log-mel [frames, mels] of at least 2 frames. Raises DataError for another shape, NaN or infinity."""
    if clip.ndim != 2 or len(clip) < 2 or not np.isfinite(clip).all():
        raise DataError(
            f"notebook score: expected a finite log-mel [frames, mels] of at least 2 frames; found shape {list(clip.shape)}"
        )
    spectrum, change = np.zeros(clip.shape[1]), 0.0
    for first in range(0, len(clip), FRAMES_PER_BLOCK):
        wide = clip[first : first + FRAMES_PER_BLOCK + 1].astype(np.float64)
        difference = wide[1:] - wide[:-1]
        change += float(np.abs(difference, out=difference).sum())
        spectrum += wide[:FRAMES_PER_BLOCK].sum(axis=0)
    return ClipSums(len(clip), spectrum, change)


def profile_of(clips: Iterable[ClipSums]) -> Profile:
    """Profile of a set of clips. Raises DataError if there are none or their numbers of mel bands differ."""
    spectrum = np.zeros(0)
    frames = differences = 0
    change = 0.0
    for index, clip in enumerate(clips):
        if index and len(clip.spectrum) != len(spectrum):
            raise DataError(f"notebook score: clip {index} has {len(clip.spectrum)} mel bands, others {len(spectrum)}")
        spectrum = clip.spectrum + (spectrum if index else 0.0)
        frames += clip.frames
        differences += (clip.frames - 1) * len(clip.spectrum)
        change += clip.change
    if not frames:
        raise DataError("notebook score: expected at least one clip, found none")
    return Profile(spectrum / frames, change / differences)


def notebook_score(*, real: Profile, synthetic: Profile, frechet: float) -> dict[str, float]:
    """The score out of 100 and its three terms.

    frechet: Fréchet distance in a space of few dimensions (that of the notebook, on pixels, needs far more clips).
    fd_score = max(0, 100 - 10 frechet); freq_score = 100 x Pearson's r of the spectra, which may be negative; smooth_score =
    max(0, 100 - 100 |1 - synthetic roughness / real roughness|); overall = 0.4 fd + 0.4 freq + 0.2 smooth. A term that is
    undefined, for a flat spectrum or constant real clips, counts as 0. The score ignores labels, diversity and copies: do not
    tune by it. Raises DataError for spectra of different lengths, NaN, infinity, or a negative distance.
    """
    spectra = np.array([synthetic.spectrum, real.spectrum]) if len(real.spectrum) == len(synthetic.spectrum) else None
    if (
        spectra is None
        or not (np.isfinite(spectra).all() and np.isfinite([real.roughness, synthetic.roughness, frechet]).all())
        or frechet < 0
    ):
        raise DataError(
            f"notebook score: expected finite spectra of one length, roughness and a distance of at least 0; found "
            f"{len(real.spectrum)} and {len(synthetic.spectrum)} bands, roughness {real.roughness:g} and "
            f"{synthetic.roughness:g}, distance {frechet:g}"
        )
    fd_score = max(0.0, 100 - 10 * frechet)
    freq_score = 100 * metric("pearson", *spectra) if np.ptp(spectra, axis=1).all() else 0.0
    smooth_score = max(0.0, 100 - 100 * abs(1 - synthetic.roughness / real.roughness)) if real.roughness > 0 else 0.0
    overall = 0.4 * fd_score + 0.4 * freq_score + 0.2 * smooth_score
    return {"fd_score": fd_score, "freq_score": freq_score, "smooth_score": smooth_score, "overall": overall}
