"""An optimizer that skips updates with NaN or infinity."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from emotion.errors import ModelError
from emotion.training import health
from emotion.training.device import LossScaler
from emotion.training.progress import Progress

SKIPPED_IN_A_ROW = 50  # after so many skipped updates the training has failed


class OptimizerHealth(NamedTuple):
    """What `GuardedOptimizer.health` returns, on the host. loss_scale: infinite where losses are not scaled."""

    skipped: float
    skipped_in_a_row: float
    most_in_a_row: float
    weights_norm: float
    loss_scale: float


class GuardedOptimizer:
    """Steps a fused optimizer, and skips the update where loss or gradient is not finite.

    The decision and the count are made on the device, so that the host does not wait. In a skipped update weights, moments and
    step count stay as they were. The state holds optimizer, counts and loss scaler. clip: largest norm of the gradient.

    What changes from step to step is in tensors that stay where they are, so that a step can be captured as a graph. Gradients
    are set to None before a step, not to 0: a graph gives them places of its own, and to fill them with 0 takes time.
    """

    def __init__(self, optimizer: Optimizer, scaler: LossScaler, clip: float = math.inf) -> None:
        self.optimizer, self.scaler, self.clip = optimizer, scaler, clip
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        (device,) = {parameter.device for parameter in self._parameters}
        self._first_rates = torch.tensor([float(group["lr"]) for group in optimizer.param_groups], device=device)
        self._rates = torch.empty_like(self._first_rates)
        self._rate_of_group = self._rates.unbind()
        # All skipped updates, those in a row up to now, and the longest row.
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        # Views: each index at a step would be one more kernel.
        self._all_and_row, self._row, self._longest = self._counts[:2], self._counts[1], self._counts[2]
        self._no_scale = torch.full((), math.inf, device=device)
        self._allow_capture()

    def _allow_capture(self) -> None:
        """Adam refuses to be captured without this flag; where it is fused the flag changes nothing else."""
        for group in self.optimizer.param_groups:
            group["capturable"] = self._counts.is_cuda
        # Else it warns of steps with the flag that are not captured.
        self.optimizer._warned_capturable_if_run_uncaptured = True

    def set_rates(self, factor: float) -> None:
        """Set each group's learning rate to `factor` times what it was at first. Without it the rates stay as they are."""
        torch.mul(self._first_rates, factor, out=self._rates)
        # In every step, because loading a state replaces them.
        for group, rate in zip(self.optimizer.param_groups, self._rate_of_group, strict=True):
            group["lr"] = rate

    def step(self, loss: Tensor) -> None:
        """Update the weights, after the backward pass of `loss` (a scalar) scaled by `scaler.scale`. Does not wait."""
        self.scaler.forget_failed_step()
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip < math.inf:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.clip, norm)
        total = norm + loss.detach()
        # x - x is not 0 only for NaN and infinity; `isfinite` takes twice as many kernels.
        skipped = (total - total) != 0
        self._all_and_row += skipped
        self._row *= skipped
        torch.maximum(self._longest, self._row, out=self._longest)
        # A GradScaler passes these to a fused optimizer too, but looks at the gradients alone, not at the loss.
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        del self.optimizer.grad_scale, self.optimizer.found_inf  # type: ignore[attr-defined]
        self.scaler.update()

    def health(self) -> Tensor:
        """[5] on the device: the numbers of an `OptimizerHealth`."""
        scale = self.scaler.scale_on_device()
        norm = torch.nn.utils.get_total_norm(self._parameters)
        others = torch.stack([norm.double(), (self._no_scale if scale is None else scale.squeeze()).double()])
        return torch.cat([self._counts.double(), others])

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "skipped": self._counts}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self._allow_capture()  # the state may be of a CPU
        self.scaler.load_state_dict(state["scaler"])
        self._counts.copy_(state["skipped"])


def check_finite(progress: Progress, step: int, settings: str, **found: OptimizerHealth) -> None:
    """Warn of skipped updates of each network. Raises ModelError after too many, or where weights are NaN or infinite.

    step: steps done when it was found. settings: the learning rates, for the message.
    """
    location, is_last = f"{progress.phase}: step {step}", step == progress.steps
    for name, health_of in found.items():
        total, longest = round(health_of.skipped), round(health_of.most_in_a_row)
        text = health.skipped_updates(name, total, longest, settings)
        # In fp16 the loss scale is found by skipping updates; `health.fp16_overflow` reports when that does not end.
        if math.isinf(health_of.loss_scale):
            progress.warn_once(f"skipped_updates_{name}", text, step)
        # A training that ends while it skips updates has failed too, however short it was.
        if longest >= SKIPPED_IN_A_ROW or (is_last and health_of.skipped_in_a_row > 1):
            raise ModelError(f"{location}: {text}")
        if not math.isfinite(health_of.weights_norm):
            advice = f"Lower {settings}, or set precision to fp32."
            raise ModelError(f"{location}: the weights of the {name} are NaN or infinite. {advice}")
