import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emotion.config import CheckpointConfig, GanConfig, VitConfig
from emotion.data.leaks import write_seen
from emotion.errors import Interrupted, ModelError
from emotion.training.device import Device, Fetched
from emotion.training.graphed_step import WARM_UP, GraphBackend
from emotion.training.readings import Reading, Readings
from tests.emotion.tape import Tapes
from tests.emotion.trainings import (
    CPU,
    SMALL_GAN,
    SMALL_MEL,
    SMALL_VIT,
    context,
    never,
    partition,
    run_gan,
    run_vit,
    stop_at_question,
    write_songs,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ALWAYS = CheckpointConfig(every_seconds=0)


@dataclass(frozen=True)
class OnItsWay(Fetched):
    """Numbers that are on the host when somebody has waited for them, or has asked for them `after` times."""

    after: int
    asked: list[None]

    def is_here(self) -> bool:
        self.asked.append(None)
        return len(self.asked) > self.after


@dataclass(frozen=True)
class BusyGpu(Device):
    """A CPU that is as far behind the host as a GPU may be."""

    after: int = 10**9

    def fetch(self, tensor: torch.Tensor) -> Fetched:
        return OnItsWay(tensor, None, self.after, [])


def busy_gpu(after: int = 10**9) -> BusyGpu:
    return BusyGpu(torch.device("cpu"), "fp32", threads=1, deterministic=True, after=after)


@pytest.fixture
def reported() -> list[tuple[int, dict[str, list[float]]]]:
    return []


@pytest.fixture
def report(reported: list[tuple[int, dict[str, list[float]]]]) -> Callable[[Reading], None]:
    return lambda reading: reported.append((reading.step, reading.numbers))


def test_on_a_cpu_numbers_are_reported_at_once(
    reported: list[tuple[int, dict[str, list[float]]]], report: Callable[[Reading], None]
) -> None:
    readings = Readings(CPU, report)
    counts = torch.tensor([3, 2**40], dtype=torch.int64)
    readings.send(7, loss=torch.tensor(0.5, requires_grad=True), rate=0.25, counts=counts, flag=torch.tensor(True))
    assert reported == [(7, {"loss": [0.5], "rate": [0.25], "counts": [3, 2**40], "flag": [1]})]
    readings.flush()
    assert len(reported) == 1


def test_on_a_gpu_they_are_reported_once_they_are_there_and_before_the_next_are_sent(
    reported: list[tuple[int, dict[str, list[float]]]], report: Callable[[Reading], None]
) -> None:
    readings = Readings(busy_gpu(after=2), report)
    readings.send(1, loss=torch.tensor(0.5))
    readings.poll()
    assert reported == []
    readings.poll()
    assert [step for step, _ in reported] == [1]
    readings.send(2, loss=torch.tensor(0.5))
    readings.send(3, loss=torch.tensor(0.5))
    assert [step for step, _ in reported] == [1, 2]
    readings.flush()
    assert [step for step, _ in reported] == [1, 2, 3]


def test_numbers_that_change_after_they_were_sent_are_reported_as_they_were(
    reported: list[tuple[int, dict[str, list[float]]]], report: Callable[[Reading], None]
) -> None:
    readings, loss = Readings(busy_gpu(), report), torch.tensor(0.5, dtype=torch.float64)
    readings.send(1, loss=loss)
    loss.fill_(7)
    readings.flush()
    assert reported == [(1, {"loss": [0.5]})]


# In the loops

Run = Callable[..., None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run("gan", out, device=…, should_stop=…, checkpoints=…, graphs=…, **settings): a training of 5 steps, with two epochs of
    the ViT."""
    real = write_songs(tmp_path_factory.mktemp("real"), SMALL_MEL, 12, seed=10)
    synthetic = write_songs(tmp_path_factory.mktemp("synthetic"), SMALL_MEL, 5, seed=5, synthetic=True)
    write_seen(synthetic.folder, {"file 0", "sound 0"})

    def run(
        phase: str,
        out: Path,
        device: Device,
        should_stop: Callable[[], bool] = never,
        checkpoints: CheckpointConfig | None = None,
        graphs: GraphBackend | None = None,
        **settings: Any,
    ) -> None:
        given = replace(context(out, should_stop, checkpoints), device=device, graphs=graphs)
        if phase == "gan":
            values = SMALL_GAN.model_dump() | {"epochs": 3} | settings
            run_gan(partition(real.only(range(10))), GanConfig.model_validate(values), given)
        else:
            values = SMALL_VIT.model_dump() | settings
            songs = partition(real.only(range(10)), real.only([10, 11]))
            run_vit(songs, synthetic, VitConfig.model_validate(values), given)

    return run


def records(out: Path) -> list[dict[str, Any]]:
    """Without their time, and without warnings."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines if "warning" not in line]


@pytest.mark.parametrize("phase", [pytest.param("gan", marks=pytest.mark.full), "vit"])
def test_late_numbers_are_recorded_for_their_own_step_and_none_is_lost(phase: str, run: Run, tmp_path: Path) -> None:
    run(phase, tmp_path / "at once", CPU)
    expected = records(tmp_path / "at once")
    name = {"gan": "d_loss", "vit": "loss"}[phase]
    assert [record["step"] for record in expected if name in record] == [1, 2, 3, 4, 5]
    for after in (1, 10**9):
        run(phase, tmp_path / str(after), busy_gpu(after))
        assert records(tmp_path / str(after)) == expected
    # Asked to stop, and resumed.
    out = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        run(phase, out, busy_gpu(), stop_at_question(2))
    assert records(out) == expected[:2]
    run(phase, out, busy_gpu())
    assert records(out) == expected


@pytest.mark.parametrize(
    ("phase", "fails_at", "settings"),
    [
        ("gan", "aten::_fused_adam_", {"epochs": 240, "penalty_every_steps": 4}),
        ("vit", "aten::_fused_adamw_", {"epochs": 80, "batch_size": 2, "synthetic_share": 0.0}),
    ],
)
def test_a_graph_that_fails_while_numbers_are_on_their_way_is_recorded_after_them(
    phase: str, fails_at: str, settings: dict[str, float], run: Run, tmp_path: Path
) -> None:
    """Of 400 steps every second one is reported. The training is resumed after one step, so that the graph is due in step 4: when
    the numbers of step 2 are on their way, before those of step 4, and before the first validation."""
    failing = Tapes(fails_at)
    for steps in (1, WARM_UP + 1):
        with pytest.raises(Interrupted):
            run(phase, tmp_path, busy_gpu(), stop_at_question(steps), graphs=failing, **settings)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("warning")) for line in lines] == [(2, None), (3, "cuda_graphs"), (4, None)]


