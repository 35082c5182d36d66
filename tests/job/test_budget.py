"""Budgets, from the records of attempts to whole jobs whose trainings are far longer."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emotion.errors import ModelError
from emotion.files import append_json_line
from job.config import BudgetConfig
from job.pipeline.folders import JobFolders
from job.pipeline.phases import PHASES
from job.pipeline.reproduce import spec_to_reproduce
from job.pipeline.runner import run_job
from job.preemption import StopRequest
from job.run_folder.attempts import ATTEMPTS, seconds_of_attempts
from job.spec.load import load_spec
from job.spec.model import fingerprint
from job.unattended.budget import Budget, training_seconds
from tests.conftest import TINY, TinyRun, terminated_in_gan
from tests.job.soak import promised_bytes
from tests.manifests import manifest_with

LONG = ("gan.epochs=1000000", "vit.epochs=1000000", "vit.patience_epochs=1000000")


FIELDS = {"start": {"host": "a", "pid": 1}, "end": {"reason": "Interrupted", "exit_code": 75}, "spent": {}}


def write_events(run_folder: Path, *events: dict[str, Any]) -> None:
    """With the fields that all events of a kind have."""
    lines = [json.dumps({"time": 1.0, **FIELDS[event["event"]], **event}) + "\n" for event in events]
    (run_folder / ATTEMPTS).write_text("".join(lines))


@pytest.mark.parametrize(("minutes", "seconds"), [(1, 30), (2, 60), (10, 9 * 60), (60, 54 * 60), (480, 460 * 60)])
def test_trainings_leave_time_for_what_follows(minutes: float, seconds: float) -> None:
    assert training_seconds(BudgetConfig(minutes=minutes)) == pytest.approx(seconds)


def test_a_budget_counts_all_attempts_and_of_killed_ones_what_they_have_recorded(tmp_path: Path) -> None:
    write_events(
        tmp_path,
        {"event": "start", "attempt": 1, "monotonic": 5.0},
        {"event": "spent", "attempt": 1, "seconds": 30.0},
        {"event": "spent", "attempt": 1, "seconds": 60.0},
        {"event": "start", "attempt": 2, "monotonic": 9.0},
        {"event": "spent", "attempt": 2, "seconds": 30.0},
        {"event": "end", "attempt": 2, "seconds": 40.0},
        # Another machine, which counts from 1 again; killed at once.
        {"event": "start", "attempt": 1, "monotonic": 7.0},
    )
    events = [json.loads(line) for line in (tmp_path / ATTEMPTS).read_text().splitlines()]
    assert seconds_of_attempts(events) == [60, 40, 0]
    assert seconds_of_attempts(events, now=8.5) == [60, 40, 1.5]
    assert 100 <= Budget(BudgetConfig(minutes=5), tmp_path, 2).seconds < 110


@pytest.mark.parametrize(
    ("used", "gan_ends", "vit_ends"), [(0, False, False), (149, False, False), (151, True, False), (271, True, True)]
)
def test_the_gan_gets_half_of_the_time_that_is_left_and_the_vit_the_rest(
    tmp_path: Path, used: float, gan_ends: bool, vit_ends: bool
) -> None:
    """Of 5 minutes one is reserved, so trainings end after 240 s; the GAN has begun after 60 s."""
    began = {"event": "spent", "attempt": 1, "seconds": 60.0, "phase": "gan", "total": 60.0}
    write_events(tmp_path, {"event": "start", "attempt": 1}, began, {"event": "end", "attempt": 1, "seconds": used})
    budget = Budget(BudgetConfig(minutes=5), tmp_path, 2)
    assert (budget.is_used_up("gan")(1), budget.is_used_up("vit")(1)) == (gan_ends, vit_ends)


@pytest.mark.parametrize(("phase", "share"), [("gan", 120), ("vit", 240)])
def test_a_training_that_a_budget_has_ended_is_ended_again_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, share: float
) -> None:
    """The last record of the thread is of before the end."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    write_events(tmp_path, {"event": "start", "attempt": 1})
    ends = Budget(BudgetConfig(minutes=5), tmp_path, 1).is_used_up(phase)
    now += share - 0.5
    assert not ends(1)
    now += 0.5
    assert ends(2)
    append_json_line(tmp_path / ATTEMPTS, {"time": 2.0, "event": "start", "attempt": 2, "host": "a", "pid": 1})
    assert Budget(BudgetConfig(minutes=5), tmp_path, 2).is_used_up(phase)(2)


