"""A sweep without SLURM."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.conftest import TINY


def local(sweep: Path, work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "slurm", "local", str(sweep), "--work", str(work), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@contextlib.contextmanager
def started(folder: Path, phase: str) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """A sweep of one long task whose job has begun the phase, and its standard error from there on."""
    sweep = folder / "sweep.yaml"
    sweep.write_text(f"{{name: one, spec: {TINY}, folds: [0], set: [gan.epochs=2000]}}", encoding="utf-8")
    command = [sys.executable, "-m", "slurm", "local", str(sweep), "--work", str(folder / "work")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(f"phase={phase} begins" in line for line in process.stderr)
        yield process, process.stderr


def test_a_task_that_fails_ends_the_sweep_with_its_exit_code(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(f"{{name: two, spec: {TINY}, folds: [0, 1], set: [data.source={tmp_path / 'absent'}]}}", encoding="utf-8")
    found = local(sweep, tmp_path / "work")
    assert found.returncode == 65, found.stderr
    assert "task 1 of 2: base seed=0 fold=0" in found.stderr
    assert "task 2" not in found.stderr


@pytest.mark.full
def test_a_stop_signal_reaches_the_running_job_which_saves_its_state(tmp_path: Path) -> None:
    with started(tmp_path, "gan") as (process, output):
        process.terminate()
        rest = output.read()  # to the end of the job, too, which has the same pipe
    assert process.returncode == 75, rest
    assert list((tmp_path / "work").glob("tiny-*/gan-*/checkpoints/step-*.json"))


def test_a_task_that_was_killed_ends_the_sweep_as_in_a_shell(tmp_path: Path) -> None:
    with started(tmp_path, "stage") as (process, output):
        (job,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(job), signal.SIGKILL)
        rest = output.read()
    assert process.returncode == 137, rest
    assert "emotion-job run was killed by signal 9, perhaps for lack of memory. The same command resumes." in rest


@pytest.mark.full
def test_all_tasks_run_and_are_collected_and_a_second_call_computes_nothing(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    settings = "[{name: base}, {name: none, set: [vit.synthetic_share=0]}]"
    sweep.write_text(f"{{name: two, spec: {TINY}, folds: [0], settings: {settings}}}", encoding="utf-8")
    work = tmp_path / "work"
    first, second = (local(sweep, work, "--set", "evaluate.bootstrap_samples=101") for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert "phase=vit begins" in first.stderr
    assert "begins" not in second.stderr
    (collected,) = work.glob("sweeps/two-*/collected/collected.json")
    settings_found = json.loads(collected.read_text())["settings"]
    assert [setting["label"] for setting in settings_found] == ["vit.synthetic_share=0.0", "vit.synthetic_share=0.25"]
    # One GAN serves both.
    assert len(list(work.glob("*/gan-*"))) == 1
