"""The protocol that every storage back end implements. `job.storage.open.open_storage` picks the one for a location.

A new back end is a class with these methods, a location type in job/spec/location.py and a line in open.py;
tests/job/test_storage_protocol.py runs the same tests on each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from emotion.errors import EmotionError, StorageError

BLOCK_BYTES = 1 << 20  # size of one read or write
STALE_SECONDS = 24 * 3600.0  # a temporary file that has not changed for this long belongs to a killed writer
STOP_CHECK_SECONDS = 0.1  # the longest time between two checks whether to stop


class WrongBytesError(StorageError):
    """A file does not have the digest that it should have."""


class AbsentError(StorageError):
    """There is no such file."""


@dataclass(frozen=True)
class Entry:
    """A file in a storage. name: posix path relative to the storage. tag: version; it differs whenever the content differs."""

    name: str
    size: int
    tag: str
    mtime_ns: int


@dataclass(frozen=True)
class Fetched:
    """A fetched file. sha256: hex digest of its bytes. verified: what the bytes were verified against: sha256 (the expected
    digest), store sha256 or store crc32 (the server's checksums), etag (an MD5), or size alone. encoding: compression of these
    bytes; empty if they are not compressed."""

    sha256: str
    verified: str
    encoding: str = ""


class Storage(Protocol):
    """Files by name: a posix path relative to the location that was opened.
    Every method raises StorageError (AccessError if permission is denied), and Interrupted when asked to stop. Methods retry
    temporary errors, so callers never retry. Methods are called from several threads at the same time. If a writer is killed, at
    any moment, the file is complete, unchanged or absent. Written files are durable."""

    @property
    def url(self) -> str:
        """The location as text, for messages. Without credentials."""

    def problem(self) -> EmotionError | None:
        """The error that prevents use of the storage, checked before hours of work; None if it can be used. Its text is only the
        reason."""

    def identity(self) -> str:
        """The identity that uses the storage, for messages: a user, or the source of an access key. Without credentials."""

    def clock_ahead_seconds(self) -> float | None:
        """Seconds by which this machine's clock was ahead of the server's at its last answer; None without a server or answer."""

    def create(self) -> None:
        """Create the folder of the location, with its parents. A bucket is not created."""

    def entries(self, folder: str = "") -> Iterator[Entry]:
        """All files below a folder, at any depth, sorted by name; no files if there is no such folder. Temporary files may be
        listed."""

    def entry(self, name: str) -> Entry:
        """One file. Raises AbsentError."""

    def read(self, name: str) -> bytes | None:
        """The content of a small file, None if it is absent."""

    def digest(self, name: str) -> str:
        """Hex SHA-256 of the content, computed by reading it. Raises AbsentError."""

    def get(self, name: str, target: Path, sha256: str | None = None, entry: Entry | None = None) -> Fetched:
        """Copy a file to `target`, whose folder exists: complete and verified, or not at all.
        sha256: the expected digest, if known. entry: the expected version, if known. If stopped, a back end may keep the part
        that it has fetched in a temporary file next to `target` and resume from it. Raises WrongBytesError, AbsentError."""

    def write(self, name: str, content: bytes) -> None:
        """Write or replace a small file. Folders are created as needed, below an existing location."""

    def write_new(self, name: str, content: bytes) -> bool:
        """Write a small file unless it exists. True for exactly one of several simultaneous writers: the winner."""

    def put(self, source: Path, name: str, sha256: str) -> None:
        """Copy a local file to the storage. sha256: its digest; WrongBytesError is raised, and nothing written, if it differs."""

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""

    def move(self, name: str, to: str) -> None:
        """Rename a file if it exists, replacing `to`."""

    def clear(self, folder: str, own: bool) -> None:
        """Remove temporary files and unfinished uploads of killed writers below a folder.
        own: whether no other writer is active there; otherwise only those older than STALE_SECONDS are removed."""
