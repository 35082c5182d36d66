"""Errors that no retry helps against: exit code, and one line with action, object and reason."""

import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from emotion.errors import AccessError, DataError, EmotionError, Interrupted, StorageError
from job.config import StorageConfig
from job.spec.location import S3
from job.storage import s3_retry
from job.storage.open import open_storage
from tests.stores.certificates import DAY, Authority
from tests.stores.dataset import AUDIO, BIG, assert_all_there, assert_error, assert_nothing_wrong, fill, no, staged, storage_of
from tests.stores.scripted import Answer, Request, ScriptedS3, error, redirect


def test_all_objects_deleted_after_the_listing_are_named_in_one_error(store: ScriptedS3, tmp_path: Path) -> None:
    for name in ("3.mp3", "8.mp3", "12.mp3"):
        store.on("GetObject", f"{AUDIO}/{name}", error(404, "NoSuchKey"), times=math.inf)
    with pytest.raises(DataError) as caught:
        staged(store, tmp_path / "out")
    named = [f"s3://bucket/{AUDIO}/{name}: HTTP 404" for name in ("3.mp3", "8.mp3", "12.mp3")]
    assert_error(caught, DataError, 65, "3 of 12", *named)
    assert len(store.asked("GetObject", f"{AUDIO}/3.mp3")) == 1
    assert_nothing_wrong(store, tmp_path / "out")


@pytest.mark.parametrize(("operation", "action"), [("GetObject", "s3:GetObject"), ("ListObjectsV2", "s3:ListBucket")])
def test_denied_access_is_an_error_at_the_first_answer(store: ScriptedS3, tmp_path: Path, operation: str, action: str) -> None:
    store.on(operation, "*", error(403, "AccessDenied", "Access Denied"), times=math.inf)
    with pytest.raises(AccessError) as caught:
        staged(store, tmp_path / "out", connections=1)
    assert_error(caught, AccessError, 77, action, "s3://bucket/deam", "403 AccessDenied")
    assert len(store.asked(operation)) == 1


@pytest.mark.parametrize(
    "body",
    [
        b'<Error xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Code>NoSuchKey</Code><Message>none</Message></Error>',
        b"<Error/>",
        b"<html><body><h1>Not Found</h1></body></html>",
        b"",
    ],
    ids=["with a namespace", "without a code", "page of a proxy", "empty"],
)
def test_an_absent_object_is_absent_however_the_server_says_so(store: ScriptedS3, body: bytes) -> None:
    store.on("GetObject", "*", lambda request, honest: Answer(404, body, {"Content-Type": "application/xml"}), times=math.inf)
    assert storage_of(store).read("absent") is None


def test_a_missing_bucket_is_named(store: ScriptedS3, tmp_path: Path) -> None:
    store.on("ListObjectsV2", "*", error(404, "NoSuchBucket"), times=math.inf)
    with pytest.raises(StorageError) as caught:
        staged(store, tmp_path / "out")
    assert_error(caught, StorageError, 69, "s3://bucket/", "NoSuchBucket")


def credentials_file(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(f"[default]\naws_access_key_id = {name}\naws_secret_access_key = scripted-x\naws_session_token = y\n")
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))


@pytest.mark.parametrize("renewed", [True, False])
def test_expired_credentials_are_read_again_once(
    store: ScriptedS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renewed: bool
) -> None:
    file = tmp_path / "credentials"
    credentials_file(file, "EARLIER", monkeypatch)

    def expired(request: Request, honest: Callable[[], Answer]) -> Answer:
        if "Credential=EARLIER/" not in request.headers["authorization"]:
            return honest()
        if renewed:
            credentials_file(file, "LATER", monkeypatch)
        return error(400, "ExpiredToken", "The provided token has expired.")(request, honest)

    store.on("GetObject", f"{AUDIO}/*", expired, passed=4, times=math.inf)
    if renewed:
        staged(store, tmp_path / "out", connections=1)
        assert_all_there(store, tmp_path / "out")
        assert len([one for one in store.requests if one.status == 400]) == 1
        return
    with pytest.raises(Interrupted) as caught:
        staged(store, tmp_path / "out", connections=1)
    assert caught.value.exit_code == 75
    assert len([one for one in store.requests if one.status == 400]) == 2
    assert len(list((tmp_path / "out" / "audio").glob("[!.]*"))) == 4


def test_a_wrong_clock_is_reported_with_the_difference(store: ScriptedS3, tmp_path: Path) -> None:
    theirs = format_datetime(datetime.now(UTC) - timedelta(minutes=20), usegmt=True)
    store.on("*", "*", error(403, "RequestTimeTooSkewed", Date=theirs), times=math.inf)
    with pytest.raises(StorageError) as caught:
        staged(store, tmp_path / "out")
    assert_error(caught, StorageError, 69, "clock is 20 minutes ahead", "s3://bucket/deam")


# Other hosts


def test_an_unknown_host_is_an_error_after_few_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_retry, "LONGEST_PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    config = StorageConfig(endpoint_url="https://store.invalid", patience_seconds=1e6)
    with pytest.raises(StorageError) as caught:
        next(open_storage(S3("bucket", "deam"), config, no).entries())
    assert_error(caught, StorageError, 69, "https://store.invalid", "no such host", "s3://bucket/deam")


@pytest.mark.parametrize("wrong", ["unknown authority", "expired", "another host"])
def test_nothing_is_sent_to_a_server_with_a_wrong_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    authority = Authority(tmp_path)
    context = {
        "unknown authority": lambda: authority.server(),
        "expired": lambda: authority.server(valid=-DAY),
        "another host": lambda: authority.server("127.0.0.2"),
    }[wrong]()
    with ScriptedS3(context) as store:
        fill(store)
        for name, value in store.address.environment().items():
            monkeypatch.setenv(name, value)
        if wrong != "unknown authority":
            monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.file))
        with pytest.raises(StorageError) as caught:
            storage_of(store).entry("big.bin")
        assert_error(caught, StorageError, 69, "certificate", "s3://bucket/deam/big.bin", "AWS_CA_BUNDLE")
        assert store.requests == []


def test_a_certificate_of_the_authority_in_aws_ca_bundle_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path)
    with ScriptedS3(authority.server()) as store:
        fill(store)
        for name, value in {**store.address.environment(), "AWS_CA_BUNDLE": str(authority.file)}.items():
            monkeypatch.setenv(name, value)
        assert storage_of(store).entry("big.bin").size == len(BIG)


@pytest.mark.parametrize("operation", ["ListObjectsV2", "GetObject", "PutObject"])
def test_a_redirect_to_another_host_is_not_followed(store: ScriptedS3, tmp_path: Path, operation: str) -> None:
    with ScriptedS3() as other:
        fill(other)
        store.on(operation, "*", redirect(f"{other.address.endpoint_url}/bucket/x"), times=math.inf)
        with pytest.raises(EmotionError) as caught:
            storage_of(store).write("x", b"1") if operation == "PutObject" else staged(store, tmp_path / "out")
        assert_error(caught, StorageError, 69, "s3://bucket/deam", "storage.endpoint_url")
        assert other.requests == []
