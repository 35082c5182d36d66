"""Downloads from S3: broken and slow connections, wrong bytes, objects that change, several processes at once.

The server is scripted (tests/stores/scripted.py): real HTTP on loopback, with faults. No fault leaves an incomplete or wrong file
under a final name.
"""

import hashlib
import math
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import botocore.client
import botocore.response
import pytest

from emotion.errors import AccessError, DataError, StorageError
from job.storage.protocol import Fetched
from job.storage.s3_download import in_base64
from job.storage.transfer import in_parallel
from tests.stores.dataset import (
    AUDIO,
    BIG,
    SONGS,
    assert_all_there,
    assert_error,
    assert_nothing_wrong,
    looked_up,
    no,
    staged,
    storage_of,
)
from tests.stores.scripted import (
    Answer,
    Object,
    Request,
    ScriptedS3,
    end_at,
    error,
    flip_bit,
    never,
    reset_at,
    reset_unheard,
    slowly,
    with_headers,
)

# Broken and slow connections


@pytest.mark.parametrize("byte", [1, 65_537, 500_000, 999_999])
def test_a_download_resumes_at_the_byte_where_the_body_ended_too_early(store: ScriptedS3, tmp_path: Path, byte: int) -> None:
    entry = looked_up(store)
    store.on("GetObject", "*", end_at(byte))
    storage_of(store).get("big.bin", tmp_path / "x", hashlib.sha256(BIG).hexdigest(), entry)
    assert (tmp_path / "x").read_bytes() == BIG
    first, second = store.asked("GetObject")
    assert second.headers["range"] == f"bytes={byte}-"
    assert second.headers["if-match"] == f'"{store.objects["deam/big.bin"].tag}"'
    assert first.sent + second.sent == len(BIG)


def test_connection_resets_cost_at_most_ten_percent_more_bytes(store: ScriptedS3, tmp_path: Path) -> None:
    # A reset discards what is unread in the socket. Sent this slowly, it is read as it arrives, as on a network.
    entry = looked_up(store)
    store.bytes_a_second = 2e6
    for byte in (1000, 300_000, 200_000):
        store.on("GetObject", "*", reset_at(byte))
    storage_of(store).get("big.bin", tmp_path / "x", hashlib.sha256(BIG).hexdigest(), entry)
    assert (tmp_path / "x").read_bytes() == BIG
    assert len(store.asked("GetObject")) == 4
    assert all("if-match" in request.headers for request in store.asked("GetObject")[1:])
    assert store.sent() <= 1.1 * len(BIG)


