"""A song as one vector of fixed length, for regressors on whole songs: statistics over time of its log-mel, and its tonality."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.fft

from emotion.audio.feature_store import FRAMES_PER_BLOCK, Features
from emotion.errors import DataError
from emotion.threads import in_threads

Array = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.floating[Any]]
LEVEL, CENTRE, SPREAD, FLATNESS, ONSET = range(5)  # columns of `frame_measures`, before those of the contrast
BANDS = 7
QUIET = 1e-9


def song_vectors(features: Features, threads: int, check_stop: Callable[[], None]) -> Array:
    """`song_vector` of every song, [songs, numbers]. check_stop: see `in_threads`."""

    frames_per_second = features.mel.sample_rate_hz / features.mel.hop_samples

    def vector(index: int) -> Array:
        return song_vector(features.song(index), frames_per_second, features.tonality[index])

    return np.array(list(in_threads(vector, range(len(features.songs)), threads, check_stop)))


def song_vector(log_mel: Numbers, frames_per_second: float, tonality: Numbers) -> Array:
    """Pooled statistics, timbre and rhythm of a song's log-mel [frames, mels], and its tonality.

    A single frame counts twice, without a change.
    """
    frames = log_mel if len(log_mel) > 1 else np.repeat(log_mel, 2, axis=0)
    course = frame_measures(frames)
    timbre = np.concatenate([course.mean(axis=0), course.std(axis=0)])
    rhythm = rhythm_of(course[1:, ONSET], frames_per_second)
    return np.concatenate([pooled_statistics(frames), timbre, rhythm, tonality.astype(np.float64)])


def frame_measures(log_mel: Numbers) -> Array:
    """[frames, mels] dB → [frames, 5 + BANDS]: level (dB), centre and spread of the spectrum (in mels), flatness (dB), onset (the
    mean rise since the frame before, dB; 0 for the first), and the contrast (dB) of each of BANDS equal bands of mels: the mean
    of its loudest quarter minus that of its quietest (after Jiang et al. 2002, Music type classification by spectral contrast).
    """
    frames, mels = log_mel.shape
    found = np.zeros((frames, 5 + BANDS))
    bands = [band for band in np.array_split(np.arange(mels), BANDS) if len(band)]
    position = np.arange(mels)
    for first in range(0, frames, FRAMES_PER_BLOCK):
        before = log_mel[max(first - 1, 0) : first + FRAMES_PER_BLOCK].astype(np.float64)
        block = before[1:] if first else before
        rows = found[first : first + len(block)]
        rows[:, LEVEL] = 10 * np.log10((10 ** (block / 10)).sum(axis=1))
        magnitude = 10 ** (block / 20)
        magnitude /= magnitude.sum(axis=1, keepdims=True)
        rows[:, CENTRE] = magnitude @ position
        rows[:, SPREAD] = np.sqrt((magnitude * (position - rows[:, CENTRE : CENTRE + 1]) ** 2).sum(axis=1))
        rows[:, FLATNESS] = block.mean(axis=1) - rows[:, LEVEL]
        rises = np.diff(before, axis=0).clip(0).mean(axis=1)
        rows[len(rows) - len(rises) :, ONSET] = rises
        for number, band in enumerate(bands):
            ordered = np.sort(block[:, band], axis=1)
            quarter = max(1, len(band) // 4)
            rows[:, 5 + number] = ordered[:, -quarter:].mean(axis=1) - ordered[:, :quarter].mean(axis=1)
    return found


def rhythm_of(onsets: Array, frames_per_second: float) -> Array:
    """[4]: tempo (octaves above one beat a second), clarity of the beat from 0 to 1, relative deviation of the onsets, share of
    strong ones. onsets: [frames], at least one.

    The beat is the lag of 0.3 to 1.5 s with the highest autocorrelation; without such a lag, or without onsets, it is 1 s and its
    clarity 0.
    """
    mean, deviation = onsets.mean(), onsets.std()
    size = scipy.fft.next_fast_len(2 * len(onsets), real=True)
    power = np.abs(scipy.fft.rfft(onsets - mean, size)) ** 2
    correlation = scipy.fft.irfft(power, size)[: len(onsets)]
    lags = np.arange(round(0.3 * frames_per_second), min(round(1.5 * frames_per_second), len(onsets)))
    tempo = clarity = 0.0
    if len(lags) and correlation[0] > QUIET:
        beat = lags[correlation[lags].argmax()]
        tempo, clarity = np.log2(frames_per_second / beat), correlation[beat] / correlation[0]
    strong = (onsets > mean + 2 * deviation).mean()
    return np.array([tempo, clarity, deviation / (mean + QUIET), strong])


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
