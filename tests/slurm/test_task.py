"""An attempt on a node without SLURM, or with a fake scontrol. The job is a program of a few lines."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

import pytest

from emotion.errors import SpecError
from emotion.files import read_json_lines
from slurm.submit import make_sweep_folder
from slurm.sweep import load_sweep
from slurm.sweep_folder import JobKind, SweepFolder
from slurm.task import Attempt, NodeJob
from tests.slurm.private_slurm import wait_for
from tests.slurm.samples import add_program, cluster_of, sweep_file

JOB = """#!{python}
import json, os, signal, sys, time
out = {out!r}
def handle(number, _frame):
    with open(out, "a") as file:
        file.write(signal.Signals(number).name + "\\n")
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, handle)
signal.pthread_sigmask(signal.SIG_SETMASK, [])  # as the job does: the launcher starts it with signals blocked
with open(out, "a") as file:
    file.write(f"started {{os.environ['SLURM_JOB_END_TIME']}}\\n")
while {waits} and len(open(out).readlines()) < 2:
    time.sleep(0.05)
time.sleep({waits} and 0.5)
recorded = {recorded!r}
if recorded is not None:
    os.makedirs({run!r}, exist_ok=True)
    with open({run!r} + "/attempts.jsonl", "a") as file:
        file.write(json.dumps({{"event": "end", "time": round(time.time(), 3), "exit_code": recorded}}) + "\\n")
sys.exit({code})
"""

SCONTROL = """
case "$*" in
    "requeue {which}7") exec /bin/mkdir -p {requeued} ;;
    requeue*) echo "Requested operation is presently disabled" >&2; exit 1 ;;
    *) echo "JobId=7 JobState={state} Restarts=0 EndTime={end}{preempt}" ;;
