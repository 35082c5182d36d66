"""Who owns a folder: one job at a time, on one machine or on several that share a file system.

An owner has a file `.lease-N.json`, N being one more than the newest there was. Only one can create it, and who has the newest
owns the folder. Whether its owner still lives is told in two ways. On one machine the kernel knows: the owner locks its file,
and the lock dies with it. Between machines such locks are not to be trusted (some file systems release them late, some keep
them to one machine, some have none), so the owner also counts up a number in the file, and who wants the folder watches it
by his own clock; the clocks of two machines are never compared. An owner that slept through this finds a newer file and leaves
at once: whatever else it did, it would do in somebody else's folder.
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
from job.preemption import StopRequest

log = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
WATCH_SECONDS = 30.0
POLL_SECONDS = 0.2
RECORD_BYTES = 1024
"""A record is written in place and in one piece, padded to this."""


@dataclass(frozen=True)
class Holder:
    """What a lease file says. `attempt` is its N; `beats` moves while the owner lives; `released` when it has left."""

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
    """Own `folder` for the block, which is given the number of this attempt, counted from 1.

    wait: for whoever owns it, instead of raising BusyError that names him. Where another job has taken the folder over meanwhile,
    the process ends at once, with the exit code of BusyError, or of Interrupted with `wait`. Raises what `should_stop` says when
    it is asked to stop before the folder is ours.
    """
    attempt, descriptor = _claimed(folder, should_stop, wait, beat_seconds, watch_seconds)
    mine = Holder(attempt, socket.gethostname(), os.getpid(), boot_id())
    left = threading.Event()

    def beat() -> None:
        beats = 0
        while not left.wait(beat_seconds):
            beats += 1
            # A folder that cannot be read or written for a moment is a beat missed; a broken disk has told the job itself by now.
            with contextlib.suppress(OSError):
                newest = max(_attempts(folder), default=0)
                if newest > attempt:
                    log.error("attempt %d has taken %s over from this one, which leaves at once", newest, folder)
                    os._exit(Interrupted.exit_code if wait else BusyError.exit_code)
                _write(descriptor, replace(mine, beats=beats))

    heart = threading.Thread(target=beat, name="lease", daemon=True)
    heart.start()
    try:
        _write(descriptor, mine)
        yield attempt
    finally:
        left.set()
        heart.join()
        with contextlib.suppress(OSError):
            _write(descriptor, replace(mine, released=True))
        os.close(descriptor)


def boot_id() -> str:
    """Tells one start of one machine from every other; empty where the kernel does not say, which is no machine's."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _claimed(
    folder: Path, should_stop: StopRequest, wait: bool, beat_seconds: float, watch_seconds: float
) -> tuple[int, int]:
    """(attempt, file descriptor) of a lease that is ours. The descriptor carries the lock and must stay open."""
    here = boot_id()
    seen: tuple[int, bytes] | None = None
    since = time.monotonic()
    told = False
    while True:
        attempt = max(_attempts(folder), default=0)
        content, locked = _look(folder, attempt)
        holder = _parsed(content)
        now = time.monotonic()
        if seen != (attempt, content):
            if seen is not None and not wait and content and not (holder and holder.released):
                raise BusyError(
                    f"{folder}: {holder or 'another process'} is running this spec here. Wait for it or stop it."
                )
            seen, since = (attempt, content), now
        dead = holder is not None and not locked and bool(here) and holder.boot_id == here
        left = attempt == 0 or (holder is not None and holder.released)
        if left or dead or now - since >= watch_seconds:
            descriptor = _created(folder, attempt + 1)
            if descriptor is not None:
                return attempt + 1, descriptor
        if should_stop():
            raise should_stop.leaving(Interrupted(f"stopped while waiting for {folder}"))
        if not told:
            log.info("waiting for %s, last owned by %s", folder, holder or "an unknown process")
            told = True
        time.sleep(min(POLL_SECONDS, beat_seconds))


def _attempts(folder: Path) -> list[int]:
    # Listed by the system itself: pathlib's glob takes a folder that cannot be read for an empty one.
    found = [re.fullmatch(r"\.lease-(\d+)\.json", name) for name in os.listdir(folder)]  # noqa: PTH208
    return [int(match[1]) for match in found if match]


def _path(folder: Path, attempt: int) -> Path:
    return folder / f".lease-{attempt}.json"


def _look(folder: Path, attempt: int) -> tuple[bytes, bool]:
    """What a lease file says, and whether somebody has it locked or there are no locks."""
    try:
        # Opened anew each time: what makes NFS ask the server again.
        descriptor = os.open(_path(folder, attempt), os.O_RDONLY)
    except FileNotFoundError:
        return b"", True
    try:
        try:
            content = os.read(descriptor, RECORD_BYTES)
        except PermissionError:
            # Locks of SMB keep readers out, too: somebody lives, which is told as a file that is different each time.
            return str(time.monotonic()).encode(), True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return content, True
        return content, False
    finally:
        os.close(descriptor)


def _parsed(content: bytes) -> Holder | None:
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        return None


def _created(folder: Path, attempt: int) -> int | None:
    """The locked, still empty lease file of this attempt; None where somebody else was first."""
    try:
        descriptor = os.open(_path(folder, attempt), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    # Locked before it says whose it is: an empty file is nobody's, and nobody takes it for that of a dead process. Who looks at
    # it holds the lock for a moment only.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    found = _attempts(folder)
    if max(found, default=0) != attempt:
        # We had looked at what is long past: its file was pruned meanwhile, and a newer one is there.
        os.close(descriptor)
        return None
    for older in found:
        if older < attempt:
            _path(folder, older).unlink(missing_ok=True)
    return descriptor


def _write(descriptor: int, holder: Holder) -> None:
    os.pwrite(descriptor, json.dumps(asdict(holder)).ljust(RECORD_BYTES).encode(), 0)
    # To the server, where another machine can see it.
    os.fsync(descriptor)
