"""Steps as graphs: on a CPU with the tapes of tests/emotion/tape.py in place of CUDA graphs, on a GPU with these themselves."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emotion.config import CheckpointConfig, DeviceConfig, GanConfig, VitConfig
from emotion.data.leaks import write_seen
from emotion.errors import Interrupted
from emotion.gan.train import train_gan
from emotion.training.device import Device, resolve_device
from emotion.training.graphed_step import WARM_UP, CudaGraphs, GraphBackend, GraphedSteps
from emotion.training.memory_backoff import MemoryBackoff
from emotion.vit.train import train_vit
from tests.emotion.tape import Tapes
from tests.emotion.trainings import CPU, SMALL_GAN, SMALL_MEL, SMALL_VIT, context, never, partition, stop_at_question, write_songs

pytestmark = pytest.mark.usefixtures("one_thread")

PHASES = ("gan", "vit")
GAN = GanConfig.model_validate(SMALL_GAN.model_dump() | {"epochs": 10, "micro_batch": 3, "penalty_every_steps": 4})
"""12 steps in two micro-batches, with penalties in 0, 4 and 8."""
VIT = VitConfig.model_validate(SMALL_VIT.model_dump() | {"epochs": 7, "micro_batch": 4, "frozen_epochs": 2.7, "ema_decay": 0.9})
"""13 steps in two micro-batches: 6 that train the head alone, then 7 that train all."""
LEFT = {"gan": ("generator.safetensors", "discriminator.safetensors"), "vit": ("model/model.safetensors", "summary.json")}
FP16 = replace(CPU, precision="fp16")
"""With all that a precision brings: casts, and a loss scale that changes."""

Train = Callable[..., dict[str, bytes]]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """train(phase, out, graphs) runs a training and returns the files it leaves, by name."""
    real = write_songs(tmp_path_factory.mktemp("real"), SMALL_MEL, 10, seed=10)
    synthetic = write_songs(tmp_path_factory.mktemp("synthetic"), SMALL_MEL, 5, seed=5, synthetic=True)
    write_seen(synthetic.folder, {"file 0", "sound 0"})
    songs = partition(real.only(range(7)), real.only([7, 8, 9]))

    def run(
        phase: str, out: Path, graphs: GraphBackend | None, should_stop: Callable[[], bool] = never, device: Device = CPU
    ) -> dict[str, bytes]:
        given = replace(context(out, should_stop, CheckpointConfig(every_seconds=3600)), graphs=graphs, device=device)
        # To predict its memory would take as long as to train it.
        config: GanConfig | VitConfig = GAN if phase == "gan" else VIT
        vit = VIT if graphs is None else VIT.model_copy(update={"recomputed_blocks": 1})  # equal bytes in spite of both
        backoff = MemoryBackoff(
            phase, config, device, predict=lambda micro: {}, host_bytes=lambda account: 0, features_bytes=0, settings=""
        )
        if phase == "gan":
            backoff.run(lambda: train_gan(partition(songs.training), config=GAN, context=given, backoff=backoff))
        else:
            backoff.run(lambda: train_vit(songs, synthetic=synthetic, config=vit, context=given, backoff=backoff))
        return {name: (out / name).read_bytes() for name in LEFT[phase]}

    return run


@pytest.fixture(scope="module")
def without(train: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What whole trainings without graphs leave, with the numbers they have recorded."""
    found: dict[str, dict[str, Any]] = {}
    for phase in PHASES:
        out = tmp_path_factory.mktemp(phase)
        found[phase] = {**train(phase, out, None), "numbers": numbers(out)}
    return found


def warnings(out: Path) -> list[str]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record["text"] for record in records if record.get("warning") == "cuda_graphs"]


