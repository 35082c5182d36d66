"""Helpers for copying many files: threads, safe names, free space."""

import concurrent.futures
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from emotion.errors import DataError, Interrupted, StorageError
from emotion.threads import waiting
from job.storage.protocol import STOP_CHECK_SECONDS, Entry

MAX_NAME_BYTES = 255  # of one component of a path, on every file system of Linux


def in_parallel(tasks: Sequence[Callable[[], None]], threads: int, should_stop: Callable[[], bool]) -> Iterator[list[int]]:
    """Run tasks in at most `threads` threads. Yields, now and then, the indices of tasks that have finished since the last yield.
    Raises what the first failing task raises, or Interrupted when asked to stop. Tasks that have not started by then never do."""
    queue = deque(enumerate(tasks))
    done: deque[int] = deque()
    ended = threading.Event()

    def run_tasks() -> None:
        # Threads take tasks by themselves: waking the main thread for every file would cost a good part of the copy.
        while queue and not ended.is_set() and not should_stop():
            try:
                index, task = queue.popleft()
            except IndexError:
                return
            task()
            done.append(index)

    pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="storage")
    workers = [pool.submit(run_tasks) for _ in range(min(threads, len(tasks)))]
    try:
        active = set(workers)
        while active:
            finished, active = concurrent.futures.wait(active, STOP_CHECK_SECONDS, concurrent.futures.FIRST_EXCEPTION)
            for worker in finished:
                worker.result()
            yield [done.popleft() for _ in range(len(done))]
            # This check is no sign of progress (`waiting`): the threads' own checks before each task are.
            with waiting():
                if active and should_stop():
                    break
        if active or queue:
            raise Interrupted("stopped")
    finally:
        ended.set()
        # The wait is short: a thread may hang in a file system or in a request that is not answered.
        pool.shutdown(wait=False, cancel_futures=True)
        concurrent.futures.wait(workers, 2 * STOP_CHECK_SECONDS)


def refuse_names(names: Sequence[str], source: str) -> None:
    """Raise DataError for file names that lead out of a folder, that a file system may not allow, or that it may confuse."""
    folded: dict[str, str] = {}
    for name in names:
        parts = name.split("/")
        if "" in parts:
            problem = "has slashes with nothing between them"
        elif any(part in (".", "..") for part in parts):
            problem = "leads out of the folder"
        elif not name.isprintable() or "\\" in name:
            problem = "has a character that a file name must not have"
        elif any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in parts):
            problem = f"is longer than a file name may be ({MAX_NAME_BYTES} bytes)"
        elif folded.setdefault(name.casefold(), name) != name:
            problem = f"differs from {folded[name.casefold()]!r} by case alone"
        else:
            continue
        raise DataError(f"{source}: the name {name[:80]!r} {problem}. Rename it there; nothing was copied.")


def file_name(name: str) -> str:
    """The file name for an object. In object storage a slash is an ordinary character: `a//b` and `/a/b` are keys, too."""
    return "/".join(part for part in name.split("/") if part)


def is_same_file(path: Path, entry: Entry) -> bool:
    """Whether `path` is a finished copy of `entry`: same size and modification time."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (status.st_size, status.st_mtime_ns) == (entry.size, entry.mtime_ns)


def require_space(folder: Path, needed_bytes: int, files: int) -> None:
    """Raise StorageError if the disk under `folder` has too few free bytes, or room for too few more files."""
    free = shutil.disk_usage(folder).free
    advice = "Free some space or name another folder with --work or --scratch."
    if free < needed_bytes:
        raise StorageError(
            f"storage: {folder} has {free / 2**30:.2f} GiB left, {needed_bytes / 2**30:.2f} GiB are needed. {advice}"
        )
    status = os.statvfs(folder)
    if status.f_files and status.f_favail < files:  # file systems that allocate inodes on demand report 0 of 0
        raise StorageError(f"storage: {folder} has room for {status.f_favail} more files (inodes), {files} are needed. {advice}")
