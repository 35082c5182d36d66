"""Bytes in and out: places that hold files, and copies that are whole or absent.

A place is a folder or, for s3://BUCKET/PREFIX, a prefix of a bucket (job/storage/s3.py). What the spec names is reached through
`place_of` alone, so that nothing else has to know which of the two it is.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from emotion.config import StorageConfig
from emotion.errors import AccessError, DataError, Interrupted, StorageError
from emotion.files import make_folder, sync, write_bytes, written_atomically
from job.spec.location import S3

BLOCK = 1 << 20
STALE_SECONDS = 24 * 3600.0
"""Nobody writes so long to a temporary without a sign."""
ASKED_SECONDS = 0.1
"""From one look at whether to stop to the next."""
LONGEST_NAME_BYTES = 255
"""Of one part of a path, on every file system of Linux."""


class WrongBytesError(StorageError):
    """What was read is not what its digest says."""


class AbsentError(StorageError):
    """There is no such file."""


@dataclass(frozen=True)
class Entry:
    """A file of a place. name: posix path relative to the place. tag: another one whenever the content is another."""

    name: str
    size: int
    tag: str
    mtime_ns: int


@dataclass(frozen=True)
class Fetched:
    """verified: by what the bytes are known to be right: sha256 (asked for), store sha256, store crc32, etag (MD5), size."""

    sha256: str
    verified: str


class Place(Protocol):
    """Files by name, a posix path relative to the place. Everything raises StorageError, and Interrupted if asked to stop."""

    @property
    def url(self) -> str: ...

    def below(self, name: str) -> "Place":
        """The place that a folder in it is."""

    def problem(self) -> StorageError | None:
        """Why it cannot be used, if it cannot. The text is the reason alone."""

    def create(self) -> None:
        """Make the folder; a bucket has to be there."""

    def entries(self, folder: str = "") -> Iterator[Entry]:
        """Every file below, by name; none where there is no such folder."""

    def entry(self, name: str) -> Entry:
        """Raises AbsentError where there is no such file."""

    def read(self, name: str) -> bytes | None:
        """The content of a small file, None where there is none."""

    def digest(self, name: str) -> str:
        """Hex SHA-256 of a file's content, read for it. Raises AbsentError."""

    def get(self, name: str, target: Path, sha256: str | None = None, entry: Entry | None = None) -> Fetched:
        """Copy a file into a folder that is there: whole, or not at all.

        entry: what it has to be still. Raises WrongBytesError where it has another digest than this, AbsentError.
        """

    def write(self, name: str, content: bytes) -> None:
        """A small file, whole or as it was before."""

    def write_new(self, name: str, content: bytes) -> bool:
        """The same, unless there is one already. Whether it was written."""

    def put(self, source: Path, name: str, sha256: str) -> None:
        """Copy a file to the place. Raises WrongBytesError where it has another digest than this."""

    def remove(self, name: str) -> None:
        """A file that may be there."""

    def move(self, name: str, to: str) -> None:
        """Rename a file that may be there."""

    def clear(self, folder: str, own: bool) -> None:
        """Remove what killed writers have left half-written; of others (not `own`) only what is old: they may be at it."""


def place_of(url: str, config: StorageConfig, should_stop: Callable[[], bool], writer: str = "") -> Place:
    """A location of the spec as a place. writer: tells those apart who may write one file of a folder at one time.

    should_stop is asked while a store keeps us waiting.
    """
    if url.startswith(S3):
        from job.storage.s3 import Bucket  # boto3 takes half a second

        return Bucket(url, config, should_stop)
    return Folder(Path(url), writer)


