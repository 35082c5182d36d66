"""Answers of S3 that are none: pages of captive portals and proxies, nothing at all, no ETag, the ETag of other bytes.

A request counts as carried out only if its answer says so. Otherwise it is sent again, until `storage.patience_seconds`.
"""

import hashlib
import json
import logging
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emotion.errors import StorageError
from emotion.training.checkpoint_files import list_steps
from job.pipeline.phase_functions import is_published
from job.preemption import StopRequest
from job.results.publish import copy_run
from job.run_folder.mirror_fetch import MirrorReader
from job.spec.load import load_spec
from job.spec.model import run_name
from job.storage import s3_upload
from job.storage.protocol import Storage
from tests.conftest import TINY
from tests.job.test_s3_to_s3_job import killed_when
from tests.job.test_s3_upload import published
from tests.stores.dataset import assert_error, no, staged, storage_of
from tests.stores.scripted import (
    NOT_ANSWERS,
    PAGE,
    Answer,
    Fault,
    Object,
    Request,
    ScriptedS3,
    answer_with,
    error,
    lost,
    with_headers,
    without_etag,
)

BODY = random.Random(4).randbytes(250_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


def put(storage: Storage, folder: Path) -> None:
    (folder / "x").write_bytes(BODY)
    storage.put(folder / "x", "run/x", SHA256)


DONE: dict[str, tuple[Callable[[Storage, Path], Any], Callable[[ScriptedS3], bool]]] = {
    "PutObject": (lambda storage, _: storage.write("new", b"1"), lambda s3: s3.objects["deam/new"].body == b"1"),
    "CreateMultipartUpload": (put, lambda s3: s3.objects["deam/run/x"].body == BODY),
    "UploadPart": (put, lambda s3: s3.objects["deam/run/x"].body == BODY),
    "CompleteMultipartUpload": (put, lambda s3: s3.objects["deam/run/x"].body == BODY),
    "CopyObject": (lambda storage, _: storage.move("big.bin", "moved"), lambda s3: "deam/moved" in s3.objects),
    "DeleteObject": (lambda storage, _: storage.remove("big.bin"), lambda s3: "deam/big.bin" not in s3.objects),
    "ListObjectsV2": (lambda storage, _: list(storage.entries("MEMD_audio")), lambda _: True),
    "GetObject": (lambda storage, _: storage.read("big.bin"), lambda _: True),
}
"""What sends a request of each operation, and whether it was carried out."""
OTHER_ETAG = with_headers(ETag=f'"{"0" * 32}"')


def faults(operation: str) -> dict[str, Fault]:
    found = dict(NOT_ANSWERS)
    if operation not in ("DeleteObject", "CreateMultipartUpload"):
        found["no ETag"] = without_etag
    if operation in ("PutObject", "UploadPart", "GetObject"):
        found["ETag of other bytes"] = OTHER_ETAG
    return found


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_upload, "PART_BYTES", 100_000)


def prepare(store: ScriptedS3) -> None:
    store.stop_failing()
    store.objects["deam/big.bin"] = Object(b"1")
    for key in ("deam/run/x", "deam/new", "deam/moved"):
        store.objects.pop(key, None)
    store.requests.clear()


@pytest.mark.parametrize("operation", DONE)
def test_a_request_is_sent_again_until_its_answer_says_that_it_was_carried_out(
    store: ScriptedS3, tmp_path: Path, operation: str
) -> None:
    send, is_done = DONE[operation]
    storage = storage_of(store)
    prepare(store)
    right = send(storage, tmp_path)
    needed = len(store.asked(operation))
    for name, fault in faults(operation).items():
        prepare(store)
        store.on(operation, "*", fault)
        assert send(storage, tmp_path) == right, name
        assert is_done(store), name
        assert len(store.asked(operation)) == needed + 1, name