def numbers(out: Path) -> list[dict[str, Any]]:
    """What a training has recorded, without the time."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in record.items() if name != "time"} for record in records]


def test_a_gan_of_graphs_has_equal_bytes_and_losses(train: Train, without: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """0 and 4 with penalties and 1 and 2 without them have no graph. 3 is captured; 4 frees that; 5 and 8 are captured.
    Graphs are also freed before and after the training."""
    tapes = Tapes()
    assert {**train("gan", tmp_path, tapes), "numbers": numbers(tmp_path)} == without["gan"]
    assert (tapes.steps_without, len(tapes.replayed), len(tapes.captured), tapes.frees) == (4, 8, 3, 3)
    plain, again, penalised = tapes.captured
    assert plain.length == again.length < penalised.length
    assert tapes.replayed == [plain, again, again, again, penalised, again, again, again]


def test_a_vit_of_graphs_has_equal_bytes_and_losses_while_layers_thaw(
    train: Train, without: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """The head alone: 0 and 1 without a graph, 2 to 5 with one. Then all: 6 and 7 without, 8 to 12 with another."""
    tapes = Tapes()
    assert {**train("vit", tmp_path, tapes), "numbers": numbers(tmp_path)} == without["vit"]
    assert (tapes.steps_without, tapes.frees) == (4, 3)
    head, everything = tapes.captured
    assert head.length < everything.length
    assert tapes.replayed == [head] * 4 + [everything] * 5


@pytest.mark.parametrize("stop_at", [2, pytest.param(6, marks=pytest.mark.full)])
@pytest.mark.parametrize("phase", PHASES)
def test_a_training_of_graphs_that_is_interrupted_and_resumed_has_equal_bytes(
    phase: str, stop_at: int, train: Train, without: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        train(phase, tmp_path, Tapes(), stop_at_question(stop_at))
    tapes = Tapes()
    assert {**train(phase, tmp_path, tapes), "numbers": numbers(tmp_path)} == without[phase]
    assert tapes.captured


@pytest.mark.parametrize(
    ("phase", "fails_at", "device"), [("gan", "aten::_fused_adam_", CPU), ("vit", "aten::_fused_adamw_", FP16)]
)
def test_where_a_step_cannot_be_captured_the_training_goes_on_without_graphs(
    phase: str, fails_at: str, device: Device, train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It fails in the first update of weights, when gradients, casts of noise and the scaler's step are half done."""
    expected = train(phase, tmp_path / "without", None, device=device)
    tapes = Tapes(fails_at)
    caplog.clear()
    assert train(phase, tmp_path / "with", tapes, device=device) == expected
    assert tapes.captured == []
    assert tapes.failure == "operation failed due to a previous error during capture"
    (text,) = warnings(tmp_path / "with")
    assert tapes.failure in text
    assert sum(text in record.getMessage() for record in caplog.records) == 1


def test_after_an_out_of_memory_error_the_smaller_micro_batch_has_its_own_graphs(train: Train, tmp_path: Path) -> None:
    """The error strikes after 5 steps; the training begins again, as no checkpoint was due."""

    def fails_once() -> Callable[[], bool]:
        asked = 0

        def should_stop() -> bool:
            nonlocal asked
            asked += 1
            if asked == 5:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return False

        return should_stop

    tapes = Tapes()
    expected = train("vit", tmp_path / "without", None, fails_once())
    assert train("vit", tmp_path / "with", tapes, fails_once()) == expected
    before, after = tapes.captured[0], tapes.captured[-1]
    assert before.length < after.length  # more micro-batches are more operators


@pytest.mark.parametrize("phase", PHASES)
def test_where_a_capture_runs_out_of_memory_the_smaller_micro_batch_has_graphs(phase: str, train: Train, tmp_path: Path) -> None:
    class Small(Tapes):
        """Memory for half of the first micro-batch."""

        def capture(self, work: Any) -> Any:
            self._fails_at = None if self.captures else "aten::add_"
            self.captures += 1
            return super().capture(work)

        captures = 0

    tapes = Small(error=torch.OutOfMemoryError("CUDA out of memory."))
    train(phase, tmp_path, tapes)
    assert tapes.failure is None
    assert tapes.captured
    texts = [record.get("text", "") for record in numbers(tmp_path)]
    assert sum("samples at a time instead of" in text for text in texts) == 1
    assert warnings(tmp_path) == []


# The seam alone


class Counting:
    """A step that adds its input to a total, and the names that it warns of."""

    def __init__(self, backend: GraphBackend | None) -> None:
        self.total = torch.zeros(())
        self.network = nn.Linear(1, 1)
        self.runs_of_python = 0
        self.warnings: list[str] = []
        self.steps = GraphedSteps(backend, [self.network], self.warnings.append)

    def step(self, x: Tensor, *, factor: float = 1.0) -> tuple[Tensor, ...]:
        self.runs_of_python += 1
        self.network.weight.grad = torch.ones(1, 1)
        self.total += factor * x.sum()
        return (self.total.clone(),)

    def add(self, *values: float, key: str = "") -> float:
        (total,) = self.steps.run(key, self.step, torch.tensor(values))
        return total.item()


def test_each_call_runs_the_step_once_on_what_it_is_given() -> None:
    counting = Counting(Tapes())
    assert [counting.add(value) for value in (1, 2, 4, 8, 16)] == [1, 3, 7, 15, 31]
    assert counting.runs_of_python == WARM_UP + 1


