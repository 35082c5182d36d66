import pytest

from emotion.errors import SpecError
from job.spec.model import JobSpec
from slurm.cluster import ClusterConfig
from slurm.container import Bind, binds_of, job_argv, kill_argv
from tests.slurm.samples import cluster_of, spec_of

RUN = ["run", "/w/spec.yaml"]


def argv_of(cluster: ClusterConfig, spec: JobSpec | None = None) -> list[str]:
    return job_argv(RUN, spec or spec_of(), cluster, "emotion-x", "1000:100", {"SLURM_JOB_END_TIME": "99"})


def test_a_bare_job_runs_in_the_python_of_the_cluster_file() -> None:
    cluster = cluster_of(runtime="bare", image=None, python="/opt/python", environment=["A=b c"])
    assert argv_of(cluster) == ["/usr/bin/env", "A=b c", "SLURM_JOB_END_TIME=99", "/opt/python", "-P", "-m", "job", *RUN]
    assert kill_argv(cluster, "emotion-x") is None


def test_a_job_in_apptainer_gets_binds_gpus_and_environment() -> None:
    cluster = cluster_of(runtime="apptainer", image="/i.sif", gpus=1, scratch="/s", options=["--writable-tmpfs"])
    assert argv_of(cluster) == [
        *("apptainer", "exec", "--cleanenv", "--no-home", "--pwd", "/w", "--nv"),
        *("--bind", "/deam:/deam:ro", "--bind", "/s:/s:rw", "--bind", "/w:/w:rw"),
        *("--env", "SLURM_JOB_END_TIME=99", "--writable-tmpfs", "/i.sif", "emotion-job", *RUN),
    ]
    assert kill_argv(cluster, "emotion-x") is None


def test_a_job_in_docker_gets_mounts_gpus_user_and_environment() -> None:
    cluster = cluster_of(gpus=2, options=["--network", "none"])
    assert argv_of(cluster) == [
        *("docker", "run", "--rm", "--name", "emotion-x", "--workdir", "/w", "--user", "1000:100", "--gpus", "all"),
        *("--mount", "type=bind,source=/deam,target=/deam,readonly", "--mount", "type=bind,source=/w,target=/w"),
        *("--env", "SLURM_JOB_END_TIME=99", "--entrypoint", "emotion-job", "--network", "none", "job:1", *RUN),
    ]
    assert kill_argv(cluster, "emotion-x") == ["docker", "rm", "--force", "emotion-x"]


def test_podman_keeps_the_id_of_the_user() -> None:
    assert argv_of(cluster_of(runtime="podman", gpus=1))[:11] == [
        *("podman", "run", "--rm", "--name", "emotion-x", "--workdir", "/w"),
        *("--userns", "keep-id", "--device", "nvidia.com/gpu=all"),
    ]


def test_all_local_paths_of_the_spec_are_bound_once() -> None:
    spec = spec_of(
        artifacts={"destination": "/out"},
        checkpoint={"mirror": "/mirror"},
        split={"protocol": "lists", "lists": "/deam/lists"},
        vit={"weights": "/weights/vit", "teacher": "/teacher.npz"},
    )
    assert binds_of(spec, cluster_of(binds=["/more"])) == [
        Bind("/deam", False),
        Bind("/mirror", True),
        Bind("/more", False),
        Bind("/out", True),
        Bind("/teacher.npz", False),
        Bind("/w", True),
        Bind("/weights/vit", False),
    ]
    assert Bind("/w/scratch", True) not in binds_of(spec, cluster_of())


def test_the_file_of_the_folds_of_a_final_model_is_bound() -> None:
    spec = spec_of(split={"protocol": "all", "out_of_fold": "/sweeps/one/collected/out_of_fold.json"})
    assert Bind("/sweeps/one/collected/out_of_fold.json", False) in binds_of(spec, cluster_of())


def test_locations_in_object_storage_are_not_bound() -> None:
    spec = JobSpec.model_validate(
        {
            "name": "x",
            "data": {"source": "s3://music/deam", "manifest": "/deam.json"},
            "artifacts": {"destination": "s3://music/runs"},
            "vit": {"weights": "s3://music/vit.safetensors"},
        }
    )
    assert binds_of(spec, cluster_of()) == [Bind("/deam.json", False), Bind("/w", True)]


def test_a_writable_folder_inside_a_read_only_one_stays_writable() -> None:
    spec = spec_of(artifacts={"destination": "/deam/results"})
    assert binds_of(spec, cluster_of())[:2] == [Bind("/deam", False), Bind("/deam/results", True)]


def test_a_path_with_a_comma_is_refused() -> None:
    with pytest.raises(SpecError, match="has a comma"):
        binds_of(spec_of(artifacts={"destination": "/a,b"}), cluster_of())
