import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emotion.training.progress import Progress


def recorded_steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_line_is_json_with_time_phase_and_step(tmp_path: Path) -> None:
    with Progress(tmp_path, "gan", 0, 3) as progress:
        progress.advance(1, loss=0.5)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["phase"], record["step"], record["loss"]) == ("gan", 1, 0.5)
    assert record["time"] > 1.7e9


def test_a_resumed_phase_cuts_the_file_back_to_the_restored_step(tmp_path: Path) -> None:
    with Progress(tmp_path, "gan", 0, 9) as progress:
        for step in range(1, 6):
            progress.advance(step, loss=1.0)
    with Progress(tmp_path, "gan", 3, 9) as progress:
        progress.advance(4, loss=2.0)
    assert recorded_steps(tmp_path) == [1, 2, 3, 4]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    with Progress(tmp_path, "gan", 0, 9) as progress:
        progress.advance(1, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1, "pha')
    with Progress(tmp_path, "gan", 5, 9) as progress:
        progress.advance(6, loss=1.0)
    assert recorded_steps(tmp_path) == [1, 6]


@pytest.mark.parametrize(
    "damage",
    [b"\0" * 20, b'{"step": 2, "loss": \xff1}', b"12", b"null", b'["step"]', b"{", b""],
    ids=["zeros", "not UTF-8", "number", "null", "list", "torn", "empty"],
)
def test_a_damaged_line_is_dropped_and_those_around_it_stay(tmp_path: Path, damage: bytes) -> None:
    first, *others = (b'{"time": 1.0, "phase": "gan", "step": %d, "loss": 1.0}' % step for step in (1, 3, 7))
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([first, damage, *others]) + b"\n")
    with Progress(tmp_path, "gan", 5, 9) as progress:
        progress.advance(6, loss=1.0)
    assert recorded_steps(tmp_path) == [1, 3, 6]


@pytest.mark.parametrize("changed", [{"step": None}, {"step": "2"}, {"step": 2.5}, {"phase": None}, {"time": None}])
def test_a_record_without_its_fields_is_left_out_when_a_phase_resumes(tmp_path: Path, changed: dict[str, Any]) -> None:
    first, second, third = ({"time": 1.0, "phase": "gan", "step": step, "loss": 1.0} for step in (1, 2, 3))
    damaged = {name: value for name, value in {**second, **changed}.items() if value is not None}
    text = "".join(json.dumps(record) + "\n" for record in (first, damaged, third))
    (tmp_path / "metrics.jsonl").write_text(text)
    with Progress(tmp_path, "gan", 5, 9) as progress:
        progress.advance(6, loss=1.0)
    assert recorded_steps(tmp_path) == [1, 3, 6]


def test_nan_and_infinity_are_never_written(tmp_path: Path) -> None:
    with Progress(tmp_path, "gan", 0, 9) as progress:
        progress.advance(1, loss=float("nan"))
        progress.advance(2, loss=float("inf"), rate=1.0)
    (record,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert record.keys() == {"time", "phase", "step", "rate"}


# In a process of its own, as the limit holds for all files of a process.
ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from emotion.training.progress import Progress
folder = Path(sys.argv[1])
with Progress(folder, "gan", 0, 9) as progress:
    progress.advance(1, loss=1.0)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / "metrics.jsonl").stat().st_size + 10, resource.RLIM_INFINITY))
    progress.advance(2, loss=2.0)
    progress.warn_once("checkpoint", "there is no room")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    progress.advance(3, loss=3.0)
"""


def test_lines_that_a_full_disk_refused_are_written_once_there_is_room(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", ON_A_FULL_DISK, tmp_path], check=True)
    assert recorded_steps(tmp_path) == [1, 2, 2, 3]


def test_numbers_that_come_late_keep_their_step_and_time(tmp_path: Path) -> None:
    with Progress(tmp_path, "gan", 0, 9) as progress:
        progress.advance(5)
        progress.record(3, {"loss": 0.5}, seconds=12.3456)
        progress.warn_once("late", "a text", step=3)
        progress.warn_once("now", "a text")
        # A resumed phase would cut the file before it.
        with pytest.raises(AssertionError, match="step 4 is recorded after"):
            progress.record(4, {"loss": 0.5}, seconds=13.0)
    assert recorded_steps(tmp_path) == [3, 3, 5]
    assert progress.records[0]["time"] == 12.346


def test_numbers_are_fetched_about_two_hundred_times_and_at_the_end(tmp_path: Path) -> None:
    with Progress(tmp_path, "gan", 0, 1001) as progress:
        due = [step for step in range(1, 1002) if progress.due(step)]
    assert len(due) == 201
    assert due[-1] == 1001


def test_off_a_terminal_the_end_is_logged_once_with_its_rate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "emotion"), Progress(tmp_path, "vit", 0, 2) as progress:
        progress.advance(1, loss=0.25)
        progress.advance(2, loss=0.125)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith("phase=vit step=2/2 loss=0.125 steps_per_second=")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """clock(seconds) lets time pass."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_the_rate_is_that_of_the_steps_without_the_time_of_pauses(
    tmp_path: Path, clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "emotion"), Progress(tmp_path, "vit", 0, 100) as progress:
        clock(4)
        with progress.paused():
            clock(60)
        progress.advance(8)
        # A validation without a step, of any length, has no rate, and does not change that of the steps after it.
        with progress.paused():
            clock(30)
        progress.advance(8, validation_ccc=0.5)
        clock(10)
        progress.advance(18)
    rates = [record.getMessage().partition("steps_per_second=")[2].split(" memory")[0] for record in caplog.records]
    assert rates == ["2 seconds_to_go=46", "", "1 seconds_to_go=82"]


def test_a_phase_of_one_step_has_no_rate(
    tmp_path: Path, clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "emotion"), Progress(tmp_path, "quality", 0, 1) as progress:
        clock(0.001)
        progress.advance(1)
    assert [record.getMessage() for record in caplog.records] == ["phase=quality step=1/1"]