def test_a_connection_reset_before_any_answer_is_retried(store: ScriptedS3, tmp_path: Path) -> None:
    store.on("*", "*", reset_unheard, times=3)
    storage_of(store).get("big.bin", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BIG


@pytest.mark.parametrize("fault", [slowly(20.0), never], ids=["20 bytes a second", "no answer"])
def test_a_silent_or_very_slow_connection_is_replaced(store: ScriptedS3, tmp_path: Path, fault: Any) -> None:
    entry = looked_up(store)
    store.on("GetObject", "*", fault, times=2)
    storage_of(store, timeout_seconds=0.3).get("big.bin", tmp_path / "x", hashlib.sha256(BIG).hexdigest(), entry)
    assert (tmp_path / "x").read_bytes() == BIG
    assert len(store.asked("GetObject")) == 3


@pytest.mark.parametrize("fault", [slowly(20.0), never], ids=["20 bytes a second", "no answer"])
def test_a_server_that_stays_silent_or_very_slow_is_a_storage_error(store: ScriptedS3, tmp_path: Path, fault: Any) -> None:
    store.on("GetObject", f"{AUDIO}/*", fault, times=math.inf)
    with pytest.raises(StorageError) as caught:
        staged(store, tmp_path / "out", timeout_seconds=0.2, patience_seconds=0.3)
    assert_error(caught, StorageError, 69, "s3:GetObject", f"s3://bucket/{AUDIO}/")
    assert list((tmp_path / "out").glob("audio/[!.]*")) == []


# Wrong bytes


def test_an_object_with_a_flipped_bit_is_fetched_again(store: ScriptedS3, tmp_path: Path) -> None:
    store.on("GetObject", f"{AUDIO}/7.mp3", flip_bit(10_000))
    notes = staged(store, tmp_path / "out")
    assert_all_there(store, tmp_path / "out")
    assert len(store.asked("GetObject", f"{AUDIO}/7.mp3")) == 2
    assert notes["verified"] == {"etag": 1 + len(SONGS)}


@pytest.mark.parametrize("knows", ["etag", "checksum", "metadata", "manifest"])
def test_all_objects_that_stay_damaged_are_named_in_one_error(store: ScriptedS3, tmp_path: Path, knows: str) -> None:
    for found in store.objects.values():
        digest = hashlib.sha256(found.body)
        # The ETag of an encrypted object is not a digest.
        store.encrypts = knows != "etag"
        if knows == "checksum":
            store.sends_checksums = True
            found.headers["x-amz-checksum-sha256"] = in_base64(digest.digest())
        elif knows == "metadata":
            found.headers["x-amz-meta-sha256"] = digest.hexdigest()
    if knows == "manifest":
        files = ", ".join(
            f'"{key.removeprefix("deam/")}": {{"size": {len(found.body)}, "sha256": "{hashlib.sha256(found.body).hexdigest()}"}}'
            for key, found in store.objects.items()
        )
        store.objects["deam/dataset.json"] = Object(f'{{"files": {{{files}}}}}'.encode())
    for name in ("3.mp3", "11.mp3"):
        store.on("GetObject", f"{AUDIO}/{name}", flip_bit(10_000), times=math.inf)
    with pytest.raises(DataError) as caught:
        staged(store, tmp_path / "out")
    assert_error(caught, DataError, 65, "2 of 12", f"s3://bucket/{AUDIO}/3.mp3", f"s3://bucket/{AUDIO}/11.mp3", "damaged")
    assert [len(store.asked("GetObject", f"{AUDIO}/{name}")) for name in ("3.mp3", "11.mp3", "4.mp3")] == [2, 2, 1]
    assert {path.name for path in (tmp_path / "out" / "audio").iterdir()} == {*SONGS} - {"3.mp3", "11.mp3"}
    assert_nothing_wrong(store, tmp_path / "out")


def test_a_complete_body_shorter_than_listed_is_refused(store: ScriptedS3, tmp_path: Path) -> None:
    key = f"{AUDIO}/7.mp3"

    def shorter(request: Request, honest: Callable[[], Answer]) -> Answer:
        answer = honest()
        return Answer(answer.status, answer.body[:5000], answer.headers)

    store.on("GetObject", key, shorter, times=math.inf)
    with pytest.raises(DataError) as caught:
        staged(store, tmp_path / "out")
    assert_error(caught, DataError, 65, f"s3://bucket/{key}", "changed during download", "5000 bytes")
    assert not (tmp_path / "out" / "audio" / "7.mp3").exists()


def test_objects_without_any_digest_are_verified_by_size_and_reported_so(store: ScriptedS3, tmp_path: Path) -> None:
    store.encrypts = True
    assert staged(store, tmp_path / "out")["verified"] == {"size": 1 + len(SONGS)}


def test_an_object_with_another_etag_than_listed_is_refused(store: ScriptedS3, tmp_path: Path) -> None:
    store.on("GetObject", f"{AUDIO}/7.mp3", with_headers(ETag=f'"{"0" * 32}"'), times=math.inf)
    with pytest.raises(DataError) as caught:
        staged(store, tmp_path / "out")
    assert_error(caught, DataError, 65, f"s3://bucket/{AUDIO}/7.mp3", "changed during download", "0" * 32)
    assert len(store.asked("GetObject", f"{AUDIO}/7.mp3")) == 2
    assert not (tmp_path / "out" / "audio" / "7.mp3").exists()


def test_an_object_that_changes_during_a_download_is_never_mixed_from_both_versions(store: ScriptedS3, tmp_path: Path) -> None:
    key = f"{AUDIO}/7.mp3"

    def changed_meanwhile(request: Request, honest: Callable[[], Answer]) -> Answer:
        answer = end_at(9000)(request, honest)
        store.objects[key] = Object(random.Random("another").randbytes(20_000))
        return answer

    store.on("GetObject", key, changed_meanwhile)
    with pytest.raises(DataError) as caught:
        staged(store, tmp_path / "out")
    assert_error(caught, DataError, 65, f"s3://bucket/{key}", "changed during download")
    assert not (tmp_path / "out" / "audio" / "7.mp3").exists()
    staged(store, tmp_path / "out")
    assert_all_there(store, tmp_path / "out")


# Several processes at once


def test_several_downloads_of_one_object_to_one_path_all_succeed(store: ScriptedS3, tmp_path: Path) -> None:
    """Two jobs share a scratch, or a thread of an earlier attempt is still running."""
    entry = looked_up(store)
    store.bytes_a_second = 4e6
    targets = [lambda: storage_of(store).get("big.bin", tmp_path / "x", None, entry)] * 3
    for _ in in_parallel([lambda get=get: assert_complete(get(), tmp_path / "x") for get in targets], 3, no):  # type: ignore[misc]
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def assert_complete(fetched: Fetched, path: Path) -> None:
    assert fetched.sha256 == hashlib.sha256(BIG).hexdigest()
    assert path.read_bytes() == BIG


# Without the private attributes of botocore


class KnownToBotocoreAlone:
    """An attribute that only botocore sees. For others it is absent, as after a rename."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if f"{os.sep}botocore{os.sep}" not in sys._getframe(1).f_code.co_filename:
            raise AttributeError(self.name)
        return instance.__dict__[self.name]

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self.name] = value


@pytest.fixture(params=["client", "client and body"])
def _without_private_attributes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: list[tuple[type, str]] = [(botocore.client.BaseClient, "_endpoint")]
    if request.param == "client and body":
        hidden.append((botocore.response.StreamingBody, "_raw_stream"))
    for owner, name in hidden:
        monkeypatch.setattr(owner, name, KnownToBotocoreAlone(name), raising=False)


@pytest.mark.usefixtures("_without_private_attributes")
def test_without_private_attributes_of_botocore_downloads_use_its_ordinary_client(store: ScriptedS3, tmp_path: Path) -> None:
    faults = [error(503, "SlowDown"), end_at(5000), reset_at(9000), flip_bit(10_000), reset_unheard]
    for name, fault in zip(SONGS, faults, strict=False):
        store.on("GetObject", f"{AUDIO}/{name}", fault)
    assert staged(store, tmp_path / "out")["verified"] == {"etag": 1 + len(SONGS)}
    assert_all_there(store, tmp_path / "out")
    assert all("Boto3" in request.headers["user-agent"] for request in store.requests)
    assert store.asked("GetObject", f"{AUDIO}/{SONGS[1]}")[1].headers["range"] == "bytes=5000-"
    storage = storage_of(store)
    assert storage.get("big.bin", tmp_path / "x", hashlib.sha256(BIG).hexdigest()).verified == "sha256"
    assert (tmp_path / "x").read_bytes() == BIG
    store.on("GetObject", "*", error(403, "AccessDenied"), times=math.inf)
    with pytest.raises(AccessError) as caught:
        storage.read("big.bin")
    assert_error(caught, AccessError, 77, "s3:GetObject", "s3://bucket/deam/big.bin")
