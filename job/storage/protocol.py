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
STALE_SECONDS = 24 * 3600.0  # a temporary that has not changed for so long belongs to a writer that was killed
STOP_CHECK_SECONDS = 0.1  # the longest time between two checks whether to stop


class WrongBytesError(StorageError):
    """A file does not have the digest that it should have."""


class AbsentError(StorageError):
    """There is no such file."""


@dataclass(frozen=True)
class Entry:
    """A file of a storage. name: posix path relative to it. tag: version; it differs whenever the content differs."""

    name: str
    size: int
    tag: str
    mtime_ns: int


@dataclass(frozen=True)
class Fetched:
    """A file that was fetched. sha256: of its bytes, in hex. verified: what the bytes were verified against. sha256 (the expected
    one), store sha256 or store crc32 (the server's checksums), etag (an MD5), or size alone. encoding: how these bytes are
    compressed, where they still are."""

    sha256: str
    verified: str
    encoding: str = ""


class Storage(Protocol):
    """Files by name: a posix path relative to the location that was opened.
    Every method raises StorageError (AccessError where permission is denied), and Interrupted when asked to stop. What fails
    temporarily is retried inside, so that callers never retry. Methods are called from several threads at the same time. A writer
    that is killed at any moment leaves a file complete, as it was before, or absent, and written files are durable."""

    @property
    def url(self) -> str:
        """The location as text, for messages. Without credentials."""

    def problem(self) -> EmotionError | None:
        """Why the storage cannot be used; None if it can. Checked before hours of work; the text is only the reason."""

    def identity(self) -> str:
        """As whom the storage is used, for messages: a user, where an access key comes from. Without credentials."""

    def clock_ahead_seconds(self) -> float | None:
        """How far this machine's clock was ahead of the server's at its last answer; None without a server or an answer."""

    def create(self) -> None:
        """Create the folder of the location, with its parents. A bucket is not created."""

    def entries(self, folder: str = "") -> Iterator[Entry]:
        """All files below a folder, at any depth, sorted by name. None if there is no such folder. Temporaries may be listed."""

    def entry(self, name: str) -> Entry:
        """One file. Raises AbsentError."""

    def read(self, name: str) -> bytes | None:
        """The content of a small file, None if it is absent."""

    def digest(self, name: str) -> str:
        """Hex SHA-256 of the content, which is read for it. Raises AbsentError."""

    def get(self, name: str, target: Path, sha256: str | None = None, entry: Entry | None = None) -> Fetched:
        """Copy a file to `target`, whose folder exists: complete and verified, or not at all.
        sha256: the expected digest, if known. entry: the version that is meant, if known. A back end may keep what it fetched
        before a stop in a temporary beside `target`, and resume there. Raises WrongBytesError, AbsentError."""

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
        """Remove the temporaries and unfinished uploads of killed writers below a folder.
        own: no other writer is active there. Otherwise only what is older than STALE_SECONDS."""
