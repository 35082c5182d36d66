"""Random numbers as functions of (seed, phase, step, sample).

No generator keeps state between steps, so neither resuming nor the size of the micro-batch changes what a sample sees.
"""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for one purpose. Names are joined with a separator, so ("gan", 12) and ("gan", 1, 2) differ."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A new numpy generator for one purpose."""
    return np.random.Generator(np.random.PCG64(derive(seed, *names)))


def step_generator(seed: int, phase: str, step: int) -> torch.Generator:
    """A CPU torch generator for one optimizer step.

    Draws are made on the CPU for the whole batch, so that neither device nor micro-batch changes them.
    """
    return torch.Generator().manual_seed(derive(seed, phase, step))


def seed_step(seed: int, phase: str, step: int) -> None:
    """Seed torch's global generators for one optimizer step, in case a library draws from them."""
    torch.manual_seed(derive(seed, phase, step))


def batch_indices(seed: int, stream: str, step: int, batch: int, items: int) -> npt.NDArray[np.int64]:
    """[batch] indices into `items` for one step: of one shuffled epoch after another, cut into batches across epochs."""
    first = step * batch
    picked = np.empty(batch, np.int64)
    filled = 0
    while filled < batch:
        epoch, offset = divmod(first + filled, items)
        part = _epoch_order(seed, stream, epoch, items)[offset : offset + batch - filled]
        picked[filled : filled + len(part)] = part
        filled += len(part)
    return picked


# Two streams of a training, each in two epochs where a batch straddles them.
@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, stream: str, epoch: int, items: int) -> npt.NDArray[np.int64]:
    """[items] the order of one epoch, kept from step to step: to shuffle costs as much as there are items. Read-only."""
    order = generator(seed, stream, "epoch", epoch).permutation(items)
    order.flags.writeable = False
    return order


def crop_starts(
    seed: int, stream: str, step: int, lengths: Sequence[int] | npt.NDArray[np.int64], frames: int
) -> npt.NDArray[np.int64]:
    """[batch] first frames of random crops of `frames` frames, one per song of the given lengths; 0 for a shorter song."""
    room = np.maximum(np.asarray(lengths, np.int64) - frames, 0)
    return generator(seed, stream, "crop", step).integers(0, room + 1)
