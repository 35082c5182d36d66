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
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emotion.audio.feature_store import Features, FeatureWriter
from emotion.config import CheckpointConfig, DeviceConfig, GanConfig, MelConfig, VitConfig
from emotion.data.leaks import write_seen
from emotion.data.songs import SongLabels
from emotion.errors import Interrupted, ModelError
from emotion.gan import train as gan
from emotion.gan.losses import gradient_penalty
from emotion.gan.networks import Discriminator, Generator
from emotion.training.device import Device, LossScaler, resolve_device
from emotion.training.memory_account import COMPONENTS, Account, TensorBytes, account
from emotion.training.memory_backoff import Memory, chosen_micro_batch, is_out_of_memory
from emotion.vit import train as vit
from job.pipeline.folders import JobFolders
from job.pipeline.runner import run_job
from job.preemption import StopRequest
from job.spec.load import load_spec
from tests.bench.memory import CASES, measured
from tests.conftest import TINY, TinyRun

MEL = MelConfig(sample_rate_hz=8000, window_samples=512, hop_samples=256, mels=32, fmax_hz=4000)
GAN = GanConfig(epochs=4, batch_size=6, clip_seconds=1.1, latent=3, width=4, penalty_every_steps=2)
VIT = VitConfig(
    model="test_vit", weights="random", clip_seconds=1.1, epochs=2, batch_size=6, learning_rate=1e-3, max_crops=2
)
ALWAYS, NEVER = CheckpointConfig(every_seconds=0), CheckpointConfig(every_seconds=3600)
TOLERANCE = 1e-4
"""Largest difference of a weight between runs with different micro-batches, in fp32: sums are taken in another order."""
POINTS = 25

pytestmark = pytest.mark.usefixtures("one_thread")


class Failing(TorchDispatchMode):
    """Lets operators that allocate run out of memory, as a full allocator does, where `fails` says so of their number, from 1.

    `left`: how many tensors of a failed attempt were still alive when the next operator allocated.
    """

    def __init__(self, fails: Callable[[int], bool]) -> None:
        super().__init__()
        self.fails, self.count = fails, 0
        self.left: list[int] = []
        self._made: list[weakref.ref[torch.UntypedStorage]] = []
        self._failed = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        # A prediction allocates nothing.
        if any(isinstance(x, FakeTensor) or x.device.type == "meta" for x in tensors):
            return result
        given = {storage_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tensors if storage_of(x) not in given]
        if not made:
            return result
        if self._failed:
            self.left.append(sum(storage() is not None for storage in self._made))
            self._made, self._failed = [], False
        self.count += 1
        if self.fails(self.count):
            self._failed = True
            raise torch.OutOfMemoryError("a test lets memory run out")
        self._made += [weakref.ref(x.untyped_storage()) for x in made]
        return result


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def never() -> bool:
    return False


@pytest.fixture(scope="module")
def device() -> Device:
    return resolve_device(DeviceConfig(kind="cpu", threads=1), "fp32")


def make_features(out: Path, songs: int, synthetic: bool) -> Features:
    rng = np.random.default_rng(songs)
    with FeatureWriter(out, MEL) as writer:
        for song in range(songs):
            valence, arousal = rng.uniform(-1, 1, 2)
            log_mel = (-30 + 10 * arousal + 3 * rng.standard_normal((80, 32))).astype(np.float32)
            digests = {} if synthetic else {"file_sha256": f"file {song}", "sound_sha256": f"sound {song}"}
            writer.append(SongLabels(song, valence, arousal, 0.3, 0.3, f"artist {song}"), log_mel, **digests)
    return Features(out)


