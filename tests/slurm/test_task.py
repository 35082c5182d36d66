"""An attempt on a node on which SLURM cannot be asked. The job is a program of a few lines that ends as it is told."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from emotion.files import read_json_lines
from slurm.submit import make_sweep_folder
from slurm.sweep import load_sweep
from slurm.sweep_folder import SweepFolder, What
from slurm.task import Attempt, NodeTask
from tests.conftest import TINY
from tests.slurm.cluster import wait_for
from tests.slurm.test_container import cluster_of

JOB = """#!{python}
import json, os, signal, sys, time
out = {out!r}
def hear(number, _frame):
    with open(out, "a") as file:
        file.write(signal.Signals(number).name + "\\n")
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, hear)
with open(out, "a") as file:
    file.write(f"began {{os.environ['SLURM_JOB_END_TIME']}}\\n")
while {waits} and len(open(out).readlines()) < 2:
    time.sleep(0.05)
time.sleep({waits} and 0.5)
says = {says!r}
if says is not None:
    os.makedirs({run!r}, exist_ok=True)
    with open({run!r} + "/attempts.jsonl", "a") as file:
        file.write(json.dumps({{"event": "end", "time": round(time.time(), 3), "exit_code": says}}) + "\\n")
sys.exit({code})
"""

SCONTROL = """#!/bin/sh
case $1 in
    requeue) exec /bin/mkdir -p {requeued} ;;
    *) echo "JobId=7 JobState=RUNNING Restarts=0 EndTime={end}{preempt}" ;;
