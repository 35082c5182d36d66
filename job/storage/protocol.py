"""Bytes in and out: places that hold files, and copies that are whole or absent.

A place is a folder or, for s3://BUCKET/PREFIX, a prefix of a bucket (job/storage/s3.py). What the spec names is reached through
`open_storage` alone, so that nothing else has to know which of the two it is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from emotion.errors import StorageError

BLOCK = 1 << 20
STALE_SECONDS = 24 * 3600.0
"""Nobody writes so long to a temporary without a sign."""
ASKED_SECONDS = 0.1
"""From one look at whether to stop to the next."""


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


class Storage(Protocol):
    """Files by name, a posix path relative to the place. Everything raises StorageError, and Interrupted if asked to stop."""

    @property
    def url(self) -> str: ...

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
