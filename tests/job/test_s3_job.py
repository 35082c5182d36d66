"""Jobs as processes with object storage: exit codes and error lines, stops at any byte, no secret in any output."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.job.test_s3_to_s3_job import put_dataset
from tests.stores.dataset import AUDIO, SONGS
from tests.stores.scripted import Fault, Object, ScriptedS3, error, flip_bit, redirect, with_headers
from tests.stores.servers import S3Server

Command = Callable[..., subprocess.CompletedProcess[str]]
SHARES = (0.04, 0.2, 0.37, 0.5, 0.71, 0.93)
"""Where a staging is stopped, as a share of all bytes."""


def staging(work: Path, *overrides: str) -> list[str]:
    sets = ["data.source=s3://bucket/deam", *overrides]
    words = [word for one in sets for word in ("--set", one)]
    return ["run", str(TINY), "--work", str(work), "--until", "stage", *words]


@pytest.mark.full
@pytest.mark.parametrize(
    ("operation", "fault", "exit_code", "words"),
    [
        ("GetObject", error(403, "AccessDenied"), 77, f"s3:GetObject s3://bucket/{AUDIO}/"),
        ("ListObjectsV2", error(403, "AccessDenied"), 77, "s3:ListBucket s3://bucket/deam"),
        ("GetObject", error(404, "NoSuchKey"), 65, "12 of 12 files in s3://bucket/deam"),
        ("GetObject", flip_bit(0), 65, f"s3://bucket/{AUDIO}/10.mp3 is damaged"),
        ("GetObject", with_headers(ETag='"0"'), 65, "changed during download"),
        ("GetObject", error(503, "SlowDown"), 69, "503 SlowDown"),
        ("GetObject", error(400, "ExpiredToken"), 75, "credentials have expired"),
        ("ListObjectsV2", error(403, "RequestTimeTooSkewed"), 69, "clock"),
        ("ListObjectsV2", redirect("https://127.0.0.2/"), 69, "storage.endpoint_url"),
    ],
    ids=["denied", "listing denied", "absent", "flipped", "changed", "slow down", "expired", "clock", "redirect"],
)
def test_a_failing_job_ends_with_its_exit_code_and_one_line(
    emotion_job: Command, store: ScriptedS3, tmp_path: Path, operation: str, fault: Fault, exit_code: int, words: str
) -> None:
    store.on(operation, f"{AUDIO}/*" if operation == "GetObject" else "*", fault, times=math.inf)
    found = emotion_job(*staging(tmp_path / "work", "storage.patience_seconds=0.5"))
    assert found.returncode == exit_code, found.stderr
    errors = [line for line in found.stderr.splitlines() if " INFO " not in line and " WARNING " not in line]
    assert len(errors) == 1, found.stderr
    assert words in found.stderr
    assert "Traceback" not in found.stderr
    assert list(tmp_path.rglob("audio/[!.]*")) == []
    assert_no_secret(store.address, tmp_path, found)


@pytest.mark.full
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_staging_stopped_at_any_byte_fetches_at_most_five_percent_more_than_it_needs(
    store: ScriptedS3, tmp_path: Path, stop: signal.Signals
) -> None:
    # As on a network: little is in flight compared with what has arrived.
    store.bytes_a_second = 4e6
    for name in SONGS:
        store.objects[f"{AUDIO}/{name}"] = Object(random.Random(name).randbytes(1_200_000))
    wanted = sum(len(found.body) for key, found in store.objects.items() if not key.endswith("big.bin"))
    command = [sys.executable, "-m", "job", *staging(tmp_path, "storage.connections=2")]
    for share in SHARES:
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            while store.sent() < share * wanted:
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.001)
            process.send_signal(stop)
            stderr = process.communicate()[1]
        assert process.returncode == (-signal.SIGKILL if stop is signal.SIGKILL else 75), stderr
        for path in tmp_path.rglob("audio/[!.]*"):
            assert path.read_bytes() == store.objects[f"{AUDIO}/{path.name}"].body
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("audio/*")} == {
        name: store.objects[f"{AUDIO}/{name}"].body for name in SONGS
    }
    assert wanted <= store.sent() <= 1.05 * wanted


# Secrets


def assert_no_secret(store: S3Server, folder: Path, found: subprocess.CompletedProcess[str]) -> None:
    """No file and no output of a job contains a part of its credentials or of a signature."""
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name, content in {**files, "stdout": found.stdout.encode(), "stderr": found.stderr.encode()}.items():
        for secret in (store.access_key, store.secret_key, "hush-token", "X-Amz-", "Signature=", "Credential="):
            assert secret.encode() not in content, f"{secret} in {name}"


@pytest.mark.full
def test_a_job_leaves_no_secret_in_files_logs_or_object_storage(emotion_job: Command, moto: S3Server, tmp_path: Path) -> None:
    client, bucket = moto.client(), moto.new_bucket()
    put_dataset(client, bucket, 24, tmp_path / "generated")
    work = tmp_path / "work"
    sets = [
        f"data.source=s3://{bucket}/deam",
        f"artifacts.destination=s3://{bucket}/runs",
        f"checkpoint.mirror=s3://{bucket}/mirror",
    ]
    words = [word for one in sets for word in ("--set", one)]
    environment = {**moto.environment(), "AWS_SESSION_TOKEN": "hush-token"}
    found = emotion_job("run", TINY, "--work", work, *words, **environment)
    assert found.returncode == 0, found.stderr
    # Objects and their headers are searched, too.
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for one in page["Contents"]:
            path = work / "objects" / one["Key"]
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, one["Key"], str(path))
            headers = client.head_object(Bucket=bucket, Key=one["Key"])["ResponseMetadata"]["HTTPHeaders"]
            path.with_name(f"{path.name}.headers").write_text(str(headers))
    assert list(work.glob("objects/runs/*/manifest.json"))
    assert list(work.glob("objects/mirror/*/job.log"))
    assert_no_secret(moto, work, found)


@pytest.mark.full
def test_a_signature_refused_by_ceph_is_an_access_error_without_the_key(
    emotion_job: Command, radosgw: S3Server, tmp_path: Path
) -> None:
    bucket = radosgw.new_bucket()
    wrong = S3Server(radosgw.endpoint_url, radosgw.access_key, "another-secret-key")
    command = staging(tmp_path, f"data.source=s3://{bucket}/deam")
    found = emotion_job(*command, **wrong.environment())
    assert found.returncode == 77, found.stderr
    assert f"s3:ListBucket s3://{bucket}/deam" in found.stderr
    assert "SignatureDoesNotMatch" in found.stderr
    assert_no_secret(wrong, tmp_path, found)


@pytest.mark.full
def test_without_credentials_the_job_says_where_to_provide_them(emotion_job: Command, store: ScriptedS3, tmp_path: Path) -> None:
    nothing = {name: "" for name in os.environ if name.startswith(("AWS_ACCESS", "AWS_SECRET", "AWS_SESSION"))}
    store.on("*", "*", error(403, "AccessDenied"), times=math.inf)
    found = emotion_job(*staging(tmp_path), **nothing)
    assert found.returncode == 77, found.stderr
    assert "Provide AWS credentials" in found.stderr
    assert len(store.requests) == 1
