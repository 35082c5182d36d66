"""Levels of a sound's channels before they are averaged, and its clipping.

The models use one mono signal, the mean of the channels. Channels of opposite phase cancel in it, though a listener hears them.
"""

import math

import numpy as np

from emotion.audio.decoding import Array
from emotion.audio.mel import SILENCE_POWER

FULL_SCALE = 0.999  # of a sample that has reached it, in 16 bits or more
FLAT_SAMPLES = 3  # in a row at full scale: a wave that is cut off there, and not one that just reaches it


class Levels:
    """`add` takes the blocks of one sound, [samples, channels] as in the file, full scale 1."""

    def __init__(self) -> None:
        self._samples = 0  # over all channels
        self._flat = 0
        self._power = self._mixed_power = 0.0  # sums of squares: of all samples, and of the mean of the channels

    def add(self, block: Array) -> None:
        count, channels = block.shape
        if count == 0:
            return
        self._samples += count * channels
        self._power += float(np.vdot(block, block))
        mixed = block if channels == 1 else block @ np.full(channels, 1 / channels, np.float32)
        self._mixed_power += channels * float(np.vdot(mixed, mixed))
        if max(float(block.max()), -float(block.min())) >= FULL_SCALE:
            is_full = np.abs(block) >= FULL_SCALE
            in_a_row = is_full[: 1 - FLAT_SAMPLES]
            for later in range(1, FLAT_SAMPLES):
                in_a_row = in_a_row & is_full[later : count - FLAT_SAMPLES + 1 + later]
            self._flat += int(in_a_row.sum())

    @property
    def lost_db(self) -> float:
        """How much quieter the mean of the channels is than the channels: 0 where they are equal, 3 where they are unrelated."""
        return 10 * math.log10(max(self._power, SILENCE_POWER) / max(self._mixed_power, SILENCE_POWER))

    @property
    def clipped_share(self) -> float:
        """The share of samples that begin FLAT_SAMPLES at full scale or above, of 0 to 1."""
        return self._flat / max(self._samples, 1)
