"""Other people's environments and sites on a real SLURM: variables that SLURM reads, odd paths, preemption that cancels."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.sweep_folder import SweepFolder
from tests.conftest import TINY
from tests.slurm.conftest import LONG, ROOT, User, require_slurm
from tests.slurm.private_slurm import PrivateSlurm, started, wait_for

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]

# graceful, abruptly: their jobs are cancelled by a preemption, and SLURM does not start them again.
PARTITIONS = """\
PartitionName=graceful Nodes=node[1-2] PriorityTier=1 PreemptMode=CANCEL GraceTime=10 DefaultTime=10
PartitionName=abruptly Nodes=node[1-2] PriorityTier=1 PreemptMode=CANCEL GraceTime=0 DefaultTime=10"""
HOSTILE = {
    "SBATCH_TIMELIMIT": "3",
    "SBATCH_NO_REQUEUE": "1",
    "SBATCH_EXPORT": "NONE",
    "SBATCH_PARTITION": "closed",
    "SBATCH_OPEN_MODE": "truncate",
    "SBATCH_WAIT": "1",
    "SLURM_MEM_PER_GPU": "1",
    "SLURM_CPU_BIND": "mask_cpu:0x8000",
    "SLURM_EXIT_ERROR": "64",
    "SLURM_STDOUTMODE": "none",
    "SLURM_TIME_FORMAT": "relative",
    "SQUEUE_FORMAT": "%A",
    "SQUEUE_STATES": "PENDING",
    "SQUEUE_USERS": "nobody",
    "SCANCEL_STATE": "PENDING",
    "SCANCEL_INTERACTIVE": "1",
    "SACCT_FORMAT": "User",
    "LC_ALL": "C",
    "TZ": "Asia/Kathmandu",
}
STARTED, RESTORED = "phase=gan begins", "checkpoint restored"

# A job that is asked to stop and is slow: it ends when SLURM has ended it.
SLOW = f"""#!{sys.executable}
import os, signal, subprocess, sys, time
if sys.argv[-1] == "features" or "collect" in sys.argv:
    sys.exit(0)
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.signal(signal.SIGTERM, lambda *_: None)
print("slow job begins", flush=True)
job = os.environ["SLURM_JOB_ID"]
while True:
    shown = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True)
    if shown.returncode:
        print("scontrol:", shown.stderr, flush=True)  # a busy controller; the job may well be running
    elif "JobState=RUNNING" not in shown.stdout:
        sys.exit(75)
    time.sleep(0.2)
