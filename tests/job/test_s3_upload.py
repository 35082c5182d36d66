"""Uploads to S3: broken connections, other writers, servers that support less, denied deletions.

The server is scripted (tests/stores/scripted.py), and Ceph in some tests.
"""

import hashlib
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emotion.errors import AccessError, ModelError, StorageError
from job.config import StorageConfig
from job.results.publish import copy_run
from job.spec.location import S3
from job.storage import s3_upload
from job.storage.open import open_storage
from tests.conftest import TINY, terminated_in_gan
from tests.manifests import write_manifest
from tests.stores.dataset import assert_error, no, storage_of
from tests.stores.scripted import Answer, Object, Request, ScriptedS3, error, reset_unheard
from tests.stores.servers import S3Server

BODY = random.Random(2).randbytes(450_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of five parts with `_small_parts`: four of 100,000 bytes and one of 50,000."""
    path = tmp_path / "step-1.ckpt"
    path.write_bytes(BODY)
    return path


@pytest.fixture
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_upload, "PART_BYTES", 100_000)


# Parts


@pytest.mark.usefixtures("_small_parts")
def test_only_a_part_whose_connection_is_reset_is_sent_again(store: ScriptedS3, source: Path) -> None:
    store.on("UploadPart", "*", reset_unheard, passed=2)
    store.on("UploadPart", "*", error(503, "SlowDown"))
    storage_of(store).put(source, "run/x", SHA256)
    assert store.objects["deam/run/x"].body == BODY
    assert len(store.asked("UploadPart")) == 5 + 2
    assert all("content-md5" in request.headers for request in store.asked("UploadPart"))
    assert store.uploads == {}


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("operation", ["UploadPart", "CompleteMultipartUpload"])
def test_an_upload_that_fails_is_aborted_and_leaves_nothing(store: ScriptedS3, source: Path, operation: str) -> None:
    store.on(operation, "*", error(503, "SlowDown"), passed=2 if operation == "UploadPart" else 0, times=math.inf)
    with pytest.raises(StorageError) as caught:
        storage_of(store, patience_seconds=0.1).put(source, "run/x", SHA256)
    assert_error(caught, StorageError, 69, "s3:PutObject", "s3://bucket/deam/run/x", "503 SlowDown")
    assert len(store.asked("AbortMultipartUpload")) == 1
    assert (store.uploads, "deam/run/x" in store.objects) == ({}, False)


@pytest.mark.usefixtures("_small_parts")
def test_a_file_that_was_changed_is_not_uploaded(store: ScriptedS3, source: Path) -> None:
    source.write_bytes(BODY[:-1] + b"?")
    with pytest.raises(StorageError, match=r"step-1.ckpt is damaged"):
        storage_of(store).put(source, "run/x", SHA256)
    assert (store.uploads, "deam/run/x" in store.objects) == ({}, False)


@pytest.mark.usefixtures("_small_parts")
def test_clear_aborts_the_uploads_of_killed_jobs_below_a_folder(store: ScriptedS3, source: Path) -> None:
    client = store.address.client()
    for key in ("deam/run/x", "deam/other/x"):
        client.create_multipart_upload(Bucket="bucket", Key=key)
    storage_of(store).clear("run", own=True)
    assert [key for key, _, _ in store.uploads.values()] == ["deam/other/x"]


@pytest.mark.usefixtures("_small_parts")
def test_an_upload_whose_last_answer_was_lost_is_complete(store: ScriptedS3, source: Path) -> None:
    def lost(request: Request, honest: Callable[[], Answer]) -> Answer:
        honest()
        return Answer(silent=True, reset=True)

    store.on("CompleteMultipartUpload", "*", lost)
    storage_of(store).put(source, "run/x", SHA256)
    assert (store.objects["deam/run/x"].body, store.uploads) == (BODY, {})


KILLED_UPLOAD = """
import sys
from pathlib import Path
from job.config import StorageConfig
from job.storage import s3_upload
from job.spec.location import parse_location
from job.storage.open import open_storage
s3_upload.PART_BYTES = 5 << 20
open_storage(parse_location(sys.argv[1]), StorageConfig(), lambda: False).put(Path(sys.argv[2]), "x", sys.argv[3])
"""


@pytest.mark.full
def test_nothing_of_an_upload_killed_between_two_parts_stays_in_ceph_after_the_next_one(
    radosgw: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in radosgw.environment().items():
        monkeypatch.setenv(name, value)
    client, name = radosgw.client(), radosgw.new_bucket()
    body = random.Random(3).randbytes(64 << 20)
    file = tmp_path / "x"
    file.write_bytes(body)
    digest = hashlib.sha256(body).hexdigest()
    command = [sys.executable, "-c", KILLED_UPLOAD, f"s3://{name}/run", str(file), digest]

    def parts() -> list[Any]:
        uploads = client.list_multipart_uploads(Bucket=name).get("Uploads", ())
        return [
            part
            for one in uploads
            for part in client.list_parts(Bucket=name, Key=one["Key"], UploadId=one["UploadId"]).get("Parts", ())
        ]

    with subprocess.Popen(command) as process:
        while len(parts()) < 2:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert client.list_multipart_uploads(Bucket=name)["Uploads"]
    assert "Contents" not in client.list_objects_v2(Bucket=name)

    to = open_storage(S3(name, "run"), StorageConfig(), no)
    to.clear("", own=True)
    to.put(file, "x", digest)
    assert client.get_object(Bucket=name, Key="run/x")["Body"].read() == body
    assert "Uploads" not in client.list_multipart_uploads(Bucket=name)


# Other writers


@pytest.mark.full
def test_a_conflict_is_retried_until_patience_seconds_have_passed(store: ScriptedS3) -> None:
    conflict = error(409, "ConditionalRequestConflict")
    store.on("PutObject", "*", conflict, times=3)
    assert storage_of(store).write_new("manifest.json", b"ours")
    assert len(store.asked("PutObject")) == 4
    store.on("PutObject", "*", conflict, times=math.inf)
    with pytest.raises(StorageError) as caught:
        storage_of(store, patience_seconds=0.1).write_new("other.json", b"ours")
    assert_error(caught, StorageError, 69, "s3:PutObject", "s3://bucket/deam/other.json", "409")
    assert len(store.asked("PutObject")) < 100


WEIGHTS = "model/model.safetensors"


def published(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "model").mkdir()
    (folder / WEIGHTS).write_bytes(weights)
    return write_manifest(folder)


@pytest.mark.parametrize("same", [True, False])
def test_of_two_simultaneous_publishers_the_later_one_verifies_the_result_of_the_first(
    store: ScriptedS3, tmp_path: Path, same: bool
) -> None:
    ours, theirs = published(tmp_path / "a", b"1"), published(tmp_path / "b", b"1" if same else b"2")
    there = {f"deam/runs/{name}": Object((theirs / name).read_bytes()) for name in (WEIGHTS, "manifest.json")}

    def other_was_quicker(request: Request, honest: Callable[[], Answer]) -> Answer:
        store.objects.update(there)
        return honest()

    store.on("PutObject", "*/manifest.json", other_was_quicker)
    target = storage_of(store, "s3://bucket/deam/runs")
    if same:
        copy_run(ours, target, no)
    else:
        with pytest.raises(ModelError) as caught:
            copy_run(ours, target, no)
        assert_error(caught, ModelError, 70, "s3://bucket/deam/runs", "another result")
    assert [request.status for request in store.asked("PutObject", "*/manifest.json")] == [412]
    assert store.objects["deam/runs/manifest.json"].body == (theirs / "manifest.json").read_bytes()


# Servers that support less


def test_a_server_without_conditional_requests_is_used_without_them_after_a_warning(
    store: ScriptedS3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.refuses = {"if-none-match": 501, "if-match": 501}
    target = storage_of(store)
    assert target.write_new("a", b"1")
    assert not target.write_new("a", b"2")
    assert store.objects["deam/a"].body == b"1"
    assert target.get("a", tmp_path / "a").verified == "store sha256"
    assert (tmp_path / "a").read_bytes() == b"1"
    warnings = [line for line in caplog.messages if "does not support" in line]
    assert [line.split("support ")[1].split(":")[0] for line in warnings] == ["If-None-Match", "x-amz-checksum-mode", "If-Match"]


def test_uploads_use_neither_newer_checksums_nor_chunked_encoding(store: ScriptedS3, source: Path) -> None:
    store.refuses = dict.fromkeys(
        ["x-amz-sdk-checksum-algorithm", "x-amz-trailer", "x-amz-checksum-crc32", "x-amz-checksum-crc64nvme"], 400
    )
    target = storage_of(store)
    target.write("a", b"1")
    target.put(source, "b", SHA256)
    assert (store.objects["deam/a"].body, store.objects["deam/b"].body) == (b"1", BODY)
    assert all(request.headers.get("content-encoding") is None for request in store.requests)


def test_content_that_arrives_damaged_is_sent_again(store: ScriptedS3) -> None:
    def damaged(request: Request, honest: Callable[[], Answer]) -> Answer:
        request.body = b"?" + request.body[1:]
        return honest()

    store.on("PutObject", "*", damaged)
    storage_of(store).write("a", b"what was meant")
    assert [request.status for request in store.asked("PutObject")] == [400, 200]
    assert store.objects["deam/a"].body == b"what was meant"


def test_a_denied_deletion_is_an_access_error(store: ScriptedS3) -> None:
    store.on("DeleteObject", "*", error(403, "AccessDenied"), times=math.inf)
    with pytest.raises(AccessError) as caught:
        storage_of(store).remove("big.bin")
    assert_error(caught, AccessError, 77, "s3:DeleteObject", "s3://bucket/deam/big.bin")
    assert len(store.asked("DeleteObject")) == 1


@pytest.mark.full
def test_a_job_whose_mirror_denies_deletions_warns_and_finishes(emotion_job: Any, store: ScriptedS3, tmp_path: Path) -> None:
    store.on("DeleteObject*", "*", error(403, "AccessDenied"), times=math.inf)

    def command(work: Path) -> list[str]:
        return ["run", str(TINY), "--work", str(work), "--set", "checkpoint.mirror=s3://bucket/mirror"]

    # A finished phase removes the checkpoints of earlier attempts from the mirror.
    stopped, _ = terminated_in_gan([sys.executable, "-m", "job", *command(tmp_path / "first")])
    assert stopped == 75
    (gan,) = tmp_path.glob("first/tiny-*/gan-*")
    checkpoint = f"mirror/{gan.parent.name}/{gan.name}/checkpoints/step-1.ckpt"
    store.objects[checkpoint] = Object(b"x")
    first = emotion_job(*command(tmp_path / "first"))
    assert first.returncode == 0, first.stderr
    (warning,) = [line for line in first.stderr.splitlines() if "s3:DeleteObject" in line]
    assert " WARNING mirror: " in warning
    assert "Traceback" not in first.stderr
    assert checkpoint in store.objects
    # All phases are in the mirror: another machine only has to publish.
    second = emotion_job(*command(tmp_path / "second"))
    assert second.returncode == 0, second.stderr
    begun = [line.split("phase=")[1].split()[0] for line in second.stderr.splitlines() if " begins " in line]
    assert begun == ["publish"]
