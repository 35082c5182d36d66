"""A song as one vector of fixed length: statistics over time of its log-mel, for regressors on whole songs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from emotion.audio.feature_store import FRAMES_PER_BLOCK, Features
from emotion.errors import DataError
from emotion.threads import in_threads

Array = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.floating[Any]]


def pooled_songs(features: Features, threads: int, check_stop: Callable[[], None]) -> Array:
    """`pooled_statistics` of every song, [songs, 3 x mels]. check_stop: see `in_threads`."""
    rows = in_threads(lambda index: pooled_statistics(features.song(index)), range(len(features.songs)), threads, check_stop)
    return np.array(list(rows)).reshape(len(features.songs), 3 * features.mel.mels)


def pooled_statistics(log_mel: Numbers) -> Array:
    """A song as one vector [3 x mels]: mean and standard deviation over time, and that of the change from frame to frame.

    log_mel: [frames, mels], at least 2 frames, in any unit; computed in float64 (a float16 sum over a song overflows).
    Raises DataError for another shape, NaN or infinity.
    """
    if log_mel.ndim != 2 or len(log_mel) < 2 or not np.isfinite(log_mel).all():
        raise DataError(
            "pooled statistics: expected a finite log-mel [frames, mels] of at least 2 frames, found "
            f"{list(log_mel.shape)}, smallest {log_mel.min(initial=0):g}, largest {log_mel.max(initial=0):g}"
        )
    frames, mels = log_mel.shape
    shift = log_mel[0].astype(np.float64)  # sums of squares of what lies near 0 lose no digits
    total, squares, squared_changes = np.zeros((3, mels))
    for first in range(0, frames, FRAMES_PER_BLOCK):
        wide = log_mel[first : first + FRAMES_PER_BLOCK + 1].astype(np.float64)  # a change belongs to the frame before it
        wide -= shift
        change = wide[1:] - wide[:-1]
        squared_changes += np.einsum("fm,fm->m", change, change)
        wide = wide[:FRAMES_PER_BLOCK]
        total += wide.sum(axis=0)
        squares += np.einsum("fm,fm->m", wide, wide)
    mean, mean_change = total / frames, (log_mel[-1] - shift) / (frames - 1)
    variances = squares / frames - mean**2, squared_changes / (frames - 1) - mean_change**2
    return np.concatenate([shift + mean, *(np.sqrt(variance.clip(0)) for variance in variances)])
