"""What a store can do to a download or a listing: errors, broken and slow connections, wrong bytes, wrong keys, wrong hosts.

The store is scripted (tests/stores/scripted.py): a real server on loopback that fails as told. Held for each: the right end, with
one line that names the object and what was asked, the number of requests, and nothing half-written under a final name.
"""

import hashlib
import logging
import math
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import botocore.client
import botocore.response
import pytest

from emotion.config import DataConfig
from emotion.errors import AccessError, DataError, EmotionError, Interrupted, StorageError
from job.config import StorageConfig
from job.spec.location import S3
from job.storage import s3_retry
from job.storage.open import open_storage
from job.storage.protocol import Entry, Fetched
from job.storage.s3_download import in_base64
from job.storage.stage import stage
from job.storage.transfer import in_parallel
from tests.stores.certificates import DAY, Authority
from tests.stores.dataset import AUDIO, BIG, SONGS, assert_error, config_of, fill, no, storage_of
from tests.stores.scripted import (
    Answer,
    Object,
    Request,
    ScriptedS3,
    end_at,
    error,
    flip_bit,
    never,
    redirect,
    reset_at,
    reset_unheard,
    slowly,
    with_headers,
)


def staged(store: ScriptedS3, folder: Path, source: str = "s3://bucket/deam", **storage: Any) -> dict[str, Any]:
    """The notes of a staging into a folder."""
    folder.mkdir(exist_ok=True)
    return stage(DataConfig(source=source), config_of(store, **storage), folder.parent / "manifests", folder, no)[1]


def looked_up(store: ScriptedS3) -> Entry:
    """The large object as a listing has it; what was asked for that does not count."""
    entry = storage_of(store).entry("big.bin")
    store.requests.clear()
    return entry


def assert_all_there(store: ScriptedS3, folder: Path) -> None:
    assert sorted(path.name for path in (folder / "audio").iterdir()) == sorted(SONGS)
    assert_nothing_wrong(store, folder)


def assert_nothing_wrong(store: ScriptedS3, folder: Path) -> None:
    """What has a final name is whole and right."""
    for path in (folder / "audio").glob("[!.]*"):
        assert path.read_bytes() == store.objects[f"{AUDIO}/{path.name}"].body


# Errors that pass


def test_bursts_of_slow_down_are_waited_out(store: ScriptedS3, tmp_path: Path) -> None:
    store.on("GetObject", "*", error(503, "SlowDown"), passed=2, times=20)
    store.on("ListObjectsV2", "*", error(503, "SlowDown"), times=2)
    staged(store, tmp_path / "out")
    assert_all_there(store, tmp_path / "out")
    # dataset.json, which is not there, labels and songs; and once more for each refusal.
    assert len(store.asked("GetObject")) == 2 + len(SONGS) + 20


