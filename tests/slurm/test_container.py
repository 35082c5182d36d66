import json
from pathlib import Path
from typing import Any

import pytest

from emotion.errors import SpecError
from job.spec.model import JobSpec
from slurm.cluster import ClusterConfig, load_cluster
from slurm.container import Bind, binds_of, job_argv, kill_argv
from tests.slurm.test_sweep import EXAMPLES


def cluster_of(**values: Any) -> ClusterConfig:
    whole = {"time_limit_minutes": 60, "work": "/w", "runtime": "docker", "image": "job:1", "gpus": 0, **values}
    return ClusterConfig.model_validate_json(json.dumps(whole))


def spec_of(**values: Any) -> JobSpec:
    return JobSpec.model_validate({"name": "x", "data": {"source": "/deam"}, **values})


RUN = ["run", "/w/spec.yaml"]


def argv_of(cluster: ClusterConfig, spec: JobSpec | None = None) -> list[str]:
    return job_argv(RUN, spec or spec_of(), cluster, "emotion-x", "1000:100", {"SLURM_JOB_END_TIME": "99"})


def test_bare() -> None:
    cluster = cluster_of(runtime="bare", image=None, python="/opt/python", environment=["A=b c"])
    assert argv_of(cluster) == ["env", "A=b c", "SLURM_JOB_END_TIME=99", "/opt/python", "-P", "-m", "job", *RUN]
    assert kill_argv(cluster, "emotion-x") is None


def test_apptainer() -> None:
    cluster = cluster_of(runtime="apptainer", image="/i.sif", gpus=1, scratch="/s", options=["--writable-tmpfs"])
    assert argv_of(cluster) == [
        *("apptainer", "exec", "--cleanenv", "--no-home", "--pwd", "/w", "--nv"),
        *("--bind", "/deam:/deam:ro", "--bind", "/s:/s:rw", "--bind", "/w:/w:rw"),
        *("--env", "SLURM_JOB_END_TIME=99", "--writable-tmpfs", "/i.sif", "emotion-job", *RUN),
    ]
    assert kill_argv(cluster, "emotion-x") is None


def test_docker() -> None:
    cluster = cluster_of(gpus=2, options=["--network", "none"])
    assert argv_of(cluster) == [
        *("docker", "run", "--rm", "--name", "emotion-x", "--workdir", "/w", "--user", "1000:100", "--gpus", "all"),
        *("--mount", "type=bind,source=/deam,target=/deam,readonly", "--mount", "type=bind,source=/w,target=/w"),
        *("--env", "SLURM_JOB_END_TIME=99", "--entrypoint", "emotion-job", "--network", "none", "job:1", *RUN),
    ]
    assert kill_argv(cluster, "emotion-x") == ["docker", "rm", "--force", "emotion-x"]


def test_podman_keeps_the_users_id() -> None:
    assert argv_of(cluster_of(runtime="podman", gpus=1))[:11] == [
        *("podman", "run", "--rm", "--name", "emotion-x", "--workdir", "/w"),
        *("--userns", "keep-id", "--device", "nvidia.com/gpu=all"),
    ]


def test_a_container_sees_all_that_the_spec_names_and_nothing_twice() -> None:
    spec = spec_of(
        artifacts={"destination": "/out"},
        checkpoint={"mirror": "/mirror"},
        split={"protocol": "lists", "lists": "/deam/lists"},
        vit={"weights": "/weights/vit"},
    )
    assert binds_of(spec, cluster_of(binds=["/more"])) == [
        Bind("/deam", False),
        Bind("/mirror", True),
        Bind("/more", False),
        Bind("/out", True),
        Bind("/w", True),
        Bind("/weights/vit", False),
    ]
    assert Bind("/w/scratch", True) not in binds_of(spec, cluster_of())


def test_what_lies_in_a_store_is_not_bound() -> None:
    spec = JobSpec.model_validate(
        {
            "name": "x",
            "data": {"source": "s3://music/deam", "manifest": "/deam.json"},
            "artifacts": {"destination": "s3://music/runs"},
            "vit": {"weights": "s3://music/vit.safetensors"},
        }
    )
    assert binds_of(spec, cluster_of()) == [Bind("/deam.json", False), Bind("/w", True)]


def test_what_is_written_inside_of_what_is_read_stays_writable() -> None:
    spec = spec_of(artifacts={"destination": "/deam/results"})
    assert binds_of(spec, cluster_of())[:2] == [Bind("/deam", False), Bind("/deam/results", True)]


def test_a_path_that_no_runtime_can_bind_is_refused() -> None:
    with pytest.raises(SpecError, match="has a comma"):
        binds_of(spec_of(artifacts={"destination": "/a,b"}), cluster_of())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"work": "here"}, "work: expected an absolute path"),
        ({"image": None}, "image: missing, runtime docker needs it"),
        ({"python": "/p"}, "python: of no use with runtime docker"),
        ({"partition": "a b"}, "partition: expected"),
        ({"environment": ["X"]}, "environment: expected NAME=VALUE"),
        ({"environment": ["aws_secret_access_key=x"]}, "aws_secret_access_key: secrets do not belong in this file"),
        ({"environment": ["HF_TOKEN=x"]}, "HF_TOKEN: secrets do not belong in this file"),
        ({"environment": ["A=1", "DB_PASSWORD=x"]}, "DB_PASSWORD: secrets do not belong in this file"),
        ({"sbatch": ["--wrap=true"]}, "--wrap is what the launcher itself sets"),
        ({"sbatch": ["--array=1"]}, "--array is what the launcher itself sets"),
        ({"sbatch": ["-p x"]}, "expected --OPTION"),
        ({"binds": ["/a:b"]}, "cannot be bound"),
        ({"memory_gb": 3}, "memory_gb: unknown key; did you mean memory_gib?"),
        ({"time_limit_minutes": None}, "time_limit_minutes: expected a whole number of at least 1"),
    ],
)
def test_what_is_wrong_with_a_cluster_file_is_told(tmp_path: Path, values: dict[str, Any], expected: str) -> None:
    path = tmp_path / "cluster.yaml"
    whole = {"time_limit_minutes": 60, "work": "/w", "runtime": "docker", "image": "job:1", **values}
    path.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        load_cluster(path)
    assert str(caught.value).startswith(f"{path}:1:")
    assert expected in str(caught.value)


def test_a_name_that_only_sounds_like_a_secret_is_taken() -> None:
    names = ["TOKENIZERS_PARALLELISM=false", "AWS_WEB_IDENTITY_TOKEN_FILE=/t"]
    assert cluster_of(environment=names).environment == tuple(names)


def test_preparing_takes_the_arrays_options_unless_it_has_its_own() -> None:
    array = {"sbatch": ["--constraint=a100"], "qos": "gpu", "account": "a"}
    same = cluster_of(**array).for_preparing()
    assert (same.sbatch, same.qos, same.account) == (("--constraint=a100",), "gpu", "a")
    other = cluster_of(**array, prepare={"sbatch": [], "qos": "cpu", "account": "b"}).for_preparing()
    assert (other.sbatch, other.qos, other.account) == ((), "cpu", "b")


def test_the_example_is_a_cluster_file_and_preparing_asks_for_less() -> None:
    cluster = load_cluster(EXAMPLES / "cluster.yaml")
    prepare = cluster.for_preparing()
    assert (cluster.partition, cluster.gpus, cluster.cpus) == ("gpu", 1, 4)
    assert (prepare.partition, prepare.gpus, prepare.cpus, prepare.memory_gib) == ("cpu", 0, 8, 16)