esac
"""
HOUR = 3600.0
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"


class Node:
    """values: of the cluster file; retries: its section of that name."""

    def __init__(
        self, place: Path, values: Mapping[str, Any] | None = None, settings: Any = None, **retries: int
    ) -> None:
        self.place, self.out = place, place / "out"
        self.programs = place / "programs"
        self.programs.mkdir()
        self.requeued = place / "requeued"
        (self.programs / "env").symlink_to("/usr/bin/env")
        sweep_path = place / "sweep.yaml"
        sweep = {"name": "one", "spec": str(TINY), "folds": [0], "settings": settings or [{"name": "base"}]}
        sweep_path.write_text(json.dumps(sweep), encoding="utf-8")
        self.program = place / "program"
        bare: dict[str, Any] = {"runtime": "bare", "image": None, "python": str(self.program), "retries": retries}
        cluster = cluster_of(work=str(place / "work"), **{**bare, **(values or {})})
        self.folder: SweepFolder = make_sweep_folder(load_sweep(sweep_path), sweep_path, cluster)

    def job(self, code: int, waits: bool = False, says: int | None = None) -> None:
        run = str(self.folder.run_folder(0))
        text = JOB.format(python=sys.executable, out=str(self.out), code=code, waits=waits, says=says, run=run)
        self.program.write_text(text, encoding="utf-8")
        self.program.chmod(0o755)

    def slurm(self, left: float, preempted: bool = False) -> None:
        """From now on SLURM can be asked. left: seconds to the time limit."""
        now = datetime.now()
        end = (now + timedelta(seconds=left)).isoformat(timespec="seconds")
        preempt = f" PreemptTime={(now + timedelta(hours=1)).isoformat(timespec='seconds')}" if preempted else ""
        text = SCONTROL.format(end=end, preempt=preempt, requeued=self.requeued)
        self.add_program("scontrol", text)

    def add_program(self, name: str, text: str) -> None:
        (self.programs / name).write_text(text, encoding="utf-8")
        (self.programs / name).chmod(0o755)

    def was_requeued(self) -> bool:
        """Since it was asked last."""
        if not self.requeued.exists():
            return False
        self.requeued.rmdir()
        return True

    def start(self, before: str = "", what: What = "task", **variables: str) -> "subprocess.Popen[str]":
        """As submitit does it: unpickled, then called. before: Python that the process runs first."""
        code = (
            f"import pickle, sys\n{before}\nfrom slurm.task import NodeTask, run_task\n"
            f"run_task(pickle.loads(pickle.dumps(NodeTask({str(self.folder.path)!r}, 1, {what!r}, 0))))"
        )
        environment = {**os.environ, "SLURM_JOB_ID": "7", "PATH": str(self.programs), **variables}
        return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)

    def attempt(self, before: str = "", what: What = "task", **variables: str) -> tuple[int, str]:
        """(exit code, what was said)"""
        with self.start(before, what, **variables) as process:
            said = process.communicate()[0]
        return process.returncode, said

    @property
    def kinds(self) -> list[str]:
        events = read_json_lines(self.folder.attempts_path("task", 0))
        return [str(event["kind"]) for event in events if event["event"] == "end"]

    def heard(self) -> list[str]:
        return self.out.read_text(encoding="utf-8").splitlines()[1:] if self.out.exists() else []


@pytest.mark.parametrize(
    ("code", "kind"),
    [(0, "done"), (64, "failed"), (65, "failed"), (70, "failed"), (77, "failed"), (76, "stopped")],
)
def test_what_ends_for_good_is_not_started_again(tmp_path: Path, code: int, kind: str) -> None:
    node = Node(tmp_path)
    node.job(code)
    assert node.attempt()[0] == code
    assert node.kinds == [kind]


def test_what_the_job_has_written_counts_more_than_its_exit_code(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.job(1, says=0)
    assert node.attempt()[0] == 0
    # What an attempt before it has written does not count.
    node.job(64)
    assert node.attempt()[0] == 64


def test_where_slurm_cannot_be_told_the_exit_code_says_it_and_a_person_is_asked(tmp_path: Path) -> None:
    node = Node(tmp_path, errors=1)
    node.job(69)
    code, said = node.attempt()
    assert (code, node.kinds) == (69, ["error", "failed"])
    assert "SLURM does not start it again: scontrol is not in PATH" in said
    code, said = node.attempt()
    assert (code, node.kinds[2:]) == (69, ["failed"])
    assert "all 1 retries are used up" in said


def test_an_error_that_cannot_be_counted_is_not_tried_again_and_a_preemption_is(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.slurm(left=HOUR)
    node.job(69, says=69)
    assert node.attempt()[0] == 69
    assert node.was_requeued()
    # As on a full disk, files take no more bytes.
    code, said = node.attempt(FULL)
    assert (code, node.was_requeued()) == (1, False)
    assert "could not be counted, so it is not started again" in said
    node.slurm(left=HOUR, preempted=True)
    node.attempt(FULL)
    assert node.was_requeued()


def test_a_container_of_another_job_is_left_alone(tmp_path: Path) -> None:
    node = Node(tmp_path, {"runtime": "docker", "image": "job:1", "python": None})
    node.add_program("docker", f'#!/bin/sh\necho "$@" >> {node.out}\n')
    assert node.attempt()[0] == 0
    removed, run = node.out.read_text(encoding="utf-8").splitlines()
    name = f"emotion-{node.folder.tasks[0].run}-task-7"
    assert removed == f"rm --force {name}"
    assert f"--name {name} " in run


@pytest.mark.parametrize(("gpus", "expected"), [("", "--gpus all"), ("2,3", '--gpus "device=2,3"')])
def test_docker_is_told_the_gpus_of_the_job(tmp_path: Path, gpus: str, expected: str) -> None:
    node = Node(tmp_path, {"runtime": "docker", "image": "job:1", "python": None, "gpus": 2})
    node.add_program("docker", f'#!/bin/sh\necho "$@" >> {node.out}\n')
    node.attempt(SLURM_JOB_GPUS=gpus, CUDA_VISIBLE_DEVICES="0,1")
    run = node.out.read_text(encoding="utf-8").splitlines()[1]
    assert f"{expected} " in run
    assert ("CUDA_VISIBLE_DEVICES=0,1" in run) == (not gpus)


def test_one_stop_request_is_passed_on_whatever_comes(tmp_path: Path) -> None:
    node = Node(tmp_path, preemptions=0)
    node.job(75, waits=True)
    with node.start() as process:
        wait_for("the job has begun", node.out.exists)
        process.send_signal(signal.SIGUSR2)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[0]
    assert node.heard() == ["SIGUSR1"]
    assert "preempted, and all 0 retries are used up" in said
    assert process.returncode == 70


def test_a_stop_request_is_passed_on_until_somebody_hears_it(tmp_path: Path) -> None:
    node = Node(tmp_path, preemptions=0)
    node.job(75, waits=True)
    hearing = tmp_path / "hearing"
    deaf = (
        "import os, signal, time\nsignal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"
        f"open({str(tmp_path / 'deaf')!r}, 'w').close()\nwhile not os.path.exists({str(hearing)!r}):\n    time.sleep(0.05)"
    )
    text = node.program.read_text(encoding="utf-8")
    node.program.write_text(text.replace("\n", f"\n{deaf}\n", 1), encoding="utf-8")
    with node.start() as process:
        wait_for("the job is there", (tmp_path / "deaf").exists)
        process.send_signal(signal.SIGUSR2)
        assert process.stdout is not None
        assert "the job is asked to save and leave" in process.stdout.readline()
        hearing.touch()
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert node.heard()[0] == "SIGUSR1"


@pytest.mark.parametrize(("left", "kind", "again"), [(50, "timed out", True), (HOUR, "failed", False)])
def test_a_start_too_late_for_the_time_limit_is_a_time_out(tmp_path: Path, left: float, kind: str, again: bool) -> None:
    node = Node(tmp_path)
    node.slurm(left)
    node.job(64)
    node.attempt()
    assert (node.kinds, node.was_requeued()) == ([kind], again)


def test_storage_that_is_away_for_a_moment_costs_a_restart_and_not_the_task(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.slurm(left=HOUR)
    node.job(0)
    # What has run and saved is not run again.
    written = node.folder.run_folder(0) / "attempts.jsonl"
    written.mkdir(parents=True)
    assert node.attempt()[0] == 0
    assert node.kinds == ["done"]
    for path in (node.folder.spec_path(0), node.folder.path / "sweep.json"):
        path.rename(path.with_name("away"))
        path.mkdir()  # an error that is not that of a missing file
        for restarts, again in (("1", True), ("2", False)):
            code, said = node.attempt(SLURM_RESTART_COUNT=restarts)
            assert (code, node.was_requeued()) == (69, again), said
        path.rmdir()
        path.with_name("away").rename(path)


def test_the_container_that_collects_sees_all_that_was_published(tmp_path: Path) -> None:
    settings = [
        {"name": name, "set": [f"artifacts.destination={tmp_path}/{name}", f"synth.songs={songs}"]}
        for name, songs in (("a", 10), ("b", 11))
    ]
    node = Node(tmp_path, {"runtime": "docker", "image": "job:1", "python": None}, settings=settings)
    node.add_program("docker", f'#!/bin/sh\necho "$@" >> {node.out}\n')
    assert node.attempt(what="collect")[0] == 0
    ran = node.out.read_text(encoding="utf-8").splitlines()[1]
    for name in ("a", "b"):
        assert f"source={tmp_path}/{name},target={tmp_path}/{name}" in ran


def test_a_job_whose_launcher_dies_is_asked_to_stop(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.job(75, waits=True)
    with node.start() as process:
        wait_for("the job has begun", node.out.exists)
        process.kill()
        process.communicate()
    wait_for("the job was told", lambda: node.heard() == ["SIGUSR1"])


@pytest.mark.parametrize(("what", "gpus", "cpus"), [("task", 2, 3), ("prepare", 0, 5), ("collect", 0, 5)])
def test_a_job_runs_with_what_it_was_submitted_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: What, gpus: int, cpus: int
) -> None:
    node = Node(tmp_path, {"gpus": 2, "cpus": 3, "prepare": {"cpus": 5}})
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(node.programs))
    cluster = Attempt(NodeTask(str(node.folder.path), 1, what, 0), []).cluster
    assert (cluster.gpus, cluster.cpus) == (gpus, cpus)


def test_a_task_of_a_cancelled_submission_does_not_begin(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.job(0)
    node.folder.cancelled_mark(1).touch()
    assert node.attempt()[0] == 76
    assert node.kinds == ["cancelled"]
    assert not node.out.exists()


def test_a_changed_or_missing_folder_ends_in_one_line(tmp_path: Path) -> None:
    node = Node(tmp_path)
    (node.folder.path / "sweep.json").write_text("{}", encoding="utf-8")
    code, said = node.attempt()
    assert code == 64
    assert said.startswith("emotion-slurm: ")
    assert said.count("\n") == 1
