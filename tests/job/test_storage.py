import os
from pathlib import Path

import pytest

from emotion.errors import StorageError
from job.storage.local_folder import LocalFolder, copy_into
from job.storage.protocol import BLOCK
from job.storage.transfer import is_same_file, require_space


@pytest.mark.parametrize("content", [b"abc", b""])
def test_a_copy_has_the_bytes_and_the_time_of_its_source(tmp_path: Path, content: bytes) -> None:
    source, target = tmp_path / "a song.mp3", tmp_path / "copies" / "2.mp3"
    target.parent.mkdir()
    source.write_bytes(content)
    os.utime(source, ns=(1, 1_234_567_890_123_456_789))
    copy_into(source, target)
    assert target.read_bytes() == content
    assert target.stat().st_mtime_ns == source.stat().st_mtime_ns
    assert is_same_file(target, LocalFolder(tmp_path).entry("a song.mp3"))
    assert [path.name for path in target.parent.iterdir()] == ["2.mp3"]


def test_more_than_one_block_is_copied_whole(tmp_path: Path) -> None:
    content = b"0123456789" * (BLOCK // 5)
    (tmp_path / "a").write_bytes(content)
    copy_into(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == content


def test_another_size_or_another_time_is_another_file(tmp_path: Path) -> None:
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


def test_a_target_below_a_file_is_refused_and_the_file_stays(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(StorageError, match=f"cannot copy {tmp_path}/a to {tmp_path}/file/b: "):
        copy_into(tmp_path / "a", tmp_path / "file" / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "file"]
    assert (tmp_path / "file").read_bytes() == b"in the way"


def test_a_folder_in_the_way_is_refused_and_no_temporary_file_is_left(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").mkdir()
    with pytest.raises(StorageError, match="Is a directory"):
        copy_into(tmp_path / "a", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_full_disk_is_a_storage_error_and_what_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"before")
    # Writing to it fails as on a disk that is full; the temporary file of `b` is a link to it.
    (tmp_path / ".b.part").symlink_to("/dev/full")
    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(StorageError, match="No space left on device"):
        copy_into(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"before"
    assert not (tmp_path / ".b.part").is_symlink()


def test_a_missing_source_is_refused_and_an_earlier_copy_stays(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"before")
    with pytest.raises(StorageError, match="No such file"):
        copy_into(tmp_path / "absent", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"before"


def test_space_that_no_disk_has_is_refused_with_the_numbers_and_the_options(tmp_path: Path) -> None:
    require_space(tmp_path, 0, 1)
    with pytest.raises(StorageError, match=r"1048576\.00 GiB are needed.*--work or --scratch"):
        require_space(tmp_path, 2**50, 1)


def test_inodes_that_no_disk_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=rf"{2**60} are needed.*--work or --scratch"):
        require_space(tmp_path, 0, 2**60)
