"""The record of attempts, which end by real signals here."""

import json
import os
import signal
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from emotion.errors import Interrupted, ModelError, StorageError
from job.pipeline.phases import PROGRESS_FILES
from job.results.provenance import attempt_records
from job.run_folder.attempts import (
    ATTEMPTS,
    MAX_ATTEMPTS_WITHOUT_PROGRESS,
    MAX_HANGS_WITHOUT_PROGRESS,
    paired,
    read_attempts,
    recorded_attempt,
)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run" / "gan-1" / "checkpoints").mkdir(parents=True)
    return tmp_path / "run"


@pytest.fixture
def numbers() -> Iterator[int]:
    return count(1)


def attempt(run_folder: Path, number: int, ending: BaseException | None = None) -> None:
    with recorded_attempt(run_folder, number, run_folder.parent / "scratch", PROGRESS_FILES, dict):
        if ending is not None:
            raise ending


def killed(run_folder: Path, number: int) -> None:
    child = os.fork()
    if child == 0:
        with recorded_attempt(run_folder, number, run_folder.parent / "scratch", PROGRESS_FILES, dict):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def kill_times(times: int, run_folder: Path, numbers: Iterator[int]) -> None:
    for _ in range(times):
        killed(run_folder, next(numbers))


@pytest.mark.parametrize("kind", [StorageError, ValueError])
def test_the_message_of_an_attempt_has_no_secret(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "FwoGZXIvYcanary")
    with pytest.raises(kind):
        attempt(run_folder, 1, kind("Invalid header value b'FwoGZXIvYcanary'"))
    assert "canary" not in (run_folder / ATTEMPTS).read_text()
    assert "[AWS_SESSION_TOKEN]" in read_attempts(run_folder)[-1]["message"]


def test_an_attempt_is_recorded_with_its_start_and_how_it_ended(run_folder: Path) -> None:
    attempt(run_folder, 1)
    with pytest.raises(StorageError):
        attempt(run_folder, 2, StorageError("the disk is full"))
    killed(run_folder, 3)
    events = read_attempts(run_folder)
    assert [(event["attempt"], event["event"], event.get("exit_code")) for event in events] == [
        (1, "start", None),
        (1, "end", 0),
        (2, "start", None),
        (2, "end", 69),
        (3, "start", None),
    ]
    assert events[3]["reason"] == "StorageError"
    assert events[3]["message"] == "the disk is full"


def test_durations_are_not_those_of_a_clock_that_is_set_while_the_job_runs(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    day = 86400.0
    with recorded_attempt(run_folder, 1, run_folder.parent / "scratch", PROGRESS_FILES, dict):
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now - day)
    start, end = read_attempts(run_folder)
    assert end["time"] < start["time"]
    finished, running = attempt_records([start, end, start | {"attempt": 2}], time.monotonic())
    assert finished.duration_seconds is not None
    assert running.duration_seconds is not None
    assert 0 <= finished.duration_seconds < day
    assert 0 <= running.duration_seconds < day


def test_after_ten_killed_attempts_without_progress_the_run_ends(run_folder: Path, numbers: Iterator[int]) -> None:
    kill_times(MAX_ATTEMPTS_WITHOUT_PROGRESS - 1, run_folder, numbers)
    attempt(run_folder, next(numbers), None)
    kill_times(MAX_ATTEMPTS_WITHOUT_PROGRESS, run_folder, numbers)
    with pytest.raises(ModelError, match="the last 10 attempts were killed before they made progress"):
        attempt(run_folder, next(numbers))
    # Whoever runs it again has looked into it.
    attempt(run_folder, next(numbers))


@pytest.mark.parametrize(
    "new",
    [
        "run/gan-1/receipt.json",
        "run/gan-1/checkpoints/step-7.json",
        "run/synth-1/.songs.jsonl",
        "scratch/stage-1/audio/7.mp3",
        "scratch/features-1/.songs.jsonl",
    ],
)
def test_a_new_progress_file_in_between_counts(run_folder: Path, numbers: Iterator[int], new: str) -> None:
    kill_times(MAX_ATTEMPTS_WITHOUT_PROGRESS - 1, run_folder, numbers)
    path = run_folder.parent / new
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("new")
    kill_times(MAX_ATTEMPTS_WITHOUT_PROGRESS - 1, run_folder, numbers)
    attempt(run_folder, next(numbers))


@pytest.mark.parametrize(
    "nothing",
    [
        "run/.lease-9.json",
        "run/job.log",
        "run/progress.json",
        "run/gan-1/metrics.jsonl",
        "run/gan-1/progress.json",
        "scratch/stage-1/audio/.7.mp3.part",
    ],
)
def test_files_that_every_attempt_writes_are_no_progress(run_folder: Path, numbers: Iterator[int], nothing: str) -> None:
    kill_times(MAX_ATTEMPTS_WITHOUT_PROGRESS - 1, run_folder, numbers)
    path = run_folder.parent / nothing
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("the tenth attempt writes this")
    kill_times(1, run_folder, numbers)
    with pytest.raises(ModelError):
        attempt(run_folder, next(numbers))


