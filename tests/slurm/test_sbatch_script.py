"""The sbatch script, run by bash on a node whose SLURM commands are scripts of a few lines."""

import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from job.spec.load import load_spec
from job.spec.model import run_name
from slurm.cluster import ClusterConfig
from slurm.requeue import AttemptEnd, Limits, decide_requeue, retries_used
from slurm.sbatch_script import script
from slurm.slurm_cli import RUNNING_STATES, JobInfo
from tests.conftest import TINY
from tests.slurm.samples import add_program, cluster_of

SPEC = load_spec(TINY)
RUN = run_name(SPEC)
HOUR = 3600.0
SRUN = """shift 4; exec "$@\""""
SCONTROL = """
case $1 in
    requeue) echo "$@" >> "$STATE/requeued" ;;
    *)
        [ -e "$STATE/silent" ] && exit 1
        echo "JobId=7 JobState=$JOB_STATE Restarts=0 StartTime=$START EndTime=$END PreemptTime=$PREEMPT"
        ;;
esac
"""


class Node:
    """job: the shell commands of the job. values: of the cluster file."""

    def __init__(self, folder: Path, job: str, **values: Any) -> None:
        self.programs, self.state = folder / "bin", folder / "state"
        self.state.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("job", job)):
            self.program(name, text)
        bare = {"runtime": "bare", "image": None, "python": str(self.programs / "job")}
        self.cluster: ClusterConfig = cluster_of(work=str(folder / "work"), **{**bare, **values})
        self.script = script(SPEC, self.cluster)

    def program(self, name: str, text: str) -> None:
        add_program(self.programs, name, text)

    def run(self, left: float = HOUR, **variables: str) -> tuple[int, str]:
        """Exit code and output. left: seconds to the time limit."""
        now = datetime.now(UTC)
        environment = {
            **{key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"},
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "STATE": str(self.state),
            "START": f"{now:%FT%T}",
            "END": f"{now + timedelta(seconds=left):%FT%T}",
            "PREEMPT": "None",
            "JOB_STATE": "RUNNING",
            "SLURM_JOB_ID": "7",
            **variables,
        }
        found = subprocess.run(
            ["bash", "-c", self.script],
            stdin=subprocess.DEVNULL,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return found.returncode, found.stdout

    def written(self, name: str) -> str:
        path = self.state / name
        return path.read_text(encoding="utf-8") if path.exists() else ""


def test_the_script_removes_only_its_own_container(tmp_path: Path) -> None:
    node = Node(tmp_path, "", runtime="docker", image="job:1", python=None)
    node.program("docker", 'echo "$@" >> "$STATE/docker"')
    assert node.run()[0] == 0
    removed, run, removed_again = node.written("docker").splitlines()
    assert removed == removed_again == f"rm --force emotion-{RUN}-7"
    assert f"--name emotion-{RUN}-7 " in run


def test_a_job_is_requeued_if_the_controller_does_not_answer(tmp_path: Path) -> None:
    node = Node(tmp_path, 'touch "$STATE/silent"; exit 75')
    code, output = node.run()
    assert code == 75
    assert "preempted: this job is started again" in output
    assert node.written("requeued") == "requeue incomplete 7\n"


@pytest.mark.parametrize(("gpus", "expected"), [("", "--gpus all"), ("2,3", '--gpus "device=2,3"')])
def test_docker_gets_the_gpus_of_the_job(tmp_path: Path, gpus: str, expected: str) -> None:
    node = Node(tmp_path, "", runtime="docker", image="job:1", python=None, gpus=2)
    node.program("docker", 'echo "$@" >> "$STATE/docker"')
    node.run(SLURM_JOB_GPUS=gpus, CUDA_VISIBLE_DEVICES="0,1")
    run = node.written("docker").splitlines()[1]
    assert f"{expected} " in run
    assert ("CUDA_VISIBLE_DEVICES=0,1" in run) == (not gpus)


def test_gpus_are_hidden_only_if_slurm_sets_the_variable(tmp_path: Path) -> None:
    node = Node(tmp_path, 'echo "${CUDA_VISIBLE_DEVICES-unset}" >> "$STATE/seen"', gpus=1)
    node.run()
    node.run(CUDA_VISIBLE_DEVICES="3")
    assert node.written("seen") == "unset\n3\n"


def test_the_job_does_not_run_if_its_spec_cannot_be_written(tmp_path: Path) -> None:
    node = Node(tmp_path, "")
    node.program("cat", "exit 1")
    assert node.run()[0] == 69


def test_an_error_is_retried_within_its_budget_and_only_if_it_can_be_counted(tmp_path: Path) -> None:
    node = Node(tmp_path, "exit 69", retries={"errors": 2})
    assert node.run()[0] == 75
    assert node.written("requeued") == "requeue incomplete 7\n"
    # As on a full disk.
    (ledger,) = (tmp_path / "work" / "slurm").glob("*.retries")
    ledger.unlink()
    ledger.symlink_to("/dev/full")
    node.program("grep", "echo 0")  # /dev/full has no end
    assert node.run()[0] == 69
    assert node.written("requeued") == "requeue incomplete 7\n"


@pytest.mark.parametrize(("before", "expected"), [("(null)", "node3"), ("node[1-2]", "node[1-2],node3")])
def test_after_71_the_node_is_excluded_beside_those_that_were_before(tmp_path: Path, before: str, expected: str) -> None:
    node = Node(tmp_path, "exit 71")
    refuses = '[ -e "$STATE/requeued" ] && [ "$1" = update ] && { echo "$@" >> "$STATE/updated"; exit "${UPDATE_CODE:-0}"; }'
    node.program("scontrol", f"{refuses}\n{SCONTROL.replace('JobId=7', f'JobId=7 ExcNodeList={before}')}")
    code, output = node.run(SLURMD_NODENAME="node3")
    assert (code, node.written("updated")) == (75, f"update JobId=7 ExcNodeList={expected}\n")
    assert "node3 cannot do the job and is excluded: this job is started on another node" in output
    code, output = node.run(SLURMD_NODENAME="node3", UPDATE_CODE="1")
    assert code == 75
    assert "node3 cannot do the job, and SLURM does not exclude it: this job may start there again" in output


DECISIONS = [
    # exit code of the job, stop requested, state of the job, being preempted, seconds left, retries used of each cause
    *((code, False, "RUNNING", False, HOUR, 0) for code in (0, 1, 64, 65, 69, 70, 71, 73, 75, 76, 77, 137)),
    *((code, True, "RUNNING", False, HOUR, 0) for code in (0, 1, 65, 69, 75, 76, 143)),
    *((code, False, "RUNNING", True, HOUR, 0) for code in (0, 64, 69, 75, 76, 143)),
    *((75, True, state, False, HOUR, 0) for state in (*RUNNING_STATES, "COMPLETING", "CANCELLED", "PENDING")),
    # Ended at the moment of the preemption, which is in a minute, or long after it.
    *((75, True, state, True, left, 0) for state in ("COMPLETING", "PREEMPTED", "CANCELLED") for left in (60, HOUR)),
    *((code, True, "CANCELLED", False, HOUR, 0) for code in (0, 65, 69, 143)),
    *((code, False, "RUNNING", False, 100, 0) for code in (64, 69, 75)),
    *((code, False, "RUNNING", False, 30, used) for code in (0, 64, 65, 69, 75, 77) for used in (0, 1)),
    (75, True, "RUNNING", False, 30, 0),
    (64, True, "RUNNING", True, 30, 0),
    (64, True, "CANCELLED", False, 30, 0),
    (75, True, "RUNNING", True, HOUR, 1),
]


@pytest.mark.parametrize(("code", "asked", "state", "preempted", "left", "used"), DECISIONS)
def test_the_script_decides_as_the_launcher_does(
    tmp_path: Path, code: int, asked: bool, state: str, preempted: bool, left: float, used: int
) -> None:
    # The shell reads 138 of a job that ends at the moment of a signal; a real job records its exit code.
    stop = 'kill -USR1 "$PPID"\nsleep 0.2\n' if asked else ""
    node = Node(tmp_path, f"{stop}exit {code}", retries={"preemptions": 1, "time_outs": 1, "errors": 1})
    causes = retries_used([], 1)
    (tmp_path / "work" / "slurm").mkdir(parents=True)
    ledger = tmp_path / "work" / "slurm" / f"{RUN}.7.retries"
    ledger.write_text("".join(f"{cause}\n" * used for cause in causes), encoding="utf-8")
    now = datetime.now(UTC)
    found, output = node.run(left, JOB_STATE=state, PREEMPT=f"{now + timedelta(minutes=1):%FT%T}" if preempted else "None")

    limits = Limits(SPEC.preemption.grace_seconds, node.cluster.save_seconds, node.cluster.retries)
    job = JobInfo(state, 0, now.timestamp() + left, now.timestamp() + 60 if preempted else None)
    end = AttemptEnd(code, asked, left, job)
    expected = decide_requeue(end, limits, dict.fromkeys(causes, used))
    assert (node.written("requeued") != "") == expected.requeue, output
    if expected.requeue:
        assert f"emotion-slurm: {expected.text}\n".replace("this task", "this job") in output
        assert ledger.read_text(encoding="utf-8").splitlines().count(expected.outcome) == used + 1
    else:
        assert found == expected.exit_code, output
        assert expected.cause == expected.outcome or f"emotion-slurm: {expected.text}\n" in output


def test_no_variable_of_the_user_reaches_srun_and_those_of_sbatch_are_named(tmp_path: Path) -> None:
    node = Node(tmp_path, "")
    node.program("srun", 'env > "$STATE/seen"')
    set_by_user = ("SLURM_MEM_PER_CPU", "SLURM_CPU_BIND", "SLURM_EXPORT_ENV", "SRUN_DEBUG", "SBATCH_ACCOUNT", "SCONTROL_ALL")
    kept = ("SLURM_CONF", "SLURM_JWT", "SLURM_JOB_NODELIST", "SLURM_NODE_ALIASES", "OTHER")
    _, output = node.run(**dict.fromkeys((*set_by_user, *kept), "x"))
    seen = {line.partition("=")[0] for line in node.written("seen").splitlines()}
    assert seen.isdisjoint(set_by_user)
    assert {*kept, "SLURM_JOB_ID"} <= seen
    assert "emotion-slurm: SBATCH_ACCOUNT was set when this script was submitted" in output


@pytest.mark.parametrize(("answer", "updated"), [("Requeue=0", "update JobId=7 Requeue=1\n"), ("Requeue=1", ""), ("", "")])
def test_a_job_that_may_not_be_requeued_is_changed(tmp_path: Path, answer: str, updated: str) -> None:
    node = Node(tmp_path, "")
    show = f'echo "JobState=RUNNING {answer} EndTime=$END"'
    node.program("scontrol", f'[ "$1" = update ] && echo "$@" >> "$STATE/updated"\n{show}')
    assert node.run()[0] == 0
    assert node.written("updated") == updated


def test_the_requested_limit_counts_if_the_controller_does_not_answer(tmp_path: Path) -> None:
    node = Node(tmp_path, 'echo "$SLURM_JOB_END_TIME" > "$STATE/end"')
    node.program("scontrol", "exit 1")
    before = time.time()
    assert node.run()[0] == 0
    assert 0 <= int(node.written("end")) + 1 - (before + 60 * node.cluster.time_limit_minutes) < 60


def test_the_script_needs_no_path_and_reads_no_startup_file(tmp_path: Path) -> None:
    node = Node(tmp_path, "")
    path = tmp_path / "job.sh"
    path.write_text(node.script, encoding="utf-8")
    path.chmod(0o755)
    startup = tmp_path / "startup.sh"
    startup.write_text("exit 3", encoding="utf-8")
    environment = {"PATH": str(node.programs), "BASH_ENV": str(startup), "BASH_FUNC_log%%": "() { exit 4; }", "SLURM_JOB_ID": "7"}
    end = f"{datetime.now(UTC) + timedelta(hours=1):%FT%T}"
    found = subprocess.run(
        [str(path)], env={**environment, "STATE": str(node.state), "END": end}, capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (0, "emotion-slurm: the job ended with 0\n"), found.stderr


def test_a_job_that_reaches_its_limit_is_killed_and_started_again(tmp_path: Path) -> None:
    node = Node(tmp_path, "exec sleep 600")
    _, output = node.run(left=9)
    assert "the job ended with 137" in output
    assert "timed out: this job is started again (1 of 100)" in output
    assert node.written("requeued") == "requeue incomplete 7\n"


def test_a_preemption_before_this_attempt_is_ignored(tmp_path: Path) -> None:
    node = Node(tmp_path, "exit 69")
    _, output = node.run(PREEMPT="2000-01-01T00:00:00")
    assert "error: this job is started again (1 of 2)" in output


@pytest.mark.parametrize("runtime", ["bare", "apptainer", "docker", "podman"])
def test_the_script_is_valid_bash_for_every_runtime(tmp_path: Path, runtime: str) -> None:
    image = {"python": sys.executable, "image": None} if runtime == "bare" else {"image": "/i.sif"}
    text = script(load_spec(TINY), cluster_of(work=str(tmp_path), runtime=runtime, gpus=1, partition="gpu", **image))
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "@" not in "".join(line for line in text.splitlines() if line.startswith("srun"))
    assert 'SLURM_JOB_END_TIME="$end"' in text
    assert "#SBATCH --partition=gpu" in text
