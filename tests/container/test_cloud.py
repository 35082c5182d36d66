"""The job definitions for AWS Batch, Kubernetes and SkyPilot: valid, and restarting a job only where that helps."""

import fnmatch
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import kubernetes_validate
import pytest
import yaml

from emotion.data.toy_dataset import generate_dataset
from emotion.errors import EmotionError, Interrupted
from tests.container.engines import Docker, fetch
from tests.container.fixtures import BUILD_SECONDS, DEMO
from tests.stores.servers import REGION, S3Server, moto_server

FOLDER = Path(__file__).parents[2] / "container"
BATCH = json.loads((FOLDER / "aws-batch/job-definition.json").read_text())
KUBERNETES = list(yaml.safe_load_all((FOLDER / "kubernetes/job.yaml").read_text()))
(JOB,) = (document for document in KUBERNETES if document["kind"] == "Job")
SKY = yaml.safe_load((FOLDER / "sky/job.yaml").read_text())
(CONTAINER,) = JOB["spec"]["template"]["spec"]["containers"]

RESUMABLE = {75}
ELSEWHERE = {71}
"""This node cannot do the job."""
MAY_SUCCEED_LATER = {69, 73, 1, 137, 143}
"""Unavailable storage, a run owned by another job, and jobs that crashed or were killed."""


def exit_codes(kind: type[EmotionError] | type[Interrupted]) -> set[int]:
    """Exit codes of an exception and its subclasses."""
    return {kind.exit_code}.union(*map(exit_codes, kind.__subclasses__()))


FINAL = (exit_codes(EmotionError) | exit_codes(Interrupted)) - RESUMABLE - ELSEWHERE - MAY_SUCCEED_LATER


def settings_of(command: Sequence[str]) -> list[str]:
    """The values of --set in a command line."""
    follows = [after for word, after in itertools.pairwise(command) if word == "--set"]
    return follows + [word.removeprefix("--set=") for word in command if word.startswith("--set=")]


def test_the_final_exit_codes_are_those_that_the_readme_lists() -> None:
    assert {64, 65, 70, 76, 77} == FINAL


# Kubernetes


@pytest.mark.parametrize("version", ["1.29", "1.33", kubernetes_validate.latest_version()])
def test_the_manifest_matches_the_schema_of_kubernetes(version: str) -> None:
    for document in KUBERNETES:
        kubernetes_validate.validate(document, version, strict=True)
    wrong = json.loads(json.dumps(JOB))
    wrong["spec"]["podFailurePolicy"]["rules"][0]["acton"] = "Ignore"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def kubernetes_does(code: int, disrupted: bool = False) -> str:
    """The action of the first rule that matches a failed pod, else Count, as documented for podFailurePolicy."""
    for rule in JOB["spec"]["podFailurePolicy"]["rules"]:
        if disrupted and {"type": "DisruptionTarget", "status": "True"} in rule.get("onPodConditions", []):
            return str(rule["action"])
        codes = rule.get("onExitCodes")
        if codes and (code in codes["values"]) == (codes["operator"] == "In"):
            return str(rule["action"])
    return "Count"


def test_kubernetes_restarts_only_jobs_that_can_resume() -> None:
    assert {kubernetes_does(code) for code in RESUMABLE} == {"Ignore"}
    assert {kubernetes_does(code) for code in FINAL} == {"FailIndex"}
    assert {kubernetes_does(code) for code in MAY_SUCCEED_LATER | ELSEWHERE} == {"Count"}
    assert {kubernetes_does(code, disrupted=True) for code in (75, 137, 143, 70)} == {"Ignore"}


