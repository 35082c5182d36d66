"""What is submitted, and what is left where that fails: on a login node whose commands are a few lines each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from emotion.errors import SpecError, StorageError
from slurm.operations import resubmit
from slurm.slurm_cli import Site, accounted
from slurm.status import statuses
from slurm.submit import make_sweep_folder, scripts, submit_tasks
from slurm.sweep import Sweep, load_sweep
from slurm.sweep_folder import SweepFolder, append_event, submitting
from tests.conftest import TINY
from tests.slurm.test_container import cluster_of

SITE = Site({"MaxArraySize": "1001"}, {"low": {"Default": "YES", "State": "UP"}})
SBATCH = """
count=$(cat "$STATE/count" 2>/dev/null || echo 0)
[ "$count" = "$SBATCH_FAILS_AT" ] && { echo "no such thing" >&2; exit 1; }
echo $((count + 1)) > "$STATE/count"
echo "Submitted batch job $((count + 11))"
"""
SCONTROL = """
case "$*" in
    *config) echo "MaxArraySize = 1001" ;;
    *) echo "PartitionName=low Default=YES State=UP" ;;
esac
"""
SQUEUE = """cat "$STATE/queue" 2>/dev/null || true"""
SCANCEL = """echo "$@" >> "$STATE/cancelled"; exit "${SCANCEL_CODE:-0}\""""


