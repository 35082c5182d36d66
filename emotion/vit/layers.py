"""Layers of a ViT: learning rates and unfreezing by layer number, and dropout noise that is independent of the micro-batch."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emotion.compat import DropPath, group_parameters
from emotion.config import VitConfig
from emotion.training.device import Device


def layer_numbers(network: nn.Module) -> dict[str, int]:
    """Parameter name → layer: 0 for the patch embedding, the highest for the head and the last norm."""
    numbers: dict[str, int] = group_parameters(network, network.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    top = max(numbers.values())
    return {name: top if name.startswith(("norm.", "fc_norm.")) else number for name, number in numbers.items()}


def parameter_groups(network: nn.Module, layers: dict[str, int], config: VitConfig) -> list[dict[str, Any]]:
    """One group per learning rate and weight decay. The rate falls by layer_decay with each layer below the highest.

    Biases, norms and embeddings have no weight decay. Source: Clark et al. 2020 (ELECTRA), as used by BEiT and MAE.
    """
    undecayed = set(network.no_weight_decay()) if hasattr(network, "no_weight_decay") else set()  # type: ignore[operator]
    top = max(layers.values())
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        rate = config.learning_rate * config.layer_decay ** (top - layers[name])
        weight_decay = config.weight_decay if parameter.ndim > 1 and name not in undecayed else 0.0
        group = groups.setdefault((rate, weight_decay), {"params": [], "lr": rate, "weight_decay": weight_decay})
        group["params"].append(parameter)
    return list(groups.values())


def head_groups(head: nn.Linear, config: VitConfig) -> list[dict[str, Any]]:
    """Parameter groups of an additional head, with the learning rate of the highest layer."""
    kept = {"lr": config.learning_rate}
    return [
        {"params": [head.weight], "weight_decay": config.weight_decay, **kept},
        {"params": [head.bias], "weight_decay": 0.0, **kept},
    ]


def lowest_learning(layers: dict[str, int], config: VitConfig, epoch: float) -> int:
    """The number of the lowest layer that is trained at this (fractional) epoch: first only head and last norm, then block after
    block from the top."""
    top = max(layers.values())
    if epoch < config.frozen_epochs:
        return top
    if epoch < config.frozen_epochs + config.unfreeze_epochs:
        return top - 1 - int((epoch - config.frozen_epochs) / config.unfreeze_epochs * top)
    return 0


def unfreeze(network: nn.Module, layers: dict[str, int], lowest: int) -> None:
    """Unfreeze the layers from number `lowest` on and freeze all others.

    Frozen weights get no gradient, so the optimizer skips them.
    """
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(layers[name] >= lowest)


def recompute(network: nn.Module, blocks: int) -> None:
    """Activation checkpointing: the first `blocks` blocks store only their input; the backward pass recomputes the rest.

    Same results, less memory. Such a block takes a third more time; a smaller micro-batch costs that in all blocks, see
    `emotion.vit.objective.backward`. Source: Chen et al. 2016 (sublinear memory cost), section 3.
    """
    for block in list(network.blocks)[:blocks]:  # type: ignore[arg-type]
        # All random numbers come from a BatchNoise, so no generator state has to be saved; reading that of a GPU would block.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


class BatchNoise:
    """Dropout and stochastic depth as functions of (seed of the step, layer, sample).

        noise.draw(seed, batch, device)   # once a step
        noise.rows = slice(0, 4)          # before each forward pass

    One call draws the numbers of all layers for the whole effective batch, and one copy sends them to a tensor with a fixed
    address (for CUDA graphs). Each layer reads its part for the rows of the forward pass. So a sample gets the same noise in
    every micro-batch and in a second forward pass. The number of values that a layer needs is known after its first forward pass
    only: there it draws the next values of the same random sequence, which gives the same result as the single call of later
    steps.
    """

    _generator: torch.Generator  # of the current step

    def __init__(self) -> None:
        self.rows = slice(0, 0)
        self._batch = 0
        # Layer → offset (numbers per sample of the layers before it) and its shape per sample.
        self._places: dict[str, tuple[int, torch.Size]] = {}
        self._numbers = 0  # per sample, of all layers seen so far
        self._probabilities = torch.empty(0)  # of each number to be kept
        self._factors = torch.empty(0)  # on the device: layer after layer, sample after sample
        self._cast: dict[torch.dtype, Tensor] = {}

    def draw(self, seed: int, batch: int, device: Device) -> None:
        """Draw for one step of `batch` samples."""
        if batch != self._batch:
            self._places, self._numbers, self._batch = {}, 0, batch
            self._probabilities = torch.empty(0)
        self._generator = torch.Generator().manual_seed(seed)
        self.forget_casts()
        if self._numbers == 0:
            return
        factors = self._draw(self._probabilities)
        if self._factors.numel() != factors.numel():
            self._factors = torch.empty_like(factors, device=device.device)
        device.write(self._factors, factors)

    def forget_casts(self) -> None:
        """Clear the casts at the start of a step: a failed graph capture leaves casts without values."""
        self._cast.clear()

    def factors(self, layer: str, probability: float, like: Tensor, per_sample: bool) -> Tensor:
        """Dropout factors with mean 1 for the rows in `like`: 0 (dropped) or 1 / probability (kept). probability: of keeping."""
        if layer not in self._places:
            self._add(layer, probability, torch.Size([1] * (like.dim() - 1)) if per_sample else like.shape[1:], like.device)
        if like.dtype not in self._cast:
            self._cast[like.dtype] = self._factors.to(like.dtype)
        before, shape = self._places[layer]
        size = shape.numel()
        first = before * self._batch
        start, stop, _ = self.rows.indices(self._batch)
        return self._cast[like.dtype][first + start * size : first + stop * size].view(stop - start, *shape)

    def _add(self, layer: str, probability: float, shape: torch.Size, device: torch.device) -> None:
        """Register a layer in its first forward pass and draw its numbers."""
        self._places[layer] = self._numbers, shape
        probabilities = torch.full((self._batch * shape.numel(),), probability)
        new = self._draw(probabilities).to(device, non_blocking=True)
        self._factors = torch.cat([self._factors, new]) if self._numbers else new
        self._probabilities = torch.cat([self._probabilities, probabilities])
        self._numbers += shape.numel()
        self._cast.clear()

    def _draw(self, probabilities: Tensor) -> Tensor:
        return (torch.rand(len(probabilities), generator=self._generator) < probabilities) / probabilities


class NoisyLayer(nn.Module):
    """Replaces timm's DropPath (per_sample) or nn.Dropout, with draws from a BatchNoise."""

    def __init__(self, noise: BatchNoise, layer: str, probability: float, per_sample: bool) -> None:
        super().__init__()
        self.noise, self.layer, self.probability, self.per_sample = noise, layer, probability, per_sample

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * self.noise.factors(self.layer, self.probability, x, self.per_sample)


def install_noise(network: nn.Module) -> BatchNoise:
    """Replace every active dropout and stochastic-depth layer of a timm model by a NoisyLayer."""
    noise = BatchNoise()
    for name, module in list(network.named_modules()):
        rate = module.drop_prob if isinstance(module, DropPath) else module.p if isinstance(module, nn.Dropout) else 0.0
        if rate:
            network.set_submodule(name, NoisyLayer(noise, name, 1 - rate, per_sample=isinstance(module, DropPath)))
    return noise
