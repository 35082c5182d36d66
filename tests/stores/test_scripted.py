"""The scripted server, tested with boto3."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.exceptions
import pytest

from tests.stores.certificates import Authority
from tests.stores.scripted import Object, ScriptedS3, end_at, error, flip_bit, never, reset_at, reset_unheard, with_headers

BODY = os.urandom(100_000)


@pytest.fixture
def server() -> Iterator[ScriptedS3]:
    with ScriptedS3() as found:
        found.objects["a/song.mp3"] = Object(BODY)
        yield found


def get(client: Any, key: str = "a/song.mp3", **more: str) -> bytes:
    return bytes(client.get_object(Bucket="b", Key=key, **more)["Body"].read())


def code(caught: pytest.ExceptionInfo[botocore.exceptions.ClientError]) -> str:
    return str(caught.value.response["Error"]["Code"])


def test_an_object_is_returned_with_its_metadata_and_its_md5_as_etag(server: ScriptedS3) -> None:
    client = server.address.client()
    client.put_object(Bucket="b", Key="x", Body=BODY, Metadata={"sha256": "0a"})
    found = client.head_object(Bucket="b", Key="x")
    assert get(client, "x") == BODY
    assert (found["ContentLength"], found["Metadata"]) == (len(BODY), {"sha256": "0a"})
    assert found["ETag"] == f'"{hashlib.md5(BODY).hexdigest()}"'
    client.copy_object(Bucket="b", Key="y", CopySource={"Bucket": "b", "Key": "x"})
    client.delete_object(Bucket="b", Key="x")
    assert set(server.objects) == {"a/song.mp3", "y"}
    client.delete_objects(Bucket="b", Delete={"Objects": [{"Key": "y"}]})
    assert set(server.objects) == {"a/song.mp3"}


def test_a_range_is_served_only_if_the_etag_matches(server: ScriptedS3) -> None:
    client = server.address.client()
    assert get(client, Range="bytes=99990-", IfMatch=hashlib.md5(BODY).hexdigest()) == BODY[99990:]
    assert get(client, Range="bytes=10-19") == BODY[10:20]
    for status, asked in ((412, {"IfMatch": "0"}), (416, {"Range": "bytes=100000-"})):
        with pytest.raises(botocore.exceptions.ClientError) as caught:
            get(client, **asked)
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status


def test_listings_have_pages_and_may_contain_any_key(server: ScriptedS3) -> None:
    odd = ["a/../../x", "a//y", "a/nul\0", "a/ü" * 80, "a/A", "a/&<"]
    server.objects.update({key: Object(b"1") for key in odd})
    server.decoys = [f"a/z{number:04}" for number in range(2500)]
    pages = list(server.address.client().get_paginator("list_objects_v2").paginate(Bucket="b", Prefix="a/"))
    found = [entry["Key"] for page in pages for entry in page["Contents"]]
    assert [len(page["Contents"]) for page in pages] == [1000, 1000, 507]
    assert found == sorted(["a/song.mp3", *odd, *server.decoys])


def test_an_upload_in_parts_has_the_etag_that_amazon_documents(server: ScriptedS3) -> None:
    client = server.address.client()
    upload = client.create_multipart_upload(Bucket="b", Key="x")["UploadId"]
    assert client.list_multipart_uploads(Bucket="b")["Uploads"][0]["UploadId"] == upload
    sent = [
        client.upload_part(Bucket="b", Key="x", UploadId=upload, PartNumber=number, Body=text)
        for number, text in ((1, b"one"), (2, b"two"))
    ]
    parts = [{"PartNumber": number, "ETag": part["ETag"]} for number, part in enumerate(sent, 1)]
    client.complete_multipart_upload(Bucket="b", Key="x", UploadId=upload, MultipartUpload={"Parts": parts})
    digests = hashlib.md5(b"one").digest() + hashlib.md5(b"two").digest()
    assert (server.objects["x"].body, server.objects["x"].tag) == (b"onetwo", f"{hashlib.md5(digests).hexdigest()}-2")
    upload = client.create_multipart_upload(Bucket="b", Key="x")["UploadId"]
    client.abort_multipart_upload(Bucket="b", Key="x", UploadId=upload)
    assert "Uploads" not in client.list_multipart_uploads(Bucket="b")


def test_uploads_are_verified_against_their_digests_and_conditions(server: ScriptedS3) -> None:
    client = server.address.client()
    for wrong in ({"ContentMD5": "AAAAAAAAAAAAAAAAAAAAAA=="}, {"ChecksumCRC32": "AAAAAA=="}):
        with pytest.raises(botocore.exceptions.ClientError) as caught:
            client.put_object(Bucket="b", Key="x", Body=b"1", **wrong)
        assert code(caught) == "BadDigest"
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        client.put_object(Bucket="b", Key="a/song.mp3", Body=b"1", IfNoneMatch="*")
    assert code(caught) == "PreconditionFailed"
    server.refuses["if-none-match"] = 501
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        client.put_object(Bucket="b", Key="x", Body=b"1", IfNoneMatch="*")
    assert code(caught) == "NotImplemented"
    assert set(server.objects) == {"a/song.mp3"}


def test_boto3_detects_a_flipped_bit_if_the_server_sends_checksums(server: ScriptedS3) -> None:
    client = server.address.client(response_checksum_validation="when_supported")
    client.put_object(Bucket="b", Key="x", Body=BODY, ChecksumAlgorithm="CRC32")
    server.sends_checksums = True
    server.on("GetObject", "x", flip_bit(5))
    with pytest.raises(botocore.exceptions.FlexibleChecksumError):
        get(client, "x")
    assert get(client, "x") == BODY


def test_a_scripted_error_is_the_answer_to_matching_requests_only(server: ScriptedS3) -> None:
    client = server.address.client(retries={"total_max_attempts": 1})
    server.on("GetObject", "a/*", error(503, "SlowDown"), passed=1, times=2)
    assert get(client) == BODY
    for _ in range(2):
        with pytest.raises(botocore.exceptions.ClientError) as caught:
            get(client)
        assert code(caught) == "SlowDown"
    assert get(client) == BODY
    assert [request.status for request in server.asked("GetObject")] == [200, 503, 503, 200]


def test_bodies_can_end_early_in_order_or_with_a_reset(server: ScriptedS3) -> None:
    client = server.address.client(retries={"total_max_attempts": 1})
    server.on("GetObject", "*", end_at(70_000))
    with pytest.raises(botocore.exceptions.BotoCoreError):
        get(client)
    server.on("GetObject", "*", reset_at(70_000))
    with pytest.raises(botocore.exceptions.ResponseStreamingError, match="reset"):
        get(client)
    assert server.sent() == 140_000
    server.on("PutObject", "*", reset_unheard)
    with pytest.raises(botocore.exceptions.HTTPClientError):
        client.put_object(Bucket="b", Key="x", Body=b"1")
    assert "x" not in server.objects


def test_headers_can_be_replaced_by_wrong_ones(server: ScriptedS3) -> None:
    server.on("GetObject", "*", with_headers(etag='"0"'))
    assert server.address.client().get_object(Bucket="b", Key="a/song.mp3")["ETag"] == '"0"'


def test_a_missing_answer_is_a_timeout(server: ScriptedS3) -> None:
    server.on("GetObject", "*", never)
    with pytest.raises(botocore.exceptions.ReadTimeoutError):
        get(server.address.client(retries={"total_max_attempts": 1}, read_timeout=0.2))


def test_only_clients_that_trust_the_authority_get_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path)
    with ScriptedS3(authority.server()) as server:
        server.objects["a/song.mp3"] = Object(BODY)
        with pytest.raises(botocore.exceptions.SSLError):
            get(server.address.client(retries={"total_max_attempts": 1}))
        assert server.requests == []
        monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.file))
        assert get(server.address.client()) == BODY
