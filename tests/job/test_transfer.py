"""Parallel tasks, unsafe names, free space."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from emotion.errors import DataError, Interrupted, StorageError
from job.storage.transfer import in_parallel, refuse_names, require_space


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["a/../../2.mp3"], "leads out of the folder"),
        (["/2.mp3"], "has slashes with nothing between them"),
        (["a//2.mp3"], "has slashes with nothing between them"),
        (["./2.mp3"], "leads out of the folder"),
        (["a\0/2.mp3"], "has a character"),
        (["a\n/2.mp3"], "has a character"),
        (["a\\2.mp3"], "has a character"),
        (["ü" * 128 + "/2.mp3"], "is longer than a file name may be"),
        (["a/2.mp3", "A/2.MP3"], "differs from 'a/2.mp3' by case alone"),
        (["straße/2.mp3", "STRASSE/2.mp3"], "by case alone"),
    ],
)
def test_names_that_lead_out_of_the_folder_or_collide_are_refused(names: list[str], problem: str) -> None:
    refuse_names(["ü" * 127 + "/2.mp3", "b..c/.2.mp3", "3.mp3"], "s3://bucket")
    with pytest.raises(DataError, match=problem) as caught:
        refuse_names(names, "s3://bucket")
    assert caught.value.exit_code == 65
    assert str(caught.value).isprintable()


def test_in_parallel_runs_exactly_as_many_tasks_at_once_as_asked_for() -> None:
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


def test_after_a_failed_task_or_a_stop_no_further_task_starts() -> None:
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


def test_too_little_space_is_refused_with_the_numbers_and_the_options(tmp_path: Path) -> None:
    require_space(tmp_path, 0, 1)
    with pytest.raises(StorageError, match=r"1048576\.00 GiB are needed.*--work or --scratch"):
        require_space(tmp_path, 2**50, 1)


def test_too_few_inodes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=rf"{2**60} are needed.*--work or --scratch"):
        require_space(tmp_path, 0, 2**60)
