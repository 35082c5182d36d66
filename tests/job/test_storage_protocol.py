"""The storage protocol, tested in the same way on a folder, on moto and on Ceph."""

import hashlib
import os
from pathlib import Path

import pytest

from job.config import StorageConfig
from job.spec.location import S3, parse_location
from job.storage.local_folder import LocalFolder
from job.storage.open import open_storage
from job.storage.protocol import AbsentError, Storage, WrongBytesError
from job.storage.s3_upload import PART_BYTES
from tests.stores.servers import S3Server

LARGE = PART_BYTES * 5 // 2
NOT_MD5 = "0" * 64


@pytest.fixture(params=["folder", "moto", pytest.param("radosgw", marks=pytest.mark.full)])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Server | None:
    """The server of object storage, with its environment set; None for a folder."""
    if request.param == "folder":
        return None
    server: S3Server = request.getfixturevalue(request.param)
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def storage(server: S3Server | None, tmp_path: Path) -> Storage:
    if server is None:
        (tmp_path / "storage").mkdir()
        return LocalFolder(tmp_path / "storage")
    config = StorageConfig(endpoint_url=server.endpoint_url, timeout_seconds=10, patience_seconds=5)
    # A key with a slash, a blank and letters that a request has to escape.
    return open_storage(S3(server.new_bucket(), "a b/ü+="), config, lambda: False)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_read_returns_what_was_written_and_none_for_an_absent_file(storage: Storage) -> None:
    assert storage.problem() is None
    assert storage.read("a/b") is None
    assert list(storage.entries()) == []
    for content in (b"first", b"", b"second"):
        storage.write("a/b", content)
        assert storage.read("a/b") == content
        assert storage.digest("a/b") == sha256(content)
    with pytest.raises(AbsentError):
        storage.digest("a/c")
    with pytest.raises(AbsentError):
        storage.entry("a/c")


def test_it_says_as_whom_it_is_used_and_how_the_clocks_differ(storage: Storage, server: S3Server | None) -> None:
    assert storage.problem() is None
    ahead = storage.clock_ahead_seconds()
    if server is None:
        assert (storage.identity(), ahead) == (f"user {os.geteuid()}", None)
        return
    assert storage.identity() == "AWS_ACCESS_KEY_ID"
    assert ahead is not None
    assert abs(ahead) < 60


def test_write_new_writes_only_once(storage: Storage) -> None:
    assert storage.write_new("manifest.json", b"ours")
    assert not storage.write_new("manifest.json", b"theirs")
    assert storage.read("manifest.json") == b"ours"


def test_entries_are_sorted_by_name_with_sizes_and_only_those_below_the_folder(storage: Storage) -> None:
    for name in ("b/2", "b/10", "a", "b.c", "b/deep/er", "bb/x"):
        storage.write(name, name.encode())
    assert [(entry.name, entry.size) for entry in storage.entries("b")] == [("b/10", 4), ("b/2", 3), ("b/deep/er", 9)]
    assert len(list(storage.entries())) == 6
    assert list(storage.entries("absent")) == []
    before = storage.entry("a")
    assert before in list(storage.entries())
    storage.write("a", b"b")
    assert storage.entry("a").tag != before.tag


@pytest.mark.parametrize("size", [0, 3, 300_000, pytest.param(LARGE, marks=pytest.mark.full)])
def test_put_and_get_copy_a_complete_file_or_refuse_it_by_its_digest(storage: Storage, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(content)
    with pytest.raises(WrongBytesError, match=f"its SHA-256 is {sha256(content)}, expected {NOT_MD5}"):
        storage.put(source, "x/y", NOT_MD5)
    assert list(storage.entries()) == []
    storage.put(source, "x/y", sha256(content))
    storage.put(source, "x/y", sha256(content))
    entry = storage.entry("x/y")
    assert entry.size == size
    for asked in (sha256(content), None):
        fetched = storage.get("x/y", target, asked, entry if asked else None)
        assert target.read_bytes() == content
        assert fetched.sha256 == sha256(content)
        assert not isinstance(storage, LocalFolder) or target.stat().st_mtime_ns == source.stat().st_mtime_ns
        target.unlink()
    with pytest.raises(WrongBytesError, match="is damaged"):
        storage.get("x/y", target, NOT_MD5)
    with pytest.raises(AbsentError):
        storage.get("x/z", target)
    assert [path.name for path in tmp_path.glob("*") if path.name != "storage"] == ["source"]


def test_remove_and_move_ignore_absent_files(storage: Storage) -> None:
    storage.remove("a")
    storage.move("a", "b")
    storage.write("a", b"a")
    storage.move("a", "aside/b")
    assert [entry.name for entry in storage.entries()] == ["aside/b"]
    storage.remove("aside/b")
    assert list(storage.entries()) == []


def test_clear_removes_what_killed_writers_left_and_of_active_writers_only_what_is_old(
    storage: Storage, request: pytest.FixtureRequest
) -> None:
    is_always_old = False
    if isinstance(storage, LocalFolder):
        storage.write("run/a", b"a")
        (storage.path / "run" / ".b.part").write_bytes(b"b")

        def unfinished() -> int:
            return len(list(storage.path.rglob(".*.part")))
    else:
        location = parse_location(storage.url)
        assert isinstance(location, S3)
        client = request.getfixturevalue("server").client()
        client.create_multipart_upload(Bucket=location.bucket, Key=f"{location.key}/run/b")
        (upload,) = client.list_multipart_uploads(Bucket=location.bucket)["Uploads"]
        # moto gives all uploads the same date.
        is_always_old = upload["Initiated"].year == 2010

        def unfinished() -> int:
            return len(client.list_multipart_uploads(Bucket=location.bucket).get("Uploads", ()))

    assert unfinished() == 1
    if not is_always_old:
        storage.clear("run", own=False)
        storage.clear("run", own=False)
    storage.clear("other", own=True)
    assert unfinished() == 1
    storage.clear("run", own=True)
    assert unfinished() == 0


def test_problem_says_why_a_storage_cannot_be_used(tmp_path: Path, moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in moto.environment().items():
        monkeypatch.setenv(name, value)
    absent = LocalFolder(tmp_path / "absent").problem()
    assert str(absent) == "No such file or directory"
    config = StorageConfig(endpoint_url=moto.endpoint_url)
    problem = open_storage(S3("no-such-bucket", "x"), config, lambda: False).problem()
    assert "s3:ListBucket s3://no-such-bucket/x/" in str(problem)
    assert "NoSuchBucket" in str(problem)