class KilledError(Exception):
    """In place of SIGKILL."""


@pytest.mark.parametrize("phase", [pytest.param("gan", marks=pytest.mark.full), "vit"])
def test_the_numbers_before_a_checkpoint_are_recorded_with_it(phase: str, run: Run, tmp_path: Path) -> None:
    def killed() -> bool:
        raise KilledError

    run(phase, tmp_path / "at once", CPU)
    with pytest.raises(KilledError):
        # A step of a training asks whether to stop after its checkpoint.
        run(phase, tmp_path / "killed", busy_gpu(), killed, ALWAYS)
    assert (tmp_path / "killed" / "checkpoints" / "step-1.json").exists()
    run(phase, tmp_path / "killed", busy_gpu())
    assert records(tmp_path / "killed") == records(tmp_path / "at once")


@pytest.mark.parametrize(
    ("phase", "settings"), [("gan", {"generator_learning_rate": 1e30}), ("vit", {"learning_rate": 1e38, "warmup_fraction": 0.0})]
)
def test_a_failure_that_is_known_late_still_ends_the_training(
    phase: str, settings: dict[str, float], run: Run, tmp_path: Path
) -> None:
    out = tmp_path / phase
    with pytest.raises(ModelError, match=rf"{phase}: step .* or set precision to fp32"):
        run(phase, out, busy_gpu(), epochs=0.5, **settings)
    assert not list(out.rglob("*.safetensors"))
