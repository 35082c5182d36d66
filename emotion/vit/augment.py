"""Augmentation of an effective batch. Every draw depends on (seed, step) and on the sample, not on the micro-batch."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from emotion.config import VitConfig
from emotion.training.seeding import generator


def mixup(clips: Tensor, labels: Tensor, config: VitConfig, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """C-Mixup: blend clips [batch, 1, mels, frames] with ones of a similar label, and the labels [batch, 2] alike.

    Source: Yao et al. 2022 (C-Mixup), eq. 6 with a Gaussian kernel of `mixup_bandwidth`.
    """
    if config.mixup_alpha == 0:
        return clips, labels
    draws = generator(seed, "vit", "mixup", step)
    points = labels.double().numpy()
    squares = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    weights = np.exp(-squares / (2 * config.mixup_bandwidth**2))
    np.fill_diagonal(weights, 1e-12)
    cumulative = np.cumsum(weights, axis=1)
    partners = (draws.random((len(points), 1)) * cumulative[:, -1:] > cumulative).sum(axis=1)
    share = draws.beta(config.mixup_alpha, config.mixup_alpha, len(points)).astype(np.float32)
    other = torch.from_numpy(partners)
    kept = torch.from_numpy(np.maximum(share, 1 - share))
    column, cube = kept[:, None], kept[:, None, None, None]
    return cube * clips + (1 - cube) * clips[other], column * labels + (1 - column) * labels[other]


def spec_augment(clips: Tensor, config: VitConfig, longest_frames: int, seed: int, step: int) -> Tensor:
    """Set time and mel masks to 0, the mean of the training songs. Source: Park et al. 2019 (SpecAugment), section 2."""
    draws = generator(seed, "vit", "masks", step)
    batch, _, mels, frames = clips.shape
    keep = _masks(draws, batch, mels, config.mel_masks, config.mel_mask_bands)[:, :, None]
    keep = keep & _masks(draws, batch, frames, config.time_masks, longest_frames)[:, None, :]
    return clips * torch.from_numpy(keep)[:, None]


def _masks(draws: np.random.Generator, batch: int, length: int, masks: int, widest: int) -> npt.NDArray[np.bool_]:
    """[batch, length], False under `masks` spans of 0 to `widest` positions each."""
    keep = np.ones((batch, length), bool)
    position = np.arange(length)
    for _ in range(masks):
        width = draws.integers(0, min(widest, length) + 1, batch)
        start = draws.integers(0, length - width + 1)
        keep &= (position < start[:, None]) | (position >= (start + width)[:, None])
    return keep
