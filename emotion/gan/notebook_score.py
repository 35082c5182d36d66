"""The quality score of the notebook that this project grew from, so that its values of 50 to 70 can be compared with ours."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from emotion.errors import DataError
from emotion.evaluation.metrics import Array, metric


class Profile(NamedTuple):
    """Of a set of clips. spectrum: [mels] mean over all frames; roughness: mean |difference between neighbouring frames|."""

    spectrum: Array
    roughness: float


def profile_of(clips: Iterable[npt.NDArray[Any]]) -> Profile:
    """clips: log-mels [frames, mels] of at least 2 frames. Raises DataError for no clips, another shape, NaN or infinity."""
    total = np.zeros(0)
    frames = differences = 0
    change = 0.0
    for index, clip in enumerate(clips):
        if clip.ndim != 2 or len(clip) < 2 or (index and clip.shape[1] != len(total)) or not np.isfinite(clip).all():
            raise DataError(
                f"notebook score: clip {index} must be a finite log-mel [frames, mels] of at least 2 frames and as many "
                f"mel bands as the others; found shape {list(clip.shape)}"
            )
        wide = clip.astype(np.float64)
        total = wide.sum(axis=0) + (total if index else 0.0)
        frames += len(wide)
        differences += (len(wide) - 1) * wide.shape[1]
        change += float(np.abs(np.diff(wide, axis=0)).sum())
    if not frames:
        raise DataError("notebook score: expected at least one clip, found none")
    return Profile(total / frames, change / differences)


def notebook_score(*, real: Profile, synthetic: Profile, frechet: float) -> dict[str, float]:
    """The score out of 100 and its three terms.

    frechet: Fréchet distance in a space of few dimensions (the notebook's, on pixels, cannot be estimated from so few clips).
    fd_score = max(0, 100 - 10 frechet); freq_score = 100 x Pearson's r of the spectra, which may be negative; smooth_score =
    max(0, 100 - 100 |1 - synthetic roughness / real roughness|); overall = 0.4, 0.4 and 0.2 of them. A term that is undefined,
    for a flat spectrum or constant real clips, counts as 0. The score takes no account of labels, diversity or copies: do not
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
