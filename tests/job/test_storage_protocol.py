"""What a place promises, of a folder, of moto and of a real store alike."""

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from emotion.errors import DataError, Interrupted
from job.config import StorageConfig
from job.spec.location import S3
from job.storage.local_folder import LocalFolder
from job.storage.open import open_storage
from job.storage.protocol import AbsentError, Storage, WrongBytesError
from job.storage.s3 import PART_BYTES
from job.storage.transfer import in_parallel, refuse_names
from tests.stores.servers import Store

LARGE = PART_BYTES * 5 // 2
NOT_MD5 = "0" * 64


@pytest.fixture(params=["folder", "moto", pytest.param("radosgw", marks=pytest.mark.full)])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    if request.param == "folder":
        (tmp_path / "place").mkdir()
        return LocalFolder(tmp_path / "place")
    store: Store = request.getfixturevalue(request.param)
    for name, value in store.environment().items():
        monkeypatch.setenv(name, value)
    config = StorageConfig(endpoint_url=store.endpoint_url, timeout_seconds=10, patience_seconds=5)
    # A key with a slash, a blank and letters that a request has to escape.
    return open_storage(S3(store.new_bucket(), "a b/ü+="), config, lambda: False)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_what_was_written_is_read_and_an_absent_file_is_none(place: Storage) -> None:
    assert place.problem() is None
    assert place.read("a/b") is None
    assert list(place.entries()) == []
    for content in (b"first", b"", b"second"):
        place.write("a/b", content)
        assert place.read("a/b") == content
        assert place.digest("a/b") == sha256(content)
    with pytest.raises(AbsentError):
        place.digest("a/c")
    with pytest.raises(AbsentError):
        place.entry("a/c")


def test_a_new_file_is_written_once(place: Storage) -> None:
    assert place.write_new("manifest.json", b"ours")
    assert not place.write_new("manifest.json", b"theirs")
    assert place.read("manifest.json") == b"ours"


def test_files_are_listed_by_name_with_their_sizes_below_a_folder_and_no_other(place: Storage) -> None:
    for name in ("b/2", "b/10", "a", "b.c", "b/deep/er", "bb/x"):
        place.write(name, name.encode())
    assert [(entry.name, entry.size) for entry in place.entries("b")] == [("b/10", 4), ("b/2", 3), ("b/deep/er", 9)]
    assert len(list(place.entries())) == 6
    assert list(place.entries("absent")) == []
    before = place.entry("a")
    assert before in list(place.entries())
    place.write("a", b"b")
    assert place.entry("a").tag != before.tag


