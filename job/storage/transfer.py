"""What every copy of files needs: threads, safe names, free space."""

import concurrent.futures
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from emotion.errors import DataError, Interrupted, StorageError
from job.storage.protocol import ASKED_SECONDS, Entry

LONGEST_NAME_BYTES = 255
"""Of one part of a path, on every file system of Linux."""


def in_parallel(
    tasks: Sequence[Callable[[], None]], threads: int, should_stop: Callable[[], bool]
) -> Iterator[list[int]]:
    """Run tasks in so many threads and yield the indices of those that were done meanwhile, every now and then.

    Raises what the first that fails raises, or Interrupted when asked to stop; what has not begun then never does.
    """
    waiting = deque(enumerate(tasks))
    done: deque[int] = deque()
    ended = threading.Event()

    def work() -> None:
        # Each thread takes the next one by itself: to wake this one for every file costs as much as a part of the file.
        while waiting and not ended.is_set() and not should_stop():
            try:
                index, task = waiting.popleft()
            except IndexError:
                return
            task()
            done.append(index)

    pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="storage")
    workers = [pool.submit(work) for _ in range(min(threads, len(tasks)))]
    try:
        working = set(workers)
        while working:
            finished, working = concurrent.futures.wait(working, ASKED_SECONDS, concurrent.futures.FIRST_EXCEPTION)
            for worker in finished:
                worker.result()
            yield [done.popleft() for _ in range(len(done))]
            if working and should_stop():
                break
        if working or waiting:
            raise Interrupted("stopped")
    finally:
        ended.set()
        # Not waited for here: a thread may hang in a file system or at a store that does not answer.
        pool.shutdown(wait=False, cancel_futures=True)
        concurrent.futures.wait(workers, 2 * ASKED_SECONDS)


def refuse_names(names: Sequence[str], where: str) -> None:
    """Raise DataError for names of files that lead out of a folder, or that a file system could not keep apart."""
    folded: dict[str, str] = {}
    for name in names:
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts):
            problem = "leads out of the folder"
        elif not name.isprintable() or "\\" in name:
            problem = "has a character that a file name must not have"
        elif any(len(os.fsencode(part)) > LONGEST_NAME_BYTES for part in parts):
            problem = f"is longer than a file name may be ({LONGEST_NAME_BYTES} bytes)"
        elif folded.setdefault(name.casefold(), name) != name:
            problem = f"differs from {folded[name.casefold()]!r} by case alone"
        else:
            continue
        raise DataError(f"{where}: the name {name[:80]!r} {problem}. Rename it there; nothing was copied.")


def is_same_file(path: Path, entry: Entry) -> bool:
    """Whether there is a finished copy of `entry`: same size and modification time."""
    try:
        facts = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (facts.st_size, facts.st_mtime_ns) == (entry.size, entry.mtime_ns)


def require_space(folder: Path, needed: int, files: int) -> None:
    """Raise StorageError if the disk under `folder` has fewer than `needed` bytes, or room for fewer files, left."""
    free = shutil.disk_usage(folder).free
    advice = "Free some space or name another folder with --work or --scratch."
    if free < needed:
        raise StorageError(
            f"storage: {folder} has {free / 2**30:.2f} GiB left, {needed / 2**30:.2f} GiB are needed. {advice}"
        )
    facts = os.statvfs(folder)
    # Some file systems make inodes as they need them and say 0 of 0.
    if facts.f_files and facts.f_favail < files:
        raise StorageError(
            f"storage: {folder} has room for {facts.f_favail} more files (inodes), {files} are needed. {advice}"
        )
