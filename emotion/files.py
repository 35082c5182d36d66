"""Write files atomically and durably, read and write JSON and CSV, compute SHA-256 digests."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Add the name of this file to an OSError of the block that names none. Errors of write() and fsync() name none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
            error.filename = str(path)
        raise


@contextmanager
def written_atomically(path: Path, writer: str = "") -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` only if the block ends without an error.

    Temporary file in the same folder → write → fsync → rename → fsync of the folder. If the process is killed, the next attempt
    overwrites the temporary file. writer: distinguishes writers that may write `path` at the same time.
    """
    temporary = path.with_name(f".{path.name}{writer}.part")
    try:
        with errors_name(path), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents; each is durable before the next is created in it.

    The name of the lowest existing folder is synced, too: a process that was killed may have created it without syncing it.
    Raises FileExistsError if the lowest existing path is a file.
    """
    missing, lowest = [], path
    while not lowest.exists():
        missing.append(lowest)
        lowest = lowest.parent
    lowest.mkdir(exist_ok=True)  # raises FileExistsError if it is a file
    _sync_name(lowest)
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def _sync_name(folder: Path) -> None:
    """Make the name of a folder durable.

    Skips folders that this program cannot have created: the root of a file system, or one in an unreadable folder.
    """
    parent = folder.absolute().parent
    if folder.stat().st_dev == parent.stat().st_dev:
        with suppress(PermissionError):
            sync(parent)


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with errors_name(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes, writer: str = "") -> None:
    with written_atomically(path, writer) as file:
        file.write(content)


def write_text(path: Path, text: str, writer: str = "") -> None:
    write_bytes(path, text.encode(), writer)


def write_json(path: Path, value: object, writer: str = "") -> None:
    """Write JSON with sorted keys, so that equal values give equal bytes. Raises ValueError for NaN and infinity."""
    write_bytes(path, json_bytes(value), writer)


def json_bytes(value: object) -> bytes:
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")  # surrogates, of environment variables that are not UTF-8


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write CSV. Floats are written in their shortest exact form, so that reading gives the same bits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises OSError, and ValueError if it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; empty if there is no file. Skips invalid lines, such as one cut off by a crash."""
    found = []
    with suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict):
                    found.append(record)
    return found


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Append one line. If a crash left the last line incomplete, end that line first."""
    with errors_name(path), path.open("a+b") as file:
        file.seek(max(0, file.tell() - 1))
        is_incomplete = file.read() not in (b"", b"\n")
        file.write((b"\n" if is_incomplete else b"") + json.dumps(record).encode() + b"\n")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: object) -> str:
    """Hex SHA-256 of a JSON value in canonical form. Raises ValueError for NaN and infinity."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
