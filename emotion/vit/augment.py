"""Augmentation of an effective batch. Every draw depends on (seed, step) and on the sample, not on the micro-batch."""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from emotion.audio.clips import Array
from emotion.config import VitConfig
from emotion.training.seeding import generator

Flags = npt.NDArray[np.bool_]


def draw_mixup(labels: Array, config: VitConfig, seed: int, step: int) -> tuple[npt.NDArray[np.int64], Array]:
    """C-Mixup: for each of labels [batch, 2] the index of a partner with a similar label, and the own share; [batch] each.

    Source: Yao et al. 2022 (C-Mixup), eq. 6 with a Gaussian kernel of `mixup_bandwidth`.
    """
    draws = generator(seed, "vit", "mixup", step)
    points = labels.astype(np.float64)
    squares = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    weights = np.exp(-squares / (2 * config.mixup_bandwidth**2))
    np.fill_diagonal(weights, 1e-12)
    cumulative = np.cumsum(weights, axis=1)
    partners = (draws.random((len(points), 1)) * cumulative[:, -1:] > cumulative).sum(axis=1)
    share = draws.beta(config.mixup_alpha, config.mixup_alpha, len(points)).astype(np.float32)
    return partners, np.maximum(share, 1 - share)


def blend(values: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
    """Mix each of values [batch, …] with its partner: share * own + (1 - share) * partner. partners, shares: [batch]."""
    kept = shares.view(-1, *[1] * (values.dim() - 1))
    return (kept * values).add_(values[partners].mul_(1 - kept))


def draw_keep(
    batch: int, shape: tuple[int, int], config: VitConfig, longest_frames: int, seed: int, step: int
) -> tuple[Flags, Flags]:
    """SpecAugment: [batch, mels] and [batch, frames], False under the masks. Source: Park et al. 2019, section 2."""
    draws = generator(seed, "vit", "masks", step)
    mels, frames = shape
    keep_mels = _masks(draws, batch, mels, config.mel_masks, config.mel_mask_bands)
    return keep_mels, _masks(draws, batch, frames, config.time_masks, longest_frames)


def mask(clips: Tensor, keep_mels: Tensor, keep_frames: Tensor) -> Tensor:
    """Set masked points of clips [batch, 1, mels, frames] to 0, the mean of the training songs."""
    return clips * (keep_mels[:, None, :, None] & keep_frames[:, None, None, :])


def _masks(draws: np.random.Generator, batch: int, length: int, masks: int, widest: int) -> Flags:
    """[batch, length], False under `masks` spans of 0 to `widest` positions each."""
    keep = np.ones((batch, length), bool)
    position = np.arange(length)
    for _ in range(masks):
        width = draws.integers(0, min(widest, length) + 1, batch)
        start = draws.integers(0, length - width + 1)
        keep &= (position < start[:, None]) | (position >= (start + width)[:, None])
    return keep
