"""What the launcher makes of what it is told, without a SLURM."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from job.spec.load import load_spec
from job.spec.model import JobSpec
from slurm.checks import diagnosis, problems_of_cluster, problems_of_specs
from slurm.cluster import ClusterConfig
from slurm.sbatch_script import script
from slurm.slurm_cli import JobFacts, Site, expanded, seconds_of
from slurm.status import Progress, read_progress
from slurm.submit import Part, dependency_of, parts_of
from slurm.task import used_up, why
from tests.conftest import TINY
from tests.slurm.test_container import cluster_of


def test_an_array_is_split_and_its_parts_follow_one_another() -> None:
    parts = parts_of([0], range(5), 2)
    assert parts == [
        Part("prepare", (0,)),
        Part("task", (0, 1), after_ok=(0,)),
        Part("task", (2, 3), after_ok=(0,), after_any=(1,)),
        Part("task", (4,), after_ok=(0,), after_any=(2,)),
        Part("collect", (0,), after_any=(1, 2, 3)),
    ]
    ids = ["11", "12", "13", "14"]
    assert [dependency_of(part, ids) for part in parts] == [
        None,
        "afterok:11",
        "afterok:11,afterany:12",
        "afterok:11,afterany:13",
        "afterany:12:13:14",
    ]


RUNNING = JobFacts("RUNNING", 0, None, False)
HOUR = 3600.0


@pytest.mark.parametrize(
    ("code", "received", "facts", "left", "expected"),
    [
        (75, [15], JobFacts("RUNNING", 0, None, True), HOUR, "preempted"),
        (75, [15], JobFacts("RUNNING", 0, None, True), 5, "preempted"),
        (143, [15], JobFacts("RUNNING", 0, None, True), HOUR, "preempted"),
        # A second after the start of a job with a limit of a minute.
        (75, [12], JobFacts("RUNNING", 0, None, True), 59, "preempted"),
        # The signal of the preemption is still on its way to another process of the job.
        (75, [15], JobFacts("SIGNALING", 0, None, True), HOUR, "preempted"),
        (75, [15], JobFacts("COMPLETING", 0, None, False), HOUR, "cancelled"),
        (75, [15], JobFacts("CANCELLED", 0, None, False), HOUR, "cancelled"),
        (75, [15], JobFacts("COMPLETING", 1, None, False), HOUR, "requeued"),
        (75, [], RUNNING, 50, "timed out"),
        (75, [12], RUNNING, 100, "timed out"),
        (137, [], RUNNING, 9, "timed out"),
        (75, [], RUNNING, HOUR, "preempted"),  # a spot instance was told
        (69, [], RUNNING, HOUR, "error"),
        (73, [], RUNNING, HOUR, "error"),
        (137, [], RUNNING, HOUR, "error"),
        (1, [], None, HOUR, "error"),
        (75, [15], None, HOUR, "preempted"),
    ],
)
def test_why_an_attempt_ended(
    code: int, received: list[int], facts: JobFacts | None, left: float, expected: str
) -> None:
    assert why(code, received, facts, 0, time.time() + left, late=130) == expected


def test_budgets_are_counted_apart_and_for_each_submission() -> None:
    kinds = ["error", "preempted", "timed out", "timed out", "requeued"]
    events: list[dict[str, Any]] = [
        {"event": "start", "submission": 1},
        {"event": "end", "submission": 1, "kind": "error"},
    ]
    for kind in kinds:
        events += [{"event": "start", "submission": 2}, {"event": "end", "submission": 2, "kind": kind}]
    # Killed, and started again by SLURM; then one that is still open.
    events += [{"event": "start", "submission": 2}, {"event": "start", "submission": 2}]
    assert used_up(events, 2) == {"preempted": 4, "timed out": 2, "error": 1}
    assert used_up(events, 3) == {"preempted": 0, "timed out": 0, "error": 0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 30),
        ("5:00", 300),
        ("1:00:00", 3600),
        ("2-00:00:00", 172800),
        ("2-12", 216000),
        ("2-12:30", 217800),
        ("UNLIMITED", None),
        ("NONE", None),
    ],
)
def test_lengths_of_time(text: str, expected: float | None) -> None:
    assert seconds_of(text) == expected


@pytest.mark.parametrize(
    ("name", "jobs"),
    [
        ("7", ["7"]),
        ("7_2", ["7_2"]),
        ("3_[0-1]", ["3_0", "3_1"]),
        ("3_[4]", ["3_4"]),
        ("3_[0-2,5%4]", ["3_0", "3_1", "3_2", "3_5"]),
    ],
)
def test_names_of_the_accounting(name: str, jobs: list[str]) -> None:
    assert expanded(name) == jobs


CONFIG = {"KillWait": "30 sec", "MaxArraySize": "1001", "MaxJobCount": "100", "PreemptType": "preempt/partition_prio"}
GPU = {"PartitionName": "gpu", "Default": "YES", "State": "UP", "MaxTime": "1-00:00:00", "GraceTime": "120"}


def site_of(**partition: str) -> Site:
    return Site(CONFIG, {"gpu": {**GPU, "PreemptMode": "REQUEUE", **partition}})


def here(tmp_path: Path, **values: Any) -> ClusterConfig:
    return cluster_of(work=str(tmp_path), work_is_shared=True, **values)


def test_nothing_is_wrong_with_a_good_cluster_file(tmp_path: Path) -> None:
    assert problems_of_cluster(here(tmp_path), site_of()) == []
    assert problems_of_specs([load_spec(TINY)], here(tmp_path), site_of()) == []


@pytest.mark.parametrize(
    ("values", "partition", "expected"),
    [
        ({"partition": "gpus"}, {}, "partition: there is no partition gpus; there are gpu"),
        ({"prepare": {"partition": "cpu"}}, {}, "prepare.partition: there is no partition cpu"),
        ({}, {"State": "DOWN"}, "gpu is DOWN"),
        ({"time_limit_minutes": 2000}, {}, "partition gpu allows 1440"),
        ({"save_seconds": 121}, {}, "gives a preempted job 120 s (GraceTime)"),
        ({"runtime": "apptainer", "image": "/nowhere.sif"}, {}, "image: there is no /nowhere.sif"),
        ({"runtime": "bare", "image": None, "python": "/etc/passwd"}, {}, "python: /etc/passwd is no program"),
    ],
)
def test_what_would_not_work_is_refused(
    tmp_path: Path, values: dict[str, Any], partition: dict[str, str], expected: str
) -> None:
    assert expected in "\n".join(problems_of_cluster(here(tmp_path, **values), site_of(**partition)))


def test_a_save_may_be_longer_than_no_grace_at_all(tmp_path: Path) -> None:
    assert problems_of_cluster(here(tmp_path), site_of(GraceTime="0")) == []


def spec_with(grace_seconds: float) -> JobSpec:
    return load_spec(TINY, [f"preemption.grace_seconds={grace_seconds}"])


@pytest.mark.parametrize(
    ("grace", "minutes", "specs", "expected"),
    [
        (19, 60, 1, "make it 20 or more"),
        (60, 1, 1, "nothing would get done"),
        (60, 60, 99, "the sweep has 99 tasks, but this site keeps at most 100 jobs"),
    ],
)
def test_specs_that_would_not_work_here_are_refused(
    tmp_path: Path, grace: float, minutes: int, specs: int, expected: str
) -> None:
    cluster = here(tmp_path, time_limit_minutes=minutes)
    assert expected in "\n".join(problems_of_specs([spec_with(grace)] * specs, cluster, site_of()))


@pytest.mark.parametrize(
    ("partition", "config", "expected"),
    [
        ({}, {}, "GraceTime 120 s: SIGTERM comes at once, the job saves, and this task alone is started again"),
        ({}, {"SlurmctldParameters": "preempt_send_user_signal"}, "the signal asked for (USR2) comes at once"),
        ({"GraceTime": "0"}, {}, "lost back to the last periodic checkpoint"),
        ({"PreemptMode": "OFF"}, {}, "preemption: none here"),
        ({"PreemptMode": "CANCEL", "GraceTime": "0"}, {}, "use emotion-slurm resubmit"),
        ({"PreemptMode": "SUSPEND"}, {}, "nothing is lost"),
    ],
)
def test_the_doctor_says_what_a_preemption_does(
    tmp_path: Path, partition: dict[str, str], config: dict[str, str], expected: str
) -> None:
    site = site_of(**partition)
    assert expected in "\n".join(diagnosis(here(tmp_path), Site({**site.config, **config}, site.partitions)))


def test_progress_is_what_the_log_says_last(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    assert read_progress(log) == Progress()
    lines = [
        "2026-11-25T20:08:05Z INFO phase=features ends seconds=1.0",
        "2026-11-25T20:08:06Z INFO phase=gan begins folder=/w/gan-1",
        "2026-11-25T20:08:17Z INFO phase=gan step=160/360 d_loss=0.68 steps_per_second=16",
    ]
    log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = read_progress(log)
    assert found == Progress("gan", 160, 360, 16)
    assert found.seconds_to_go == 12.5
    log.write_text("\n".join([*lines, "2026-11-25T20:08:18Z INFO phase=synth begins folder=/w/s"]), encoding="utf-8")
    assert read_progress(log) == Progress("synth")


@pytest.mark.parametrize("runtime", ["bare", "apptainer", "docker", "podman"])
def test_the_plain_script_is_a_script_for_every_runtime(tmp_path: Path, runtime: str) -> None:
    image = {"python": sys.executable, "image": None} if runtime == "bare" else {"image": "/i.sif"}
    text = script(load_spec(TINY), here(tmp_path, runtime=runtime, gpus=1, partition="gpu", **image))
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "@" not in "".join(line for line in text.splitlines() if line.startswith("srun"))
    assert 'SLURM_JOB_END_TIME="$end"' in text
    assert "#SBATCH --partition=gpu" in text


def test_the_launcher_needs_neither_torch_nor_numpy_nor_slurm(tmp_path: Path) -> None:
    """And says in a line that there is no SLURM here."""
    blocked = ("torch", "numpy", "scipy", "librosa", "timm", "boto3", "tqdm")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked}))\nfrom slurm.__main__ import main; main()"
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(f"{{time_limit_minutes: 9, work: {tmp_path}, runtime: docker, image: x}}", encoding="utf-8")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(f"{{name: x, spec: {TINY}}}", encoding="utf-8")
    nowhere = {**os.environ, "PATH": str(tmp_path)}
    command = [sys.executable, "-c", code, "submit", str(sweep), "--cluster", str(cluster)]
    found = subprocess.run(command, capture_output=True, text=True, env=nowhere, check=False)
    assert found.returncode == 64
    assert found.stderr == (
        "emotion-slurm: scontrol is not in PATH: this is no machine of a SLURM cluster. Log in to one, or load its module.\n"
    )
