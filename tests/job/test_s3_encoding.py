"""Objects that are stored compressed, with Content-Encoding, as `gsutil cp -z` and many web servers' tools leave them."""

import gzip
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from emotion.errors import DataError, StorageError
from job.storage.protocol import WrongBytesError
from tests.stores.dataset import AUDIO, BIG, LABELS, SONGS, assert_error, staged, storage_of
from tests.stores.scripted import Answer, Object, Request, ScriptedS3, end_at

SHA256 = hashlib.sha256(BIG).hexdigest()


def compress(store: ScriptedS3, key: str, encoding: str = "gzip") -> None:
    content = gzip.compress(store.objects[key].body, 1, mtime=0)
    store.objects[key] = Object(content, {"Content-Encoding": encoding})


def test_labels_and_songs_that_are_stored_compressed_are_staged_as_what_they_are(store: ScriptedS3, tmp_path: Path) -> None:
    songs = {name: store.objects[f"{AUDIO}/{name}"].body for name in SONGS}
    compress(store, LABELS)
    for name in SONGS[:3]:
        compress(store, f"{AUDIO}/{name}", "x-gzip")
    for attempt in ("first", "again", "first"):  # the last one finds copies and a manifest of them
        staged(store, tmp_path / attempt)
        found = {path.name: path.read_bytes() for path in (tmp_path / attempt / "audio").iterdir()}
        assert found == songs


@pytest.mark.parametrize("sha256", [None, SHA256])
def test_a_compressed_object_is_resumed_and_verified_twice(store: ScriptedS3, tmp_path: Path, sha256: str | None) -> None:
    compress(store, "deam/big.bin")
    size = len(store.objects["deam/big.bin"].body)
    storage = storage_of(store)
    entry = storage.entry("big.bin")
    store.on("GetObject", "*", end_at(600_000))
    fetched = storage.get("big.bin", tmp_path / "x", sha256, entry)
    assert (tmp_path / "x").read_bytes() == BIG
    assert (fetched.sha256, fetched.verified, fetched.encoding) == (SHA256, "sha256" if sha256 else "etag", "")
    assert store.sent() < size + 100
    # Killed between the last byte and the end.
    for old in tmp_path.iterdir():
        old.unlink()
    (tmp_path / f".x.{entry.tag}.part").write_bytes(store.objects["deam/big.bin"].body)
    storage.get("big.bin", tmp_path / "x", sha256, entry)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", BIG)]


def test_a_compressed_small_file_is_read(store: ScriptedS3) -> None:
    store.objects["deam/note"] = Object(gzip.compress(b"hello", mtime=0), {"Content-Encoding": "gzip"})
    assert storage_of(store).read("note") == b"hello"


def test_an_object_that_only_says_that_it_is_compressed_is_used_as_it_is(store: ScriptedS3, tmp_path: Path) -> None:
    store.objects["deam/big.bin"] = Object(BIG, {"Content-Encoding": "gzip"})
    storage_of(store).get("big.bin", tmp_path / "x", SHA256)
    assert (tmp_path / "x").read_bytes() == BIG


@pytest.mark.parametrize(
    "damage", [lambda body: body[:-9], lambda body: body[:500] + b"?" * 500 + body[1000:]], ids=["cut", "bytes"]
)
def test_compressed_bytes_that_are_damaged_are_refused(
    store: ScriptedS3, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    compress(store, "deam/big.bin")
    store.objects["deam/big.bin"] = replace(store.objects["deam/big.bin"], body=damage(store.objects["deam/big.bin"].body))
    for request in (lambda: storage_of(store).get("big.bin", tmp_path / "x"), lambda: storage_of(store).read("big.bin")):
        with pytest.raises(WrongBytesError, match="cannot be decompressed"):
            request()
    assert list(tmp_path.iterdir()) == []


def test_another_digest_than_expected_is_refused(store: ScriptedS3, tmp_path: Path) -> None:
    compress(store, "deam/big.bin")
    with pytest.raises(StorageError, match="its SHA-256 is"):
        storage_of(store).get("big.bin", tmp_path / "x", "0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_another_compression_is_refused_by_name(store: ScriptedS3, tmp_path: Path) -> None:
    store.objects[LABELS] = replace(store.objects[LABELS], headers={"Content-Encoding": "br"})
    with pytest.raises(DataError) as caught:
        staged(store, tmp_path / "out")
    assert_error(caught, DataError, 65, LABELS, "Content-Encoding 'br'")


def test_an_encoding_of_the_upload_alone_is_none(store: ScriptedS3) -> None:
    store.objects["deam/note"] = Object(b"hello", {"Content-Encoding": "aws-chunked"})
    assert storage_of(store).read("note") == b"hello"


def test_a_proxy_that_compresses_on_the_way_is_noticed(store: ScriptedS3, tmp_path: Path) -> None:
    """The size is not that of the object then."""

    def compressed(request: Request, honest: Callable[[], Answer]) -> Answer:
        answer = honest()
        return replace(answer, body=gzip.compress(answer.body, mtime=0), headers={**answer.headers, "Content-Encoding": "gzip"})

    storage = storage_of(store)
    entry = storage.entry("big.bin")
    store.on("GetObject", "*", compressed)
    storage.get("big.bin", tmp_path / "x", None, entry)
    assert (tmp_path / "x").read_bytes() == BIG
