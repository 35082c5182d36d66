"""A local folder as storage: copies, and new files of which one writer alone wins."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from emotion.errors import AccessError, StorageError
from job.storage.local_folder import LocalFolder, copy_into
from job.storage.protocol import BLOCK_BYTES
from job.storage.transfer import is_same_file


@pytest.mark.parametrize("content", [b"abc", b""])
def test_a_copy_has_the_bytes_and_the_modification_time_of_its_source(tmp_path: Path, content: bytes) -> None:
    source, target = tmp_path / "a song.mp3", tmp_path / "copies" / "2.mp3"
    target.parent.mkdir()
    source.write_bytes(content)
    os.utime(source, ns=(1, 1_234_567_890_123_456_789))
    copy_into(source, target)
    assert target.read_bytes() == content
    assert target.stat().st_mtime_ns == source.stat().st_mtime_ns
    assert is_same_file(target, LocalFolder(tmp_path).entry("a song.mp3"))
    assert [path.name for path in target.parent.iterdir()] == ["2.mp3"]


def test_a_file_of_several_blocks_is_copied_completely(tmp_path: Path) -> None:
    content = b"0123456789" * (BLOCK_BYTES // 5)
    (tmp_path / "a").write_bytes(content)
    copy_into(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == content


def test_a_file_of_another_size_or_time_is_not_the_same_file(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"abc")
    assert not is_same_file(target, LocalFolder(tmp_path).entry("a"))
    copy_into(source, target)
    time = source.stat().st_mtime_ns
    os.utime(source, ns=(time, time + 1))
    assert not is_same_file(target, LocalFolder(tmp_path).entry("a"))
    source.write_bytes(b"abcd")
    os.utime(source, ns=(time, time))
    assert not is_same_file(target, LocalFolder(tmp_path).entry("a"))


def test_a_target_below_a_file_is_an_error_and_the_file_stays(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(StorageError, match=f"cannot copy {tmp_path}/a to {tmp_path}/file/b: "):
        copy_into(tmp_path / "a", tmp_path / "file" / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "file"]
    assert (tmp_path / "file").read_bytes() == b"in the way"


def test_a_folder_at_the_target_is_an_error_and_no_temporary_is_left(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").mkdir()
    with pytest.raises(StorageError, match="Is a directory"):
        copy_into(tmp_path / "a", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_full_disk_is_a_storage_error_and_the_earlier_file_stays(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"before")
    # The temporary file of `b` is a link to a device where every write fails as on a full disk.
    (tmp_path / ".b.part").symlink_to("/dev/full")
    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(StorageError, match="No space left on device"):
        copy_into(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"before"
    assert not (tmp_path / ".b.part").is_symlink()


def test_a_missing_source_is_an_error_and_the_earlier_copy_stays(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"before")
    with pytest.raises(StorageError, match="No such file"):
        copy_into(tmp_path / "absent", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"before"


# write_new


@pytest.mark.parametrize("has_links", [True, False], ids=["hard links", "no hard links"])
def test_of_several_simultaneous_writers_of_a_new_file_exactly_one_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    if not has_links:

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    writers = range(4)
    together = threading.Barrier(len(writers))

    def write(writer: int, name: str) -> bool:
        folder = LocalFolder(tmp_path, f".{writer}")
        together.wait()
        return folder.write_new(name, b"%d" % writer * 10_000)

    with ThreadPoolExecutor(len(writers)) as pool:
        for number in range(60):
            name = f"run/{number}.json"
            won = list(pool.map(write, writers, [name] * len(writers)))
            assert won.count(True) == 1
            assert (tmp_path / name).read_bytes() == b"%d" % won.index(True) * 10_000
    assert list(tmp_path.rglob(".*")) == []


def test_without_hard_links_a_failed_write_of_a_new_file_leaves_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(StorageError, match="Input/output error"):
        LocalFolder(tmp_path).write_new("a", b"ours")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    assert LocalFolder(tmp_path).write_new("a", b"ours")


def test_a_link_that_is_reported_as_existing_because_its_answer_was_lost_is_the_writers_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS does when the request for the link is sent again."""
    link = os.link

    def link_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    assert LocalFolder(tmp_path).write_new("a", b"ours")
    assert not LocalFolder(tmp_path).write_new("a", b"theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from job.storage.local_folder import LocalFolder

def killed(source, target):
    if sys.argv[2] == "after":
        link(source, target)
    os.kill(os.getpid(), signal.SIGKILL)

link, os.link = os.link, killed
LocalFolder(Path(sys.argv[1])).write_new("run/a", b"complete")
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_writer_killed_beside_the_link_leaves_no_file_or_a_complete_one_and_its_temporary_is_cleared(
    tmp_path: Path, moment: str
) -> None:
    command = [sys.executable, "-c", KILLED_WRITER, str(tmp_path), moment]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob(".*.part"))) == 1
    folder = LocalFolder(tmp_path)
    assert folder.read("run/a") == (b"complete" if moment == "after" else None)
    folder.clear("run", own=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == (["a"] if moment == "after" else [])


def test_links_out_of_the_folder_are_not_written_through(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "inner").mkdir(parents=True)
    outside.mkdir()
    (outside / "kept").write_bytes(b"kept")
    (root / "out").symlink_to(outside)
    (root / "in").symlink_to(root / "inner")
    (root / "file").symlink_to(outside / "kept")
    folder = LocalFolder(root)
    for write in (
        lambda: folder.write("out/new", b"x"),
        lambda: folder.write_new("out/deep/new", b"x"),
        lambda: folder.put(outside / "kept", "out/new", hashlib.sha256(b"kept").hexdigest()),
        lambda: folder.remove("out/kept"),
        lambda: folder.move("file", "out/moved"),
        lambda: folder.move("out/kept", "moved"),
    ):
        with pytest.raises(AccessError, match=f"{root / 'out'} is a link to {outside}"):
            write()
    folder.write("in/new", b"x")
    folder.write("file", b"replaced")
    assert [(path.name, path.read_bytes()) for path in outside.iterdir()] == [("kept", b"kept")]
    assert (root / "inner" / "new").read_bytes() == b"x"
