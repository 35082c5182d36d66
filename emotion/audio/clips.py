"""Convert stored log-mels to network inputs and back: the same value range for real and synthetic clips."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from emotion.audio.feature_store import FRAMES_PER_BLOCK, Features, widened
from emotion.errors import DataError
from emotion.threads import in_threads

Array = npt.NDArray[np.float32]

RANGE = 4.0  # normalised values are clipped at ± this many standard deviations; the generator's output has the same range


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of each mel band in dB, over the training songs of one split.

    mean_db, sd_db: [mels]. GAN and ViT share these constants; no clip is scaled by one of its own, so loudness is kept.
    """

    mean_db: Array
    sd_db: Array

    def apply(self, log_mel: Array) -> Array:
        """[…, frames, mels] dB → the same shape in [-RANGE, RANGE]."""
        values: Array = np.clip((log_mel - self.mean_db) / self.sd_db, -RANGE, RANGE)
        return values

    def to_json(self) -> dict[str, Any]:
        return {"mean_db": self.mean_db.tolist(), "sd_db": self.sd_db.tolist(), "range": RANGE}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        if value["range"] != RANGE:
            raise DataError(f"normalisation: range is {value['range']}, this version supports only {RANGE}")
        return cls(np.array(value["mean_db"], np.float32), np.array(value["sd_db"], np.float32))


def normalisation_of(training: Features, threads: int = 1, check_stop: Callable[[], None] = lambda: None) -> Normalisation:
    """Of the training songs of a split. A band that hardly varies gets a deviation of 1 dB, so that noise is not amplified.

    threads: change no byte. check_stop: see `in_threads`.
    """

    def sums(index: int) -> npt.NDArray[np.float64]:
        """[2, mels]: of the values and of their squares."""
        found = np.zeros((2, training.mel.mels))
        stored = training.stored(index)
        for first in range(0, len(stored), FRAMES_PER_BLOCK):
            wide = widened(stored[first : first + FRAMES_PER_BLOCK]).astype(np.float64)
            found += wide.sum(axis=0), np.einsum("fm,fm->m", wide, wide)
        return found

    songs = range(len(training.songs))
    total, squares = sum(in_threads(sums, songs, threads, check_stop), np.zeros((2, training.mel.mels)))
    count = sum(song.frames for song in training.songs)
    mean = total / count
    sd = np.sqrt(np.maximum(squares / count - mean**2, 1.0))
    return Normalisation(mean.astype(np.float32), sd.astype(np.float32))


def normalised(stored: Tensor, mean_db: Tensor, sd_db: Tensor) -> Tensor:
    """Clips as they are stored, [batch, frames, mels] in dB → [batch, 1, mels, frames] in [-RANGE, RANGE], where the tensor is.

    As `Normalisation.apply`, to the byte on any device: the same operations one after another.
    """
    values = stored.to(torch.float32, copy=True).sub_(mean_db).div_(sd_db).clamp_(-RANGE, RANGE)
    return values.transpose(1, 2).unsqueeze(1).contiguous()


def in_db(clips: Tensor, mean_db: Tensor, sd_db: Tensor) -> Tensor:
    """The inverse of `normalised` for values that were not clipped: [batch, 1, mels, frames] → [batch, frames, mels] in dB, where
    the tensor is. The order in memory stays."""
    return clips.squeeze(1).transpose(1, 2).to(torch.float32, copy=True).mul_(sd_db).add_(mean_db)


def spread_starts(length: int, frames: int, most: int) -> list[int]:
    """First frames of as many crops as cover a song of `length` frames, at most `most`, evenly spread from end to end."""
    if length <= frames:
        return [0]
    crops = min(most, -(-length // frames))
    if crops == 1:
        return [(length - frames) // 2]
    return [round(k * (length - frames) / (crops - 1)) for k in range(crops)]


def some_of(starts: Sequence[int], most: int) -> list[int]:
    """Of the crops of a song at most `most`, each the middle one of an equal part of the song."""
    count = min(most, len(starts))
    return [starts[int((k + 0.5) * len(starts) / count)] for k in range(count)]