esac
"""
HOUR = 3600.0
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"


class Node:
    """values: of the cluster file. retries: its section of that name."""

    def __init__(self, folder: Path, values: Mapping[str, Any] | None = None, settings: Any = None, **retries: int) -> None:
        self.out = folder / "out"
        self.programs = folder / "programs"
        self.programs.mkdir()
        self.requeued = folder / "requeued"
        sweep_path = sweep_file(folder, folds=[0], settings=settings or [{"name": "base"}])
        self.program = folder / "program"
        bare: dict[str, Any] = {"runtime": "bare", "image": None, "python": str(self.program), "retries": retries}
        cluster = cluster_of(work=str(folder / "work"), **{**bare, **(values or {})})
        self.folder: SweepFolder = make_sweep_folder(load_sweep(sweep_path), sweep_path, cluster)

    def job(self, code: int, waits: bool = False, recorded: int | None = None) -> None:
        run = str(self.folder.run_folder(0))
        text = JOB.format(python=sys.executable, out=str(self.out), code=code, waits=waits, recorded=recorded, run=run)
        self.program.write_text(text, encoding="utf-8")
        self.program.chmod(0o755)

    def slurm(self, left: float, preempted: bool = False, state: str = "RUNNING", which: str = "") -> None:
        """Add scontrol. left: seconds to EndTime. A preemption began a moment ago. which: of the requeue that SLURM accepts."""
        now = datetime.now(UTC)
        preempt = f" PreemptTime={now:%FT%T}" if preempted else ""
        which = which or ("" if preempted else "incomplete ")
        values = {"end": f"{now + timedelta(seconds=left):%FT%T}", "preempt": preempt, "state": state}
        self.add_program("scontrol", SCONTROL.format(requeued=self.requeued, which=which, **values))

    def add_program(self, name: str, text: str) -> None:
        add_program(self.programs, name, text)

    def was_requeued(self) -> bool:
        """Whether the job was requeued since the last call."""
        if not self.requeued.exists():
            return False
        self.requeued.rmdir()
        return True

    def start(
        self, before: str = "", kind: JobKind = "task", stdout: int | IO[str] = subprocess.PIPE, **variables: str
    ) -> "subprocess.Popen[str]":
        """Unpickle a NodeJob and run it, as submitit does. before: Python code that the process runs first."""
        code = (
            f"import pickle, sys\n{before}\nfrom slurm.task import NodeJob\n"
            f"pickle.loads(pickle.dumps(NodeJob({str(self.folder.path)!r}, 1, {kind!r}, 0))).run()"
        )
        environment = {**os.environ, "SLURM_JOB_ID": "7", "PATH": str(self.programs), **variables}
        return subprocess.Popen([sys.executable, "-u", "-c", code], env=environment, stdout=stdout, text=True)  # -u as submitit

    def attempt(self, before: str = "", kind: JobKind = "task", **variables: str) -> tuple[int, str]:
        """Exit code and output."""
        with self.start(before, kind, subprocess.PIPE, **variables) as process:
            output = process.communicate()[0]
        return process.returncode, output

    @property
    def outcomes(self) -> list[str]:
        events = read_json_lines(self.folder.attempts_path("task", 0))
        return [str(event["outcome"]) for event in events if event["event"] == "end"]

    def received(self) -> list[str]:
        return self.out.read_text(encoding="utf-8").splitlines()[1:] if self.out.exists() else []


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (0, "done"),
        (76, "stopped"),
        (64, "failed"),
        # test_requeue.py has the decision for these; here they only repeat it in a process.
        *(pytest.param(code, "failed", marks=pytest.mark.full) for code in (65, 70, 77)),
    ],
)
def test_final_exit_codes_are_not_retried(tmp_path: Path, code: int, kind: str) -> None:
    node = Node(tmp_path)
    node.job(code)
    assert node.attempt()[0] == code
    assert node.outcomes == [kind]


def test_the_exit_code_that_the_job_recorded_overrides_that_of_the_process(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.job(1, recorded=0)
    assert node.attempt()[0] == 0
    # The record of an earlier attempt does not count.
    node.job(64)
    assert node.attempt()[0] == 64


def test_without_scontrol_the_task_fails_with_the_exit_code_of_the_job(tmp_path: Path) -> None:
    node = Node(tmp_path, errors=1)
    node.job(69)
    code, output = node.attempt()
    assert (code, node.outcomes) == (69, ["error", "failed"])
    assert "SLURM does not start it again: scontrol is not in PATH" in output
    code, output = node.attempt()
    assert (code, node.outcomes[2:]) == (69, ["failed"])
    assert "all 1 retries are used up" in output


EXCLUDES = """
case "$*" in
    requeue*) exec /bin/mkdir -p {requeued} ;;
    update*) [ -e {requeued} ] || {{ echo "Job is no longer pending execution" >&2; exit 1; }}
        echo "$*" >> {updates}; exit {code} ;;
    *) echo "JobId=7 JobState=RUNNING Restarts=0 EndTime=2099-01-01T00:00:00 ExcNodeList=node[8-9]" ;;