class Folder:
    """A folder of a file system as a place."""

    def __init__(self, path: Path, writer: str = "") -> None:
        self.path, self._writer = path, writer

    @property
    def url(self) -> str:
        return str(self.path)

    def below(self, name: str) -> "Folder":
        return Folder(self.path / name, self._writer)

    def problem(self) -> StorageError | None:
        # A folder that is not there is no empty one: where it should be mounted, nothing would be found.
        try:
            os.listdir(self.path)  # noqa: PTH208  pathlib's way hides errors
        except OSError as error:
            return StorageError.of(error, error.strerror)
        if not os.access(self.path, os.R_OK | os.W_OK | os.X_OK):
            return AccessError("Permission denied")
        return None

    def create(self) -> None:
        with _told(f"{self.path}: cannot make this folder"):
            make_folder(self.path)

    def entries(self, folder: str = "") -> Iterator[Entry]:
        found = []
        with _told(f"{self.path / folder}: cannot be listed"):
            for where, folders, names in os.walk(self.path / folder, onerror=_raise_unless_absent):
                folders.sort()
                for name in names:
                    path = Path(where, name)
                    with contextlib.suppress(FileNotFoundError):
                        facts = path.stat()
                        tag = str(facts.st_mtime_ns)
                        found.append(
                            Entry(path.relative_to(self.path).as_posix(), facts.st_size, tag, facts.st_mtime_ns)
                        )
        yield from sorted(found, key=lambda entry: entry.name)

    def entry(self, name: str) -> Entry:
        with _told(f"{self.path / name}: cannot be read"):
            try:
                facts = (self.path / name).stat()
            except (FileNotFoundError, NotADirectoryError):
                raise AbsentError(f"{self.path / name} is missing") from None
        return Entry(name, facts.st_size, str(facts.st_mtime_ns), facts.st_mtime_ns)

    def read(self, name: str) -> bytes | None:
        with _told(f"{self.path / name}: cannot be read"):
            try:
                return (self.path / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def digest(self, name: str) -> str:
        with _told(f"{self.path / name}: cannot be read"):
            try:
                with (self.path / name).open("rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest()
            except (FileNotFoundError, NotADirectoryError):
                raise AbsentError(f"{self.path / name} is missing") from None

    def get(self, name: str, target: Path, sha256: str | None = None, entry: Entry | None = None) -> Fetched:  # noqa: ARG002
        if not (self.path / name).exists():
            raise AbsentError(f"{self.path / name} is missing")
        return Fetched(copy_into(self.path / name, target, sha256), "sha256" if sha256 else "size")

    def write(self, name: str, content: bytes) -> None:
        with _told(f"{self.path / name}: cannot be written"):
            self._make((self.path / name).parent)
            write_bytes(self.path / name, content, self._writer)

    def write_new(self, name: str, content: bytes) -> bool:
        if (self.path / name).exists():
            return False
        self.write(name, content)
        return True

    def put(self, source: Path, name: str, sha256: str) -> None:
        with _told(f"{self.path / name}: cannot be written"):
            self._make((self.path / name).parent)
        copy_into(source, self.path / name, sha256, self._writer)

    def remove(self, name: str) -> None:
        with _told(f"{self.path / name}: cannot be removed"), contextlib.suppress(FileNotFoundError):
            (self.path / name).unlink()

    def move(self, name: str, to: str) -> None:
        with _told(f"{self.path / name}: cannot be moved"):
            self._make((self.path / to).parent)
            with contextlib.suppress(FileNotFoundError):
                (self.path / name).replace(self.path / to)

    def clear(self, folder: str, own: bool) -> None:
        with _told(f"{self.path / folder}: cannot be cleared"):
            for path in (self.path / folder).rglob(".*.part"):
                with contextlib.suppress(FileNotFoundError):
                    if own or time.time() - path.stat().st_mtime > STALE_SECONDS:
                        path.unlink()

    def _make(self, folder: Path) -> None:
        """Make a folder below the place, which has to be there, and the names of it and of all between them durable."""
        for parent in [*reversed(folder.relative_to(self.path).parents), folder.relative_to(self.path)]:
            if parent != Path():
                (self.path / parent).mkdir(exist_ok=True)
                sync((self.path / parent).parent)


@contextlib.contextmanager
def _told(text: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError.of(error, f"{text}: {error.strerror}") from error


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def copy_into(source: Path, target: Path, sha256: str | None = None, writer: str = "") -> str:
    """Copy content and modification time into a folder that is there, and return the content's SHA-256.

    Raises StorageError; WrongBytesError where the content has another digest than this. writer: see written_atomically.
    """
    digest = hashlib.sha256()
    try:
        with source.open("rb") as reader, written_atomically(target, writer) as copy:
            facts = os.fstat(reader.fileno())
            while block := reader.read(BLOCK):
                digest.update(block)
                copy.write(block)
            if sha256 is not None and digest.hexdigest() != sha256:
                raise WrongBytesError(f"{source} is damaged: its SHA-256 is {digest.hexdigest()}, expected {sha256}")
        os.utime(target, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    except OSError as error:
        raise StorageError.of(error, f"storage: cannot copy {source} to {target}: {error.strerror}.") from error
    return digest.hexdigest()


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
