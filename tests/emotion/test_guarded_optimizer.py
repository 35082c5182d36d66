import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from emotion.config import DeviceConfig
from emotion.errors import ModelError
from emotion.training.device import Device, LossScaler, resolve_device
from emotion.training.guarded_optimizer import SKIPPED_IN_A_ROW, GuardedOptimizer, OptimizerHealth, check_finite
from emotion.training.progress import Progress
from tests.emotion.operators import Operators

NAN, INFINITY = math.nan, math.inf


@pytest.fixture
def device() -> Device:
    return resolve_device(DeviceConfig(kind="cpu", threads=1), "fp32")


class Training:
    """One weight of 1; its gradient is what a step is given."""

    def __init__(self, device: Device, clip: float = math.inf) -> None:
        self.weight = nn.Parameter(torch.ones(3))
        self.adamw = torch.optim.AdamW([self.weight], 0.1, fused=True)
        self.optimizer = GuardedOptimizer(self.adamw, device.scaler(), clip)

    def step(self, gradient: float, loss: float = 1.0) -> None:
        self.weight.grad = torch.tensor([gradient, 1.0, 1.0])
        self.optimizer.step(torch.tensor(loss))

    def health(self) -> OptimizerHealth:
        return OptimizerHealth(*self.optimizer.health().tolist())

    def skipped(self) -> tuple[float, float, float]:
        """All, in a row up to now, most in a row."""
        return self.health()[:3]

    def state(self) -> list[Tensor]:
        averages = self.adamw.state[self.weight]
        return [self.weight.detach().clone(), *(averages[name].clone() for name in sorted(averages))]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("gradient", "loss"), [(NAN, 1.0), (INFINITY, 1.0), (-INFINITY, 1.0), (1.0, NAN), (1.0, INFINITY)])
def test_an_update_that_is_not_finite_changes_nothing_and_counts(
    device: Device, gradient: float, loss: float, scaled: bool
) -> None:
    training = Training(device)
    training.optimizer.scaler = LossScaler("cpu", enabled=scaled)
    training.optimizer.scaler.scale(torch.tensor(1.0))
    training.step(1.0)
    before = training.state()
    training.step(gradient, loss)
    assert all(torch.equal(a, b) for a, b in zip(training.state(), before, strict=True))
    assert training.skipped() == (1, 1, 1)


def test_after_a_skipped_update_the_training_continues_as_without_it(device: Device) -> None:
    with_nan, without = Training(device), Training(device)
    for gradient in (1.0, NAN, -2.0, 0.5):
        with_nan.step(gradient)
    for gradient in (1.0, -2.0, 0.5):
        without.step(gradient)
    assert torch.equal(with_nan.weight, without.weight)
    assert with_nan.skipped() == (1, 0, 1)


def test_gradients_are_clipped_as_torch_clips_them(device: Device) -> None:
    ours, theirs = Training(device, clip=0.5), Training(device)
    ours.step(3.0)
    theirs.weight.grad = torch.tensor([3.0, 1.0, 1.0])
    torch.nn.utils.clip_grad_norm_([theirs.weight], 0.5)
    theirs.adamw.step()
    assert torch.equal(ours.weight, theirs.weight)


def test_learning_rates_follow_the_factor_of_a_step_from_tensors_that_stay_where_they_are(device: Device) -> None:
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [weights[0]], "lr": 0.5}, {"params": [weights[1]], "lr": 0.125}]
    optimizer = GuardedOptimizer(torch.optim.AdamW(groups, weight_decay=0.0, fused=True), device.scaler())
    addresses = set()
    for factor in (1.0, 0.5):
        for weight in weights:
            weight.grad = torch.ones(1)
        optimizer.set_rates(factor)
        optimizer.step(torch.tensor(1.0))
        addresses.add(tuple(group["lr"].data_ptr() for group in optimizer.optimizer.param_groups))
        # As after a restart: the groups of the state are others, and their rates are those of the step before.
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    # Adam moves a weight by its rate while its gradient stays the same.
    assert [weight.item() for weight in weights] == pytest.approx([1 - 0.5 * 1.5, 1 - 0.125 * 1.5], abs=1e-5)
    assert len(addresses) == 1


