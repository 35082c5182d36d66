"""Optimizer steps that let no NaN into the weights."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from emotion.errors import ModelError
from emotion.training import health
from emotion.training.device import LossScaler
from emotion.training.progress import Progress

SKIPPED_IN_A_ROW = 50
"""So many updates skipped in a row are no accident: the training has failed."""


class Updates:
    """Takes the steps of a fused optimizer, and skips one where loss or gradient is not finite.

    Whether it is, the optimizer is told on the device, and nobody waits for the answer: the weights, the optimizer's averages
    and its count of steps stay as they were. What was skipped is counted there, too, and travels in the checkpoint with the
    state of the loss scaler. clip: largest norm of the gradient.
    """

    def __init__(self, optimizer: Optimizer, scaler: LossScaler, clip: float = math.inf) -> None:
        self.optimizer, self.scaler, self.clip = optimizer, scaler, clip
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        (device,) = {parameter.device for parameter in self._parameters}
        # All skipped updates, those in a row up to now, and the longest row.
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)

    def step(self, loss: Tensor) -> None:
        """After backward of `loss`, a scalar, scaled by `scaler.scale`."""
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip < math.inf:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.clip, norm)
        skipped = ~torch.isfinite(norm + loss.detach())
        self._counts[:2] += skipped
        self._counts[1] *= skipped
        torch.maximum(self._counts[2], self._counts[1], out=self._counts[2])
        # As a GradScaler hands it to a fused optimizer, which it does for gradients only.
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        del self.optimizer.grad_scale, self.optimizer.found_inf  # type: ignore[attr-defined]
        self.scaler.update()

    def skipped(self) -> tuple[int, int, int]:
        """All updates that were skipped, those in a row up to now, and most in a row. Waits for the device."""
        total, in_a_row, longest = self._counts.tolist()
        return total, in_a_row, longest

    def weights_are_finite(self) -> bool:
        """Waits for the device."""
        return bool(torch.isfinite(torch.nn.utils.get_total_norm(self._parameters)))

    def state_dict(self) -> dict[str, Any]:
        return {"scaler": self.scaler.state_dict(), "skipped": self._counts}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.scaler.load_state_dict(state["scaler"])
        self._counts.copy_(state["skipped"])


def refuse_nan(progress: Progress, settings: str, ended: bool, **updates: Updates) -> None:
    """Warn of skipped updates of each network. Raises ModelError after too many, or where its weights are no numbers.

    settings: the learning rates. ended: whether this was the last step. Waits for the device.
    """
    where = f"{progress.phase}: step {progress.done}"
    for name, of_network in updates.items():
        total, in_a_row, longest = of_network.skipped()
        text = health.skipped_updates(name, total, longest, settings)
        # In fp16 the loss scale is found by skipping; `health.overflow` tells when that does not end.
        if not of_network.scaler.is_enabled():
            progress.warn(f"skipped_updates_{name}", text)
        # A training that ends while it skips has failed, too, however short it was.
        if longest >= SKIPPED_IN_A_ROW or (ended and in_a_row > 1):
            raise ModelError(f"{where}: {text}")
        if not of_network.weights_are_finite():
            raise ModelError(
                f"{where}: the weights of the {name} are no numbers any more. Lower {settings}, or set precision to fp32."
            )
