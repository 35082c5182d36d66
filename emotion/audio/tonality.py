"""Tonality: the distribution of a song's sound over the twelve pitch classes, as one vector for regressors on whole songs.

Valence is heard in mode and harmony, which a log-mel spectrogram blurs: a mel band is wider than a semitone.
"""

import functools

import numpy as np
import numpy.typing as npt
import scipy.fft
import scipy.sparse
from numpy.lib.stride_tricks import sliding_window_view

from emotion.audio.decoding import Array

Numbers = npt.NDArray[np.float64]

CLASSES = 12
A4_HZ, A4_CLASS = 440.0, 9  # C is class 0
WINDOW_SECONDS = 0.19  # tells semitones apart from about 100 Hz on; rounded to a power of two, 4,096 samples at 22,050 Hz
LOWEST_HZ, HIGHEST_HZ = 60.0, 5000.0  # below, semitones merge; above, there are mostly overtones and noise
WIDTH = 0.5  # semitones: standard deviation of the share of a frequency in the pitch classes around it
FRAME_GROUP = 16  # as in mel.py
SEGMENT_SECONDS = 2.0  # about a bar: long enough for a chord, short enough for its changes
SILENCE = 1e-9

# How well each pitch class fits into C major and C minor, rated by listeners: Krumhansl and Kessler 1982, Psychological Review
# 89:334-368. The key of a sound is that of the best correlation: Krumhansl 1990, Cognitive Foundations of Musical Pitch.
MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)


