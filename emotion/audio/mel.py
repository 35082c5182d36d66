"""Samples → log-mel spectrograms, equal to librosa's.

librosa makes the filters and is the reference in the tests. The path from samples to decibels is our own for speed (librosa
takes 1.6 times our CPU time, see tests/bench/mel_pipeline.py) and because a song goes through in blocks, in little memory.
"""

import math
from collections.abc import Iterable

import numpy as np
import scipy.fft
import scipy.sparse
from numpy.lib.stride_tricks import sliding_window_view

from emotion.audio.decoding import Array
from emotion.config import MelConfig
from emotion.errors import SpecError

SILENCE_POWER = 1e-10  # the lower limit of power: -100 dB
FRAME_GROUP = 128  # frames transformed at a time: these and their spectra fit into the processor's cache


class LogMel:
    """Mono samples → log-mel in dB: power of centred, zero-padded Hann frames, summed by Slaney's mel filters.

    Equal to librosa.power_to_db(librosa.feature.melspectrogram(y, power=2), ref=1, amin=1e-10, top_db=None). Loudness is kept:
    twice the amplitude is +6.02 dB, silence is -100 dB. One instance may be called from several threads.

    bank: [mels, bins] filters, up to the last bin that any filter uses. window: [window_samples], Hann.
    """

    def __init__(self, mel: MelConfig) -> None:
        import librosa  # takes 2 s, which reading features does not need

        self.mel = mel
        bank = librosa.filters.mel(
            sr=mel.sample_rate_hz, n_fft=mel.window_samples, n_mels=mel.mels, fmin=mel.fmin_hz, fmax=mel.fmax_hz
        )
        if not bank.any():
            raise SpecError(f"mel: no frequency bin lies between {mel.fmin_hz:g} and {mel.fmax_hz:g} Hz; raise window_samples")
        bins = int(np.flatnonzero(bank.any(axis=0)).max()) + 1
        self.bank: Array = np.ascontiguousarray(bank[:, :bins], np.float32)
        # A filter uses 11 bins on average, so a sparse product is much less work, and starts no threads of a BLAS.
        self._sparse_bank = scipy.sparse.csr_array(self.bank)
        phase = 2 * np.pi * np.arange(mel.window_samples) / mel.window_samples
        self.window: Array = (0.5 - 0.5 * np.cos(phase)).astype(np.float32)

    def __call__(self, samples: Array) -> Array:
        """[samples] → [1 + samples // hop_samples, mels] dB, -100 or more."""
        return self.of_blocks([samples])

    def of_blocks(self, blocks: Iterable[Array]) -> Array:
        """The same for a sound in blocks, such as those of `decode_blocks`. Block boundaries do not change any bit."""
        window, hop = self.mel.window_samples, self.mel.hop_samples
        group = (FRAME_GROUP - 1) * hop + window
        pending = np.zeros(window // 2, np.float32)
        samples = frames_done = 0
        parts = []
        for block in blocks:
            samples += len(block)
            pending = np.concatenate([pending, block])
            used = 0
            while len(pending) - used >= group:
                parts.append(self._frames(pending[used : used + group]))
                used += FRAME_GROUP * hop
            frames_done += used // hop
            pending = pending[used:]
        frames = 1 + samples // hop - frames_done
        pending = np.pad(pending, (0, max((frames - 1) * hop + window - len(pending), 0)))
        for first in range(0, frames, FRAME_GROUP):
            last = min(first + FRAME_GROUP, frames) - 1
            parts.append(self._frames(pending[first * hop : last * hop + window]))
        return np.concatenate(parts)

    def _frames(self, samples: Array) -> Array:
        """[samples] that begin and end with a frame → [frames, mels] dB."""
        framed = sliding_window_view(samples, self.mel.window_samples)[:: self.mel.hop_samples]
        spectrum = scipy.fft.rfft(framed * self.window, axis=1, overwrite_x=True)[:, : self.bank.shape[1]]
        power = np.abs(spectrum)
        power *= power
        decibel = np.maximum((self._sparse_bank @ power.T).T, np.float32(SILENCE_POWER))
        # numpy vectorises the natural logarithm, not the decadic one.
        np.log(decibel, out=decibel)
        decibel *= np.float32(10 / math.log(10))
        return np.asarray(decibel, np.float32)
