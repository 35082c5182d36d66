"""The layers of a ViT: learning rates and unfreezing by their numbers, and noise that does not depend on the micro-batch."""

from typing import Any

import torch
from torch import Tensor, nn

from emotion.compat import DropPath, group_parameters
from emotion.config import VitConfig
from emotion.training.seeding import derive


def layer_numbers(network: nn.Module) -> dict[str, int]:
    """Parameter name → layer: 0 for the patch embedding, the highest for the head and the last norm."""
    numbers: dict[str, int] = group_parameters(network, network.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    top = max(numbers.values())
    return {name: top if name.startswith(("norm.", "fc_norm.")) else number for name, number in numbers.items()}


def parameter_groups(network: nn.Module, layers: dict[str, int], config: VitConfig) -> list[dict[str, Any]]:
    """One group per layer and kind, with `scale`, the layer's share of the learning rate: layer_decay ** (layers above).

    Biases, norms and embeddings have no weight decay. Source: Clark et al. 2020 (ELECTRA), as used by BEiT and MAE.
    """
    undecayed = set(network.no_weight_decay()) if hasattr(network, "no_weight_decay") else set()  # type: ignore[operator]
    top = max(layers.values())
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        decays = parameter.ndim > 1 and name not in undecayed
        scale, weight_decay = config.layer_decay ** (top - layers[name]), config.weight_decay if decays else 0.0
        new = {"params": [], "scale": scale, "weight_decay": weight_decay}
        group = groups.setdefault((layers[name], decays), new)
        group["params"].append(parameter)
    return list(groups.values())


def unfreeze(network: nn.Module, layers: dict[str, int], config: VitConfig, epoch: float) -> None:
    """Set which layers learn at this (fractional) epoch: first head and last norm, then block after block from the top.

    Frozen weights get no gradient, so the optimizer skips them and keeps its state of the others.
    """
    top = max(layers.values())
    if epoch < config.frozen_epochs:
        lowest = top
    elif epoch < config.frozen_epochs + config.unfreeze_epochs:
        lowest = top - 1 - int((epoch - config.frozen_epochs) / config.unfreeze_epochs * top)
    else:
        lowest = 0
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(layers[name] >= lowest)


class BatchNoise:
    """Dropout and stochastic depth as functions of (seed of the step, layer, sample).

    Each layer draws for the whole effective batch of `batch` samples and takes the `rows` of the forward pass, so that a sample
    gets the same noise in every micro-batch and in a second forward pass.
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
