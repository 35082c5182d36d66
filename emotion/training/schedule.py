"""The learning rate of a step, and the running average of weights."""

import copy
import math

import torch
from torch import nn


def steps_of(epochs: float, items: int, batch: int) -> int:
    """Optimizer steps of `epochs` passes over `items`, rounded up so that no item of a last partial batch is lost; 0 only for no
    epochs."""
    steps = math.ceil(round(epochs * items, 6) / batch)  # 0.07 * 100 is 7.000000000000001
    return max(steps, 1) if epochs > 0 else 0


def warmup_cosine(step: int, steps: int, warmup_fraction: float) -> float:
    """Factor of the learning rate at `step` of `steps`: a linear rise over the warm-up, then half a cosine down to 0."""
    warmup = round(warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Ema:
    """Exponential moving average of a network's weights.

    The decay rises as (1 + step) / (10 + step) up to `decay`, so that the first weights do not dominate a short run.
    head_start: steps that count as done, for a warm start.
    """

    def __init__(self, network: nn.Module, decay: float, head_start: int = 0) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay, self.head_start = decay, head_start
        # A tensor, so that an update can be captured as a graph.
        self._share = torch.zeros((), device=next(self.network.parameters()).device)

    def begin(self, step: int) -> None:
        """Set the decay of the next update. step: counted from 0."""
        done = self.head_start + step
        self._share.fill_(1 - min(self.decay, (1 + done) / (10 + done)))

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Average in the weights of a network, with the decay that `begin` has set."""
        averaged: list[torch.Tensor] = list(self.network.parameters())
        current: list[torch.Tensor] = list(network.parameters())
        torch._foreach_lerp_(averaged, current, [self._share] * len(averaged))
        for kept, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            kept.copy_(buffer)
