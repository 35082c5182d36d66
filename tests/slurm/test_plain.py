"""The plain script, run by a shell on a node on which SLURM's commands are a few lines each."""

import os
import subprocess
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from job.spec.load import load_spec
from job.spec.model import run_name
from slurm.sbatch_script import script
from tests.conftest import TINY
from tests.slurm.test_container import cluster_of

RUN = run_name(load_spec(TINY))
SRUN = """shift 3; exec "$@\""""
SCONTROL = """
case $1 in
    requeue) echo "$@" >> "$STATE/requeued" ;;
    *)
        [ -e "$STATE/silent" ] && exit 1
        echo "JobId=7 JobState=RUNNING EndTime=$END PreemptTime=None"
        ;;
esac
"""


class Node:
    """job: what the job does, as a shell script."""

    def __init__(self, place: Path, job: str, **values: Any) -> None:
        self.place, self.state = place, place / "state"
        self.state.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("job", job)):
            self.program(name, text)
        bare = {"runtime": "bare", "image": None, "python": str(place / "bin" / "job")}
        cluster = cluster_of(work=str(place / "work"), **{**bare, **values})
        self.script = script(load_spec(TINY), cluster)

    def program(self, name: str, text: str) -> None:
        path = self.place / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        path.chmod(0o755)

    def run(self, **variables: str) -> tuple[int, str]:
        """(exit code, what was said)"""
        environment = {
            **{key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"},
            "PATH": f"{self.place / 'bin'}:{os.environ['PATH']}",
            "STATE": str(self.state),
            "END": (datetime.now() + timedelta(hours=1)).isoformat(timespec="seconds"),
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

    def said(self, name: str) -> str:
        path = self.state / name
        return path.read_text(encoding="utf-8") if path.exists() else ""


def test_a_container_of_another_job_is_left_alone(tmp_path: Path) -> None:
    node = Node(tmp_path, "", runtime="docker", image="job:1", python=None)
    node.program("docker", 'echo "$@" >> "$STATE/docker"')
    assert node.run()[0] == 0
    removed, run, removed_again = node.said("docker").splitlines()
    assert removed == removed_again == f"rm --force emotion-{RUN}-7"
    assert f"--name emotion-{RUN}-7 " in run


def test_a_controller_that_is_silent_has_cancelled_nothing(tmp_path: Path) -> None:
    node = Node(tmp_path, 'touch "$STATE/silent"; exit 75')
    code, said = node.run()
    assert code == 75
    assert "preempted: this job is started again" in said
    assert node.said("requeued") == "requeue incomplete 7\n"


@pytest.mark.parametrize(("gpus", "expected"), [("", "--gpus all"), ("2,3", '--gpus "device=2,3"')])
def test_docker_is_told_the_gpus_of_the_job(tmp_path: Path, gpus: str, expected: str) -> None:
    node = Node(tmp_path, "", runtime="docker", image="job:1", python=None, gpus=2)
    node.program("docker", 'echo "$@" >> "$STATE/docker"')
    node.run(SLURM_JOB_GPUS=gpus, CUDA_VISIBLE_DEVICES="0,1")
    run = node.said("docker").splitlines()[1]
    assert f"{expected} " in run
    assert ("CUDA_VISIBLE_DEVICES=0,1" in run) == (not gpus)


def test_gpus_are_hidden_only_where_slurm_says_so(tmp_path: Path) -> None:
    node = Node(tmp_path, 'echo "${CUDA_VISIBLE_DEVICES-unset}" >> "$STATE/seen"', gpus=1)
    node.run()
    node.run(CUDA_VISIBLE_DEVICES="3")
    assert node.said("seen") == "unset\n3\n"


def test_a_spec_that_cannot_be_written_is_not_run(tmp_path: Path) -> None:
    node = Node(tmp_path, "")
    node.program("cat", "exit 1")
    assert node.run()[0] == 69


def test_an_error_is_tried_again_within_its_budget_and_while_it_can_be_counted(tmp_path: Path) -> None:
    node = Node(tmp_path, "exit 69", retries={"errors": 2})
    assert node.run()[0] == 75
    assert node.said("requeued") == "requeue incomplete 7\n"
    # As on a full disk, of which a ledger has no more room.
    (ledger,) = (tmp_path / "work" / "slurm").glob("*.retries")
    ledger.unlink()
    ledger.symlink_to("/dev/full")
    node.program("grep", "echo 0")  # /dev/full has no end
    assert node.run()[0] == 69
    assert node.said("requeued") == "requeue incomplete 7\n"
