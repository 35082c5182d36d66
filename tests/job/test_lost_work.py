"""What the end of an attempt cost, by files whose times are set, and in a job that is really killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from emotion.files import read_json, write_json
from job.pipeline.phases import PROGRESS_FILES
from job.results.provenance import attempt_records
from job.run_folder.attempts import ATTEMPTS
from job.run_folder.lost_work import cost_of_last_attempt, last_sign_of_life
from tests.conftest import TINY, TinyRun


def event(kind: str, time: float, attempt: int = 1, **more: object) -> str:
    return json.dumps({"event": kind, "time": time, "attempt": attempt, "host": "a", "pid": 1, **more}) + "\n"


def touched(path: Path, time: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    os.utime(path, (time, time))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose only attempt began at 1000, entered the phase gan at 1010, saved at 1050 and wrote to its lease at 1065."""
    run = tmp_path / "run"
    touched(run / "gan-1" / "checkpoints" / "step-7.json", 1050.0)
    touched(run / "gan-1" / "metrics.jsonl", 1064.0)  # what is reported is not saved
    (run / ATTEMPTS).write_text(event("start", 1000.0))
    write_json(run / "progress.json", {"phase": "gan", "state": "running", "folder": "gan-1", "time": 1010.0})
    os.utime(run / "progress.json", (1010, 1010))
    touched(run / ".lease-1.json", 1065.0)
    return run


def cost(run: Path) -> dict[str, float]:
    return cost_of_last_attempt(run, run.parent / "scratch", PROGRESS_FILES, last_sign_of_life(run))


def test_a_killed_attempt_lost_what_came_after_its_last_checkpoint(run: Path) -> None:
    assert cost(run) == {"lived_seconds": 65.0, "lost_seconds": 15.0}


def test_work_before_the_first_checkpoint_of_an_attempt_is_lost_from_where_the_phase_began(run: Path) -> None:
    touched(run / "gan-1" / "checkpoints" / "step-7.json", 900.0)  # of an attempt before
    assert cost(run)["lost_seconds"] == 55.0


def test_an_attempt_that_was_asked_to_stop_lost_what_it_could_not_save(run: Path) -> None:
    with (run / ATTEMPTS).open("a") as file:
        file.write(event("end", 1051.5, reason="Interrupted", exit_code=75))
    assert cost(run) == {"lost_seconds": 1.5}


def test_between_two_phases_nothing_is_lost(run: Path) -> None:
    write_json(run / "progress.json", {"phase": "gan", "state": "done", "folder": "gan-1", "time": 1065.0})
    os.utime(run / "progress.json", (1010, 1010))
    assert cost(run)["lost_seconds"] == 0.0


def test_files_in_scratch_count_for_the_phases_that_keep_them_there(run: Path) -> None:
    write_json(run / "progress.json", {"phase": "features", "state": "running", "folder": "features-1", "time": 1010.0})
    os.utime(run / "progress.json", (1010, 1010))
    touched(run.parent / "scratch" / "features-1" / ".songs.jsonl", 1060.0)
    touched(run.parent / "scratch" / "features-2" / ".songs.jsonl", 1064.0)  # of another job
    assert cost(run)["lost_seconds"] == 5.0


def test_the_work_of_a_phase_whose_folder_is_gone_is_lost(run: Path) -> None:
    shutil.rmtree(run / "gan-1")
    assert cost(run)["lost_seconds"] == 55.0


def test_what_happened_on_another_machine_is_not_known(run: Path) -> None:
    with (run / ATTEMPTS).open("a") as file:
        file.write(event("end", 1051.5, reason="Interrupted", exit_code=75) + event("start", 2000.0, 2))
    assert cost(run) == {}
    assert cost_of_last_attempt(run.parent / "empty", run, PROGRESS_FILES, 0.0) == {}


def test_a_start_says_what_the_attempt_before_it_cost() -> None:
    events = [event("start", 0.0), event("start", 100.0, 2, lived_seconds=65.0, lost_seconds=15.0), event("start", 200.0, 3)]
    killed, unknown, _ = attempt_records([json.loads(line) for line in events], now=0.0)
    assert (killed.reason, killed.duration_seconds, killed.lost_seconds) == ("killed", 65.0, 15.0)
    assert (unknown.reason, unknown.duration_seconds, unknown.lost_seconds) == ("killed", None, None)


@pytest.mark.full
def test_a_job_that_is_killed_says_in_manifest_and_report_what_it_lost(
    tiny_run: TinyRun, emotion_job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    arguments = ["run", str(TINY), "--work", str(tmp_path), "--scratch", str(tiny_run.work / "scratch")]
    with subprocess.Popen([sys.executable, "-m", "job", *arguments], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "phase=gan begins" in line)
        process.send_signal(signal.SIGKILL)
    found = emotion_job(*arguments)
    assert found.returncode == 0, found.stderr
    (published,) = (tmp_path / "published").iterdir()
    killed, last = read_json(published / "manifest.json")["attempts"]
    assert killed["reason"] == "killed"
    assert 0 <= killed["lost_seconds"] <= killed["duration_seconds"]
    assert "lost_seconds" not in last
    page = (published / "report.html").read_text(encoding="utf-8")
    assert "2 attempts of" in page
    assert "a goodput of" in page


@pytest.mark.full
def test_a_job_that_is_killed_and_loses_the_disk_of_its_machine_starts_again(
    emotion_job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    arguments = ["run", str(TINY), "--work", str(tmp_path / "work"), "--scratch", str(tmp_path / "scratch")]
    with subprocess.Popen([sys.executable, "-m", "job", *arguments], stderr=subprocess.DEVNULL) as process:
        while not any('"stage"' in path.read_text() for path in tmp_path.glob("work/*/progress.json")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    shutil.rmtree(tmp_path / "scratch")
    found = emotion_job(*arguments, "--until", "features")
    assert found.returncode == 0, found.stderr
