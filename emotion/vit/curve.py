"""Valence and arousal over time: the ViT's predictions for crops that slide over a song.

Each value describes the whole crop around its time, `window_seconds` long. Crops of neighbouring points overlap, so that changes
within a window are not resolved. Crops lie inside the song: the curve begins half a window after the start of the song and ends
half a window before its end. The stack's ridge, SVR and trees need whole songs and are not used.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import nn

from emotion.config import MelConfig
from emotion.training.device import Device
from emotion.vit.crops import SongLogMel, predict_crops
from emotion.vit.network import Array, Preprocessing

STEP_SECONDS = 0.5  # as DEAM's dynamic annotations


class Curve(NamedTuple):
    """seconds: [points], the centre of each crop; values: [points, 2] = (valence, arousal) in [-1, 1]."""

    seconds: npt.NDArray[np.float64]
    values: Array


def window_seconds(preprocessing: Preprocessing) -> float:
    """Length of a crop in seconds."""
    return preprocessing.frames * preprocessing.mel.hop_samples / preprocessing.mel.sample_rate_hz


def curve_of(
    network: nn.Module,
    preprocessing: Preprocessing,
    device: Device,
    song: SongLogMel,
    check_stop: Callable[[], None] = lambda: None,
) -> Curve:
    """Curve of one song, [frames, mels] in dB. check_stop: called before each forward pass; its exceptions propagate.

    Needs the memory of one forward pass and a few bytes per point.
    """
    seconds, starts = curve_crops(len(song), preprocessing.frames, preprocessing.mel)
    predicted = predict_crops(network, preprocessing, device, [(song, start) for start in starts], check_stop=check_stop)
    return Curve(seconds, predicted.clip(-1, 1))


def curve_crops(length: int, frames: int, mel: MelConfig) -> tuple[npt.NDArray[np.float64], list[int]]:
    """Centres in seconds, multiples of STEP_SECONDS, and first frames of the crops of `frames` in a song of `length` frames.

    A crop is centred to within half a frame. If no multiple fits, there is one crop in the middle. A song shorter than a crop is
    repeated to fill it.
    """
    frames_per_second = mel.sample_rate_hz / mel.hop_samples
    half = (frames - 1) / 2  # frame f is centred at f / frames_per_second
    first = np.ceil(half / frames_per_second / STEP_SECONDS)
    last = np.floor((length - 1 - half) / frames_per_second / STEP_SECONDS)
    seconds = STEP_SECONDS * np.arange(first, last + 1)
    if not len(seconds):
        return np.array([(length - 1) / 2 / frames_per_second]), [max((length - frames) // 2, 0)]
    starts = np.rint(seconds * frames_per_second - half).astype(int).clip(0, length - frames)
    return seconds, starts.tolist()