def test_optimizer_and_counts_are_part_of_the_state(device: Device) -> None:
    training, resumed = Training(device), Training(device)
    for gradient in (NAN, 1.0, NAN, NAN):
        training.step(gradient)
    assert training.skipped() == (3, 2, 2)
    resumed.optimizer.load_state_dict(training.optimizer.state_dict())
    resumed.step(NAN)
    assert resumed.skipped() == (4, 3, 3)
    assert all(torch.equal(a, b) for a, b in zip(resumed.state()[1:], training.state()[1:], strict=True))


def test_the_norm_of_the_weights_and_the_scale_of_losses_are_measured_without_a_wait(device: Device) -> None:
    training = Training(device)
    assert training.health()[3:] == (pytest.approx(3**0.5), math.inf)
    training.optimizer.scaler = LossScaler("cpu", init_scale=256.0, enabled=True)
    training.optimizer.scaler.scale(torch.tensor(1.0))
    training.step(INFINITY)
    with Operators() as operators:
        found = training.optimizer.health()
    assert OptimizerHealth(*found.tolist()).loss_scale == 128
    assert operators.waits == []


def test_a_network_in_fp16_may_skip_updates_to_find_the_scale(device: Device, progress: Progress) -> None:
    training = Training(device)
    training.optimizer.scaler = LossScaler("cpu", enabled=True)
    training.optimizer.scaler.scale(torch.tensor(1.0))
    training.step(INFINITY)
    check_finite(progress, 9, "x.y", network=training.health())
    assert progress.values("warning") == []


@pytest.fixture
def progress(tmp_path: Path) -> Progress:
    return Progress(tmp_path, "phase", 0, 1000)


def test_fifty_skipped_updates_in_a_row_end_the_training_and_forty_nine_are_a_warning(device: Device, progress: Progress) -> None:
    training = Training(device)
    for _ in range(SKIPPED_IN_A_ROW - 1):
        training.step(NAN)
    check_finite(progress, 9, "x.y", network=training.health())
    assert progress.values("warning") == ["skipped_updates_network"]
    training.step(1.0)
    training.step(NAN)
    check_finite(progress, 9, "x.y", network=training.health())
    for _ in range(SKIPPED_IN_A_ROW - 1):
        training.step(NAN)
    # The row has ended before the next check.
    training.step(1.0)
    with pytest.raises(ModelError, match=r"phase: step .* Lower x\.y"):
        check_finite(progress, 9, "x.y", network=training.health())


def test_a_training_that_ends_with_skipped_updates_has_failed(device: Device, progress: Progress) -> None:
    training = Training(device)
    training.step(NAN)
    check_finite(progress, 1000, "x.y", network=training.health())
    training.step(NAN)
    with pytest.raises(ModelError, match=r"phase: step .* Lower x\.y"):
        check_finite(progress, 1000, "x.y", network=training.health())


def test_weights_that_are_not_finite_end_the_training(device: Device, progress: Progress) -> None:
    training = Training(device)
    with torch.no_grad():
        training.weight[1] = INFINITY
    with pytest.raises(ModelError, match=r"the weights of the network are NaN or infinite\. Lower x\.y"):
        check_finite(progress, 9, "x.y", network=training.health())


def test_a_state_from_a_gpu_leaves_no_mark_on_a_cpu(device: Device) -> None:
    """There Adam is marked as one that may be captured as a graph; from a CPU's state a GPU's Adam would lose that mark."""
    training = Training(device)
    training.step(1.0)
    state = training.optimizer.state_dict()
    state["optimizer"]["param_groups"][0]["capturable"] = True
    training.optimizer.load_state_dict(state)
    assert training.adamw.param_groups[0]["capturable"] is False


def test_a_step_that_ended_in_the_middle_does_not_keep_the_next_from_being_scaled(device: Device) -> None:
    training = Training(device)
    scaler = training.optimizer.scaler = LossScaler("cpu", enabled=True)
    scaler.scale(torch.tensor(1.0))
    training.weight.grad = torch.ones(3)
    scaler.unscale_(training.adamw)
    training.step(scaler.get_scale())
    assert training.skipped() == (0, 0, 0)
