import json
import logging
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emotion.config import CheckpointConfig, GanConfig
from emotion.errors import Interrupted, ModelError
from emotion.gan.losses import gradient_penalty
from emotion.gan.networks import Discriminator
from emotion.training.device import Device, LossScaler
from emotion.training.memory_account import COMPONENTS, MemoryAccount, with_peak
from emotion.training.memory_backoff import MemoryBackoff, choose_micro_batch, features_fit, is_out_of_memory
from job.pipeline.folders import JobFolders
from job.pipeline.runner import run_job
from job.preemption import StopRequest
from job.spec.load import load_spec
from tests.conftest import TINY, TinyRun
from tests.emotion.trainings import CPU, ROOMY_CPU, Train, rms_difference, stop_at_question

ALWAYS = CheckpointConfig(every_seconds=0)
TOLERANCE = 1e-5  # a step is of the order of 1e-4
"""Largest difference of a weight between runs with different micro-batches, in fp32: sums are taken in another order."""
POINTS = 12

pytestmark = pytest.mark.usefixtures("one_thread")


class Failing(TorchDispatchMode):
    """Lets operators that allocate run out of memory, as a full allocator does, where `fails` says so of their number, from 1.

    `left`: how many tensors of a failed attempt were still alive when the next operator allocated.
    """

    def __init__(self, fails: Callable[[int], bool]) -> None:
        super().__init__()
        self.fails, self.count = fails, 0
        self.left: list[int] = []
        self._allocated: list[weakref.ref[torch.UntypedStorage]] = []
        self._failed = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        # A prediction allocates nothing.
        if any(isinstance(x, FakeTensor) or x.device.type == "meta" for x in tensors):
            return result
        given = {storage_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        allocated = [x for x in tensors if storage_of(x) not in given]
        if not allocated:
            return result
        if self._failed:
            self.left.append(sum(storage() is not None for storage in self._allocated))
            self._allocated, self._failed = [], False
        self.count += 1
        if self.fails(self.count):
            self._failed = True
            raise torch.OutOfMemoryError("a test lets memory run out")
        self._allocated += [weakref.ref(x.untyped_storage()) for x in allocated]
        return result


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.mark.parametrize(("free", "expected"), [(None, 48), (1000, 48), (700, 24), (80, 3), (1, 1)])
def test_the_largest_of_the_halves_that_fits_is_chosen(free: int | None, expected: int) -> None:
    assert choose_micro_batch(48, None, free, lambda micro: {"peak": 10 + 18 * micro}) == expected


def test_a_given_micro_batch_is_taken_and_is_no_larger_than_the_batch() -> None:
    assert choose_micro_batch(8, 5, 1, lambda micro: {"peak": micro}) == 5
    assert choose_micro_batch(8, 50, None, lambda micro: {"peak": micro}) == 8


def test_features_lie_on_the_device_where_they_fit_beside_a_step() -> None:
    step = with_peak(dict.fromkeys(COMPONENTS, 100))
    assert features_fit(200, 1000, step)  # 700 and 200 are nine tenths
    assert not features_fit(201, 1000, step)
    assert not features_fit(0, None, step), "on a CPU"
    assert not features_fit(0, 1000, {}), "of a step that cannot be predicted"


def test_features_leave_the_device_when_memory_runs_out_and_stay_away_after_a_resumption() -> None:
    backoff = backoff_of(device=ROOMY_CPU)
    places: list[bool] = []

    def train() -> None:
        places.append(backoff.features_on_device)
        if len(places) == 1:
            raise torch.OutOfMemoryError("a test lets memory run out")

    assert backoff.to_json()["predicted"]["data"] == 8 + 100
    assert backoff.run(train)["predicted"]["data"] == 4
    resumed = backoff_of(device=backoff.device)
    resumed.load_state_dict(backoff.state_dict())
    assert [*places, resumed.features_on_device] == [True, False, False]


def backoff_of(
    micro_batch: int | None = None,
    predict: Callable[[int], MemoryAccount] = lambda micro: with_peak(dict.fromkeys(COMPONENTS, micro)),
    device: Device = CPU,
) -> MemoryBackoff:
    config = GanConfig(batch_size=8, micro_batch=micro_batch)
    return MemoryBackoff("gan", config, device, predict=predict, host_bytes=lambda _: 0, features_bytes=100, settings="nothing")


def test_a_network_whose_memory_cannot_be_predicted_is_trained_all_the_same() -> None:
    def predict(_: int) -> MemoryAccount:
        raise RuntimeError("no fake tensors here")

    backoff = backoff_of(predict=predict)
    assert backoff.run(lambda: None)["predicted"] == {}
    assert backoff.micro_batch == 8


def test_the_errors_of_allocators_are_recognised_and_other_errors_are_not() -> None:
    for allocate in (lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: np.empty(1 << 60, np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value), caught.value
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("CUDA out of memory"))


@pytest.mark.full
@pytest.mark.parametrize("phase", ["gan", "vit"])
def test_after_out_of_memory_the_training_resumes_with_half_the_micro_batch(
    phase: str, train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Failing(never_fails) as counting:
        train(phase, tmp_path / "whole", checkpoints=ALWAYS)
    for point in spread(counting.count, 4):
        caplog.clear()
        out = tmp_path / str(point)
        with caplog.at_level(logging.WARNING), Failing(lambda count, point=point: count == point) as failing:
            found = train(phase, out, checkpoints=ALWAYS)
        assert failing.left == [0], "tensors of the failed attempt were alive"
        assert found["micro_batch"] == 3
        assert [(halved["from"], halved["to"]) for halved in found["halved"]] == [(6, 3)]
        assert "micro_batch=3 instead of 6" in caplog.text
        assert warnings(out) == ["micro_batch_3"]
        assert rms_difference(out, tmp_path / "whole") < TOLERANCE, point


@pytest.mark.full
def test_wherever_a_step_fails_none_of_its_tensors_stays_alive() -> None:
    """A failed backward pass leaves its unfinished nodes in a queue, which keeps its graph alive."""

    def attempt() -> None:
        discriminator = Discriminator(16, 4)
        clips, labels = torch.randn(2, 1, 16, 16, requires_grad=True), torch.zeros(2, 2)
        logits = discriminator(clips, labels)
        gradient_penalty(discriminator, clips, labels, logits, scaler=LossScaler("cpu", enabled=False)).backward()

    with Failing(never_fails) as counting:
        backoff_of().run(attempt)
    for point in range(1, counting.count, 13):
        with Failing(lambda count, point=point: count == point) as failing:
            backoff_of().run(attempt)
        assert failing.left == [0], point


def never_fails(_: int) -> bool:
    return False


def spread(operators: int, points: int) -> list[int]:
    """Numbers of operators, from 1, spread evenly."""
    return sorted({round((k + 0.5) * operators / points) + 1 for k in range(points)})


def warnings(out: Path) -> list[str]:
    """Of the micro-batch, in the metrics."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["warning"] for record in records if record.get("warning", "").startswith("micro_batch")]


@pytest.mark.full
@pytest.mark.parametrize("phase", ["gan", "vit"])
def test_where_one_sample_is_too_much_the_training_ends_and_says_what_to_lower(
    phase: str, train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        pytest.raises(ModelError, match=rf"{phase}: out of memory at step \d with one sample.*Lower {phase}\.") as caught,
        Failing(lambda count: count > 1000),
    ):
        train(phase, tmp_path)
    assert caught.value.exit_code == 70
    assert [f"micro_batch={micro} instead" in caplog.text for micro in (3, 2, 1)] == [True, False, True]


@pytest.mark.full
@pytest.mark.parametrize("phase", ["gan", "vit"])
def test_a_resumed_training_keeps_the_reduced_micro_batch(phase: str, train: Train, tmp_path: Path) -> None:
    with pytest.raises(Interrupted), Failing(lambda count: count == 40):
        train(phase, tmp_path, should_stop=stop_at_question(2))
    found = train(phase, tmp_path)
    assert found["micro_batch"] == 3
    assert [(halved["from"], halved["to"]) for halved in found["halved"]] == [(6, 3)]
    assert warnings(tmp_path) == ["micro_batch_3"]


@pytest.mark.parametrize(("before", "given", "expected"), [(2, 4, 2), (4, 2, 2), (None, 2, 2), (2, None, 2)])
def test_the_smaller_of_the_restored_and_the_given_micro_batch_counts(
    before: int | None, given: int | None, expected: int
) -> None:
    earlier, resumed = backoff_of(before), backoff_of(given)
    earlier.parts()
    resumed.load_state_dict(earlier.state_dict())
    assert resumed.micro_batch == expected
    assert resumed.parts()[0] == slice(0, expected)
    assert resumed.to_json()["micro_batches"] == list(dict.fromkeys([before or 8, expected]))


def test_any_other_error_ends_the_training() -> None:
    def fail() -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        backoff_of().run(fail)


@pytest.mark.full
@pytest.mark.parametrize("phase", ["gan", "vit"])
def test_memory_that_runs_out_anywhere_in_the_tiny_job_changes_nothing_but_the_micro_batch(
    phase: str, tiny_run: TinyRun, tmp_path: Path
) -> None:
    spec = load_spec(TINY, ["precision=fp32", "checkpoint.every_seconds=0"])
    given = {"gan": spec.gan.micro_batch, "vit": spec.vit.micro_batch}[phase]
    assert given is not None

    folders = JobFolders(tmp_path / "work", tiny_run.work / "scratch")
    run_job(spec, folders, {"gan": "features", "vit": "synth"}[phase], False, StopRequest())
    with Failing(never_fails) as counting:
        whole = run_job(spec, folders, phase, False, StopRequest()).rename(tmp_path / "whole")
    for point in spread(counting.count, POINTS):
        with Failing(lambda count, point=point: count == point):
            out = run_job(spec, folders, phase, False, StopRequest())
        receipt = json.loads((out / "receipt.json").read_text())
        (halved,) = receipt["measured"]["memory"]["halved"]
        assert (halved["from"], halved["to"]) == (given, given // 2)
        assert warnings(out) == [f"micro_batch_{given // 2}"]
        assert rms_difference(out, whole) < TOLERANCE, point
        shutil.rmtree(out)