def test_without_a_budget_keys_are_those_of_before_and_with_one_only_trainings_are_others(tmp_path: Path) -> None:
    none, price, some = (load_spec(TINY, list(sets)) for sets in ((), ("budget.price_per_hour=1",), ("budget.minutes=2",)))
    assert fingerprint(none) == fingerprint(price) != fingerprint(some)
    assert "budget" not in none.result_fields()
    from job.pipeline.fetch_inputs import FetchedInputs

    fetched = FetchedInputs(None, None)
    parts = [
        [phase.name for phase in PHASES if "budget_minutes" in phase.key_parts(s, fetched, lambda: False)] for s in (none, some)
    ]
    assert parts == [[], ["gan", "vit"]]


def test_what_a_budget_has_ended_is_reproduced_by_steps_and_not_by_the_clock(tmp_path: Path) -> None:
    spec = load_spec(TINY, ["budget.minutes=2", "budget.price_per_hour=3"])
    stops = {"gan": {"step": 7, "steps": 20}}
    phases = {"vit": {"key": "", "inputs": {}, "measured": {}, "notes": {"stopped_by_budget": stops}, "outputs_sha256": ""}}
    again = spec_to_reproduce(manifest_with(spec=spec.model_dump(mode="json"), phases=phases), tmp_path, ())
    assert again.budget.stop_after == (7, None)
    assert fingerprint(again) == fingerprint(spec)
    budget = Budget(again.budget, tmp_path, 1)
    assert [budget.is_used_up("gan")(step) for step in (6, 7)] == [False, True]
    assert not budget.is_used_up("vit")(10**9)
    assert not (tmp_path / ATTEMPTS).exists()


@pytest.mark.full
def test_a_job_with_a_small_budget_publishes_an_honest_model_that_is_reproduced(
    tiny_run: TinyRun, emotion_job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Its trainings would take days. It is stopped once and killed once."""
    work, scratch, settings = (
        tmp_path / "work",
        tiny_run.work / "scratch",
        ("budget.minutes=0.6", "budget.price_per_hour=36", *LONG),
    )
    arguments = [
        str(TINY),
        "--work",
        str(work),
        "--scratch",
        str(scratch),
        *(word for one in settings for word in ("--set", one)),
    ]
    command = [sys.executable, "-m", "job", "run", *arguments]
    assert terminated_in_gan(command)[0] == 75
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "phase=vit begins" in line)
        os.kill(process.pid, signal.SIGKILL)
    found = emotion_job("run", *arguments)
    assert found.returncode == 0, found.stderr
    (published,) = (work / "published").iterdir()
    manifest, metrics = (json.loads((published / name).read_text()) for name in ("manifest.json", "metrics.json"))
    stopped = manifest["budget"]["stopped"]
    assert metrics["stopped_by_budget"] == stopped
    assert set(stopped) == {"gan", "vit"}
    assert all(0 < stop["step"] < stop["steps"] for stop in stopped.values())
    assert stopped["gan"]["step"] == json.loads((published / "gan" / "config.json").read_text())["steps"]
    assert [manifest["comparable"][f"{phase}.stopped_after"] for phase in ("gan", "vit")] == [
        stopped[phase]["step"] for phase in ("gan", "vit")
    ]
    assert {warning["phase"] for warning in manifest["warnings"] if warning["warning"] == "budget"} == {"gan", "vit"}
    assert "stopped by budget.minutes" in (published / "report.html").read_text()
    assert manifest["budget"]["used_minutes"] > 0.3  # so long it has to train
    assert manifest["budget"]["price"] == pytest.approx(0.6 * manifest["budget"]["used_minutes"], abs=0.01)

    again = emotion_job("reproduce", published, "--work", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    (reproduced,) = (tmp_path / "again").glob("*/published/*")
    assert promised_bytes(reproduced) == promised_bytes(published)


def test_a_budget_that_ends_before_there_is_a_model_ends_the_job_with_an_error(tmp_path: Path) -> None:
    folders = JobFolders(tmp_path / "work", tmp_path / "scratch")
    with pytest.raises(ModelError, match="are used up in stage, before there is a model, so nothing is published"):
        run_job(load_spec(TINY, ["budget.minutes=0.0001"]), folders, "stage", False, StopRequest())
