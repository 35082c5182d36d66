"""Dropout and stochastic depth that do not depend on the micro-batch."""

import torch
from torch import Tensor, nn

from emotion.compat import DropPath
from emotion.training.seeding import derive


class BatchNoise:
    """Dropout and stochastic depth as functions of (seed of the step, layer, sample).

    A forward pass gets the samples `rows` of an effective batch of `batch`. Each layer draws for the whole batch and takes its
    rows, so that a sample gets the same noise in every micro-batch and in a second forward pass.
    """

    def __init__(self) -> None:
        self.seed, self.batch, self.rows = 0, 0, slice(0, 0)

    def at(self, seed: int, batch: int, rows: slice) -> None:
        self.seed, self.batch, self.rows = seed, batch, rows

    def keep(self, layer: int, probability: float, like: Tensor, per_sample: bool) -> Tensor:
        """Factors of mean 1: 0 for what is dropped, 1 / probability for what is kept."""
        shape = (self.batch, *([1] * (like.dim() - 1) if per_sample else like.shape[1:]))
        draws = torch.rand(shape, generator=torch.Generator().manual_seed(derive(self.seed, "layer", layer)))
        return ((draws < probability) / probability)[self.rows].to(like.device, like.dtype)


class NoisyLayer(nn.Module):
    """Replaces timm's DropPath (per_sample) or nn.Dropout, with draws from a BatchNoise."""

    def __init__(self, noise: BatchNoise, layer: int, probability: float, per_sample: bool) -> None:
        super().__init__()
        self.noise, self.layer, self.probability, self.per_sample = noise, layer, probability, per_sample

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * self.noise.keep(self.layer, self.probability, x, self.per_sample)


def install_noise(network: nn.Module) -> BatchNoise:
    """Replace every active dropout and stochastic-depth layer of a timm model by a NoisyLayer."""
    noise = BatchNoise()
    for name, module in list(network.named_modules()):
        rate = module.drop_prob if isinstance(module, DropPath) else module.p if isinstance(module, nn.Dropout) else 0.0
        if rate:
            layer = NoisyLayer(noise, derive(0, name), 1 - rate, per_sample=isinstance(module, DropPath))
            network.set_submodule(name, layer)
    return noise
