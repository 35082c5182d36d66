"""Samples → log-mel spectrograms, equal to librosa's.

librosa is the reference in the tests. The path from samples to decibels is our own for speed (librosa takes 1.6 times our CPU
time, see tests/bench/mel_pipeline.py) and because a song goes through in blocks, in little memory; the filters are, because
librosa takes longer to import than twenty songs to decode.
"""

import logging
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import scipy.fft
import scipy.sparse
from numpy.lib.stride_tricks import sliding_window_view

from emotion.audio.decoding import Array
from emotion.errors import SpecError

if TYPE_CHECKING:
    from emotion.config import MelConfig  # processes that decode songs do without pydantic

log = logging.getLogger(__name__)

SILENCE_POWER = 1e-10  # the lower limit of power: -100 dB
FRAME_GROUP = 64  # frames transformed at a time: these and their spectra fit into the processor's cache
# Slaney's scale is linear up to LOG_HZ, then logarithmic: 27 mels for each factor of 6.4.
LINEAR_HZ = 200.0 / 3
LOG_HZ = 1000.0
LOG_MELS = LOG_HZ / LINEAR_HZ
LOG_STEP = np.log(6.4) / 27.0


class LogMel:
    """Mono samples → log-mel in dB: power of centred, zero-padded Hann frames, summed by Slaney's mel filters.

    Equal to librosa.power_to_db(librosa.feature.melspectrogram(y, power=2), ref=1, amin=1e-10, top_db=None). Loudness is kept:
    twice the amplitude is +6.02 dB, silence is -100 dB. One instance may be called from several threads, and be pickled.

    window: [window_samples], Hann.
    """

    def __init__(self, mel: "MelConfig") -> None:
        self.sample_rate_hz, self.window_samples, self.hop_samples = mel.sample_rate_hz, mel.window_samples, mel.hop_samples
        bank = mel_filters(mel)
        used = bank.any(axis=1)
        if not used.any():
            raise SpecError(f"mel: no frequency bin lies between {mel.fmin_hz:g} and {mel.fmax_hz:g} Hz; raise window_samples")
        if not used.all():
            log.warning("mel: %d of %d filters have no frequency bin; raise window_samples", (~used).sum(), mel.mels)
        self._bins = int(np.flatnonzero(bank.any(axis=0)).max()) + 1
        # A filter uses 11 bins on average, so a sparse product is much less work, and starts no threads of a BLAS.
        self._sparse_bank = scipy.sparse.csr_array(bank[:, : self._bins])
        phase = 2 * np.pi * np.arange(mel.window_samples) / mel.window_samples
        self.window: Array = (0.5 - 0.5 * np.cos(phase)).astype(np.float32)

    @property
    def bank(self) -> Array:
        """[mels, bins] filters, up to the last bin that any filter uses."""
        return np.asarray(self._sparse_bank.toarray(), np.float32)

    def __call__(self, samples: Array) -> Array:
        """[samples] → [1 + samples // hop_samples, mels] dB, -100 or more."""
        return self.of_blocks([samples])

    def of_blocks(self, blocks: Iterable[Array]) -> Array:
        """The same for a sound in blocks, such as those of `decode_blocks`. Block boundaries do not change any bit."""
        window, hop = self.window_samples, self.hop_samples
        # Used again and again: new memory costs more than the product.
        memory = np.empty((FRAME_GROUP, window), np.float32), np.empty((self._bins, FRAME_GROUP), np.float32)
        pending = np.zeros(window // 2, np.float32)
        samples = frames_done = 0
        parts = []
        for block in blocks:
            samples += len(block)
            pending = np.concatenate([pending, block])
            if len(pending) < window:
                continue
            framed = sliding_window_view(pending, window)[::hop]
            whole = len(framed) // FRAME_GROUP * FRAME_GROUP
            parts += [self._frames(framed[first : first + FRAME_GROUP], *memory) for first in range(0, whole, FRAME_GROUP)]
            frames_done += whole
            pending = pending[whole * hop :]
        frames = 1 + samples // hop - frames_done
        if frames:  # there may be none left where they overlap by less than half
            pending = np.pad(pending, (0, max((frames - 1) * hop + window - len(pending), 0)))
            framed = sliding_window_view(pending, window)[::hop][:frames]
            parts += [self._frames(framed[first : first + FRAME_GROUP], *memory) for first in range(0, frames, FRAME_GROUP)]
        return np.concatenate(parts)

    def _frames(self, framed: Array, windowed: Array, power: Array) -> Array:
        """[frames, window_samples] → [frames, mels] dB. windowed [frames, window_samples], power [bins, frames]: memory for these
        frames or more."""
        windowed = np.multiply(framed, self.window, out=windowed[: len(framed)])
        spectrum = scipy.fft.rfft(windowed, axis=1)[:, : self._bins]
        power = np.abs(spectrum.T, out=power[:, : len(framed)])
        power *= power
        decibel: Array = np.maximum((self._sparse_bank @ power).T, np.float32(SILENCE_POWER), order="C")
        # numpy vectorises the natural logarithm, not the decadic one.
        np.log(decibel, out=decibel)
        decibel *= np.float32(10 / math.log(10))
        return decibel


def mel_filters(mel: "MelConfig") -> Array:
    """[mels, window_samples // 2 + 1] triangles of equal area, each from the peak of one neighbour to that of the other, on
    Slaney's scale: the numbers of librosa.filters.mel, to the bit.

    Source: Slaney 1998, Auditory Toolbox, mfcc.m.
    """
    edges_hz = _hz_of(np.linspace(_mels_of(mel.fmin_hz), _mels_of(mel.fmax_hz), mel.mels + 2))
    below_edges = np.subtract.outer(edges_hz, np.fft.rfftfreq(mel.window_samples, 1.0 / mel.sample_rate_hz))
    widths = np.diff(edges_hz)[:, np.newaxis]
    rising, falling = -below_edges[:-2] / widths[:-1], below_edges[2:] / widths[1:]
    filters: Array = np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
    filters *= (2.0 / (edges_hz[2:] - edges_hz[:-2]))[:, np.newaxis]
    return filters


def _mels_of(hz: float) -> float:
    return float(LOG_MELS + np.log(hz / LOG_HZ) / LOG_STEP if hz >= LOG_HZ else hz / LINEAR_HZ)


def _hz_of(mels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(mels >= LOG_MELS, LOG_HZ * np.exp(LOG_STEP * (mels - LOG_MELS)), LINEAR_HZ * mels)
