"""Problems that are reported before a submission, and the report of doctor."""

from pathlib import Path
from typing import Any

import pytest

from job.spec.load import load_spec
from job.spec.model import JobSpec
from slurm.checks import cluster_problems, diagnosis, spec_problems
from slurm.cluster import ClusterConfig
from slurm.slurm_cli import Site
from tests.conftest import TINY
from tests.slurm.samples import cluster_of

CONFIG = {"KillWait": "30 sec", "MaxArraySize": "1001", "MaxJobCount": "100", "PreemptType": "preempt/partition_prio"}
GPU = {"PartitionName": "gpu", "Default": "YES", "State": "UP", "MaxTime": "1-00:00:00", "GraceTime": "120"}


def site_of(**partition: str) -> Site:
    return Site(CONFIG, {"gpu": {**GPU, "PreemptMode": "REQUEUE", **partition}})


def cluster_in(tmp_path: Path, **values: Any) -> ClusterConfig:
    return cluster_of(work=str(tmp_path), work_is_shared=True, **values)


def test_a_good_cluster_file_has_no_problems(tmp_path: Path) -> None:
    assert cluster_problems(cluster_in(tmp_path), site_of()) == []
    assert spec_problems([load_spec(TINY)], cluster_in(tmp_path), site_of()) == []


@pytest.mark.parametrize(
    ("values", "partition", "expected"),
    [
        ({"partition": "gpus"}, {}, "partition: there is no partition gpus; there are gpu"),
        ({"prepare": {"partition": "cpu"}}, {}, "prepare.partition: there is no partition cpu"),
        ({}, {"State": "DOWN"}, "gpu is DOWN"),
        ({"time_limit_minutes": 2000}, {}, "partition gpu allows 1440"),
        ({"save_seconds": 121}, {}, "gives a preempted job 120 s (GraceTime)"),
        ({"runtime": "apptainer", "image": "/nowhere.sif"}, {}, "image: there is no /nowhere.sif"),
        ({"runtime": "bare", "image": None, "python": "/etc/passwd"}, {}, "python: /etc/passwd is not executable"),
        ({"runtime": "bare", "image": None, "python": "/usr"}, {}, "python: /usr is not executable"),
        ({"runtime": "bare", "image": None, "python": "/nowhere/python"}, {}, "python: there is no /nowhere/python; name the"),
    ],
)
def test_problems_of_a_cluster_file_are_reported(
    tmp_path: Path, values: dict[str, Any], partition: dict[str, str], expected: str
) -> None:
    assert expected in "\n".join(cluster_problems(cluster_in(tmp_path, **values), site_of(**partition)))


def test_a_partition_without_grace_accepts_any_save_seconds(tmp_path: Path) -> None:
    assert cluster_problems(cluster_in(tmp_path), site_of(GraceTime="0")) == []


def spec_with(grace_seconds: float) -> JobSpec:
    return load_spec(TINY, [f"preemption.grace_seconds={grace_seconds}"])


@pytest.mark.parametrize(
    ("grace", "minutes", "specs", "expected"),
    [
        (19, 60, 1, "make it 20 or more"),
        (60, 1, 1, "no work would be done"),
        (60, 60, 99, "the sweep has 99 tasks, but this site keeps at most 100 jobs"),
    ],
)
def test_problems_of_specs_on_this_site_are_reported(
    tmp_path: Path, grace: float, minutes: int, specs: int, expected: str
) -> None:
    cluster = cluster_in(tmp_path, time_limit_minutes=minutes)
    assert expected in "\n".join(spec_problems([spec_with(grace)] * specs, cluster, site_of()))


@pytest.mark.parametrize(
    ("partition", "config", "expected"),
    [
        ({}, {}, "GraceTime 120 s: SIGTERM comes at once, the job saves, and this task alone is started again"),
        ({}, {"SlurmctldParameters": "preempt_send_user_signal"}, "the requested signal (USR2) comes at once"),
        ({"GraceTime": "0"}, {}, "lost back to the last periodic checkpoint"),
        ({"PreemptMode": "OFF"}, {}, "preemption: none here"),
        ({"PreemptMode": "CANCEL", "GraceTime": "0"}, {}, "use emotion-slurm resubmit"),
        ({"PreemptMode": "SUSPEND"}, {}, "nothing is lost"),
    ],
)
def test_the_doctor_explains_what_a_preemption_does(
    tmp_path: Path, partition: dict[str, str], config: dict[str, str], expected: str
) -> None:
    site = site_of(**partition)
    assert expected in "\n".join(diagnosis(cluster_in(tmp_path), Site({**site.config, **config}, site.partitions)))