esac
"""


@pytest.mark.parametrize(
    ("code", "said"), [(0, "is excluded: this task is started on another"), (1, "does not exclude it (scontrol ")]
)
def test_after_71_the_task_is_requeued_and_its_node_excluded(tmp_path: Path, code: int, said: str) -> None:
    node = Node(tmp_path, errors=1)
    updates = tmp_path / "updates"
    node.add_program("scontrol", EXCLUDES.format(requeued=node.requeued, updates=updates, code=code))
    node.job(71)
    found, output = node.attempt(SLURMD_NODENAME="node3")
    assert (found, node.outcomes, node.was_requeued()) == (71, ["error"], True)
    assert updates.read_text(encoding="utf-8") == "update JobId=7 ExcNodeList=node[8-9],node3\n"
    assert f"node3 cannot do the job, and SLURM {said}" in output or f"node3 cannot do the job and {said}" in output
    # The budget of errors limits it: then it ends with 71, and nothing is excluded any more.
    assert node.attempt(SLURMD_NODENAME="node3")[0] == 71
    assert (node.outcomes, node.was_requeued()) == (["error", "failed"], False)
    assert len(updates.read_text(encoding="utf-8").splitlines()) == 1


def test_an_error_that_cannot_be_counted_is_not_retried_but_a_preemption_is(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.slurm(left=HOUR)
    node.job(69, recorded=69)
    assert node.attempt()[0] == 69
    assert node.was_requeued()
    # As on a full disk, no file can grow.
    code, output = node.attempt(FULL)
    assert (code, node.was_requeued()) == (1, False)
    assert "could not be counted, so the task is not started again" in output
    node.slurm(left=HOUR, preempted=True)
    node.attempt(FULL)
    assert node.was_requeued()


@pytest.mark.full
def test_a_task_that_slurm_has_ended_to_preempt_it_is_started_again_or_recorded_as_preempted(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.job(75, recorded=75)
    node.slurm(left=0, preempted=True, state="COMPLETING")
    node.attempt()
    assert (node.outcomes, node.was_requeued()) == (["preempted"], True)
    node.slurm(left=0, preempted=True, state="COMPLETING", which="nothing")
    output = node.attempt()[1]
    assert (node.outcomes, node.was_requeued()) == (["preempted"] * 2, False)
    assert "this site does not requeue (scontrol requeue 7: Requested operation is presently disabled)" in output
    assert read_json_lines(node.folder.attempts_path("task", 0))[-1]["event"] == "refused"


def test_a_preempted_task_is_started_again_if_its_log_cannot_be_written(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.job(75, recorded=75)
    node.slurm(left=HOUR, preempted=True)
    with Path("/dev/full").open("w") as full, node.start(stdout=full) as process:
        assert process.wait() == 75
    assert (node.outcomes, node.was_requeued()) == (["preempted"], True)


def test_the_launcher_removes_only_its_own_container(tmp_path: Path) -> None:
    node = Node(tmp_path, {"runtime": "docker", "image": "job:1", "python": None})
    node.add_program("docker", f'echo "$@" >> {node.out}')
    assert node.attempt()[0] == 0
    removed, run = node.out.read_text(encoding="utf-8").splitlines()
    name = f"emotion-{node.folder.tasks[0].run}-task-7"
    assert removed == f"rm --force {name}"
    assert f"--name {name} " in run


@pytest.mark.parametrize(("gpus", "expected"), [("", "--gpus all"), ("2,3", '--gpus "device=2,3"')])
def test_docker_gets_the_gpus_of_the_job(tmp_path: Path, gpus: str, expected: str) -> None:
    node = Node(tmp_path, {"runtime": "docker", "image": "job:1", "python": None, "gpus": 2})
    node.add_program("docker", f'echo "$@" >> {node.out}')
    node.attempt(SLURM_JOB_GPUS=gpus, CUDA_VISIBLE_DEVICES="0,1")
    run = node.out.read_text(encoding="utf-8").splitlines()[1]
    assert f"{expected} " in run
    assert ("CUDA_VISIBLE_DEVICES=0,1" in run) == (not gpus)


def test_several_stop_signals_are_forwarded_as_one(tmp_path: Path) -> None:
    node = Node(tmp_path, preemptions=0)
    node.job(75, waits=True)
    with node.start() as process:
        wait_for("the job has started", node.out.exists)
        process.send_signal(signal.SIGUSR2)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        output = process.communicate()[0]
    assert node.received() == ["SIGUSR1"]
    assert "preempted, and all 0 retries are used up" in output
    assert process.returncode == 70


def test_a_stop_request_is_forwarded_until_the_job_handles_it(tmp_path: Path) -> None:
    node = Node(tmp_path, preemptions=0)
    node.job(75, waits=True)
    handling = tmp_path / "handling"
    ignore = (
        "import os, signal, time\nsignal.signal(signal.SIGUSR1, signal.SIG_IGN)\nsignal.pthread_sigmask(signal.SIG_SETMASK, [])\n"
        f"open({str(tmp_path / 'started')!r}, 'w').close()\nwhile not os.path.exists({str(handling)!r}):\n    time.sleep(0.05)"
    )
    text = node.program.read_text(encoding="utf-8")
    node.program.write_text(text.replace("\n", f"\n{ignore}\n", 1), encoding="utf-8")
    with node.start() as process:
        wait_for("the job has started", (tmp_path / "started").exists)
        process.send_signal(signal.SIGUSR2)
        assert process.stdout is not None
        assert "the job is asked to save and exit" in process.stdout.readline()
        handling.touch()
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert node.received()[0] == "SIGUSR1"


def test_a_clock_that_is_set_to_tomorrow_while_the_job_runs_does_not_end_it(tmp_path: Path) -> None:
    node = Node(tmp_path, preemptions=0)
    node.slurm(left=HOUR)
    node.job(75, waits=True)
    clock = f"import os, time; real = time.time; time.time = lambda: real() + 86400 * os.path.exists({str(node.out)!r})"
    with node.start(clock) as process:
        wait_for("the job has started", node.out.exists)
        time.sleep(1)  # several looks at the clock
        assert process.poll() is None
        process.send_signal(signal.SIGUSR2)
        output = process.communicate()[0]
    assert "out of time" not in output
    assert node.received() == ["SIGUSR1"]


@pytest.mark.parametrize(("left", "kind", "again"), [(50, "timed out", True), (HOUR, "failed", False)])
def test_a_job_that_starts_too_close_to_its_time_limit_is_timed_out_and_not_failed(
    tmp_path: Path, left: float, kind: str, again: bool
) -> None:
    node = Node(tmp_path)
    node.slurm(left)
    node.job(64)
    node.attempt()
    assert (node.outcomes, node.was_requeued()) == ([kind], again)


def test_a_task_is_retried_while_its_files_are_unavailable(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.slurm(left=HOUR)
    node.job(0)
    # A job that succeeded is done even if its record cannot be read.
    written = node.folder.run_folder(0) / "attempts.jsonl"
    written.mkdir(parents=True)
    assert node.attempt()[0] == 0
    assert node.outcomes == ["done"]
    for path in (node.folder.spec_path(0), node.folder.path / "sweep.json"):
        path.rename(path.with_name("away"))
        path.mkdir()  # reading a folder fails, but not as a missing file does
        for restarts, again in (("1", True), ("2", False)):
            code, output = node.attempt(SLURM_RESTART_COUNT=restarts)
            assert (code, node.was_requeued()) == (69, again), output
        path.rmdir()
        path.with_name("away").rename(path)


def test_the_collect_job_binds_the_published_folders_of_all_tasks(tmp_path: Path) -> None:
    settings = [
        {"name": name, "set": [f"artifacts.destination={tmp_path}/{name}", f"synth.songs={songs}"]}
        for name, songs in (("a", 10), ("b", 11))
    ]
    node = Node(tmp_path, {"runtime": "docker", "image": "job:1", "python": None}, settings=settings)
    node.add_program("docker", f'echo "$@" >> {node.out}')
    assert node.attempt(kind="collect")[0] == 0
    ran = node.out.read_text(encoding="utf-8").splitlines()[1]
    for name in ("a", "b"):
        assert f"source={tmp_path}/{name},target={tmp_path}/{name}" in ran


def test_a_job_whose_launcher_is_killed_receives_a_stop_request(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.job(75, waits=True)
    with node.start() as process:
        wait_for("the job has started", node.out.exists)
        process.kill()
        process.communicate()
    wait_for("the job received the signal", lambda: node.received() == ["SIGUSR1"])


@pytest.mark.parametrize(("kind", "gpus", "cpus"), [("task", 2, 3), ("prepare", 0, 5), ("collect", 0, 5)])
def test_each_kind_of_job_runs_with_its_own_resources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: JobKind, gpus: int, cpus: int
) -> None:
    node = Node(tmp_path, {"gpus": 2, "cpus": 3, "prepare": {"cpus": 5}})
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(node.programs))
    cluster = Attempt(NodeJob(str(node.folder.path), 1, kind, 0), []).cluster
    assert (cluster.gpus, cluster.cpus) == (gpus, cpus)


def test_a_task_of_a_cancelled_submission_does_not_start(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.job(0)
    node.folder.cancelled_mark(1).touch()
    assert node.attempt()[0] == 76
    assert node.outcomes == ["cancelled"]
    assert not node.out.exists()


def test_a_damaged_sweep_folder_is_reported_in_one_line(tmp_path: Path) -> None:
    node = Node(tmp_path)
    (node.folder.path / "sweep.json").write_text("{}", encoding="utf-8")
    code, output = node.attempt()
    assert code == 64
    assert output.startswith("emotion-slurm: ")
    assert output.count("\n") == 1


def test_a_sweep_of_this_machine_alone_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"tasks": []}', encoding="utf-8")  # as emotion-slurm local writes it
    with pytest.raises(SpecError, match="a sweep of emotion-slurm local has no jobs in SLURM"):
        SweepFolder(tmp_path)
