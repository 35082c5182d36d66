"""A folder of a file system behind the storage protocol."""

import contextlib
import errno
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from emotion.errors import AccessError, DataError, EmotionError, SpecError, StorageError, system_reason
from emotion.files import make_folder, sha256_of, sync, write_bytes, written_atomically
from job.storage.protocol import BLOCK_BYTES, STALE_SECONDS, AbsentError, Entry, Fetched, WrongBytesError

NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}  # errors of os.link on a file system without hard links


class LocalFolder:
    """A folder as a storage. Methods as in job.storage.protocol.Storage; writer: see open_storage."""

    def __init__(self, path: Path, writer: str = "") -> None:
        self.path, self._writer = path, writer

    @property
    def url(self) -> str:
        return str(self.path)

    def problem(self) -> EmotionError | None:
        # An absent folder is an error, not an empty folder: it may be a file system that is not mounted.
        try:
            os.listdir(self.path)  # noqa: PTH208  pathlib's way hides errors
        except OSError as error:
            return StorageError.of(error, system_reason(error))
        if not os.access(self.path, os.R_OK | os.W_OK | os.X_OK):
            return AccessError("Permission denied")
        return None

    def identity(self) -> str:
        return f"user {os.geteuid()}"

    def clock_ahead_seconds(self) -> float | None:
        return None

    def create(self) -> None:
        with _storage_errors(f"{self.path}: cannot make this folder"):
            make_folder(self.path)

    def entries(self, folder: str = "") -> Iterator[Entry]:
        found = []
        with _storage_errors(f"{self.path / folder}: cannot be listed"):
            for parent, folders, names in os.walk(self.path / folder, onerror=_ignore_absent_folder):
                folders.sort()
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        found.append(entry_of(Path(parent, name), self.path))
        yield from sorted(found, key=lambda entry: entry.name)

    def entry(self, name: str) -> Entry:
        with self._reading(name):
            return entry_of(self.path / name, self.path)

    def read(self, name: str) -> bytes | None:
        with contextlib.suppress(AbsentError), self._reading(name):
            return (self.path / name).read_bytes()
        return None

    def digest(self, name: str) -> str:
        with self._reading(name):
            return sha256_of(self.path / name)

    def get(self, name: str, target: Path, sha256: str | None = None, entry: Entry | None = None) -> Fetched:  # noqa: ARG002
        if not (self.path / name).exists():
            raise AbsentError(f"{self.path / name} is missing")
        return Fetched(copy_into(self.path / name, target, sha256), "sha256" if sha256 else "size")

    def write(self, name: str, content: bytes) -> None:
        with self._writing(name) as path:
            write_bytes(path, content, self._writer)

    def write_new(self, name: str, content: bytes) -> bool:
        if (self.path / name).exists():
            return False
        with self._writing(name) as path:
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
            try:
                with temporary.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                try:
                    os.link(temporary, path)
                except OSError as error:
                    if error.errno not in NO_HARD_LINKS:
                        raise
                    # Claim the name with an empty file and replace that. A kill in between leaves the empty file.
                    with path.open("xb"):
                        try:
                            temporary.replace(path)
                        except OSError:
                            path.unlink(missing_ok=True)
                            raise
                written = True
            except FileExistsError:
                # Over NFS, a successful link is also reported like this if the first answer was lost.
                written = temporary.samefile(path)
            finally:
                temporary.unlink(missing_ok=True)
            if written:
                sync(path.parent)
        return written

    def put(self, source: Path, name: str, sha256: str) -> None:
        with self._writing(name) as path:
            copy_into(source, path, sha256, self._writer)

    def remove(self, name: str) -> None:
        with _storage_errors(f"{self.path / name}: cannot be removed"):
            self._refuse_links(name)
            (self.path / name).unlink(missing_ok=True)

    def move(self, name: str, to: str) -> None:
        with _storage_errors(f"{self.path / name}: cannot be moved"):
            self._refuse_links(name)
            self._make_parents(to)
            with contextlib.suppress(FileNotFoundError):
                (self.path / name).replace(self.path / to)

    def clear(self, folder: str, own: bool) -> None:
        with _storage_errors(f"{self.path / folder}: cannot be cleared"):
            for path in (self.path / folder).rglob(".*.part"):
                with contextlib.suppress(FileNotFoundError):
                    if own or time.time() - path.stat().st_mtime > STALE_SECONDS:
                        path.unlink()

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        with _storage_errors(f"{self.path / name}: cannot be read"):
            try:
                yield
            except (FileNotFoundError, NotADirectoryError):
                raise AbsentError(f"{self.path / name} is missing") from None

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        with _storage_errors(f"{self.path / name}: cannot be written"):
            self._make_parents(name)
            yield self.path / name

    def _refuse_links(self, name: str) -> None:
        """Raise AccessError if a folder in the path of a file is a link that leads out of this storage."""
        for folder in Path(name).parents[:-1]:
            refuse_link_out(self.path / folder, self.path)

    def _make_parents(self, name: str) -> None:
        """Create the parent folders of a file below this folder, which must exist, and make their names durable."""
        self._refuse_links(name)
        for folder in reversed(Path(name).parents[:-1]):
            (self.path / folder).mkdir(exist_ok=True)
            sync((self.path / folder).parent)


