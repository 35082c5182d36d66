"""The launcher and real jobs on a real SLURM: arrays, preemption, cancellation, time limits, lost nodes."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from emotion.files import read_json_lines, sha256_of
from job.results.publish import is_promised
from slurm.sweep_folder import SweepFolder
from tests.conftest import TINY
from tests.slurm.conftest import LONG, ROOT, User
from tests.slurm.private_slurm import PrivateSlurm, wait_for

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]

A_WHILE = ("gan.epochs=25", "checkpoint.every_seconds=1")
STARTED = "phase=gan begins"
RESTORED = "checkpoint restored"


def promised(published: Path) -> dict[str, str]:
    """Digests of the files that are the same in two runs of one spec."""
    files = [path for path in published.rglob("*") if path.is_file()]
    names = {path.relative_to(published).as_posix(): path for path in files}
    return {name: sha256_of(path) for name, path in sorted(names.items()) if is_promised(name)}


@dataclass
class Finished:
    """A sweep that ended without an interruption: two tasks succeeded, two failed."""

    user: User
    folder: SweepFolder


@pytest.fixture(scope="module")
def finished(stock: PrivateSlurm, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    user = User(stock, tmp_path_factory.mktemp("finished"), {"retries": {"errors": 1}})
    unreachable = [
        "checkpoint.mirror=s3://nowhere/runs",
        "storage.endpoint_url=http://127.0.0.1:9",
        "storage.patience_seconds=0.1",
    ]
    bad = [*A_WHILE, "gan.latent=5", *unreachable]
    settings = [{"name": "base", "set": A_WHILE}, {"name": "bad", "set": bad}]
    sweep = user.written("folds.yaml", {"name": "folds", "spec": str(TINY), "folds": [0, 1], "settings": settings})
    folder = user.submit(sweep)
    user.wait_until_empty()
    return Finished(user, folder)


def test_a_sweep_is_prepared_trained_and_collected(finished: Finished) -> None:
    folder, user = finished.folder, finished.user
    assert [user.events(folder, task)[-1]["outcome"] for task in range(4)] == ["done", "done", "failed", "failed"]
    assert all(folder.tasks[task].is_published for task in (0, 1))
    # Features were computed once, by the prepare job.
    scratch = Path(folder.cluster.scratch_folder)
    assert len([*scratch.glob("features-*")]) == 1
    assert "phase=features is done" in user.log(folder, 0)
    collected = json.loads((folder.path / "collected" / "collected.json").read_text())
    (setting,) = collected["settings"]
    assert [run["fold"] for run in setting["seeds"][0]["runs"]] == [0, 1]
    assert [task["task"] for task in collected["missing_tasks"]] == ["bad seed=0 fold=0", "bad seed=0 fold=1"]


def test_an_error_is_retried_within_its_budget(finished: Finished) -> None:
    events = finished.user.events(finished.folder, 2)
    assert [event.get("outcome", "start") for event in events] == ["start", "error", "start", "failed"]
    assert events[-1]["exit_code"] == 69
    assert "s3://nowhere/runs" in finished.user.log(finished.folder, 2)


def test_status_shows_every_job_on_a_site_without_accounting(finished: Finished) -> None:
    rows = json.loads(finished.user("status", finished.folder.path, "--json").stdout)
    assert [(row["kind"], row["state"], row["attempts"]) for row in rows] == [
        ("prepare", "done", 1),
        ("task", "done", 1),
        ("task", "done", 1),
        ("task", "failed", 2),
        ("task", "failed", 2),
        ("collect", "done", 1),
    ]
    assert "4 tasks: 2 done, 2 failed" in finished.user("status", finished.folder.path).stdout


def test_logs_of_a_task_contain_all_its_attempts(finished: Finished) -> None:
    text = finished.user("logs", finished.folder.path, "2").stdout
    assert text.count("emotion-slurm: the job ended with 69") == 2
    assert "all 1 retries are used up" in text


def test_submitting_the_same_sweep_twice_is_refused(finished: Finished) -> None:
    user = finished.user
    found = user("submit", user.home / "folds.yaml", "--cluster", user.home / "cluster.yaml")
    assert found.returncode == 64
    assert "was submitted before" in found.stderr


def test_a_task_that_is_preempted_twice_publishes_the_same_bytes(finished: Finished, user: User) -> None:
    user.cluster_file["sbatch"] = ["--nodelist=node1"]
    folder = user.submit(user.sweep("twice", *A_WHILE))
    following = subprocess.Popen(
        [sys.executable, "-m", "slurm", "logs", str(folder.path), "0", "--follow"],
        cwd=ROOT,
        env=user.cluster.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    user.wait_for_log(folder, STARTED)
    user.preempt("node1")
    user.wait_for_end(folder, "preempted")
    user.wait_for_log(folder, RESTORED)
    user.preempt("node1")
    user.wait_for_end(folder, "preempted", 2)
    user.wait_for_end(folder, "done")
    assert [event.get("outcome", "start") for event in user.events(folder)] == [
        *("start", "preempted", "start", "preempted", "start", "done")
    ]
    undisturbed = promised(Path(finished.folder.tasks[0].published))
    assert len(undisturbed) > 8
    assert promised(Path(folder.tasks[0].published)) == undisturbed
    # logs --follow has shown all three attempts, and ended with them.
    assert following.communicate()[0] == user.log(folder)
    # The collect job waited for the end of the task, not for its first preemption.
    wait_for("collected", lambda: (folder.path / "collected" / "collected.json").exists())
    assert json.loads((folder.path / "collected" / "collected.json").read_text())["missing_tasks"] == []


def test_a_task_of_an_array_is_requeued_alone_and_a_cancelled_task_is_not(user: User) -> None:
    user.cluster_file["sbatch"] = ["--exclusive"]  # a node each
    folder = user.submit(user.sweep("siblings", *LONG, folds=(0, 1)))
    for task in (0, 1):
        user.wait_for_log(folder, STARTED, task=task)
    cancelled, resumed = user.job(folder, 0), user.job(folder, 1)
    array = resumed.partition("_")[0]
    assert cancelled.partition("_")[0] == array
    # The array's id is also that of one of its elements: requeueing by SLURM_JOB_ID would requeue the array.
    assert user.cluster.job_fields(resumed)["JobId"] == array

    # One is preempted, then an operator requeues it.
    user.preempt(user.cluster.job_fields(resumed)["NodeList"])
    user.wait_for_end(folder, "preempted", task=1)
    user.wait_for_log(folder, RESTORED, task=1)
    user.cluster.run("scontrol", "requeue", resumed)
    assert user.wait_for_end(folder, "requeued", task=1)["exit_code"] == 75
    user.wait_for_log(folder, RESTORED, 2, task=1)
    assert user.cluster.job_fields(resumed)["Restarts"] == "2"
    assert (user.cluster.job_fields(cancelled)["JobState"], user.cluster.job_fields(cancelled)["Restarts"]) == ("RUNNING", "0")

    # The other one is cancelled. It saves, and stays cancelled.
    user.cluster.run("scancel", cancelled)
    user.wait_for_end(folder, "cancelled", task=0)
    wait_for("cancelled", lambda: user.cluster.job_fields(cancelled)["JobState"] == "CANCELLED")
    assert user.cluster.job_fields(resumed)["JobState"] == "RUNNING"

    # The node of the first one dies.
    node = user.cluster.job_fields(resumed)["NodeList"]
    user.cluster.crash(int(node.removeprefix("node")))
    user.wait_for_log(folder, RESTORED, 3, task=1)
    user.cluster.revive(int(node.removeprefix("node")))
    assert [event.get("outcome", "start") for event in user.events(folder, 1)] == [
        *("start", "preempted", "start", "requeued", "start", "start")
    ]

    # Everything that remains is cancelled.
    assert resumed in user("cancel", folder.path).stdout
    user.wait_for_end(folder, "cancelled", task=1)
    user.wait_until_empty()
    assert [user.cluster.job_fields(job)["JobState"] for job in (cancelled, resumed)] == ["CANCELLED", "CANCELLED"]
    assert user.cluster.job_fields(cancelled)["Restarts"] == "0"
    states = [row["state"] for row in json.loads(user("status", folder.path, "--json").stdout) if row["kind"] == "task"]
    assert states == ["cancelled", "cancelled"]


def test_resubmit_submits_failed_tasks_and_no_others(finished: Finished) -> None:
    user, folder = finished.user, finished.folder
    found = user("resubmit", folder.path)
    assert found.returncode == 0, found.stderr
    newest = folder.submissions()[-1]
    assert newest.number == 2
    assert [job.index for job in newest.jobs if job.kind == "task"] == [2, 3]
    again = user("resubmit", folder.path)
    assert "nothing to submit again" in again.stderr
    assert "tasks 2, 3" in again.stderr
    user("cancel", folder.path)
    user.wait_until_empty()


def test_a_task_saves_before_its_time_limit_and_resumes(user: User) -> None:
    # The job exits after 30 s. SLURM's own signal may come a minute early, which is after 55 s.
    user.cluster_file["time_limit_minutes"] = 2
    folder = user.submit(user.sweep("time", *LONG, "preemption.grace_seconds=90"))
    user.wait_for_end(folder, "timed out")
    user.wait_for_log(folder, RESTORED)
    first = user.log(folder).partition(RESTORED)[0]
    assert "(the time limit is near)" in first
    assert "received" not in first
    user("cancel", folder.path)
    user.wait_until_empty()


def test_a_task_preempted_without_grace_resumes_from_its_last_checkpoint(user: User) -> None:
    user.cluster_file |= {"partition": "abrupt", "sbatch": ["--nodelist=node2"]}
    folder = user.submit(user.sweep("abrupt", *LONG))
    user.wait_for_log(folder, STARTED)
    run = folder.run_folder(0)
    wait_for("a checkpoint", lambda: [*run.glob("gan-*/checkpoints/step-*.json")])
    user.preempt("node2")
    user.wait_for_log(folder, RESTORED)
    assert user.cluster.job_fields(user.job(folder))["Restarts"] == "1"
    user("cancel", folder.path)
    user.wait_until_empty()


def test_no_task_runs_if_preparing_fails_and_the_tables_list_the_missing_tasks(user: User) -> None:
    folder = user.submit(user.sweep("nothing", "data.source=/nowhere"))
    user.wait_until_empty()
    rows = json.loads(user("status", folder.path, "--json").stdout)
    assert [(row["kind"], row["state"]) for row in rows] == [("prepare", "failed"), ("task", "cancelled"), ("collect", "done")]
    assert "Missing, 1 task" in (folder.path / "collected" / "collected.md").read_text(encoding="utf-8")


# A stand-in for container runtimes that change exit codes: it forwards signals, and every run ends with 1.
CHANGES_EXIT_CODES = f"""#!{sys.executable}
import signal, subprocess, sys
arguments = sys.argv[sys.argv.index("emotion-job") + 1:]
child = subprocess.Popen([sys.executable, "-m", "job", *arguments])
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda number, _frame: child.send_signal(number))
child.wait()
sys.exit(1 if arguments[0] == "run" else child.returncode)
"""


# The node on which the first task starts is bad, for all attempts.
HAS_A_BAD_NODE = """#!/bin/bash
bad={folder}/bad
[ -e "$bad" ] || echo "$SLURMD_NODENAME" > "$bad"
[ "$(cat "$bad")" = "$SLURMD_NODENAME" ] && exit 71
exec {python} "$@"
"""


def test_a_task_whose_node_cannot_do_the_job_is_started_on_another_node(user: User) -> None:
    program = user.home / "python"
    program.write_text(HAS_A_BAD_NODE.format(folder=user.home, python=sys.executable), encoding="utf-8")
    program.chmod(0o755)
    user.cluster_file |= {"python": str(program), "sbatch": ["--exclude=node3"]}
    folder = user.submit(user.sweep("elsewhere"))
    user.wait_for_end(folder, "done")
    bad = (user.home / "bad").read_text(encoding="utf-8").strip()
    (prepare,) = (job.job for job in folder.submissions()[0].jobs if job.kind == "prepare")
    assert user.cluster.job_fields(prepare)["ExcNodeList"] == f"node3,{bad}"
    starts = [event for event in read_json_lines(folder.attempts_path("prepare", 0)) if event["event"] == "start"]
    assert [event["host"] for event in starts] == [bad, ({"node1", "node2"} - {bad}).pop()]
    user.wait_until_empty()


def test_a_task_is_resumed_after_the_requested_signal_in_a_runtime_that_changes_exit_codes(
    signalling: PrivateSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text(CHANGES_EXIT_CODES, encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    path = f"{program.parent}{os.pathsep}{signalling.environment['PATH']}"
    monkeypatch.setitem(signalling.environment, "PATH", path)
    image = tmp_path / "image.sif"
    image.touch()
    site: dict[str, Any] = {"runtime": "apptainer", "image": str(image), "python": None, "sbatch": ["--nodelist=node1"]}
    user = User(signalling, tmp_path, site)
    folder = user.submit(user.sweep("signal", *A_WHILE))
    # The first preemption comes before the launcher has its handlers, the second one in the middle of the job.
    wait_for("running", lambda: signalling.job_fields(user.job(folder))["JobState"] == "RUNNING")
    user.preempt("node1")
    user.wait_for_end(folder, "preempted")
    user.wait_for_log(folder, STARTED)
    user.preempt("node1")
    user.wait_for_end(folder, "preempted", 2)
    assert "received SIGUSR2" in user.log(folder)
    user.wait_for_end(folder, "done")
    kinds = [event.get("outcome", "start") for event in user.events(folder)]
    assert kinds == ["start", "preempted", "start", "preempted", "start", "done"]
    user.wait_until_empty()


def test_the_sbatch_script_is_preempted_resumed_and_cancelled_like_a_task(finished: Finished, user: User) -> None:
    cluster_file = user.written("cluster.yaml", {**user.cluster_file, "sbatch": ["--nodelist=node3"]})
    settings = [word for setting in A_WHILE for word in ("--set", setting)]
    found = user("script", TINY, "--cluster", cluster_file, *settings)
    assert found.returncode == 0, found.stderr
    script = user.home / "job.sh"
    script.write_text(found.stdout, encoding="utf-8")
    log = user.home / "job.log"

    def wait_for_output(text: str, count: int = 1) -> None:
        wait_for(f"{count} x {text}", lambda: log.exists() and log.read_text(errors="replace").count(text) >= count)

    job = user.cluster.run("sbatch", "--parsable", "-o", str(log), str(script)).strip()
    wait_for_output(STARTED)
    user.preempt("node3")
    wait_for_output("preempted: this job is started again (1 of 1000)")
    wait_for_output(RESTORED)
    wait_for("completed", lambda: user.cluster.job_fields(job)["JobState"] == "COMPLETED")
    (published,) = (user.home / "work" / "published").iterdir()
    assert promised(published) == promised(Path(finished.folder.tasks[0].published))

    long = [word for setting in LONG for word in ("--set", setting)]
    script.write_text(user("script", TINY, "--cluster", cluster_file, *long).stdout, encoding="utf-8")
    log.unlink()
    job = user.cluster.run("sbatch", "--parsable", "-o", str(log), str(script)).strip()
    wait_for_output(STARTED)
    user.cluster.run("scancel", job)
    user.wait_until_empty()
    assert (user.cluster.job_fields(job)["JobState"], user.cluster.job_fields(job)["Restarts"]) == ("CANCELLED", "0")


def test_a_sweep_above_the_array_limit_is_split_into_arrays_and_a_dry_run_writes_nothing(user: User) -> None:
    settings = [{"name": "base", "set": LONG}, {"name": "wide", "set": [*LONG, "gan.width=8"]}]
    sweep = user.written("split.yaml", {"name": "split", "spec": str(TINY), "settings": settings, "folds": [0, 1, 2]})
    shown = user("submit", sweep, "--cluster", user.written("cluster.yaml", user.cluster_file), "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert [line for line in shown.stdout.splitlines() if "--array" in line] == ["#SBATCH --array=0-3%3", "#SBATCH --array=0-1%2"]
    assert not (user.home / "work").exists()
    assert user.cluster.run("squeue", "-h") == ""

    folder = user.submit(sweep)
    user("cancel", folder.path)
    user.wait_until_empty()
    jobs = [job.job for job in folder.submissions()[0].jobs if job.kind == "task"]
    first, second = int(jobs[0].partition("_")[0]), int(jobs[4].partition("_")[0])
    assert jobs == [*(f"{first}_{index}" for index in range(4)), f"{second}_0", f"{second}_1"]
    # None of them is started again.
    assert {user.cluster.job_fields(job).get("JobState") for job in jobs} == {"CANCELLED"}


def test_submitting_costs_a_login_node_little_more_than_its_imports(user: User) -> None:
    cluster_file = user.written("cluster.yaml", user.cluster_file)
    sweep = user.written("cost.yaml", {"name": "cost", "spec": str(TINY), "seeds": [0, 1, 2, 3, 4]})

    def cpu_seconds(run: Callable[[], "subprocess.CompletedProcess[str]"]) -> float:
        before = os.times()
        assert run().returncode == 0
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    imports = [sys.executable, "-c", "import click, pydantic, yaml"]
    base, submitting = [], []
    for _ in range(5):
        base.append(cpu_seconds(lambda: subprocess.run(imports, text=True, check=False)))
        submitting.append(cpu_seconds(lambda: user("submit", sweep, "--cluster", cluster_file, "--dry-run")))
    assert min(submitting) < 5 * min(base), "usually 3 times; with numpy or boto3 over 5"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"partition": "nix"}, "partition: there is no partition nix; there are abrupt, brief, closed, high, low"),
        ({"partition": "closed"}, "partition: closed is DOWN"),
        ({"partition": "brief"}, "partition brief gives a preempted job 2 s (GraceTime)"),
        ({"partition": "brief", "save_seconds": 1}, "partition brief allows 5"),
        ({"runtime": "apptainer", "python": None, "image": "/nowhere.sif"}, "image: there is no /nowhere.sif"),
        ({"work": "/etc/passwd/work"}, "work: /etc/passwd/work cannot be written to"),
        ({"at_most": 0}, "at_most: expected a whole number of at least 1, found 0"),
        ({"account": None, "sbatch": ["--constraint=nix"]}, "sbatch: sbatch: error: "),
    ],
)
def test_problems_are_reported_and_no_job_is_submitted(user: User, values: dict[str, Any], expected: str) -> None:
    cluster_file = user.written("cluster.yaml", {**user.cluster_file, **values})
    found = user("submit", user.sweep("refused"), "--cluster", cluster_file)
    assert found.returncode in (64, 69)
    assert expected in found.stderr
    assert "Traceback" not in found.stderr
    assert user.cluster.run("squeue", "-h") == ""


def test_a_folder_that_the_nodes_do_not_share_is_refused(signalling: PrivateSlurm, tmp_path: Path) -> None:
    user = User(signalling, tmp_path, {"work_is_shared": False})
    found = user("submit", user.sweep("local"), "--cluster", user.written("cluster.yaml", user.cluster_file))
    assert found.returncode == 64
    assert "a disk of this machine, and jobs run on others (far)" in found.stderr


def test_the_doctor_reads_the_configuration_of_the_site(user: User, signalling: PrivateSlurm, tmp_path: Path) -> None:
    cluster_file = user.written("cluster.yaml", {**user.cluster_file, "partition": "brief"})
    found = user("doctor", "--cluster", cluster_file)
    assert found.returncode == 64
    assert "PreemptMode REQUEUE, GraceTime 2 s: SIGTERM comes at once" in found.stdout
    assert "save_seconds: saving takes 5 s" in found.stderr
    found = User(signalling, tmp_path)("doctor", "--cluster", user.written("cluster.yaml", user.cluster_file))
    assert found.returncode == 0, found.stderr
    assert "GraceTime 10 s: the requested signal (USR2) comes at once" in found.stdout