@pytest.mark.parametrize("operation", DONE)
def test_without_such_an_answer_the_storage_is_unavailable(store: ScriptedS3, tmp_path: Path, operation: str) -> None:
    storage = storage_of(store, patience_seconds=0)
    for name, fault in faults(operation).items():
        if (operation, name) == ("CompleteMultipartUpload", "no ETag"):
            continue  # it is complete, as the next answer says
        prepare(store)
        store.on(operation, "*", fault, times=math.inf)
        with pytest.raises(StorageError) as caught:
            DONE[operation][0](storage, tmp_path)
        text = str(caught.value)
        assert caught.value.exit_code == 69, name
        assert "s3://bucket/deam" in text, name
        assert text.isprintable(), name
        statuses = {str(request.status) for request in store.asked(operation)}
        assert set(re.findall(r"HTTP (\d+)", text)) <= statuses, text


def test_the_message_names_type_and_beginning_of_what_arrived(store: ScriptedS3) -> None:
    store.on("ListObjectsV2", "*", PAGE, times=math.inf)
    with pytest.raises(StorageError) as caught:
        list(storage_of(store, patience_seconds=0).entries())
    words = ("s3:ListBucket", "HTTP 200", "text/html; charset=utf-8", "'<html><head><title>Sign in</title></head><body>\\x1b[2J")
    assert_error(caught, StorageError, 69, *words)


@pytest.mark.parametrize("operation", sorted(DONE.keys() - {"GetObject"}))
def test_an_error_document_with_http_200_is_an_error_and_not_called_http_500(
    store: ScriptedS3, tmp_path: Path, operation: str
) -> None:
    storage = storage_of(store, patience_seconds=0)
    for code in ("InternalError", "SlowDown", "Whatever", ""):
        prepare(store)
        store.on(operation, "*", error(200, code), times=math.inf)
        with pytest.raises(StorageError) as caught:
            DONE[operation][0](storage, tmp_path)
        assert_error(caught, StorageError, 69, f"HTTP 200 {code}")
        prepare(store)
        store.on(operation, "*", error(200, code))
        DONE[operation][0](storage_of(store), tmp_path)


def test_a_deletion_answered_with_200_is_one_where_the_object_is_gone(store: ScriptedS3) -> None:
    def done(request: Request, honest: Callable[[], Answer]) -> Answer:
        honest()
        return Answer(200)

    store.on("DeleteObject", "*", done)
    storage_of(store).remove("big.bin")
    assert len(store.asked("DeleteObject")) == 1
    assert "deam/big.bin" not in store.objects


@pytest.mark.parametrize(
    "headers",
    [
        {"x-amz-server-side-encryption": "aws:kms"},
        {"x-amz-server-side-encryption": "aws:kms:dsse"},
        {"x-amz-server-side-encryption-customer-algorithm": "AES256"},
    ],
    ids=["KMS", "two layers of KMS", "a key of the customer"],
)
def test_the_etag_of_an_encrypted_object_is_no_md5(store: ScriptedS3, tmp_path: Path, headers: dict[str, str]) -> None:
    fault = with_headers(ETag=f'"{"0" * 32}"', **headers)
    store.on("PutObject", "*", fault)
    store.on("UploadPart", "*", fault, times=3)
    storage_of(store).write("new", b"1")
    put(storage_of(store), tmp_path)
    assert store.objects["deam/run/x"].body == BODY
    assert (len(store.asked("PutObject")), len(store.asked("UploadPart"))) == (1, 3)


# Publishing