def test_without_a_backend_every_call_runs_the_step_itself() -> None:
    counting = Counting(None)
    assert [counting.add(value) for value in (1, 2, 4, 8, 16)] == [1, 3, 7, 15, 31]
    assert counting.runs_of_python == 5


def test_another_key_and_another_shape_are_captured_anew_and_old_ones_again() -> None:
    tapes = Tapes()
    counting = Counting(tapes)
    for _ in range(3):
        counting.add(1)
    for _ in range(3):
        counting.add(1, 1)
    for _ in range(3):
        counting.add(1, key="other")
    assert (tapes.steps_without, len(tapes.captured), tapes.frees) == (6, 3, 3)
    # Known before: without a step that warms up, but captured again, as its graph was freed.
    assert counting.add(1) == 13
    assert counting.add(1, key="other") == 14
    assert (tapes.steps_without, len(tapes.captured)) == (6, 4)


def test_gradients_are_forgotten_before_a_capture_and_when_graphs_are_freed() -> None:
    class Watching(Tapes):
        gradients: list[Tensor | None] = []  # noqa: RUF012

        def capture(self, work: Any) -> Any:
            self.gradients.append(counting.network.weight.grad)
            return super().capture(work)

    counting = Counting(Watching())
    for _ in range(3):
        counting.add(1)
    assert Watching.gradients == [None]
    assert counting.network.weight.grad is not None
    counting.steps.free()
    assert counting.network.weight.grad is None


def test_another_error_of_a_step_is_no_reason_to_go_on() -> None:
    counting = Counting(Tapes())
    counting.add(1), counting.add(1)
    with pytest.raises(TypeError):
        counting.steps.run("", lambda: (), torch.tensor([1]))
    assert counting.warnings == []


def test_a_training_that_begins_again_after_a_failed_capture_says_so_and_makes_no_graphs() -> None:
    tapes = Tapes(fails_at="aten::sum")
    first = Counting(tapes)
    assert [first.add(1) for _ in range(4)] == [1, 2, 3, 4]
    again = Counting(tapes)
    assert [again.add(1) for _ in range(4)] == [1, 2, 3, 4]
    assert again.runs_of_python == 4
    assert first.warnings == again.warnings != []


def test_what_runs_out_of_memory_beside_graphs_is_done_again_without_them() -> None:
    tapes = Tapes()
    counting = Counting(tapes)
    memory_left = [False, True]

    def validation() -> str:
        if not memory_left.pop(0):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return "scores"

    for _ in range(3):
        counting.add(1)
    assert counting.steps.beside(validation) == "scores"
    assert tapes.frees == 2  # also at the beginning
    assert counting.add(1) == 4
    assert len(tapes.captured) == 2
    # Without graphs there is nothing to free.
    memory_left = [False, True]
    counting.steps.free()
    with pytest.raises(torch.OutOfMemoryError):
        counting.steps.beside(validation)


# On a GPU


@pytest.fixture
def gpu() -> Iterator[Device]:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield resolve_device(DeviceConfig(kind="cuda", deterministic=True), "auto")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("phase", PHASES)
def test_cuda_graphs_give_equal_bytes(
    phase: str, gpu: Device, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    expected = train(phase, tmp_path / "without", None, device=gpu)
    graphs = CudaGraphs()
    assert train(phase, tmp_path / "with", graphs, device=gpu) == expected
    assert graphs.failure is None
    assert graphs._graphs
    with pytest.raises(Interrupted):
        train(phase, tmp_path / "resumed", CudaGraphs(), stop_at_question(6), device=gpu)
    assert train(phase, tmp_path / "resumed", CudaGraphs(), device=gpu) == expected


def test_after_a_capture_that_fails_a_gpu_computes_on(gpu: Device) -> None:
    """A step that waits for the device cannot be captured."""
    waits, total, said = False, torch.zeros((), device=gpu.device), []
    steps = GraphedSteps(CudaGraphs(), [], said.append)

    def step(x: Tensor) -> tuple[Tensor, ...]:
        total.add_(x.sum())
        if waits:
            total.item()
        return (total.clone(),)

    totals = []
    for number in range(5):
        waits = number >= WARM_UP
        totals.append(steps.run("", step, torch.ones(3, device=gpu.device))[0].item())
    assert totals == [3, 6, 9, 12, 15]
    assert len(said) == 1
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    kept = torch.empty(1 << 26, device=gpu.device)
    del kept
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