@pytest.mark.parametrize("size", [0, 3, 300_000, LARGE])
def test_a_file_is_put_and_got_whole_or_refused_by_its_digest(place: Storage, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(content)
    with pytest.raises(WrongBytesError, match=f"its SHA-256 is {sha256(content)}, expected {NOT_MD5}"):
        place.put(source, "x/y", NOT_MD5)
    assert list(place.entries()) == []
    place.put(source, "x/y", sha256(content))
    place.put(source, "x/y", sha256(content))
    entry = place.entry("x/y")
    assert entry.size == size
    for asked in (sha256(content), None):
        fetched = place.get("x/y", target, asked, entry if asked else None)
        assert target.read_bytes() == content
        assert fetched.sha256 == sha256(content)
        assert not isinstance(place, LocalFolder) or target.stat().st_mtime_ns == source.stat().st_mtime_ns
        target.unlink()
    with pytest.raises(WrongBytesError, match="is damaged"):
        place.get("x/y", target, NOT_MD5)
    with pytest.raises(AbsentError):
        place.get("x/z", target)
    assert [path.name for path in tmp_path.glob("*") if path.name != "place"] == ["source"]


def test_a_file_that_may_be_there_is_removed_and_moved(place: Storage) -> None:
    place.remove("a")
    place.move("a", "b")
    place.write("a", b"a")
    place.move("a", "aside/b")
    assert [entry.name for entry in place.entries()] == ["aside/b"]
    place.remove("aside/b")
    assert list(place.entries()) == []


def test_what_killed_writers_have_left_is_cleared_of_others_only_when_it_is_old(place: Storage) -> None:
    always_old = False
    if isinstance(place, LocalFolder):
        place.write("run/a", b"a")
        part = place.path / "run" / ".b.part"
        part.write_bytes(b"b")

        def left() -> int:
            return len(list(place.path.rglob(".*.part")))
    else:
        from job.storage.s3 import S3Prefix

        assert isinstance(place, S3Prefix)
        client = place._connection.client()
        client.create_multipart_upload(**place._object("run/b"))
        (upload,) = client.list_multipart_uploads(Bucket=place._bucket)["Uploads"]
        # moto says so of each.
        always_old = upload["Initiated"].year == 2010

        def left() -> int:
            return len(client.list_multipart_uploads(Bucket=place._bucket).get("Uploads", ()))

    assert left() == 1
    if not always_old:
        place.clear("run", own=False)
        place.clear("run", own=False)
    place.clear("other", own=True)
    assert left() == 1
    place.clear("run", own=True)
    assert left() == 0


def test_a_place_that_is_not_there_says_why(tmp_path: Path, moto: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in moto.environment().items():
        monkeypatch.setenv(name, value)
    absent = LocalFolder(tmp_path / "absent").problem()
    assert str(absent) == "No such file or directory"
    config = StorageConfig(endpoint_url=moto.endpoint_url)
    problem = open_storage(S3("no-such-bucket", "x"), config, lambda: False).problem()
    assert "s3:ListBucket s3://no-such-bucket/x/" in str(problem)
    assert "NoSuchBucket" in str(problem)


# What no store is needed for


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["a/../../2.mp3"], "leads out of the folder"),
        (["/2.mp3"], "leads out of the folder"),
        (["a//2.mp3"], "leads out of the folder"),
        (["./2.mp3"], "leads out of the folder"),
        (["a\0/2.mp3"], "has a character"),
        (["a\n/2.mp3"], "has a character"),
        (["a\\2.mp3"], "has a character"),
        (["ü" * 128 + "/2.mp3"], "is longer than a file name may be"),
        (["a/2.mp3", "A/2.MP3"], "differs from 'a/2.mp3' by case alone"),
        (["straße/2.mp3", "STRASSE/2.mp3"], "by case alone"),
    ],
)
def test_names_that_lead_out_or_cannot_be_kept_apart_are_refused(names: list[str], problem: str) -> None:
    refuse_names(["ü" * 127 + "/2.mp3", "b..c/.2.mp3", "3.mp3"], "s3://bucket")
    with pytest.raises(DataError, match=problem) as caught:
        refuse_names(names, "s3://bucket")
    assert caught.value.exit_code == 65
    assert str(caught.value).isprintable()


def test_tasks_run_side_by_side_as_many_as_asked_for_and_no_more() -> None:
    meeting = threading.Barrier(3, timeout=20)
    most = now = 0
    lock = threading.Lock()

    def task() -> None:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        meeting.wait()
        with lock:
            now -= 1

    done = [index for indices in in_parallel([task] * 9, 3, lambda: False) for index in indices]
    assert sorted(done) == list(range(9))
    assert most == 3


def test_the_first_task_that_fails_and_a_stop_leave_the_rest_undone() -> None:
    begun: list[int] = []

    def numbered(number: int) -> Callable[[], None]:
        def task() -> None:
            begun.append(number)
            if number == 2:
                raise ValueError("two")

        return task

    with pytest.raises(ValueError, match="two"):
        list(in_parallel([numbered(number) for number in range(9)], 1, lambda: False))
    assert begun == [0, 1, 2]
    begun.clear()
    with pytest.raises(Interrupted):
        list(in_parallel([numbered(number) for number in range(9)], 1, lambda: len(begun) == 2))
    assert begun == [0, 1]
