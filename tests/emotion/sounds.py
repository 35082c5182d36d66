"""Sounds for the tests of emotion.audio."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from emotion.audio.decoding import decode_blocks
from emotion.config import MelConfig

Array = npt.NDArray[np.float32]

MEL = MelConfig()
RATE_HZ = MEL.sample_rate_hz
SMALL = MelConfig(sample_rate_hz=8000, window_samples=256, hop_samples=128, mels=16, fmax_hz=4000.0)


def tone(frequency_hz: float, amplitude: float, seconds: float = 1.0) -> Array:
    time_s = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    return (amplitude * np.sin(2 * np.pi * frequency_hz * time_s)).astype(np.float32)


def noise(samples: int, channels: int = 1, seed: int = 0) -> Array:
    return np.random.default_rng(seed).uniform(-0.3, 0.3, (samples, channels)).astype(np.float32)


def decode(path: Path, sample_rate_hz: int) -> Array:
    """All blocks of a file."""
    return np.concatenate(list(decode_blocks(path, sample_rate_hz)))
