"""Log-mel → audio to listen to: the inverse of `emotion.audio.mel.LogMel`, step by step."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.fft
import scipy.sparse
import soundfile
from numpy.lib.stride_tricks import sliding_window_view

from emotion.audio.decoding import Array
from emotion.audio.mel import SILENCE_POWER, LogMel
from emotion.config import MelConfig
from emotion.errors import DataError
from emotion.files import write_bytes

Spectrum = npt.NDArray[np.complex64]

FIT_ROUNDS = 50  # leaves 0.003 dB on average on music
MOMENTUM = np.float32(0.99)
TINY = np.float32(1e-30)


def synthesize_sound(
    log_mel: Array, mel: MelConfig, iterations: int, rng: np.random.Generator, check_stop: Callable[[], None] = lambda: None
) -> Array:
    """[frames, mels] dB → mono [(frames - 1) * hop_samples] at the mel's rate, full scale 1.

    dB → power → linear bins by non-negative least squares against LogMel's own filters → square root → phase by Griffin-Lim.
    What a mel does not hold is lost: phase, everything above fmax_hz, fine structure within a filter. Loudness is kept, except
    that a sound with a peak above 1, which a file could not hold, is scaled to a peak of 0.99. rng: draws the first phases.
    check_stop: called before each iteration; its exceptions pass through. Needs 15 times the memory of the magnitudes.
    Raises DataError for another shape, fewer than two frames, NaN or infinity.
    """
    if log_mel.ndim != 2 or log_mel.shape[1] != mel.mels or len(log_mel) < 2:
        raise DataError(f"sound: expected a log-mel [2 or more frames, {mel.mels}], found {list(log_mel.shape)}.")
    if not np.isfinite(log_mel).all():
        raise DataError("sound: expected finite numbers, found NaN or infinity in the log-mel.")
    analysis = LogMel(mel)
    power = np.maximum(10 ** (log_mel / np.float32(10)), np.float32(SILENCE_POWER))
    magnitude = np.sqrt(invert_bank(power, analysis.bank))
    magnitude = np.pad(magnitude, [(0, 0), (0, mel.window_samples // 2 + 1 - magnitude.shape[1])])
    sound = griffin_lim(magnitude, analysis.window, mel.hop_samples, iterations, rng, check_stop)
    peak = np.abs(sound).max()
    return sound * np.float32(0.99) / peak if peak > 1 else sound


def invert_bank(power: Array, bank: Array) -> Array:
    """Mel power [frames, mels] > 0 → linear power [frames, bins] >= 0 whose mel power comes nearest, for filters [mels, bins].

    Least squares of (fitted - given) / given: with absolute errors the loud bands decide, and quiet ones end up tens of dB away.
    Solved by multiplicative updates (Lee & Seung 2001) from a start that is flat within each filter.
    """
    filters = scipy.sparse.csr_array(bank)
    spread = scipy.sparse.csr_array(bank.T)
    given = np.ascontiguousarray(power.T)
    covered = np.maximum(bank.sum(axis=0), TINY)[:, np.newaxis]
    linear = spread @ (given / np.maximum(bank.sum(axis=1), TINY)[:, np.newaxis]) / covered
    weight = 1 / given
    target = spread @ weight
    for _ in range(FIT_ROUNDS):
        linear *= target / np.maximum(spread @ (filters @ linear * weight * weight), TINY)
    return np.ascontiguousarray(linear.T)


def griffin_lim(
    magnitude: Array,
    window: Array,
    hop: int,
    iterations: int,
    rng: np.random.Generator,
    check_stop: Callable[[], None] = lambda: None,
) -> Array:
    """[frames, window // 2 + 1] magnitudes → [(frames - 1) * hop] samples whose spectrum has about these magnitudes.

    Starts from random phases. Source: Perraudin, Balazs and Søndergaard 2013, "A fast Griffin-Lim algorithm", alpha = 0.99.
    """
    phase = rng.random(magnitude.shape, np.float32) * np.float32(2 * np.pi)
    spectrum = magnitude * np.exp(1j * phase)
    previous = np.zeros_like(spectrum)
    weight = _overlap_add(np.broadcast_to(window * window, (len(magnitude), len(window))), hop)
    np.maximum(weight, TINY, out=weight)
    for _ in range(iterations):
        check_stop()
        consistent = _spectrum_of(_sound_of(spectrum, window, hop, weight), window, hop)
        np.subtract(consistent, previous, out=spectrum)
        spectrum *= MOMENTUM
        spectrum += consistent
        spectrum *= magnitude / np.maximum(np.abs(spectrum), TINY)
        previous = consistent
    return _sound_of(spectrum, window, hop, weight)


def _spectrum_of(sound: Array, window: Array, hop: int) -> Spectrum:
    """[samples] → [1 + samples // hop, bins]: centred frames of the zero-padded sound."""
    half = len(window) // 2
    padded = np.pad(sound, (half, len(window) - half))
    return np.asarray(scipy.fft.rfft(sliding_window_view(padded, len(window))[::hop] * window, axis=1))


def _sound_of(spectrum: Spectrum, window: Array, hop: int, weight: Array) -> Array:
    """[frames, bins] → [samples]: the sound with the nearest spectrum by least squares (Griffin & Lim 1984, eq. 6).

    weight: the sum of the squared windows of all frames at each sample.
    """
    frames = scipy.fft.irfft(spectrum, len(window), axis=1)
    frames *= window
    sound = np.asarray(_overlap_add(frames, hop) / weight, np.float32)
    return sound[len(window) // 2 :][: (len(frames) - 1) * hop]


def _overlap_add(frames: Array, hop: int) -> Array:
    """[frames, window] → [samples]: the sum of the frames, each a hop after the one before."""
    count, window = frames.shape
    parts = -(-window // hop)
    total = np.zeros((count + parts - 1, hop), np.float32)
    for part in range(parts):
        cut = frames[:, part * hop : (part + 1) * hop]  # the last may be shorter
        total[part : part + count, : cut.shape[1]] += cut
    return total.ravel()


def write_wav(path: Path, samples: Array, sample_rate_hz: int) -> None:
    """Write mono samples, full scale 1, as a 16-bit WAV file, atomically."""
    content = io.BytesIO()
    soundfile.write(content, samples, sample_rate_hz, format="WAV", subtype="PCM_16")
    write_bytes(path, content.getvalue())