"""


@pytest.fixture(scope="module")
def site() -> Iterator[PrivateSlurm]:
    require_slurm()
    with started(nodes=2, kill_wait=20, extra=PARTITIONS) as cluster:
        yield cluster


@pytest.fixture
def user(site: PrivateSlurm, tmp_path: Path) -> Iterator[User]:
    user = User(site, tmp_path, {"sbatch": ["--nodelist=node1"]})
    yield user
    site.run("scancel", "--quiet", "--user=root")
    user.wait_until_empty()


def hostile(site: PrivateSlurm, folder: Path) -> dict[str, str]:
    """The environment of a user who has set everything that SLURM and bash read."""
    startup = folder / "startup.sh"
    startup.write_text("exit 3\n", encoding="utf-8")
    return {**site.environment, **HOSTILE, "BASH_ENV": str(startup)}


def inside_a_job(environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """emotion-slurm ARGUMENTS in a step of an interactive job, which has all variables that SLURM sets there."""
    step = ["srun", "--partition=low", "--ntasks=1", "--mem-per-cpu=200", "--time=9", "--export=ALL"]
    inner = "".join(f"export {name}={value!r}; " for name, value in environment.items() if name in {*HOSTILE, "BASH_ENV"})
    plain = {name: value for name, value in environment.items() if name not in {*HOSTILE, "BASH_ENV"}}
    command = f'{inner}exec "$0" "$@"'
    argv = [*step, "sh", "-c", command, sys.executable, "-m", "slurm", *map(str, arguments)]
    return subprocess.run(argv, cwd=ROOT, env=plain, capture_output=True, text=True, check=False)


def test_variables_of_the_user_and_of_an_enclosing_job_change_nothing_and_odd_paths_work(user: User) -> None:
    user.cluster_file["work"] = str(user.home / 'it\'s a "work" #1 für $ 5')
    environment = hostile(user.cluster, user.home)
    cluster_file = user.written("cluster.yaml", user.cluster_file)
    shown = inside_a_job(environment, "doctor", "--cluster", cluster_file)
    assert shown.returncode == 0, shown.stderr
    assert "not passed on to SLURM: BASH_ENV, SACCT_FORMAT, SBATCH_EXPORT, SBATCH_NO_REQUEUE, " in shown.stdout
    assert "variables of job" in shown.stdout
    found = inside_a_job(environment, "submit", user.sweep("inside"), "--cluster", cluster_file)
    assert found.returncode == 0, found.stderr
    assert "SBATCH_EXPORT, SBATCH_NO_REQUEUE, SBATCH_OPEN_MODE, SBATCH_PARTITION, SBATCH_TIMELIMIT, SBATCH_WAIT" in found.stderr
    folder = SweepFolder(Path(found.stdout.strip()))
    fields = user.cluster.job_fields(user.job(folder))
    assert (fields["Partition"], fields["Requeue"], fields["TimeLimit"]) == ("low", "1", "00:20:00")
    user.wait_until_empty()
    status = inside_a_job(environment, "status", folder.path, "--json")
    rows = json.loads(status.stdout)
    assert [(row["kind"], row["state"]) for row in rows] == [("prepare", "done"), ("task", "done"), ("collect", "done")]

    long = inside_a_job(environment, "submit", user.sweep("long", *LONG), "--cluster", cluster_file)
    folder = SweepFolder(Path(long.stdout.strip()))
    user.wait_for_log(folder, STARTED)
    # Its time limit is 20 minutes away, in whatever time zone and format.
    states = json.loads(inside_a_job(environment, "status", folder.path, "--json").stdout)
    assert [row["state"] for row in states if row["kind"] == "task"] == ["running"]
    assert user.job(folder) in inside_a_job(environment, "cancel", folder.path).stdout
    user.wait_for_end(folder, "cancelled")


def test_another_cluster_in_the_environment_is_refused_and_the_own_one_is_not(user: User) -> None:
    cluster_file, sweep = user.written("cluster.yaml", user.cluster_file), user.sweep("clusters")
    for name, value, code in (("SLURM_CLUSTERS", "far", 64), ("SBATCH_CLUSTERS", "far,lab", 64), ("SLURM_CLUSTERS", "lab", 0)):
        argv = [sys.executable, "-m", "slurm", "submit", str(sweep), "--cluster", str(cluster_file), "--dry-run"]
        environment = {**user.cluster.environment, name: value}
        found = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert found.returncode == code, found.stderr
        assert (f"{name}={value} in the environment: another cluster" in found.stderr) == (code == 64)


def test_the_script_runs_whatever_the_user_has_set_and_is_started_again_on_a_site_that_cancels(user: User) -> None:
    cluster_file = user.written("cluster.yaml", {**user.cluster_file, "partition": "abruptly"})
    settings = ["--set", "gan.epochs=25", "--set", "checkpoint.every_seconds=1"]
    script, log = user.home / "job.sh", user.home / "job.log"
    script.write_text(user("script", TINY, "--cluster", cluster_file, *settings).stdout, encoding="utf-8")
    # SBATCH_PARTITION and SBATCH_TIMELIMIT override the options of any script; SBATCH_WAIT waits.
    unavoidable = {"SBATCH_PARTITION", "SBATCH_WAIT", "SBATCH_OPEN_MODE"}
    environment = {name: value for name, value in hostile(user.cluster, user.home).items() if name not in unavoidable}
    environment |= {"SBATCH_TIMELIMIT": "9", "SLURM_MEM_PER_CPU": "200", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_ID": "1"}
    argv = ["sbatch", "--parsable", "-o", str(log), str(script)]
    job = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    def wait_for_output(text: str) -> None:
        wait_for(text, lambda: log.exists() and text in log.read_text(errors="replace"))

    wait_for_output(STARTED)
    assert user.cluster.job_fields(job)["Requeue"] == "1"
    user.preempt("node1")
    wait_for_output("preempted: this job is started again (1 of 1000)")
    wait_for_output(RESTORED)
    wait_for("completed", lambda: user.cluster.job_fields(job)["JobState"] == "COMPLETED")
    assert len([*(user.home / "work" / "published").iterdir()]) == 1


def test_a_task_is_started_again_on_a_site_that_cancels_preempted_jobs(user: User) -> None:
    """With grace and without, at the same time on two nodes."""
    folders: dict[str, SweepFolder] = {}
    for node, partition, latent in (("node1", "graceful", 4), ("node2", "abruptly", 5)):
        user.cluster_file |= {"partition": partition, "sbatch": [f"--nodelist={node}"]}
        folders[node] = user.submit(user.sweep(partition, *LONG, f"gan.latent={latent}"))
    for node, folder in folders.items():
        user.wait_for_log(folder, STARTED)
        user.preempt(node)
    for folder in folders.values():
        assert "this task is started again (1 of 1000)" in user.wait_for_end(folder, "preempted")["text"]
        user.wait_for_log(folder, RESTORED)
        assert user.cluster.job_fields(user.job(folder))["Restarts"] == "1"
        user("cancel", folder.path)


def test_a_job_that_outlasts_its_grace_is_preempted_and_one_that_is_cancelled_in_it_is_cancelled(user: User) -> None:
    program = user.home / "slow"
    program.write_text(SLOW, encoding="utf-8")
    program.chmod(0o755)
    user.cluster_file |= {"partition": "graceful", "python": str(program)}
    folders: dict[str, SweepFolder] = {}
    for node, outcome in (("node1", "cancelled"), ("node2", "preempted")):
        user.cluster_file["sbatch"] = [f"--nodelist={node}"]
        folders[outcome] = user.submit(user.sweep(outcome, *LONG))
    for folder in folders.values():
        user.wait_for_log(folder, "slow job begins")
    cancelled, preempted = folders["cancelled"], folders["preempted"]
    user.preempt("node1")
    user.wait_for_log(cancelled, "the job is asked to save and exit")
    job = user.job(cancelled)
    user.cluster.run("scancel", job)
    user.preempt("node2")
    user.wait_for_end(cancelled, "cancelled")
    wait_for("cancelled", lambda: user.cluster.job_fields(job)["JobState"] == "CANCELLED")
    assert user.cluster.job_fields(job)["Restarts"] == "0"
    user.wait_for_end(preempted, "preempted")
    user.wait_for_log(preempted, "slow job begins", 2)
    for outcome, folder in folders.items():
        assert [event["outcome"] for event in user.events(folder) if event["event"] == "end"] == [outcome]
        user("cancel", folder.path)


def test_a_task_that_the_site_does_not_start_again_is_shown_as_preempted(user: User) -> None:
    user.cluster_file["partition"] = "graceful"
    folder = user.submit(user.sweep("refused", *LONG))
    user.wait_for_log(folder, STARTED)
    user.cluster.run("scontrol", "update", f"JobId={user.job(folder)}", "Requeue=0")
    user.preempt("node1")
    user.wait_until_empty()
    (row,) = [row for row in json.loads(user("status", folder.path, "--json").stdout) if row["kind"] == "task"]
    assert (row["state"], row["ended"]) == ("preempted", {"preempted": 1})
    assert "this site does not requeue" in row["details"]
    assert "resubmit" in row["details"]
    assert "task 0: job" in user("resubmit", folder.path).stdout
    user.wait_for_log(folder, RESTORED)
    user("cancel", folder.path)