class LoginNode:
    """With sbatch, squeue, scancel and scontrol. sbatch gives the ids 11, 12, …"""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place, self.state = place, place / "state"
        self.state.mkdir()
        self.patch = monkeypatch
        for name, text in (
            ("sbatch", SBATCH),
            ("squeue", SQUEUE),
            ("scancel", SCANCEL),
            ("srun", ""),
            ("scontrol", SCONTROL),
        ):
            self.program(name, text)
        monkeypatch.setenv("PATH", f"{place / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setenv("STATE", str(self.state))
        monkeypatch.setenv("SBATCH_FAILS_AT", "never")

    def program(self, name: str, text: str) -> None:
        path = self.place / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        path.chmod(0o755)

    def queue(self, *jobs: str) -> None:
        (self.state / "queue").write_text("".join(f"{job}|RUNNING|None|node1\n" for job in jobs), encoding="utf-8")

    def cancelled(self) -> str:
        path = self.state / "cancelled"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def sweep(self, *folds: int) -> Sweep:
        path = self.place / "sweep.yaml"
        path.write_text(json.dumps({"name": "one", "spec": str(TINY), "folds": folds}), encoding="utf-8")
        return load_sweep(path)

    def folder(self, sweep: Sweep) -> SweepFolder:
        work = str(self.place / "work")
        cluster = cluster_of(work=work, work_is_shared=True, runtime="bare", image=None, python=sys.executable)
        return make_sweep_folder(sweep, self.place / "sweep.yaml", cluster)


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoginNode:
    return LoginNode(tmp_path, monkeypatch)


def test_features_are_prepared_by_a_task_that_is_submitted_again_and_by_none_that_is_at_work(login: LoginNode) -> None:
    sweep = login.sweep(0, 1, 2)
    folder = login.folder(sweep)
    first = submit_tasks(folder, sweep.specs, SITE)
    assert [(job.what, job.index, job.job) for job in first.jobs] == [
        *(("prepare", 0, "11"), ("task", 0, "12_0"), ("task", 1, "12_1"), ("task", 2, "12_2"), ("collect", 0, "13"))
    ]
    login.queue("12_0")
    second, live = resubmit(folder, SITE, None)
    assert live == [0]
    assert second is not None
    assert [(job.what, job.index) for job in second.jobs] == [
        *(("prepare", 1), ("task", 1), ("task", 2), ("collect", 0)),
    ]


def test_what_was_submitted_before_something_failed_is_cancelled_or_told_of(login: LoginNode) -> None:
    sweep = login.sweep(0, 1)
    folder = login.folder(sweep)
    login.patch.setenv("SBATCH_FAILS_AT", "2")
    with pytest.raises(StorageError, match=r"no such thing.*Nothing of this submission is left"):
        submit_tasks(folder, sweep.specs, SITE)
    assert login.cancelled() == "--quiet 11 12\n"
    assert folder.submissions() == []

    # What sbatch has taken and nobody could write down.
    (login.state / "count").unlink()
    (folder.path / "submissions").rmdir()
    (folder.path / "submissions").touch()
    with pytest.raises(StorageError, match="submissions"):
        submit_tasks(folder, sweep.specs, SITE)
    assert login.cancelled().splitlines()[1:] == ["--quiet 11"]
    (folder.path / "submissions").unlink()

    login.patch.setenv("SCANCEL_CODE", "1")
    (login.state / "count").unlink()
    with pytest.raises(StorageError, match=r"no such thing.*Jobs 11, 12 are left in the queue"):
        submit_tasks(folder, sweep.specs, SITE)
    assert {job.job for job in folder.submissions()[0].jobs} == {"11", "12_0", "12_1"}


def test_a_job_is_ours_whatever_lies_in_the_current_folder(login: LoginNode) -> None:
    folder = login.folder(login.sweep(0))
    assert " -P -u -m submitit" in scripts(login.sweep(0), folder.cluster, SITE)


def test_two_who_submit_at_once_do_not_submit_twice(login: LoginNode) -> None:
    folder = login.folder(login.sweep(0))
    with submitting(folder.path), pytest.raises(SpecError, match="somebody is submitting"), submitting(folder.path):
        pass
    # Also after a failure.
    with pytest.raises(StorageError), submitting(folder.path):
        raise StorageError
    with submitting(folder.path):
        pass


@pytest.mark.parametrize("command", ["submit", "resubmit"])
def test_whoever_comes_second_is_told(login: LoginNode, command: str) -> None:
    sweep = login.sweep(0)
    folder = login.folder(sweep)
    record = json.loads((folder.path / "sweep.json").read_text(encoding="utf-8"))
    cluster_file = login.place / "cluster.yaml"
    cluster_file.write_text(json.dumps(record["cluster"]), encoding="utf-8")
    rest = ["submit", str(login.place / "sweep.yaml"), "--cluster", str(cluster_file)]
    argv = [sys.executable, "-m", "slurm", *(rest if command == "submit" else ["resubmit", str(folder.path)])]
    with submitting(folder.path):
        found = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (found.returncode, "somebody is submitting" in found.stderr) == (64, True), found.stderr
    assert not (login.state / "count").exists()


def test_other_conditions_are_for_what_is_submitted_and_not_for_what_is_at_work(login: LoginNode) -> None:
    sweep = login.sweep(0, 1)
    folder = login.folder(sweep)
    submit_tasks(folder, sweep.specs, SITE)
    other = folder.cluster.model_copy(update={"cpus": 7})
    login.queue("12_0")
    with pytest.raises(SpecError, match="jobs of this sweep are in the queue"):
        resubmit(folder, SITE, other)
    assert SweepFolder(folder.path).cluster.cpus == 4
    login.queue()
    login.patch.setenv("SBATCH_FAILS_AT", "4")
    with pytest.raises(StorageError, match="no such thing"):
        resubmit(SweepFolder(folder.path), SITE, other)
    assert SweepFolder(folder.path).cluster.cpus == 4
    login.patch.setenv("SBATCH_FAILS_AT", "never")
    resubmit(SweepFolder(folder.path), SITE, other)
    assert SweepFolder(folder.path).cluster.cpus == 7


def test_a_result_that_is_gone_is_not_done(login: LoginNode) -> None:
    sweep = login.sweep(0)
    folder = login.folder(sweep)
    submission = submit_tasks(folder, sweep.specs, SITE)
    job = next(job.job for job in submission.jobs if job.what == "task")
    append_event(folder.attempts_path("task", 0), {"event": "end", "kind": "done", "job": job, "submission": 1})

    def state() -> str:
        return next(one.state for one in statuses(folder) if one.what == "task")

    assert state() == "lost"
    manifest = Path(folder.tasks[0].published) / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    assert state() == "done"


def test_the_accounting_is_asked_for_arrays_and_not_for_every_task(login: LoginNode) -> None:
    login.program("sacct", 'echo "$@" > "$STATE/asked"; echo "12_0|COMPLETED"; echo "12_[1-9999]|CANCELLED by 0"')
    found = accounted([f"12_{index}" for index in range(9000)])
    assert (found["12_0"], found["12_8999"], len(found)) == ("COMPLETED", "CANCELLED", 9000)
    assert "-j 12 -o" in (login.state / "asked").read_text(encoding="utf-8")
