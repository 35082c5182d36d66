"""Bytes in and out: copies that are whole or absent."""

import hashlib
import os
import shutil
from pathlib import Path

from emotion.errors import StorageError
from emotion.files import written_atomically

BLOCK = 1 << 20


class WrongBytesError(StorageError):
    """What was read is not what its digest says."""


def copy_file(source: Path, target: Path) -> None:
    """Copy content and modification time, making the target's folder. Raises StorageError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_copy(source, target, error) from error
    copy_into(source, target)


def copy_into(source: Path, target: Path, sha256: str | None = None, writer: str = "") -> None:
    """Copy content and modification time into a folder that is there.

    Raises StorageError; WrongBytesError where the content has another digest than this. writer: see written_atomically.
    """
    digest = hashlib.sha256()
    try:
        with source.open("rb") as reader, written_atomically(target, writer) as copy:
            facts = os.fstat(reader.fileno())
            while block := reader.read(BLOCK):
                if sha256 is not None:
                    digest.update(block)
                copy.write(block)
            if sha256 is not None and digest.hexdigest() != sha256:
                raise WrongBytesError(f"{source} is damaged: its SHA-256 is {digest.hexdigest()}, expected {sha256}")
        os.utime(target, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    except OSError as error:
        raise _cannot_copy(source, target, error) from error


def _cannot_copy(source: Path, target: Path, error: OSError) -> StorageError:
    return StorageError.of(error, f"storage: cannot copy {source} to {target}: {error.strerror}.")


def is_same_file(source: Path, target: Path) -> bool:
    """Whether `target` is a finished copy of `source`: same size and modification time."""
    if not target.exists():
        return False
    a, b = source.stat(), target.stat()
    return (a.st_size, a.st_mtime_ns) == (b.st_size, b.st_mtime_ns)


def require_space(folder: Path, needed: int) -> None:
    """Raise StorageError if the disk under `folder` has fewer than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"storage: {folder} has {free / 2**30:.2f} GiB left, {needed / 2**30:.2f} GiB are needed. Free some space or name "
            f"another folder with --work or --scratch."
        )
