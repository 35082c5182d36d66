"""What a store can do to an upload: connections that break, other writers, refused conditions and deletions.

As in test_object_store.py the store is scripted; some of it is done on a real one, too.
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
from job.storage import s3 as bucket
from job.storage.open import open_storage
from tests.conftest import TINY, terminated_in_gan
from tests.manifests import write_manifest
from tests.stores.dataset import assert_told, no, place
from tests.stores.scripted import Answer, Object, Request, ScriptedS3, error, reset_unheard
from tests.stores.servers import Store

BODY = random.Random(2).randbytes(450_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of five parts: 1 of 50,000 and 4 of 100,000 bytes, if parts are so small."""
    path = tmp_path / "step-1.ckpt"
    path.write_bytes(BODY)
    return path


@pytest.fixture
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "PART_BYTES", 100_000)


# Parts


@pytest.mark.usefixtures("_small_parts")
def test_a_part_whose_connection_is_reset_is_sent_again_and_no_other(store: ScriptedS3, source: Path) -> None:
    store.on("UploadPart", "*", reset_unheard, passed=2)
    store.on("UploadPart", "*", error(503, "SlowDown"))
    place(store).put(source, "run/x", SHA256)
    assert store.objects["deam/run/x"].body == BODY
    assert len(store.asked("UploadPart")) == 5 + 2
    assert all("content-md5" in request.headers for request in store.asked("UploadPart"))
    assert store.uploads == {}


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("operation", ["UploadPart", "CompleteMultipartUpload"])
def test_an_upload_that_cannot_be_finished_leaves_nothing(store: ScriptedS3, source: Path, operation: str) -> None:
    store.on(operation, "*", error(503, "SlowDown"), passed=2 if operation == "UploadPart" else 0, times=math.inf)
    with pytest.raises(StorageError) as caught:
        place(store, patience_seconds=0.1).put(source, "run/x", SHA256)
    assert_told(caught, StorageError, 69, "s3:PutObject", "s3://bucket/deam/run/x", "503 SlowDown")
    assert len(store.asked("AbortMultipartUpload")) == 1
    assert (store.uploads, "deam/run/x" in store.objects) == ({}, False)


@pytest.mark.usefixtures("_small_parts")
def test_a_file_that_is_not_what_it_was_is_not_put_there(store: ScriptedS3, source: Path) -> None:
    source.write_bytes(BODY[:-1] + b"?")
    with pytest.raises(StorageError, match=r"step-1.ckpt is damaged"):
        place(store).put(source, "run/x", SHA256)
    assert (store.uploads, "deam/run/x" in store.objects) == ({}, False)


@pytest.mark.usefixtures("_small_parts")
def test_what_a_killed_upload_has_left_goes_with_the_next_attempt(store: ScriptedS3, source: Path) -> None:
    client = store.address.client()
    for key in ("deam/run/x", "deam/other/x"):
        client.create_multipart_upload(Bucket="bucket", Key=key)
    place(store).clear("run", own=True)
    assert [key for key, _, _ in store.uploads.values()] == ["deam/other/x"]


@pytest.mark.usefixtures("_small_parts")
def test_completing_that_succeeded_although_its_answer_was_lost_is_no_failure(store: ScriptedS3, source: Path) -> None:
    def lost(request: Request, honest: Callable[[], Answer]) -> Answer:
        honest()
        return Answer(silent=True, reset=True)

    store.on("CompleteMultipartUpload", "*", lost)
    place(store).put(source, "run/x", SHA256)
    assert (store.objects["deam/run/x"].body, store.uploads) == (BODY, {})


KILLED_UPLOAD = """
import sys
from pathlib import Path
from job.config import StorageConfig
from job.storage import s3 as bucket
from job.spec.location import parse_location
from job.storage.open import open_storage
bucket.PART_BYTES = 5 << 20
open_storage(parse_location(sys.argv[1]), StorageConfig(), lambda: False).put(Path(sys.argv[2]), "x", sys.argv[3])
"""


