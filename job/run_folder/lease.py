"""A lease on a folder: one job at a time owns it, on one machine or on several that share a file system.

An owner creates `.lease-N.json`, where N is the newest number plus one. Only one process can create it, and the newest file
is the lease in force. There are two signs that its owner is alive. On the same machine: the owner locks the file, and the kernel
releases the lock when the process ends. Between machines such locks are unreliable (some file systems release them late, some
limit them to one machine, some have none). So the owner also increments a counter in the file, and a process that wants the
folder watches the counter by its own clock; the clocks of two machines are never compared. An owner that was suspended for too
long finds a newer file and exits at once, as the folder belongs to another process by then.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from emotion.errors import BusyError, Interrupted
from emotion.files import errors_name
from emotion.terminal import shown_as
from job.preemption import StopRequest
from job.run_folder.attempts import read_attempts

log = logging.getLogger(__name__)

BEAT_SECONDS = 5.0  # between increments of the counter
WATCH_SECONDS = 30.0  # without an increment the owner counts as dead
POLL_SECONDS = 0.2
RECORD_BYTES = 1024  # a record is padded to this, so that it can be overwritten by one write


@dataclass(frozen=True)
class Owner:
    """The content of a lease file. attempt: its N; beats: the counter; released: the owner has ended the lease."""

    attempt: int
    host: str
    pid: int
    boot_id: str
    beats: int = 0
    released: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (attempt {self.attempt})"


@contextlib.contextmanager
def leased(
    folder: Path,
    should_stop: StopRequest,
    wait: bool = False,
    beat_seconds: float = BEAT_SECONDS,
    watch_seconds: float = WATCH_SECONDS,
) -> Iterator[int]:
    """Own `folder` for the block. Yields the number of this attempt, from 1.
    wait: wait until the owner has released it, instead of raising BusyError with the owner's name. If another job takes over the
    folder during the block, the process exits at once, with the code of BusyError, or of Interrupted with `wait`. Raises
    Interrupted or Stopped when asked to stop before the folder is owned."""
    attempt, descriptor = _acquire(folder, should_stop, wait, beat_seconds, watch_seconds)
    mine = Owner(attempt, socket.gethostname(), os.getpid(), boot_id())
    ended = threading.Event()

    def beat() -> None:
        beats = 0
        while not ended.wait(beat_seconds):
            beats += 1
            # A folder that cannot be read or written for a moment costs one beat. The job itself reports a broken disk.
            with contextlib.suppress(OSError):
                newest = max(_attempts(folder), default=0)
                if newest > attempt:
                    log.error("attempt %d has taken over %s; this one exits at once", newest, folder)
                    os._exit(Interrupted.exit_code if wait else BusyError.exit_code)
                _write(descriptor, replace(mine, beats=beats))

    heart = threading.Thread(target=beat, name="lease", daemon=True)
    heart.start()
    try:
        with errors_name(_path(folder, attempt)):
            _write(descriptor, mine)
        yield attempt
    finally:
        ended.set()
        heart.join()
        with contextlib.suppress(OSError):
            _write(descriptor, replace(mine, released=True))
        os.close(descriptor)


def boot_id() -> str:
    """An identifier of this boot of this machine; empty if the kernel has none, which then equals no other."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _acquire(folder: Path, should_stop: StopRequest, wait: bool, beat_seconds: float, watch_seconds: float) -> tuple[int, int]:
    """(attempt, file descriptor) of a new lease. The descriptor holds the lock and must stay open."""
    boot = boot_id()
    attempt, before = 0, b""
    since = time.monotonic()
    logged = False
    while True:
        # The list may be out of date for a moment: no number is taken back, and only other content of the same file is a beat.
        newest = max(attempt, *_attempts(folder), _last_recorded(folder))
        content, locked = _read(folder, newest)
        owner = _parse(content)
        now = time.monotonic()
        if newest > attempt:
            attempt, before, since = newest, content, now
        elif content not in (b"", before):
            if before and not wait and not (owner and owner.released):
                raise BusyError(f"{folder}: {owner or 'another process'} is running this spec here. Wait for it or stop it.")
            before, since = content, now
        dead = owner is not None and not locked and bool(boot) and owner.boot_id == boot
        free = attempt == 0 or (owner is not None and owner.released)
        if free or dead or now - since >= watch_seconds:
            descriptor = _create(folder, attempt + 1)
            if descriptor is not None:
                return attempt + 1, descriptor
        if should_stop():
            raise should_stop.as_requested(Interrupted(f"stopped while waiting for {folder}"))
        if not logged:
            whose = owner or "an unknown process"
            log.info("waiting for %s, last owned by %s", folder, whose, extra=shown_as(f"waits for {folder}, owned by {whose}"))
            logged = True
        time.sleep(min(POLL_SECONDS, beat_seconds))


def _attempts(folder: Path) -> list[int]:
    # Not pathlib's glob, which treats a folder that cannot be read as empty.
    found = [re.fullmatch(r"\.lease-(\d+)\.json", name) for name in os.listdir(folder)]  # noqa: PTH208
    return [int(match[1]) for match in found if match]


def _last_recorded(folder: Path) -> int:
    """The number of the last attempt that a run has recorded, if its lease is found by name; else 0."""
    starts = [event["attempt"] for event in read_attempts(folder) if event.get("event") == "start"]
    return starts[-1] if starts and _path(folder, starts[-1]).exists() else 0


def _path(folder: Path, attempt: int) -> Path:
    return folder / f".lease-{attempt}.json"


def _read(folder: Path, attempt: int) -> tuple[bytes, bool]:
    """The content of a lease file, and whether it is locked or the file system has no locks."""
    try:
        descriptor = os.open(_path(folder, attempt), os.O_RDONLY)  # opened again each time, so that NFS asks the server
    except FileNotFoundError:
        return b"", True
    try:
        try:
            with errors_name(_path(folder, attempt)):
                content = os.read(descriptor, RECORD_BYTES)
        except PermissionError:
            # SMB refuses to read a locked file: its owner is alive. Unique content makes it look like a new beat.
            return str(time.monotonic()).encode(), True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return content, True
        return content, False
    finally:
        os.close(descriptor)


def _parse(content: bytes) -> Owner | None:
    try:
        return Owner(**json.loads(content))
    except (ValueError, TypeError, RecursionError):
        return None


def _create(folder: Path, attempt: int) -> int | None:
    """Create and lock the lease file of this attempt, still empty; None if another process was faster."""
    try:
        descriptor = os.open(_path(folder, attempt), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    # Locked before the owner is written, so that nobody takes the empty file for that of a dead process. Readers hold the lock
    # only for a moment.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    found = _attempts(folder)
    if max(found, default=0) > attempt:
        # Our listing was out of date: the file of this number was deleted since, and there is a newer one.
        os.close(descriptor)
        return None
    for older in found:
        if older < attempt:
            _path(folder, older).unlink(missing_ok=True)
    return descriptor


def _write(descriptor: int, owner: Owner) -> None:
    os.pwrite(descriptor, json.dumps(asdict(owner)).ljust(RECORD_BYTES).encode(), 0)
    os.fsync(descriptor)  # so that other machines see it