def test_a_checkpoint_saved_a_second_time_is_no_progress(run_folder: Path, numbers: Iterator[int]) -> None:
    step = run_folder / "gan-1" / "checkpoints" / "step-7.json"
    for _ in range(MAX_ATTEMPTS_WITHOUT_PROGRESS):
        step.write_text("{}")
        killed(run_folder, next(numbers))
    with pytest.raises(ModelError):
        attempt(run_folder, next(numbers))


def test_clean_stops_do_not_count(run_folder: Path, numbers: Iterator[int]) -> None:
    for _ in range(3 * MAX_ATTEMPTS_WITHOUT_PROGRESS):
        with pytest.raises(Interrupted):
            attempt(run_folder, next(numbers), Interrupted("stopped"))
    kill_times(MAX_ATTEMPTS_WITHOUT_PROGRESS - 1, run_folder, numbers)
    with pytest.raises(Interrupted):
        attempt(run_folder, next(numbers), Interrupted("stopped"))
    kill_times(1, run_folder, numbers)
    with pytest.raises(ModelError):
        attempt(run_folder, next(numbers))


def hung(run_folder: Path, number: int) -> None:
    """As the watchdog ends an attempt."""
    child = os.fork()
    if child == 0:
        with recorded_attempt(run_folder, number, run_folder.parent / "scratch", PROGRESS_FILES, dict) as record_hang:
            record_hang("no progress")
            os._exit(Interrupted.exit_code)
    assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == Interrupted.exit_code


def test_a_run_that_always_hangs_ends_with_an_error_unless_it_makes_progress(run_folder: Path, numbers: Iterator[int]) -> None:
    for _ in range(MAX_HANGS_WITHOUT_PROGRESS - 1):
        hung(run_folder, next(numbers))
    (run_folder / "gan-1" / "checkpoints" / "step-7.json").write_text("{}")
    for _ in range(MAX_HANGS_WITHOUT_PROGRESS - 1):
        hung(run_folder, next(numbers))
        killed(run_folder, next(numbers))
    with pytest.raises(Interrupted):
        attempt(run_folder, next(numbers), Interrupted("stopped"))
    hung(run_folder, next(numbers))
    with pytest.raises(ModelError, match="the last 3 attempts hung before they made progress"):
        attempt(run_folder, next(numbers))
    assert read_attempts(run_folder)[1] | {"time": 0, "seconds": 0} == {
        **{"attempt": 1, "event": "end", "exit_code": 75, "message": "no progress", "reason": "Hung", "seconds": 0, "time": 0}
    }
    attempt(run_folder, next(numbers))


def test_incomplete_lines_of_a_dying_node_are_skipped(run_folder: Path) -> None:
    attempt(run_folder, 1)
    with (run_folder / ATTEMPTS).open("a") as file:
        file.write('7\n{"time": 3, "eve')
    attempt(run_folder, 2)
    assert [(event["attempt"], event["event"]) for event in read_attempts(run_folder)] == [
        (1, "start"),
        (1, "end"),
        (2, "start"),
        (2, "end"),
    ]


@pytest.mark.parametrize(
    "changed",
    [
        *({"attempt": None}, {"attempt": [1]}, {"time": "x"}, {"event": 5}, {"host": None}, {"lost_seconds": []}),
        *({"event": "end"}, {"event": "end", "reason": "done", "exit_code": "x"}, {"event": "spent", "phase": "gan"}),
    ],
)
def test_a_line_with_a_damaged_field_is_skipped(run_folder: Path, changed: dict[str, Any]) -> None:
    start = {"event": "start", "time": 1.0, "attempt": 1, "host": "a", "pid": 1}
    (run_folder / ATTEMPTS).write_text(json.dumps(start) + "\n" + json.dumps({**start, "attempt": 2, **changed}) + "\n")
    assert read_attempts(run_folder) == [start]


def test_an_end_belongs_to_the_last_start_with_its_number() -> None:
    def event(attempt: int, kind: str, host: str) -> dict[str, object]:
        return {"attempt": attempt, "event": kind, "host": host}

    killed_on_a, begun_on_b, ended_on_b, killed_on_c = (
        event(1, "start", "a"),
        event(1, "start", "b"),
        event(1, "end", "b"),
        event(1, "start", "c"),
    )
    lost = event(7, "end", "a")
    assert paired([lost, killed_on_a, begun_on_b, ended_on_b, killed_on_c]) == [
        (killed_on_a, None),
        (begun_on_b, ended_on_b),
        (killed_on_c, None),
    ]


def test_a_machine_that_counts_from_one_again_does_not_hide_earlier_killed_attempts(run_folder: Path) -> None:
    for _ in range(MAX_ATTEMPTS_WITHOUT_PROGRESS - 1):
        killed(run_folder, 1)
    with pytest.raises(Interrupted):
        attempt(run_folder, 1, Interrupted("stopped"))
    killed(run_folder, 2)
    with pytest.raises(ModelError):
        attempt(run_folder, 3)
