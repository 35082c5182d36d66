"""Samples to log-mel spectrograms, fast and equal to librosa's."""

import math
from collections.abc import Iterable

import numpy as np
import scipy.fft
import scipy.sparse
from numpy.lib.stride_tricks import sliding_window_view

from emotion.audio.decoding import Array
from emotion.config import MelConfig
from emotion.errors import SpecError

SILENCE_POWER = 1e-10  # the least power told apart: -100 dB
FRAME_GROUP = 128  # frames transformed at a time: they and their spectra stay in the processor's cache


class LogMel:
    """Mono samples → log-mel in dB: power of centred, zero-padded Hann frames, summed by Slaney's mel filters.

    Equal to librosa.power_to_db(librosa.feature.melspectrogram(y, power=2), ref=1, amin=1e-10, top_db=None). The
    reference is fixed and there is no floor below the clip's maximum, so loudness stays in: twice the amplitude is
    +6.02 dB, silence is -100 dB. Hold one and call it from any number of threads.

    bank: [mels, bins] filters, up to the last bin that one of them takes; every other bin is left out of the work.
    """

    def __init__(self, mel: MelConfig) -> None:
        import librosa  # takes 2 s, which reading a folder of features need not wait for

        self.mel = mel
        bank = librosa.filters.mel(
            sr=mel.sample_rate_hz, n_fft=mel.window_samples, n_mels=mel.mels, fmin=mel.fmin_hz, fmax=mel.fmax_hz
        )
        if not bank.any():
            raise SpecError(
                f"mel: between {mel.fmin_hz:g} and {mel.fmax_hz:g} Hz there is no bin of window_samples; raise it"
            )
        bins = int(np.flatnonzero(bank.any(axis=0)).max()) + 1
        self.bank: Array = np.ascontiguousarray(bank[:, :bins], np.float32)
        # A filter takes 11 bins on average: sparse, it is a fraction of the work, and no BLAS starts its own threads.
        self._sparse_bank = scipy.sparse.csr_array(self.bank)
        phase = 2 * np.pi * np.arange(mel.window_samples) / mel.window_samples
        self.window: Array = (0.5 - 0.5 * np.cos(phase)).astype(np.float32)

    def __call__(self, samples: Array) -> Array:
        """[samples] → [1 + samples // hop_samples, mels] dB, -100 or more."""
        return self.of_blocks([samples])

    def of_blocks(self, blocks: Iterable[Array]) -> Array:
        """The same for a sound in blocks, such as those of `decode_blocks`; the same bits however it is cut."""
        window, hop = self.mel.window_samples, self.mel.hop_samples
        group = (FRAME_GROUP - 1) * hop + window
        waiting = np.zeros(window // 2, np.float32)
        samples = done = 0
        parts = []
        for block in blocks:
            samples += len(block)
            waiting = np.concatenate([waiting, block])
            used = 0
            while len(waiting) - used >= group:
                parts.append(self._frames(waiting[used : used + group]))
                used += FRAME_GROUP * hop
            done += used // hop
            waiting = waiting[used:]
        frames = 1 + samples // hop - done
        waiting = np.pad(waiting, (0, max((frames - 1) * hop + window - len(waiting), 0)))
        for first in range(0, frames, FRAME_GROUP):
            last = min(first + FRAME_GROUP, frames) - 1
            parts.append(self._frames(waiting[first * hop : last * hop + window]))
        return np.concatenate(parts)

    def _frames(self, samples: Array) -> Array:
        framed = sliding_window_view(samples, self.mel.window_samples)[:: self.mel.hop_samples]
        spectrum = scipy.fft.rfft(framed * self.window, axis=1, overwrite_x=True)[:, : self.bank.shape[1]]
        power = np.abs(spectrum)
        power *= power
        decibel = np.maximum((self._sparse_bank @ power.T).T, np.float32(SILENCE_POWER))
        # By the natural logarithm: numpy has it vectorised, and the decadic one not.
        np.log(decibel, out=decibel)
        decibel *= np.float32(10 / math.log(10))
        return np.asarray(decibel, np.float32)