@pytest.mark.full
def test_an_upload_killed_between_two_parts_is_nowhere_in_a_real_store_after_the_next_one(
    radosgw: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_a_conflict_is_tried_again_for_as_long_as_the_patience(store: ScriptedS3) -> None:
    conflict = error(409, "ConditionalRequestConflict")
    store.on("PutObject", "*", conflict, times=3)
    assert place(store).write_new("manifest.json", b"ours")
    assert len(store.asked("PutObject")) == 4
    store.on("PutObject", "*", conflict, times=math.inf)
    with pytest.raises(StorageError) as caught:
        place(store, patience_seconds=0.1).write_new("other.json", b"ours")
    assert_told(caught, StorageError, 69, "s3:PutObject", "s3://bucket/deam/other.json", "409")
    assert len(store.asked("PutObject")) < 100


WEIGHTS = "model/model.safetensors"


def published(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "model").mkdir()
    (folder / WEIGHTS).write_bytes(weights)
    return write_manifest(folder)


@pytest.mark.parametrize("same", [True, False])
def test_of_two_publishers_at_one_moment_the_later_one_finds_out(store: ScriptedS3, tmp_path: Path, same: bool) -> None:
    ours, theirs = published(tmp_path / "a", b"1"), published(tmp_path / "b", b"1" if same else b"2")
    there = {f"deam/runs/{name}": Object((theirs / name).read_bytes()) for name in (WEIGHTS, "manifest.json")}

    def other_was_quicker(request: Request, honest: Callable[[], Answer]) -> Answer:
        store.objects.update(there)
        return honest()

    store.on("PutObject", "*/manifest.json", other_was_quicker)
    target = place(store, "s3://bucket/deam/runs")
    if same:
        copy_run(ours, target, no)
    else:
        with pytest.raises(ModelError) as caught:
            copy_run(ours, target, no)
        assert_told(caught, ModelError, 70, "s3://bucket/deam/runs", "another result")
    assert [request.status for request in store.asked("PutObject", "*/manifest.json")] == [412]
    assert store.objects["deam/runs/manifest.json"].body == (theirs / "manifest.json").read_bytes()


# Stores that know less


def test_a_store_without_conditions_is_used_without_them_and_that_is_told(
    store: ScriptedS3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.refuses = {"if-none-match": 501, "if-match": 501}
    target = place(store)
    assert target.write_new("a", b"1")
    assert not target.write_new("a", b"2")
    assert store.objects["deam/a"].body == b"1"
    assert target.get("a", tmp_path / "a").verified == "store sha256"
    assert (tmp_path / "a").read_bytes() == b"1"
    told = [line for line in caplog.messages if "does not know" in line]
    assert [line.split("know ")[1].split(":")[0] for line in told] == [
        "If-None-Match",
        "x-amz-checksum-mode",
        "If-Match",
    ]


def test_stores_that_know_neither_newer_checksums_nor_chunks_are_sent_none(store: ScriptedS3, source: Path) -> None:
    store.refuses = dict.fromkeys(
        ["x-amz-sdk-checksum-algorithm", "x-amz-trailer", "x-amz-checksum-crc32", "x-amz-checksum-crc64nvme"], 400
    )
    target = place(store)
    target.write("a", b"1")
    target.put(source, "b", SHA256)
    assert (store.objects["deam/a"].body, store.objects["deam/b"].body) == (b"1", BODY)
    assert all(request.headers.get("content-encoding") is None for request in store.requests)


def test_a_put_that_arrives_damaged_is_sent_again(store: ScriptedS3) -> None:
    def damaged(request: Request, honest: Callable[[], Answer]) -> Answer:
        request.body = b"?" + request.body[1:]
        return honest()

    store.on("PutObject", "*", damaged)
    place(store).write("a", b"what was meant")
    assert [request.status for request in store.asked("PutObject")] == [400, 200]
    assert store.objects["deam/a"].body == b"what was meant"


def test_a_denied_deletion_is_told(store: ScriptedS3) -> None:
    store.on("DeleteObject", "*", error(403, "AccessDenied"), times=math.inf)
    with pytest.raises(AccessError) as caught:
        place(store).remove("big.bin")
    assert_told(caught, AccessError, 77, "s3:DeleteObject", "s3://bucket/deam/big.bin")
    assert len(store.asked("DeleteObject")) == 1


@pytest.mark.full
def test_a_job_whose_mirror_denies_deletions_warns_keeps_what_it_may_and_ends_well(
    emotion_job: Any, store: ScriptedS3, tmp_path: Path
) -> None:
    store.on("DeleteObject*", "*", error(403, "AccessDenied"), times=math.inf)

    def command(work: Path) -> list[str]:
        return ["run", str(TINY), "--work", str(work), "--set", "checkpoint.mirror=s3://bucket/mirror"]

    # What an attempt may have left there of a checkpoint is of no use when the phase has finished.
    stopped, _ = terminated_in_gan([sys.executable, "-m", "job", *command(tmp_path / "first")])
    assert stopped == 75
    (gan,) = tmp_path.glob("first/tiny-*/gan-*")
    left = f"mirror/{gan.parent.name}/{gan.name}/checkpoints/step-1.ckpt"
    store.objects[left] = Object(b"x")
    first = emotion_job(*command(tmp_path / "first"))
    assert first.returncode == 0, first.stderr
    (warning,) = [line for line in first.stderr.splitlines() if "s3:DeleteObject" in line]
    assert " WARNING mirror: " in warning
    assert "Traceback" not in first.stderr
    assert left in store.objects
    # All phases are there all the same: another machine has nothing to do but to publish.
    second = emotion_job(*command(tmp_path / "second"))
    assert second.returncode == 0, second.stderr
    begun = [line.split("phase=")[1].split()[0] for line in second.stderr.splitlines() if " begins " in line]
    assert begun == ["publish"]