def test_one_answer_in_ten_may_be_an_error_and_each_is_told_in_the_log(
    store: ScriptedS3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drawn = random.Random(1)

    def sometimes(request: Request, honest: Callable[[], Answer]) -> Answer:
        return error(500, "InternalError")(request, honest) if drawn.random() < 0.1 else honest()

    store.on("*", "*", sometimes, times=math.inf)
    with caplog.at_level(logging.INFO):
        for attempt in range(5):
            staged(store, tmp_path / str(attempt))
            assert_all_there(store, tmp_path / str(attempt))
    failed = len([one for one in store.requests if one.status == 500])
    assert failed >= 3
    assert (
        len([line for line in caplog.messages if "HTTP 500 InternalError" in line and "trying again" in line]) == failed
    )


def test_an_error_for_ever_ends_after_few_requests_and_the_next_attempt_goes_on(
    store: ScriptedS3, tmp_path: Path
) -> None:
    store.on("GetObject", f"{AUDIO}/*", error(503, "SlowDown"), passed=5, times=math.inf)
    with pytest.raises(StorageError) as caught:
        staged(store, tmp_path / "out", connections=4, patience_seconds=1.0)
    assert_error(caught, StorageError, 69, "s3:GetObject", f"s3://bucket/{AUDIO}/", "503 SlowDown", "patience_seconds")
    refused = len([one for one in store.requests if one.status == 503])
    # Without waits and a budget it were thousands.
    assert refused < 100
    assert_nothing_wrong(store, tmp_path / "out")

    # The others lose patience a little later; a process would be gone by then.
    for thread in threading.enumerate():
        if thread.name.startswith("storage"):
            thread.join()
    store.stop_failing()
    before = len(store.asked("GetObject", f"{AUDIO}/*"))
    staged(store, tmp_path / "out")
    assert_all_there(store, tmp_path / "out")
    assert len(store.asked("GetObject", f"{AUDIO}/*")) - before == len(SONGS) - 5


def test_whoever_is_asked_to_stop_does_not_go_on_waiting(store: ScriptedS3, tmp_path: Path) -> None:
    store.on("GetObject", "*", error(503, "SlowDown"), times=math.inf)
    stop = storage_of(store, stop=lambda: len(store.asked("GetObject")) > 3, patience_seconds=1e6)
    with pytest.raises(Interrupted):
        stop.get("big.bin", tmp_path / "x", None, stop.entry("big.bin"))
    assert list(tmp_path.glob("[!.]*")) == []


# Broken and slow connections


@pytest.mark.parametrize("byte", [1, 65_537, 500_000, 999_999])
def test_a_body_that_ends_too_early_is_gone_on_with_where_it_ended(
    store: ScriptedS3, tmp_path: Path, byte: int
) -> None:
    entry = looked_up(store)
    store.on("GetObject", "*", end_at(byte))
    storage_of(store).get("big.bin", tmp_path / "x", hashlib.sha256(BIG).hexdigest(), entry)
    assert (tmp_path / "x").read_bytes() == BIG
    first, second = store.asked("GetObject")
    assert second.headers["range"] == f"bytes={byte}-"
    assert second.headers["if-match"] == f'"{store.objects["deam/big.bin"].tag}"'
    assert first.sent + second.sent == len(BIG)


def test_resets_cost_a_tenth_of_the_bytes_at_most(store: ScriptedS3, tmp_path: Path) -> None:
    # What lies unread in a socket is lost with a reset: as on a network, it is read as it comes.
    entry = looked_up(store)
    store.bytes_a_second = 2e6
    for byte in (1000, 300_000, 200_000):
        store.on("GetObject", "*", reset_at(byte))
    storage_of(store).get("big.bin", tmp_path / "x", hashlib.sha256(BIG).hexdigest(), entry)
    assert (tmp_path / "x").read_bytes() == BIG
    assert len(store.asked("GetObject")) == 4
    assert all("if-match" in request.headers for request in store.asked("GetObject")[1:])
    assert store.sent() <= 1.1 * len(BIG)


def test_a_connection_that_is_reset_before_any_answer_is_made_again(store: ScriptedS3, tmp_path: Path) -> None:
    store.on("*", "*", reset_unheard, times=3)
    storage_of(store).get("big.bin", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BIG


@pytest.mark.parametrize("fault", [slowly(20.0), never], ids=["20 bytes a second", "no answer"])
def test_a_connection_that_says_next_to_nothing_is_given_up_for_another(
    store: ScriptedS3, tmp_path: Path, fault: Any
) -> None:
    entry = looked_up(store)
    store.on("GetObject", "*", fault, times=2)
    storage_of(store, timeout_seconds=0.3).get("big.bin", tmp_path / "x", hashlib.sha256(BIG).hexdigest(), entry)
    assert (tmp_path / "x").read_bytes() == BIG
    assert len(store.asked("GetObject")) == 3


@pytest.mark.parametrize("fault", [slowly(20.0), never], ids=["20 bytes a second", "no answer"])
def test_a_store_that_stays_like_that_ends_the_job(store: ScriptedS3, tmp_path: Path, fault: Any) -> None:
    store.on("GetObject", f"{AUDIO}/*", fault, times=math.inf)
    with pytest.raises(StorageError) as caught:
        staged(store, tmp_path / "out", timeout_seconds=0.2, patience_seconds=0.3)
    assert_error(caught, StorageError, 69, "s3:GetObject", f"s3://bucket/{AUDIO}/")
    assert list((tmp_path / "out").glob("audio/[!.]*")) == []


# Wrong bytes


def test_one_flipped_bit_is_noticed_and_fetched_again(store: ScriptedS3, tmp_path: Path) -> None:
    store.on("GetObject", f"{AUDIO}/7.mp3", flip_bit(10_000))
    notes = staged(store, tmp_path / "out")
    assert_all_there(store, tmp_path / "out")
    assert len(store.asked("GetObject", f"{AUDIO}/7.mp3")) == 2
    assert notes["verified"] == {"etag": 1 + len(SONGS)}


@pytest.mark.parametrize("knows", ["etag", "checksum", "metadata", "manifest"])
def test_bits_that_stay_flipped_end_it_with_the_names_of_all_such_objects(
    store: ScriptedS3, tmp_path: Path, knows: str
) -> None:
    for found in store.objects.values():
        digest = hashlib.sha256(found.body)
        # An ETag that is no digest is trusted for nothing.
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
    assert_error(
        caught, DataError, 65, "2 of 12", f"s3://bucket/{AUDIO}/3.mp3", f"s3://bucket/{AUDIO}/11.mp3", "damaged"
    )
    assert [len(store.asked("GetObject", f"{AUDIO}/{name}")) for name in ("3.mp3", "11.mp3", "4.mp3")] == [2, 2, 1]
    assert {path.name for path in (tmp_path / "out" / "audio").iterdir()} == {*SONGS} - {"3.mp3", "11.mp3"}
    assert_nothing_wrong(store, tmp_path / "out")


def test_a_body_that_is_whole_as_far_as_it_says_but_shorter_than_listed_is_not_taken(
    store: ScriptedS3, tmp_path: Path
) -> None:
    key = f"{AUDIO}/7.mp3"

    def shorter(request: Request, honest: Callable[[], Answer]) -> Answer:
        answer = honest()
        return Answer(answer.status, answer.body[:5000], answer.headers)

    store.on("GetObject", key, shorter, times=math.inf)
    with pytest.raises(DataError) as caught:
        staged(store, tmp_path / "out")
    assert_error(caught, DataError, 65, f"s3://bucket/{key}", "changed during download", "5000 bytes")
    assert not (tmp_path / "out" / "audio" / "7.mp3").exists()


def test_what_nothing_vouches_for_is_taken_by_its_size_and_said_to_be(store: ScriptedS3, tmp_path: Path) -> None:
    store.encrypts = True
    assert staged(store, tmp_path / "out")["verified"] == {"size": 1 + len(SONGS)}


def test_another_etag_than_listed_is_another_object(store: ScriptedS3, tmp_path: Path) -> None:
    store.on("GetObject", f"{AUDIO}/7.mp3", with_headers(ETag=f'"{"0" * 32}"'), times=math.inf)
    with pytest.raises(DataError) as caught:
        staged(store, tmp_path / "out")
    assert_error(caught, DataError, 65, f"s3://bucket/{AUDIO}/7.mp3", "changed during download", "0" * 32)
    assert len(store.asked("GetObject", f"{AUDIO}/7.mp3")) == 2
    assert not (tmp_path / "out" / "audio" / "7.mp3").exists()


def test_an_object_that_changes_between_two_parts_is_never_put_together_from_both(
    store: ScriptedS3, tmp_path: Path
) -> None:
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


# What is not there, or not allowed


def test_all_objects_that_vanish_after_the_listing_are_named_at_once(store: ScriptedS3, tmp_path: Path) -> None:
    for name in ("3.mp3", "8.mp3", "12.mp3"):
        store.on("GetObject", f"{AUDIO}/{name}", error(404, "NoSuchKey"), times=math.inf)
    with pytest.raises(DataError) as caught:
        staged(store, tmp_path / "out")
    named = [f"s3://bucket/{AUDIO}/{name}: HTTP 404" for name in ("3.mp3", "8.mp3", "12.mp3")]
    assert_error(caught, DataError, 65, "3 of 12", *named)
    assert len(store.asked("GetObject", f"{AUDIO}/3.mp3")) == 1
    assert_nothing_wrong(store, tmp_path / "out")


@pytest.mark.parametrize(("operation", "action"), [("GetObject", "s3:GetObject"), ("ListObjectsV2", "s3:ListBucket")])
def test_denied_access_is_told_at_the_first_answer(
    store: ScriptedS3, tmp_path: Path, operation: str, action: str
) -> None:
    store.on(operation, "*", error(403, "AccessDenied", "Access Denied"), times=math.inf)
    with pytest.raises(AccessError) as caught:
        staged(store, tmp_path / "out", connections=1)
    assert_error(caught, AccessError, 77, action, "s3://bucket/deam", "403 AccessDenied")
    assert len(store.asked(operation)) == 1


def test_a_bucket_that_does_not_exist_is_told_by_its_name(store: ScriptedS3, tmp_path: Path) -> None:
    store.on("ListObjectsV2", "*", error(404, "NoSuchBucket"), times=math.inf)
    with pytest.raises(StorageError) as caught:
        staged(store, tmp_path / "out")
    assert_error(caught, StorageError, 69, "s3://bucket/", "NoSuchBucket")


def credentials_file(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(
        f"[default]\naws_access_key_id = {name}\naws_secret_access_key = scripted-x\naws_session_token = y\n"
    )
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))


@pytest.mark.parametrize("renewed", [True, False])
def test_expired_credentials_are_read_anew_once(
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


def test_a_clock_that_is_wrong_is_told_with_the_difference(store: ScriptedS3, tmp_path: Path) -> None:
    theirs = format_datetime(datetime.now(UTC) - timedelta(minutes=20), usegmt=True)
    store.on("*", "*", error(403, "RequestTimeTooSkewed", Date=theirs), times=math.inf)
    with pytest.raises(StorageError) as caught:
        staged(store, tmp_path / "out")
    assert_error(caught, StorageError, 69, "clock is 20 minutes ahead", "s3://bucket/deam")


# Other hosts


def test_a_host_without_an_address_is_told_after_few_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_retry, "LONGEST_PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    config = StorageConfig(endpoint_url="https://store.invalid", patience_seconds=1e6)
    with pytest.raises(StorageError) as caught:
        next(open_storage(S3("bucket", "deam"), config, no).entries())
    assert_error(caught, StorageError, 69, "https://store.invalid", "no such host", "s3://bucket/deam")


@pytest.mark.parametrize("wrong", ["unknown authority", "expired", "another host"])
def test_a_wrong_certificate_is_refused_before_anything_is_sent(
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


def test_a_right_certificate_of_an_authority_that_is_named_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


# Keys


@pytest.mark.parametrize(
    "name",
    [
        "../../99.mp3",
        "../99.mp3",
        "/etc/99.mp3",
        "a/./99.mp3",
        "a\\b/99.mp3",
        "nul\0/99.mp3",
        "x" * 300 + "/99.mp3",
        "MEMD_audio/3.MP3",
    ],
    ids=["up twice", "up", "absolute", "dot", "backslash", "nul", "300 bytes", "by case"],
)
def test_keys_that_lead_out_or_cannot_be_kept_apart_are_refused_before_anything_is_fetched(
    store: ScriptedS3, tmp_path: Path, name: str
) -> None:
    store.objects[f"deam/{name}"] = Object(b"x")
    with pytest.raises(DataError) as caught:
        staged(store, tmp_path / "out")
    assert_error(caught, DataError, 65, "s3://bucket/deam", repr(name)[1:60])
    assert store.sent("GetObject", f"{AUDIO}/*") == 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out"]


LISTING = """
import resource, sys
from job.config import StorageConfig
from job.spec.location import parse_location
from job.storage.stage import dataset_entries
from job.storage.open import open_storage
config = StorageConfig(endpoint_url=sys.argv[1])
for url in ("s3://bucket/few", "s3://bucket/deam"):
    entries = dataset_entries(open_storage(parse_location(url), config, lambda: False), url)
    print(len(entries), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.full
def test_a_hundred_thousand_other_keys_are_passed_over_in_little_memory(store: ScriptedS3, tmp_path: Path) -> None:
    decoys = [f"deam/{kind}/{number:06}.txt" for kind in ("a", "z") for number in range(50_000)]
    store.decoys = sorted([*decoys, *(f"few/{number:06}.txt" for number in range(2000)), "few/1.mp3"])
    command = [sys.executable, "-c", LISTING, store.address.endpoint_url]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    few, kib_of_few, found, kib = map(int, told)
    assert (few, found) == (1, 1 + len(SONGS))
    # All at once they are tens of MB.
    assert kib - kib_of_few < 6000
    assert len(store.asked("ListObjectsV2")) == 3 + 101
    staged(store, tmp_path / "out")
    assert_all_there(store, tmp_path / "out")
    assert len(store.asked("GetObject")) == 2 + len(SONGS)


# What several do at once


def test_two_that_fetch_one_object_into_one_place_both_get_it_whole(store: ScriptedS3, tmp_path: Path) -> None:
    """Two jobs on one scratch, or a thread that an attempt left behind and the next attempt."""
    entry = looked_up(store)
    store.bytes_a_second = 4e6
    targets = [lambda: storage_of(store).get("big.bin", tmp_path / "x", None, entry)] * 3
    for _ in in_parallel([lambda get=get: assert_whole(get(), tmp_path / "x") for get in targets], 3, no):  # type: ignore[misc]
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def assert_whole(fetched: Fetched, path: Path) -> None:
    assert fetched.sha256 == hashlib.sha256(BIG).hexdigest()
    assert path.read_bytes() == BIG


def test_a_list_that_ends_in_the_middle_is_not_taken_for_a_whole_one(store: ScriptedS3, tmp_path: Path) -> None:
    """As of a store that only knows the first version of the request."""
    page = b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>"
    store.on("ListObjectsV2", "*", lambda _request, _answer: Answer(200, page), times=math.inf)
    with pytest.raises(StorageError, match="the listing ends in the middle"):
        staged(store, tmp_path / "out")


# Without the private parts of botocore


class KnownToBotocoreAlone:
    """An attribute that for all others is not there, as if it had been renamed."""

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
def test_without_private_attributes_of_botocore_downloads_use_its_ordinary_client(
    store: ScriptedS3, tmp_path: Path
) -> None:
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
