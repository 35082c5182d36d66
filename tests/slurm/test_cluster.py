"""The cluster file."""

import json
from pathlib import Path
from typing import Any

import pytest

from emotion.errors import SpecError
from slurm.cluster import load_cluster
from tests.slurm.samples import EXAMPLES, cluster_of


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"work": "here"}, "work: expected an absolute path"),
        ({"work": "$SCRATCH/runs"}, "work: '$SCRATCH/runs' has $SCRATCH, which is not replaced; write the path out"),
        ({"scratch": "/tmp/${SLURM_JOB_ID}"}, "scratch: '/tmp/${SLURM_JOB_ID}' has ${SLURM_JOB_ID}, which is not replaced"),
        ({"environment": ["HF_HOME=$HOME/hf"]}, "HF_HOME: '$HOME/hf' is not replaced; write the value out"),
        ({"image": None}, "image: missing, runtime docker needs it"),
        ({"retries": {"memory_gib_at_most": 8}}, "retries.memory_gib_at_most: 8, but a job begins with 16 (memory_gib)"),
        (
            {"retries": {"memory_gib_at_most": 24}, "prepare": {"memory_gib": 32}},
            "retries.memory_gib_at_most: 24, but a job begins with 32",
        ),
        ({"python": "/p"}, "python: not used by runtime docker"),
        ({"partition": "a b"}, "partition: expected"),
        ({"environment": ["X"]}, "environment[0]: expected NAME=VALUE"),
        ({"environment": ["aws_secret_access_key=x"]}, "aws_secret_access_key: secrets do not belong in this file"),
        ({"environment": ["HF_TOKEN=x"]}, "HF_TOKEN: secrets do not belong in this file"),
        ({"environment": ["HTTPS_PROXY=http://me:hushhush@proxy:3128"]}, "HTTPS_PROXY: secrets do not belong in this file"),
        ({"environment": ["WANDB_API_KEY=5f2c8a11d0e94b7c"]}, "WANDB_API_KEY: secrets do not belong in this file"),
        ({"environment": ["A=1", "DB_PASSWORD=x"]}, "DB_PASSWORD: secrets do not belong in this file"),
        ({"sbatch": ["--wrap=true"]}, "--wrap is set by the launcher"),
        ({"sbatch": ["--array=1"]}, "--array is set by the launcher"),
        ({"sbatch": ["-p x"]}, "expected --OPTION"),
        ({"sbatch": ["-M x"]}, "expected --OPTION"),
        ({"sbatch": ["--clusters x"]}, "expected --OPTION"),
        ({"sbatch": ["--clusters=x"]}, "--clusters would submit to another cluster"),
        ({"prepare": {"sbatch": ["--clusters=x"]}}, "--clusters would submit to another cluster"),
        ({"sbatch": ["--cluster=x"]}, "--cluster may be read as --clusters"),
        ({"sbatch": ["--arr=1-9"]}, "--arr may be read as --array, which is set by the launcher"),
        ({"sbatch": ["--no-req"]}, "--no-req may be read as --no-requeue"),
        ({"sbatch": ["--no-requeue"]}, "--no-requeue is set by the launcher"),
        ({"sbatch": ["--parsable"]}, "--parsable changes what sbatch answers"),
        ({"sbatch": ["--quiet"]}, "--quiet changes what sbatch answers"),
        ({"sbatch": ["--wait"]}, "--wait changes what sbatch answers"),
        ({"sbatch": ["--test-only"]}, "--test-only changes what sbatch answers"),
        ({"sbatch": ["--export=NONE"]}, "--export would hide variables"),
        ({"sbatch": ["--ntasks-per-node=4"]}, "--ntasks-per-node is set by the launcher"),
        ({"sbatch": ["--cpus-per-task=8"]}, "--cpus-per-task has a key of its own in this file, cpus"),
        ({"sbatch": ["--time=9"]}, "time_limit_minutes"),
        ({"work": "/data/50%"}, "% has a meaning in the path of a log"),
        ({"work": "/data/a\\b"}, "has a meaning in the path of a log"),
        ({"work": "/data/a\tb"}, "control character"),
        ({"binds": ["/a:b"]}, "cannot be bound"),
        ({"memory_gb": 3}, "memory_gb: unknown key; did you mean memory_gib?"),
        ({"time_limit_minutes": None}, "time_limit_minutes: expected a whole number of at least 1"),
    ],
)
def test_mistakes_in_a_cluster_file_are_reported_with_file_and_line(
    tmp_path: Path, values: dict[str, Any], expected: str
) -> None:
    path = tmp_path / "cluster.yaml"
    whole = {"time_limit_minutes": 60, "work": "/w", "runtime": "docker", "image": "job:1", **values}
    path.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        load_cluster(path)
    assert str(caught.value).startswith(f"{path}:1:")
    assert expected in str(caught.value)


def test_variables_whose_names_only_resemble_secrets_are_accepted() -> None:
    names = ["TOKENIZERS_PARALLELISM=false", "AWS_WEB_IDENTITY_TOKEN_FILE=/t"]
    assert cluster_of(environment=names).environment == tuple(names)


def test_options_of_sbatch_that_are_the_users_own_are_accepted() -> None:
    options = ("--constraint=a100", "--gres=gpu:a100:1", "--gpus=1", "--exclusive", "--nodelist=n[1-2]", "--mail-type=END")
    options += ("--container-image=x", "--reservation=r", "--time-min=5", "--wait-all-nodes=1")
    assert cluster_of(sbatch=list(options)).sbatch == options


def test_the_prepare_job_uses_the_options_of_the_array_unless_it_has_its_own() -> None:
    array = {"sbatch": ["--constraint=a100"], "qos": "gpu", "account": "a"}
    same = cluster_of(**array).for_preparing()
    assert (same.sbatch, same.qos, same.account) == (("--constraint=a100",), "gpu", "a")
    other = cluster_of(**array, prepare={"sbatch": [], "qos": "cpu", "account": "b"}).for_preparing()
    assert (other.sbatch, other.qos, other.account) == ((), "cpu", "b")


def test_the_example_cluster_file_is_valid_and_its_prepare_job_needs_no_gpu() -> None:
    cluster = load_cluster(EXAMPLES / "cluster.yaml")
    prepare = cluster.for_preparing()
    assert (cluster.partition, cluster.gpus, cluster.cpus) == ("gpu", 1, 4)
    assert (prepare.partition, prepare.gpus, prepare.cpus, prepare.memory_gib) == ("cpu", 0, 8, 16)