class ChromaStream:
    """Mono samples, block by block → magnitudes of the pitch classes. Block boundaries do not change any bit.

    Magnitudes, not power: a loud note would hide the others of its chord.
    """

    def __init__(self, sample_rate_hz: int) -> None:
        self.window_samples = 2 ** round(np.log2(WINDOW_SECONDS * sample_rate_hz))
        self.hop_samples = self.window_samples  # overlapping windows cost more and gave the same concordance
        self.frames_per_second = sample_rate_hz / self.hop_samples
        self._window, self._bank = _window_and_bank(sample_rate_hz, self.window_samples)
        self._bins = self._bank.shape[1]
        self._windowed = np.empty((FRAME_GROUP, self.window_samples), np.float32)
        self._magnitudes = np.empty((self._bins, FRAME_GROUP), np.float32)
        self._pending: Array = np.zeros(self.window_samples // 2, np.float32)
        self._parts: list[Array] = []

    def add(self, block: Array) -> None:
        self._pending = np.concatenate([self._pending, block])
        group = (FRAME_GROUP - 1) * self.hop_samples + self.window_samples
        used = 0
        while len(self._pending) - used >= group:
            self._parts.append(self._frames(self._pending[used : used + group]))
            used += FRAME_GROUP * self.hop_samples
        self._pending = self._pending[used:]

    def finish(self) -> Array:
        """[1 + samples // hop_samples, 12]"""
        frames = 1 + (len(self._pending) - self.window_samples // 2) // self.hop_samples
        if frames:
            end = (frames - 1) * self.hop_samples + self.window_samples
            self._parts.append(self._frames(np.pad(self._pending, (0, max(end - len(self._pending), 0)))[:end]))
        return np.concatenate(self._parts)

    def _frames(self, samples: Array) -> Array:
        framed = sliding_window_view(samples, self.window_samples)[:: self.hop_samples]
        windowed = np.multiply(framed, self._window, out=self._windowed[: len(framed)])
        spectrum = scipy.fft.rfft(windowed, axis=1)[:, : self._bins]
        magnitudes = np.abs(spectrum.T, out=self._magnitudes[:, : len(framed)])
        return np.asarray((self._bank @ magnitudes).T, np.float32)


@functools.lru_cache
def _window_and_bank(sample_rate_hz: int, window_samples: int) -> tuple[Array, scipy.sparse.csr_array]:
    """Hann, and the filters up to the last bin that any uses: the same for all songs."""
    filters = pitch_class_filters(sample_rate_hz, window_samples)
    bins = int(np.flatnonzero(filters.any(axis=0)).max()) + 1
    return np.hanning(window_samples + 1)[:-1].astype(np.float32), scipy.sparse.csr_array(filters[:, :bins])


def pitch_class_filters(sample_rate_hz: int, window_samples: int) -> Array:
    """[12, window_samples // 2 + 1]: the share of each pitch class in each frequency, sums of 1 from LOWEST_HZ to HIGHEST_HZ."""
    hz = np.fft.rfftfreq(window_samples, 1 / sample_rate_hz)
    used = (hz >= LOWEST_HZ) & (hz <= HIGHEST_HZ)
    pitch = CLASSES * np.log2(hz[used] / A4_HZ) + A4_CLASS
    distance = (pitch - np.arange(CLASSES)[:, None] + CLASSES / 2) % CLASSES - CLASSES / 2
    shares = np.where(np.abs(distance) < 3 * WIDTH, np.exp(-0.5 * (distance / WIDTH) ** 2), 0.0)
    filters = np.zeros((CLASSES, len(hz)), np.float32)
    filters[:, used] = shares / shares.sum(axis=0)
    return filters


def tonality(chroma: Array, frames_per_second: float) -> npt.NDArray[np.float32]:
    """A song as TONALITY_NUMBERS numbers: chroma, [frames, 12] magnitudes, at least one frame, in any unit.

    Best correlations with a major and a minor key and their difference, of the whole song; mean and deviation of the same over
    segments; mean and deviation of the entropy over pitch classes; how often the key changes from segment to segment; the mean
    chroma, turned to the key of the song; deviations of the tonal centroid, in rising order, and the length of its mean. Only
    the turned chroma depends on a key, and it follows the song's: a song in another key has the same numbers.
    """
    frames: Numbers = chroma.astype(np.float64)
    mean = frames.mean(axis=0)
    segments = np.array_split(frames, max(1, round(len(frames) / frames_per_second / SEGMENT_SECONDS)))
    local = np.array([segment.mean(axis=0) for segment in segments])
    keys, local_keys = key_correlations(mean), key_correlations(local)
    major, minor = keys[..., :CLASSES].max(), keys[..., CLASSES:].max()
    local_major, local_minor = local_keys[:, :CLASSES].max(axis=1), local_keys[:, CLASSES:].max(axis=1)
    entropy = -np.sum(shares(frames) * np.log(shares(frames) + SILENCE), axis=1)
    best = local_keys.argmax(axis=1)
    changes = (best[1:] != best[:-1]).mean() if len(best) > 1 else 0.0
    turned = np.roll(shares(mean), -(keys.argmax() % CLASSES))
    centroids = shares(local) @ TONNETZ.T
    spread = np.sort(centroids.std(axis=0))
    over_segments = [(of.mean(), of.std()) for of in (local_major, local_minor, local_major - local_minor, entropy)]
    numbers = [major, minor, major - minor, *np.ravel(over_segments), changes, *turned, *spread]
    return np.array([*numbers, np.linalg.norm(centroids.mean(axis=0))], np.float32)


def key_correlations(chroma: Numbers) -> Numbers:
    """[..., 12] → [..., 24]: Pearson's r with the profiles of the twelve major, then the twelve minor keys; 0 for silence."""
    centred = chroma - chroma.mean(axis=-1, keepdims=True)
    return np.asarray(centred / (np.linalg.norm(centred, axis=-1, keepdims=True) + SILENCE) @ KEY_PROFILES.T)


def shares(chroma: Numbers) -> Numbers:
    """[..., 12] with sums of 1; 0 for silence."""
    return np.asarray(chroma / (chroma.sum(axis=-1, keepdims=True) + SILENCE))


def _key_profiles() -> Numbers:
    """[24, 12], centred, of length 1."""
    rows = [np.roll(profile, key) for profile in (MAJOR, MINOR) for key in range(CLASSES)]
    centred = np.array(rows) - np.mean(rows, axis=1, keepdims=True)
    return np.asarray(centred / np.linalg.norm(centred, axis=1, keepdims=True))


def _tonnetz() -> Numbers:
    """[6, 12]: each pitch class on the circles of fifths, minor thirds and major thirds. Source: Harte, Sandler and Gasser 2006,
    Detecting harmonic change in musical audio."""
    steps = np.arange(CLASSES) * np.pi
    circles = [(1.0, steps * 7 / 6), (1.0, steps * 3 / 2), (0.5, steps * 2 / 3)]
    return np.array([radius * of(angle) for radius, angle in circles for of in (np.sin, np.cos)])


KEY_PROFILES, TONNETZ = _key_profiles(), _tonnetz()
TONALITY_NUMBERS = len(tonality(np.zeros((1, CLASSES), np.float32), 1.0))