def test_the_policy_meets_the_rules_of_the_kubernetes_api_server() -> None:
    """The API server requires these in addition to the schema."""
    spec = JOB["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert "backoffLimitPerIndex" in spec
    assert spec["completionMode"] == "Indexed"
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule.get("onExitCodes", {}).get("containerName", "job") == CONTAINER["name"]


def test_the_command_for_kubernetes_is_a_valid_job(emotion_job: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert CONTAINER["args"][:2] == ["run", "/specs/deam.yaml"]
    values = [word for setting in settings_of(CONTAINER["args"]) for word in ("--set", setting)]
    arguments = ["check", "job/specs/deam.yaml", *values]
    found = emotion_job(*arguments, JOB_COMPLETION_INDEX="4")
    assert found.returncode == 0, found.stderr
    assert emotion_job(*arguments, JOB_COMPLETION_INDEX="5").returncode == 64, "the control: there are five folds"


# SkyPilot

SKYPILOT = "skypilot==0.14.1"
"""Installed for one test, without its fifty dependencies, some of which contradict ours."""
SKYPILOT_SCHEMAS = """
import importlib, json, sys, types

# The schemas are functions of one module. What it imports from the package's __init__, and from where a machine is to stop
# when idle, would import all of SkyPilot. The schema of `config`, which our file does not have, would, too.
sys.path.insert(0, sys.argv[1])
sky = sys.modules["sky"] = types.ModuleType("sky")
sky.__path__, sky.__version__ = [f"{sys.argv[1]}/sky"], "0"
autostop = sys.modules["sky.skylet.autostop_lib"] = types.ModuleType("sky.skylet.autostop_lib")
autostop.AutostopWaitFor = types.SimpleNamespace(supported_modes=list)
schemas = importlib.import_module("sky.utils.schemas")
schemas._task_config_schema = dict
validator = importlib.import_module("sky.utils.validator").get_schema_validator()
task = json.load(sys.stdin)
for schema, part in ((schemas.get_task_schema(), task), (schemas.get_resources_schema(), task["resources"])):
    for error in validator(schema).iter_errors(part):
        print(error.message)
"""


@pytest.mark.full
def test_the_task_matches_the_schema_of_skypilot(tmp_path: Path) -> None:
    fetch([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, SKYPILOT], "SkyPilot")

    def problems(task: dict[str, Any]) -> str:
        command = [sys.executable, "-c", SKYPILOT_SCHEMAS, tmp_path]
        return subprocess.run(command, input=json.dumps(task), stdout=subprocess.PIPE, text=True, check=True).stdout

    assert "config" not in SKY
    assert problems(SKY) == ""
    assert "'use_spots' was unexpected" in problems({**SKY, "resources": {**SKY["resources"], "use_spots": True}})
    recovery = {"recover_on_exit_codes": ["75"]}
    assert "['75']" in problems({**SKY, "resources": {**SKY["resources"], "job_recovery": recovery}})
    assert "'runs' was unexpected" in problems({**SKY, "runs": ""})


def test_skypilot_restarts_only_jobs_that_can_resume() -> None:
    """A machine that goes away is replaced in any case; of exit codes, those that are listed restart a job."""
    resources = SKY["resources"]
    assert resources["use_spot"] is True
    assert set(resources["job_recovery"]["recover_on_exit_codes"]) == RESUMABLE
    assert "max_restarts_on_errors" not in resources["job_recovery"], "it would count every exit code"


def test_the_command_for_skypilot_is_a_valid_job(
    emotion_job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Run by bash, as on the machine, with a `docker` that shows its arguments."""
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    docker.chmod(0o755)
    assert SKY["envs"]["FOLD"] is None, "without a value of its own it has to be given"
    environment = {**os.environ, **SKY["envs"], "FOLD": "4", "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run_by_bash(script: str) -> list[str]:
        return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True).stdout.split()

    assert run_by_bash(SKY["setup"]) == ["pull", "--quiet", SKY["envs"]["IMAGE"]]
    arguments = run_by_bash(SKY["run"])
    image, *command = arguments[arguments.index(SKY["envs"]["IMAGE"]) :]
    assert image.startswith("REGISTRY/emotion-job:")
    assert command[:2] == ["run", "/specs/deam.yaml"]
    values = [word for setting in settings_of(command) for word in ("--set", setting)]
    found = emotion_job("check", "job/specs/deam.yaml", *values)
    assert found.returncode == 0, found.stderr
    assert "split.fold=4" in values


# AWS Batch


def batch_does(code: int | None, status_reason: str = "Essential container in task exited") -> str:
    """The action of the first condition that matches, else RETRY, as documented for evaluateOnExit."""
    for rule in BATCH["retryStrategy"]["evaluateOnExit"]:
        reported = {"onExitCode": "" if code is None else str(code), "onStatusReason": status_reason, "onReason": ""}
        if all(fnmatch.fnmatchcase(reported[name], pattern) for name, pattern in rule.items() if name != "action"):
            return str(rule["action"])
    return "RETRY"


def test_batch_restarts_only_jobs_that_can_resume() -> None:
    assert {batch_does(code) for code in RESUMABLE | ELSEWHERE} == {"RETRY"}
    assert batch_does(None, "Host EC2 (instance i-0f00) terminated.") == "RETRY"
    assert {batch_does(code) for code in FINAL | {1, 137}} == {"EXIT"}


def batch_command(**replaced: str) -> list[str]:
    parameters = {**BATCH["parameters"], **replaced}
    command = BATCH["containerProperties"]["command"]
    return [parameters[word.removeprefix("Ref::")] if word.startswith("Ref::") else word for word in command]


def test_the_command_for_batch_is_a_valid_job(emotion_job: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    command = batch_command(source="data.source=s3://bucket/DEAM")
    assert command[:2] == ["run", "/specs/deam.yaml"]
    values = [word for setting in settings_of(command) for word in ("--set", setting)]
    found = emotion_job("check", "job/specs/deam.yaml", *values, AWS_BATCH_JOB_ARRAY_INDEX="4")
    assert found.returncode == 0, found.stderr
    outside = emotion_job("check", "job/specs/deam.yaml", *values)
    assert outside.returncode == 64, "the control: outside of an array there is no fold"
    assert "AWS_BATCH_JOB_ARRAY_INDEX" in outside.stderr


@pytest.fixture(scope="module")
def aws(docker: Docker) -> Iterator[S3Server]:
    """moto with S3 and a Batch that starts its jobs in our engine, on this machine's network."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DOCKER_HOST", docker.environment["DOCKER_HOST"])
        environment.setenv("MOTO_DOCKER_NETWORK_MODE", "host")
        with moto_server() as server:
            yield server


def client_of(server: S3Server, service: str) -> Any:
    session = boto3.session.Session(server.access_key, server.secret_key, region_name=REGION)
    return session.client(service, endpoint_url=server.endpoint_url)


@pytest.fixture(scope="module")
def queue(aws: S3Server) -> str:
    """A job queue, with the network, roles and machines that it needs."""
    ec2, iam, batch = (client_of(aws, service) for service in ("ec2", "iam", "batch"))
    network = ec2.create_vpc(CidrBlock="172.30.0.0/24")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=network, CidrBlock="172.30.0.0/25")["Subnet"]["SubnetId"]
    group = ec2.create_security_group(GroupName="g", Description="g", VpcId=network)["GroupId"]
    role = iam.create_role(RoleName="r", AssumeRolePolicyDocument="{}")["Role"]["Arn"]
    iam.create_instance_profile(InstanceProfileName="p")
    iam.add_role_to_instance_profile(InstanceProfileName="p", RoleName="r")
    profile = iam.get_instance_profile(InstanceProfileName="p")["InstanceProfile"]["Arn"]
    machines = {"type": "SPOT", "minvCpus": 0, "maxvCpus": 8, "instanceTypes": ["g5.xlarge"], "subnets": [subnet]}
    made = batch.create_compute_environment(
        computeEnvironmentName="machines",
        type="MANAGED",
        state="ENABLED",
        computeResources={**machines, "securityGroupIds": [group], "instanceRole": profile, "bidPercentage": 70},
        serviceRole=role,
    )
    order = [{"order": 1, "computeEnvironment": made["computeEnvironmentArn"]}]
    found = batch.create_job_queue(jobQueueName="gpu", state="ENABLED", priority=1, computeEnvironmentOrder=order)
    return str(found["jobQueueArn"])


@pytest.mark.full
@pytest.mark.timeout(BUILD_SECONDS)
@pytest.mark.parametrize("fold", [3, 9])
def test_a_job_of_the_definition_runs_in_batch_from_s3_to_s3(
    aws: S3Server, queue: str, image: str, tmp_path: Path, fold: int
) -> None:
    """It runs up to the features. The control, a fold that does not exist, fails."""
    s3, batch, bucket = aws.client(), client_of(aws, "batch"), aws.new_bucket()
    generate_dataset(tmp_path, 24, 0, lambda: False)
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        s3.upload_file(str(path), bucket, f"DEAM/{path.relative_to(tmp_path)}")

    definition = {**BATCH, "containerProperties": {**BATCH["containerProperties"], "image": image}}
    registered = batch.register_job_definition(**definition)["jobDefinitionArn"]
    parameters = {name: value.replace("BUCKET", bucket) for name, value in BATCH["parameters"].items()}
    # This machine has no GPU and no metadata service, and moto no arrays. The last of equal keys counts.
    here = ["--set", "device.kind=cpu", "--set", "preemption.spot=null", "--until", "features"]
    environment = {**aws.environment(), "AWS_BATCH_JOB_ARRAY_INDEX": str(fold)}
    job = batch.submit_job(
        jobName=f"fold-{fold}",
        jobQueue=queue,
        jobDefinition=registered,
        parameters={**parameters, "spec": DEMO},
        containerOverrides={
            "command": [*BATCH["containerProperties"]["command"], *here],
            "environment": [{"name": name, "value": value} for name, value in environment.items() if value],
        },
    )["jobId"]
    while (described := batch.describe_jobs(jobs=[job])["jobs"][0])["status"] not in ("SUCCEEDED", "FAILED"):
        time.sleep(1)
    assert described["status"] == ("SUCCEEDED" if fold < 4 else "FAILED"), described
    kept = [entry["Key"] for entry in s3.list_objects_v2(Bucket=bucket, Prefix="mirror/").get("Contents", [])]
    assert any("features" in name and name.endswith("receipt.json") for name in kept) == (fold < 4), kept