@contextlib.contextmanager
def _storage_errors(text: str) -> Iterator[None]:
    """Raise StorageError for an OSError. text: the beginning of its message."""
    try:
        yield
    except OSError as error:
        raise StorageError.of(error, f"{text}: {system_reason(error)}") from error


def refuse_link_out(path: Path, root: Path) -> None:
    """Raise AccessError for a link that leads out of the folder `root`: files written through it would be outside of `root`."""
    if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
        raise AccessError(f"{path} is a link to {path.resolve()}, outside of {root}: it is not followed. Remove the link.")


def require_possible_folder(path: Path, key: str) -> None:
    """Raise SpecError if this path or a parent is a file, StorageError if it is a dangling link, as for a disk that is not
    mounted. key: key of the spec or option of the command line."""
    lowest = path
    while not lowest.exists() and not lowest.is_symlink():
        lowest = lowest.parent
    if not lowest.exists():
        raise StorageError(f"{key}: {lowest} is a link to {lowest.readlink()}, and there is nothing. Make or mount it.")
    if not lowest.is_dir():
        raise SpecError(f"{key}: expected a folder, but {lowest} is a file. Name a folder.")


def refuse_folder(path: Path, key: str) -> None:
    """Raise DataError if the path of a file is a folder. key: key of the spec that names the file."""
    if path.is_dir():
        raise DataError(f"{key}: {path} is a folder, expected a file. Name the file.")


def _ignore_absent_folder(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def entry_of(path: Path, root: Path) -> Entry:
    """The entry of a file below a folder. Its tag is its modification time. Raises OSError."""
    status = path.stat()
    return Entry(path.relative_to(root).as_posix(), status.st_size, str(status.st_mtime_ns), status.st_mtime_ns)


def copy_into(source: Path, target: Path, sha256: str | None = None, writer: str = "") -> str:
    """Copy content and modification time into an existing folder, atomically. Returns the content's hex SHA-256.
    sha256: the expected digest. writer: see written_atomically. Raises WrongBytesError, StorageError."""
    digest = hashlib.sha256()
    try:
        with source.open("rb") as reader, written_atomically(target, writer) as copy:
            status = os.fstat(reader.fileno())
            while block := reader.read(BLOCK_BYTES):
                digest.update(block)
                copy.write(block)
            if sha256 is not None and digest.hexdigest() != sha256:
                raise WrongBytesError(f"{source} is damaged: its SHA-256 is {digest.hexdigest()}, expected {sha256}")
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    except OSError as error:
        raise StorageError.of(error, f"storage: cannot copy {source} to {target}: {system_reason(error)}.") from error
    return digest.hexdigest()