Train = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, device: Device) -> Train:
    """train("gan", out, …) is the account of a small training; its weights are in `weights`."""
    real = make_features(tmp_path_factory.mktemp("real"), 10, False)
    synthetic = make_features(tmp_path_factory.mktemp("synthetic"), 5, True)
    write_seen(synthetic.folder, {"file 0", "sound 0"})
    training, validation = real.only(range(7)), real.only([7, 8, 9])

    def run(
        phase: str,
        out: Path,
        micro: int | None = None,
        checkpoints: CheckpointConfig = NEVER,
        should_stop: Callable[[], bool] = never,
    ) -> dict[str, Any]:
        out.mkdir(exist_ok=True)
        if phase == "gan":
            config = GAN.model_copy(update={"micro_batch": micro})
            return gan.train_gan(training, [], config, checkpoints, 0, device, out, should_stop)
        vit_config = VIT.model_copy(update={"micro_batch": micro})
        return vit.train_vit(training, validation, [], synthetic, vit_config, checkpoints, 0, device, out, should_stop)

    return run


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Of all networks that a training has left."""
    files = sorted(out.rglob("*.safetensors"))
    return {f"{path.stem}.{name}": value for path in files for name, value in load_file(path).items()}


def largest_difference(one: Path, other: Path) -> float:
    found, expected = weights(one), weights(other)
    return max((value - found[name]).abs().max().item() for name, value in expected.items())


# The account


def test_the_peak_is_what_is_alive_at_once() -> None:
    weight = torch.ones(100, requires_grad=True)
    with TensorBytes(torch.device("cpu"), lambda: {"parameters": [weight], "gradients": grads(weight)}, []) as counted:
        first = weight * 2  # 400 bytes and 400 more
        second = first.detach().repeat(5)  # 2,000
        del second
        first.sum().backward()
    expected = {"parameters": 400, "activations": 2400}
    assert counted.account == account({name: expected.get(name, 0) for name in COMPONENTS})


def grads(weight: torch.Tensor) -> list[torch.Tensor]:
    return [] if weight.grad is None else [weight.grad]


def test_a_view_counts_once_and_what_backward_makes_is_gradient_or_workspace() -> None:
    weight = torch.ones(1000, requires_grad=True)
    with TensorBytes(torch.device("cpu"), lambda: {"parameters": [weight], "gradients": grads(weight)}, []) as counted:
        weight.view(10, 100).t().reshape(-1).square().sum().backward()
    # The reshape copies; square keeps its input; backward: the gradient of the square, and its copy in the weight's order.
    assert counted.account["parameters"] == 4000
    assert 4000 <= counted.account["activations"] <= 8100
    assert counted.account["gradients"] + counted.account["workspace"] >= 4000


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_count_is_that_of_the_allocator(precision: Any) -> None:
    device = Device(torch.device("cpu"), precision, 1, True)
    G, D = Generator(64, 8, 16), Discriminator(64, 16)
    clips, labels, noise = torch.randn(4, 1, 64, 128), torch.randn(4, 2), torch.randn(4, 8, 9)
    scaler = LossScaler("cpu", enabled=False)

    def step() -> None:
        gan._discriminator_backward(G, D, clips, labels, noise, [slice(0, 4)], 1.0, device, scaler)

    with TensorBytes(torch.device("cpu"), dict, []) as counted:
        step()
    D.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    allocated = peak = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    # The allocator does not see what was there before; the count does where an operator returns a view of it.
    there = sum(tensor.nbytes for tensor in (*G.parameters(), *D.parameters(), clips, labels, noise))
    assert counted.account["peak"] - there <= 1.02 * peak
    # What kernels use inside and give back at once is seen by the allocator alone.
    assert peak <= 1.1 * counted.account["peak"]


@pytest.mark.parametrize("phase", ["gan", "vit"])
@pytest.mark.parametrize("micro", [None, 4, 1])
def test_what_is_predicted_is_what_is_measured(phase: str, micro: int | None, train: Train, tmp_path: Path) -> None:
    found = train(phase, tmp_path, micro)
    assert found["micro_batch"] == (micro or 6)
    assert found["predicted"]["peak"] == pytest.approx(found["measured"]["peak"], rel=0.02)
    for component in ("parameters", "optimizer", "averages", "data"):
        assert found["predicted"][component] == found["measured"][component] > 0
    assert sum(found["measured"][component] for component in COMPONENTS) == found["measured"]["peak"]


def test_a_smaller_micro_batch_is_predicted_to_need_less(device: Device) -> None:
    peaks = [gan.predicted_memory(GAN, MEL, device, micro)["peak"] for micro in (6, 3, 1)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > peaks[-1]


@pytest.mark.parametrize("phase", ["gan", "vit"])
def test_counting_changes_no_byte(phase: str, train: Train, tmp_path: Path) -> None:
    train(phase, tmp_path / "plain")
    with TensorBytes(torch.device("cpu"), dict, []):
        train(phase, tmp_path / "counted")
    assert largest_difference(tmp_path / "counted", tmp_path / "plain") == 0


@pytest.mark.parametrize(("free", "expected"), [(None, 48), (1000, 48), (700, 24), (80, 3), (1, 1)])
def test_the_largest_of_the_halves_that_fits_is_chosen(free: int | None, expected: int) -> None:
    assert chosen_micro_batch(48, None, free, lambda micro: {"peak": 10 + 18 * micro}) == expected


def test_a_given_micro_batch_is_taken_and_is_no_larger_than_the_batch() -> None:
    assert chosen_micro_batch(8, 5, 1, lambda micro: {"peak": micro}) == 5
    assert chosen_micro_batch(8, 50, None, lambda micro: {"peak": micro}) == 8


def test_a_network_that_cannot_be_predicted_is_trained_all_the_same(device: Device) -> None:
    def predict(_: int) -> Account:
        raise RuntimeError("no fake tensors here")

    memory = Memory("vit", 8, None, device, predict, lambda step: step["peak"])
    assert memory.kept_within(lambda: None, "nothing")["predicted"] == {}
    assert memory.micro_batch == 8


# Out of memory


def test_what_allocators_say_is_known_and_other_errors_are_not() -> None:
    for allocate in (lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: np.empty(1 << 60, np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value), caught.value
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("CUDA out of memory"))


@pytest.mark.parametrize("phase", ["gan", pytest.param("vit", marks=pytest.mark.full)])
def test_where_memory_runs_out_the_training_goes_on_with_half_the_micro_batch(
    phase: str, train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Failing(never_fails) as counting:
        train(phase, tmp_path / "whole", checkpoints=ALWAYS)
    for point in spread(counting.count, 3):
        caplog.clear()
        out = tmp_path / str(point)
        with caplog.at_level(logging.WARNING), Failing(lambda count, point=point: count == point) as failing:
            found = train(phase, out, checkpoints=ALWAYS)
        assert failing.left == [0], "tensors of the failed attempt were alive"
        assert found["micro_batch"] == 3
        assert [(halved["from"], halved["to"]) for halved in found["halved"]] == [(6, 3)]
        assert "micro_batch=3 instead of 6" in caplog.text
        assert warnings(out) == ["micro_batch_3"]
        assert largest_difference(out, tmp_path / "whole") < TOLERANCE, point


@pytest.mark.full
def test_wherever_a_step_fails_nothing_of_it_stays_alive(device: Device) -> None:
    """A backward pass that fails leaves what it had still to do in a queue, which keeps its graph."""

    def attempt() -> None:
        discriminator = Discriminator(16, 4)
        gradient_penalty(discriminator, torch.randn(2, 1, 16, 16), torch.zeros(2, 2)).backward()

    def memory() -> Memory:
        return Memory("gan", 2, None, device, lambda micro: account(dict.fromkeys(COMPONENTS, micro)), lambda step: 0)

    with Failing(never_fails) as counting:
        memory().kept_within(attempt, "nothing")
    for point in range(1, counting.count, 13):
        with Failing(lambda count, point=point: count == point) as failing:
            memory().kept_within(attempt, "nothing")
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


@pytest.mark.parametrize("phase", ["gan", "vit"])
def test_where_one_sample_is_too_much_the_job_ends_with_what_to_lower(
    phase: str, train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        pytest.raises(
            ModelError, match=rf"{phase}: out of memory at step \d with one sample.*Lower {phase}\."
        ) as caught,
        Failing(lambda count: count > 1000),
    ):
        train(phase, tmp_path)
    assert caught.value.exit_code == 70
    assert [f"micro_batch={micro} instead" in caplog.text for micro in (3, 2, 1)] == [True, False, True]


@pytest.mark.parametrize("phase", ["gan", "vit"])
def test_a_micro_batch_that_was_found_out_is_not_forgotten_by_the_next_attempt(
    phase: str, train: Train, tmp_path: Path
) -> None:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    with pytest.raises(Interrupted), Failing(lambda count: count == 40):
        train(phase, tmp_path, should_stop=should_stop)
    found = train(phase, tmp_path)
    assert found["micro_batch"] == 3
    assert [(halved["from"], halved["to"]) for halved in found["halved"]] == [(6, 3)]
    assert warnings(tmp_path) == ["micro_batch_3"]


@pytest.mark.parametrize(("before", "given", "expected"), [(2, 4, 2), (4, 2, 2), (None, 2, 2), (2, None, 2)])
def test_the_smaller_of_the_remembered_and_the_given_micro_batch_counts(
    before: int | None, given: int | None, expected: int, train: Train, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        train("gan", tmp_path, before, should_stop=lambda: True)
    assert train("gan", tmp_path, given)["micro_batch"] == expected


def test_any_other_error_ends_the_training(train: Train, tmp_path: Path) -> None:
    def should_stop() -> bool:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        train("gan", tmp_path, should_stop=should_stop)


# The whole tiny job, and large networks


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
        assert largest_difference(out, whole) < TOLERANCE, point
        shutil.rmtree(out)


@pytest.mark.full
@pytest.mark.parametrize(("model", "batch"), CASES)
def test_predictions_hold_for_networks_of_every_size(model: str, batch: int) -> None:
    found = measured(model, batch)
    assert found["predicted"]["peak"] == pytest.approx(found["measured"]["peak"], rel=0.1)
    assert found["predicted"]["process"] == pytest.approx(found["peak_process_bytes"], rel=0.25)
