"""A folder of a file system behind the storage protocol."""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from emotion.errors import AccessError, StorageError
from emotion.files import make_folder, sync, write_bytes, written_atomically
from job.storage.protocol import BLOCK, STALE_SECONDS, AbsentError, Entry, Fetched, WrongBytesError


class LocalFolder:
    """A folder of a file system as a place."""

    def __init__(self, path: Path, writer: str = "") -> None:
        self.path, self._writer = path, writer

    @property
    def url(self) -> str:
        return str(self.path)

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
