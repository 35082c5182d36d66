"""The layers of a ViT: their numbers, and by them learning rates and unfreezing."""

from typing import Any

from torch import nn

from emotion.compat import group_parameters
from emotion.config import VitConfig


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
