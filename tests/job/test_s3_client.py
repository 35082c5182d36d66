"""What is asked of S3 and how it is signed: public buckets, buckets whose reader pays, access points, directory buckets."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emotion.errors import AccessError, StorageError
from job.config import StorageConfig
from job.spec.location import parse_location
from job.storage.open import open_storage
from job.storage.protocol import Storage
from job.storage.s3_client import S3Connection
from tests.stores.dataset import BIG, assert_all_there, assert_error, no, staged, storage_of
from tests.stores.scripted import Answer, Request, ScriptedS3, error


def do_everything(storage: Storage, folder: Path) -> None:
    """Every request but those of uploads in parts."""
    names = [entry.name for entry in storage.entries()]
    assert "big.bin" in names
    storage.get("big.bin", folder / "big", None, storage.entry("big.bin"))
    assert (folder / "big").read_bytes() == BIG
    assert storage.write_new("new", b"1")
    assert not storage.write_new("new", b"2")
    storage.move("new", "moved")
    assert (storage.read("new"), storage.read("moved")) == (None, b"1")
    storage.clear("", own=True)


# Credentials


@pytest.fixture
def _anonymous(store: ScriptedS3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_anonymous")
def test_a_public_bucket_is_read_without_credentials(store: ScriptedS3, tmp_path: Path) -> None:
    staged(store, tmp_path / "out")
    assert_all_there(store, tmp_path / "out")
    assert not [request for request in store.requests if "authorization" in request.headers]
    do_everything(storage_of(store), tmp_path)


@pytest.mark.usefixtures("_anonymous")
@pytest.mark.parametrize("operation", ["ListObjectsV2", "GetObject"])
def test_a_denied_anonymous_request_says_that_no_credentials_were_found(
    store: ScriptedS3, tmp_path: Path, operation: str
) -> None:
    store.on(operation, "*", error(403, "AccessDenied"), times=math.inf)
    with pytest.raises(AccessError) as caught:
        staged(store, tmp_path / "out")
    assert_error(caught, AccessError, 77, "s3://bucket/deam", "No credentials were found", "Provide AWS credentials")


# Whoever pays


def only_for_payers(request: Request, honest: Callable[[], Answer]) -> Answer:
    if request.headers.get("x-amz-request-payer") == "requester":
        return honest()
    return error(403, "AccessDenied")(request, honest)


def test_a_bucket_whose_reader_pays_needs_a_setting(store: ScriptedS3, tmp_path: Path) -> None:
    store.on("*", "*", only_for_payers, times=math.inf)
    with pytest.raises(AccessError) as caught:
        list(storage_of(store).entries())
    assert_error(caught, AccessError, 77, "storage.requester_pays")
    do_everything(storage_of(store, requester_pays=True), tmp_path)


# The endpoint


def test_an_endpoint_with_the_bucket_in_it_is_named(store: ScriptedS3) -> None:
    config = StorageConfig(endpoint_url=f"{store.address.endpoint_url}/bucket", patience_seconds=0)
    storage = open_storage(parse_location("s3://bucket/deam"), config, no)
    for request in (lambda: list(storage.entries()), lambda: storage.entry("big.bin")):
        with pytest.raises(StorageError) as caught:
            request()
        assert "127.0.0.1/bucket has the bucket bucket in it" in str(caught.value)
    problem = storage.problem()
    assert problem is not None
    assert problem.exit_code == 69


# Access points and directory buckets. Their hosts are Amazon's: the requests that would be sent are sent to the scripted server.

ACCESS_POINT = "arn:aws:s3:eu-west-1:123456789012:accesspoint/songs"
DIRECTORY_BUCKET = "songs--euw1-az1--x-s3"
SESSION = (
    b"<CreateSessionResult><Credentials><AccessKeyId>session-key</AccessKeyId><SecretAccessKey>x</SecretAccessKey>"
    b"<SessionToken>session-token</SessionToken><Expiration>2099-01-01T00:00:00Z</Expiration></Credentials></CreateSessionResult>"
)


@pytest.fixture
def hosts(store: ScriptedS3, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hosts that requests were meant for. Every request goes to the scripted server."""
    import botocore.httpsession

    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    found: list[str] = []
    send = botocore.httpsession.URLLib3Session.send

    def redirected(session: botocore.httpsession.URLLib3Session, request: Any) -> Any:
        host, _, path = request.url.partition("://")[2].partition("/")
        found.append(host)
        request.url = f"{store.address.endpoint_url}/bucket/{path}"
        if path.startswith("?session"):
            request.url = f"{store.address.endpoint_url}/bucket/session"
        return send(session, request)

    monkeypatch.setattr(botocore.httpsession.URLLib3Session, "send", redirected)
    store.on("GetObject", "session", lambda request, honest: Answer(200, SESSION), times=math.inf)
    return found


def test_an_access_point_is_read_and_written_at_its_own_host_and_region(
    store: ScriptedS3, hosts: list[str], tmp_path: Path
) -> None:
    location = parse_location(f"s3://{ACCESS_POINT}/deam")
    do_everything(open_storage(location, StorageConfig(region="us-east-1", patience_seconds=0), no), tmp_path)
    assert set(hosts) == {"songs-123456789012.s3-accesspoint.eu-west-1.amazonaws.com"}
    assert all("/eu-west-1/s3/aws4_request" in request.headers["authorization"] for request in store.requests)


def test_a_directory_bucket_is_read_and_written_with_a_session_and_its_etags_are_no_digests(
    store: ScriptedS3, hosts: list[str], tmp_path: Path
) -> None:
    def random_etag(request: Request, honest: Callable[[], Answer]) -> Answer:
        assert "content-md5" not in request.headers
        for found in store.objects.values():
            found.etag = found.etag or "0123456789abcdef" * 2
        answer = honest()
        return Answer(answer.status, answer.body, {**answer.headers, "x-amz-storage-class": "EXPRESS_ONEZONE"})

    store.on("GetObject", "[!s]*", random_etag, times=math.inf)
    store.on("PutObject", "*", random_etag, times=math.inf)
    store.on("ListObjectsV2", "*", random_etag, times=math.inf)
    location = parse_location(f"s3://{DIRECTORY_BUCKET}/deam")
    storage = open_storage(location, StorageConfig(region="eu-west-1", patience_seconds=0), no)
    do_everything(storage, tmp_path)
    assert storage.read("big.bin") == BIG  # the ETag is no digest, and a listing of one object is not allowed
    assert "big.bin" not in {request.query.get("prefix", "").rpartition("/")[2] for request in store.asked("ListObjectsV2")}
    assert set(hosts) == {f"{DIRECTORY_BUCKET}.s3express-euw1-az1.eu-west-1.amazonaws.com"}
    # Amazon wants the ordinary signature for copies.
    others = [request for request in store.requests if request.key != "session" and request.operation != "CopyObject"]
    assert [request for request in others if request.headers.get("x-amz-s3session-token") != "session-token"] == []
    assert len(store.asked("GetObject", "session")) == 1


def test_an_endpoint_may_have_a_path(store: ScriptedS3) -> None:
    """As that of some services; only the bucket's own name is suspicious."""
    connection = S3Connection(StorageConfig(endpoint_url="https://store.example/bucket/s3"))
    client = connection.client()
    assert connection.hint(client, "bucket") == ""
    assert "has the bucket s3 in it" in connection.hint(client, "s3")