def test_a_run_is_published_only_if_its_manifest_can_be_read_back(
    store: ScriptedS3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def forgotten(request: Request, honest: Callable[[], Answer]) -> Answer:
        return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    ours = published(tmp_path / "a", b"1")
    for key in ("manifest.json", "model/model.safetensors"):
        store.on("PutObject", f"*/{key}", forgotten)
        with caplog.at_level(logging.INFO), pytest.raises(StorageError) as caught:
            copy_run(ours, storage_of(store, "s3://bucket/deam/runs"), no)
        assert_error(caught, StorageError, 69, "s3://bucket/deam/runs", key)
        assert not any("published folder" in line for line in caplog.messages)
        store.objects.pop("deam/runs/manifest.json", None)
        store.objects.pop("deam/runs/model/model.safetensors", None)
    copy_run(ours, storage_of(store, "s3://bucket/deam/runs"), no)
    assert store.objects["deam/runs/manifest.json"].body == (ours / "manifest.json").read_bytes()


# Listings


def listing(*pages: str) -> Fault:
    """Pages of a listing in a ring. Each is `keys|token`, keys separated by commas; without a token it is the last one."""
    asked = iter(range(10**6))

    def page(request: Request, honest: Callable[[], Answer]) -> Answer:
        number = next(asked)
        keys, _, token = pages[number % len(pages)].replace("#", str(number)).partition("|")
        text = "".join(
            f"<Contents><Key>deam/{key}</Key><Size>1</Size><ETag>1</ETag><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
            for key in keys.split(",")
            if key
        )
        more = f"<IsTruncated>{str(bool(token)).lower()}</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>"
        return Answer(200, f"<ListBucketResult>{text}{more}</ListBucketResult>".encode(), {"Content-Type": "application/xml"})

    return page


@pytest.mark.parametrize(
    "pages",
    [("a|1", "b|2"), ("a|1", "b|1"), ("a,b|#",), ("a|#", "b|#", "c|#"), ("|#",), ("a|1", "|#")],
    ids=["ring of tokens", "one token", "one page", "ring of pages", "empty pages", "empty pages after one"],
)
def test_a_listing_that_brings_nothing_new_is_an_error_after_few_pages(store: ScriptedS3, pages: tuple[str, ...]) -> None:
    store.on("ListObjectsV2", "*", listing(*pages), times=math.inf)
    with pytest.raises(StorageError) as caught:
        list(storage_of(store).entries())
    assert_error(caught, StorageError, 69, "s3:ListBucket", "s3://bucket/deam", "the listing does not end")
    assert len(store.asked("ListObjectsV2")) <= len(pages) + 1


def test_a_long_listing_says_so_in_the_log(store: ScriptedS3, caplog: pytest.LogCaptureFixture) -> None:
    store.on("ListObjectsV2", "*", listing("#|t#"), times=100)
    store.on("ListObjectsV2", "*", listing("last"))
    with caplog.at_level(logging.INFO):
        assert len(list(storage_of(store).entries())) == 101
    assert [line for line in caplog.messages if "100 pages so far" in line]


INCOMPLETE = [
    (rb"<Size>\d+</Size>", b""),
    (rb"<Size>\d+</Size>", b"<Size>many</Size>"),
    (rb"<Size>\d+</Size>", b"<Size>-1</Size>"),
    (rb"<ETag>[^<]*</ETag>", b'<ETag>""</ETag>'),
    (rb"<Key>[^<]*</Key>", b""),
    (rb"<Key>[^<]*</Key>", b"<Key>another/prefix</Key>"),
    (rb"<LastModified>[^<]*</LastModified>", b""),
    (rb"<LastModified>[^<]*</LastModified>", b"<LastModified>yesterday</LastModified>"),
    (rb"<IsTruncated>.*</IsTruncated>", b""),
    (rb"<IsTruncated>.*</IsTruncated>", b"<IsTruncated>perhaps</IsTruncated>"),
    (rb"</ListBucketResult>", b""),
]


def test_a_listing_that_lacks_what_a_listing_has_is_asked_for_again(store: ScriptedS3) -> None:
    storage, impatient = storage_of(store), storage_of(store, patience_seconds=0)
    right = list(storage.entries())
    for old, new in INCOMPLETE:

        def changed(request: Request, honest: Callable[[], Answer], old: bytes = old, new: bytes = new) -> Answer:
            answer = honest()
            return Answer(200, re.sub(old, new, answer.body, count=1), answer.headers)

        store.on("ListObjectsV2", "*", changed)
        assert list(storage.entries()) == right, new
        store.on("ListObjectsV2", "*", changed, times=math.inf)
        with pytest.raises(StorageError) as caught:
            list(impatient.entries())
        assert_error(caught, StorageError, 69, "s3:ListBucket s3://bucket/deam")
        store.stop_failing()


def test_a_source_whose_listing_is_none_is_unavailable_and_not_without_songs(store: ScriptedS3, tmp_path: Path) -> None:
    store.on("ListObjectsV2", "*", PAGE, times=math.inf)
    with pytest.raises(StorageError) as caught:
        staged(store, tmp_path / "out", patience_seconds=0)
    assert_error(caught, StorageError, 69, "text/html")


# Objects


@pytest.mark.parametrize("came", ["bytes 0-9/1000000", "bytes */1000000", "bytes 500000-999999/*", ""])
def test_a_range_that_was_not_asked_for_is_not_used(store: ScriptedS3, tmp_path: Path, came: str) -> None:
    def other(request: Request, honest: Callable[[], Answer]) -> Answer:
        answer = honest()
        headers = {**answer.headers, "Content-Range": came} if came else {}
        return Answer(206, answer.body, headers | {"ETag": answer.headers["ETag"]})

    storage = storage_of(store)
    entry = storage.entry("big.bin")
    store.on("GetObject", "deam/big.bin", lambda request, honest: Answer(200, honest().body, honest().headers, stop_at=400_000))
    store.on("GetObject", "deam/big.bin", other)
    storage.get("big.bin", tmp_path / "x", None, entry)
    assert (tmp_path / "x").read_bytes() == store.objects["deam/big.bin"].body
    assert len(store.asked("GetObject")) == 1 + 3


def test_a_download_goes_on_after_an_answer_that_is_none(store: ScriptedS3, tmp_path: Path) -> None:
    storage = storage_of(store)
    for name, fault in {**NOT_ANSWERS, "no ETag": without_etag}.items():
        store.on("GetObject", "deam/big.bin", fault)
        entry = storage.entry("big.bin")
        store.on("GetObject", "deam/big.bin", fault)
        storage.get("big.bin", tmp_path / "x", None, entry)
        assert (tmp_path / "x").read_bytes() == store.objects["deam/big.bin"].body, name


def test_an_object_without_a_time_is_asked_for_again(store: ScriptedS3) -> None:
    store.on("GetObject", "*", with_headers(Last_Modified="yesterday"))
    assert storage_of(store).entry("big.bin").size == 1_000_000


# Uploads in parts


@pytest.mark.parametrize("times", [1, 3])
def test_uploads_that_began_without_an_answer_are_aborted(store: ScriptedS3, tmp_path: Path, times: int) -> None:
    store.on("CreateMultipartUpload", "*", lost, times=times)
    put(storage_of(store), tmp_path)
    assert (store.objects["deam/run/x"].body, store.uploads) == (BODY, {})
    assert len(store.asked("AbortMultipartUpload")) == times


@pytest.mark.parametrize("other", ["earlier", "with a part", "another object"])
def test_uploads_of_other_writers_stay(store: ScriptedS3, tmp_path: Path, other: str) -> None:
    client = store.address.client()
    key = "deam/run/xy" if other == "another object" else "deam/run/x"
    upload = client.create_multipart_upload(Bucket="bucket", Key=key)["UploadId"]
    if other == "earlier":
        store.began[upload] -= 60
    if other == "with a part":
        client.upload_part(Bucket="bucket", Key=key, UploadId=upload, PartNumber=1, Body=b"1")
    store.on("CreateMultipartUpload", "*", lost)
    put(storage_of(store), tmp_path)
    assert (list(store.uploads), len(store.asked("AbortMultipartUpload"))) == ([upload], 1)


def test_an_upload_that_began_without_an_answer_stays_where_listing_is_denied(
    store: ScriptedS3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.on("CreateMultipartUpload", "*", lost)
    store.on("ListMultipartUploads", "*", error(403, "AccessDenied"), times=math.inf)
    put(storage_of(store), tmp_path)
    assert store.objects["deam/run/x"].body == BODY
    assert [line for line in caplog.messages if "s3:ListBucketMultipartUploads" in line and "lifecycle" in line]


def test_what_an_upload_without_any_answer_began_is_cleared_by_the_next_clear(store: ScriptedS3, tmp_path: Path) -> None:
    storage = storage_of(store, patience_seconds=0)
    storage.clear("run", own=True)
    store.on("CreateMultipartUpload", "*", lost, times=math.inf)
    with pytest.raises(StorageError):
        put(storage, tmp_path)
    assert store.uploads
    storage.clear("run", own=True)
    assert store.uploads == {}
    storage.clear("run", own=True)
    assert len(store.asked("ListMultipartUploads")) == 2


def test_all_pages_of_unfinished_uploads_are_cleared(store: ScriptedS3) -> None:
    client = store.address.client()
    for number in range(5):
        client.create_multipart_upload(Bucket="bucket", Key=f"deam/run/{number}")
    page = iter(range(5))

    def one_by_one(request: Request, honest: Callable[[], Answer]) -> Answer:
        number = next(page)
        answer = honest().body.decode()
        (found,) = [text for text in re.findall("<Upload>.*?</Upload>", answer) if f"<Key>deam/run/{number}</Key>" in text]
        more = f"<IsTruncated>{str(number < 4).lower()}</IsTruncated><NextKeyMarker>{number}</NextKeyMarker>"
        return Answer(200, f"<ListMultipartUploadsResult>{more}{found}</ListMultipartUploadsResult>".encode())

    store.on("ListMultipartUploads", "*", one_by_one, times=5)
    storage_of(store).clear("run", own=True)
    assert store.uploads == {}


# A mirror


def only_of_checkpoints(fault: Fault) -> Fault:
    return lambda request, honest: fault(request, honest) if "/checkpoints/" in request.query["prefix"] else honest()


def test_a_mirror_whose_listing_is_none_does_not_count_as_one_without_checkpoints(store: ScriptedS3, tmp_path: Path) -> None:
    spec = load_spec(TINY, ["checkpoint.mirror=s3://bucket/mirror", "storage.patience_seconds=0"])
    run_folder = tmp_path / run_name(spec)
    gan = run_folder / "gan-0123456789ab"
    there = f"mirror/{run_folder.name}/{gan.name}/checkpoints"
    record = {"step": 22, "size": 3, "sha256": hashlib.sha256(b"abc").hexdigest(), "finite": True}
    store.objects[f"{there}/step-22.ckpt"] = Object(b"abc")
    store.objects[f"{there}/step-22.json"] = Object(json.dumps(record).encode())
    mirror = MirrorReader(spec, run_folder, StopRequest())
    mirror.connect("fail")
    empty = b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>"
    for name, fault in {**NOT_ANSWERS, "listing without an end": answer_with(empty, "application/xml")}.items():
        store.on("ListObjectsV2", "*", only_of_checkpoints(fault), times=math.inf)
        with pytest.raises(StorageError, match="s3:ListBucket"):
            mirror.fetch_checkpoint(gan)
        assert not gan.exists(), name
        store.stop_failing()
    mirror.fetch_checkpoint(gan)
    assert list_steps(gan / "checkpoints") == [22]


def test_a_page_with_an_etag_is_no_receipt(store: ScriptedS3) -> None:
    """As a web server sends it for a file. A receipt that is damaged would cost its phase."""
    headers = {"ETag": '"66f1a2b3-1c7"', "Last-Modified": "Thu, 26 Nov 2026 20:00:00 GMT", "Content-Type": "text/html"}
    store.objects["deam/receipt.json"] = Object(b"{}", etag=f"{'0' * 32}-2")
    page = Answer(200, b"<html><body>Sign in</body></html>", headers)
    store.on("GetObject", "*", lambda _request, _honest: page)
    assert storage_of(store).read("receipt.json") == b"{}"
    store.on("GetObject", "*", lambda _request, _honest: page, times=math.inf)
    with pytest.raises(StorageError) as caught:
        storage_of(store, patience_seconds=0).read("receipt.json")
    assert_error(caught, StorageError, 69, "s3:GetObject s3://bucket/deam/receipt.json", "'66f1a2b3-1c7'")


@pytest.mark.parametrize("body", [b"<html>Not Found</html>", b""], ids=["page", "nothing"])
def test_a_404_of_a_proxy_is_no_absent_object_where_it_is_listed(store: ScriptedS3, body: bytes) -> None:
    store.on("GetObject", "*", answer_with(body, "text/html", 404), times=math.inf)
    assert storage_of(store).read("absent") is None
    with pytest.raises(StorageError) as caught:
        storage_of(store, patience_seconds=0).read("big.bin")
    assert caught.value.exit_code == 69
    assert "it is in the listing" in str(caught.value)


def test_a_published_object_that_changed_is_noticed_by_its_etag(store: ScriptedS3, tmp_path: Path) -> None:
    spec = load_spec(TINY, ["artifacts.destination=s3://bucket/deam"])
    ours = published(tmp_path / "a", b"1")
    storage = storage_of(store, f"s3://bucket/deam/{run_name(spec)}")
    copy_run(ours, storage, no)
    notes = {"published": {entry.name: entry.tag for entry in storage.entries()}}
    store.requests.clear()

    def is_done() -> bool:
        return is_published(spec, tmp_path / run_name(spec), notes, False, no)

    assert is_done()
    assert [request.key.rpartition("/")[2] for request in store.asked("GetObject")] == ["manifest.json"]
    key = f"deam/{run_name(spec)}/model/model.safetensors"
    kept = store.objects[key]
    store.objects[key] = Object(b"2")
    assert not is_done()
    store.objects[key] = kept
    assert is_done()
    del store.objects[key]
    assert not is_done()


@pytest.mark.full
@pytest.mark.parametrize("name", ["page", "nothing"])
def test_a_job_never_restarts_its_gan_because_a_listing_was_none(
    emotion_job: Callable[..., subprocess.CompletedProcess[str]], store: ScriptedS3, tmp_path: Path, name: str
) -> None:
    def command(machine: str, patience: float) -> list[str]:
        sets = [
            "checkpoint.mirror=s3://bucket/mirror",
            f"storage.patience_seconds={patience}",
            "gan.epochs=60",
            "checkpoint.every_seconds=1",
        ]
        words = [word for one in sets for word in ("--set", one)]
        return ["run", str(TINY), "--work", str(tmp_path / machine), "--until", "gan", *words]

    def steps() -> list[int]:
        return [int(found[1]) for key in list(store.objects) if (found := re.search(r"/gan-.*/step-(\d+)\.json$", key))]

    killed_when(lambda: bool(steps()), [sys.executable, "-m", "job", *command("first", 20)], store.address)
    step = max(steps())
    assert step > 0
    store.on("ListObjectsV2", "*", only_of_checkpoints(NOT_ANSWERS[name]), times=math.inf)
    second = emotion_job(*command("second", 0.5))
    assert second.returncode == 69, second.stderr
    assert "s3:ListBucket" in second.stderr
    assert "Traceback" not in second.stderr
    assert not list(tmp_path.glob("second/*/gan-*/checkpoints/*"))
    store.stop_failing()
    third = emotion_job(*command("second", 20))
    assert third.returncode == 0, third.stderr
    assert f"checkpoint restored step={step}" in third.stderr
