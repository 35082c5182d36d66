"""A second copy of a run's state, so that another machine can go on: `checkpoint.mirror`.

    MIRROR/NAME-KEY12/PHASE-KEY12/    the receipt of a finished phase; checkpoints of an unfinished one; metrics
    MIRROR/NAME-KEY12/                attempts and log, of all machines
    MIRROR/phases/PHASE-KEY12-DIGEST12/    files of a finished phase, by the digest of all of them: many runs share them

A phase is finished there when its receipt is there, a checkpoint exists when its JSON does; both are written last, and what is
brought back is held against the digests in them. What a phase leaves that lies elsewhere anyway (the dataset at its source, the
published run at its destination) has its receipt there and nothing else.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from emotion.errors import Interrupted, ModelError, StorageError
from emotion.files import make_folder, sync, write_bytes, write_json
from emotion.saved import data_path, read_record, record_path, remove, remove_unrecorded, set_aside, steps_in, verified
from job.attempts import ATTEMPTS
from job.preemption import StopRequest
from job.provenance import CONDITIONS
from job.receipts import LOG, METRICS, NAME, Receipt, is_as_recorded, parsed
from job.storage import WrongBytesError, copy_into

log = logging.getLogger(__name__)

Unreachable = Literal["fail", "wait", "anew"]
"""What to do where the mirror cannot be used at the start: end with 69, wait for it, or go on with what is here."""

POLL_SECONDS = 2.0
LONGEST_WAIT_SECONDS = 60.0
"""Between tries of a mirror that fails."""
TOLD = (METRICS, CONDITIONS)
"""What goes with a checkpoint or receipt: how its phase came so far."""
FEWEST_KEPT = 2
"""Checkpoints of a phase: should the newest be damaged, the one before is used."""
STALE_SECONDS = 24 * 3600.0
"""Nobody writes so long to a temporary without a sign."""


class Mirror:
    """Within `with Mirror(…) as mirror:` a thread copies what a run leaves, checkpoints first, and catches up after failures.

    The run tells it what is finished (`keep`) and what is being worked on (`follow`), and asks it for what is not here. A mirror
    that fails costs a warning, not the run. The end of the block waits for the last copy; once the job is asked to stop, for
    `grace_seconds` at most.
    """

    def __init__(
        self, root: Path, run_folder: Path, keep: int, should_stop: StopRequest, grace_seconds: float = 60.0
    ) -> None:
        self.root, self.run_folder = root, run_folder
        self.kept = max(keep, FEWEST_KEPT)
        self.should_stop, self.grace_seconds = should_stop, grace_seconds
        self.failure: str | None = None
        self.reached = False
        self._raw: dict[Path, bytes] = {}
        self._finished: dict[Path, tuple[Receipt, bool]] = {}
        self._followed: Path | None = None
        self._lock = threading.Lock()
        self._left = threading.Event()
        # Many jobs may put the same files there at one time.
        self._writer = f".{socket.gethostname()}-{os.getpid()}"
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    @property
    def there(self) -> Path:
        """The run's folder in the mirror."""
        return self.root / self.run_folder.name

    # Before a run begins

    def reach(self, unreachable: Unreachable) -> None:
        """Look whether the mirror can be used. Raises StorageError, or Interrupted when asked to stop while waiting for it."""
        told = False
        while (problem := self._problem(os.R_OK | os.W_OK | os.X_OK)) is not None:
            text = (
                f"checkpoint.mirror: {self.root} cannot be used ({problem.strerror}), so it is not known what it holds"
            )
            if unreachable == "fail":
                raise StorageError.of(
                    problem,
                    f"{text}. Make or mount this folder; or --mirror-unreachable wait, or anew with what is here.",
                )
            if unreachable == "anew":
                log.warning("%s: going on with what is here", text)
                return
            if not told:
                log.warning("%s: waiting for it", text)
                told = True
            if self.should_stop() or self._left.wait(POLL_SECONDS):
                raise self.should_stop.leaving(Interrupted(f"stopped while waiting for the mirror {self.root}"))
        self.reached = True

    def look(self) -> None:
        """Where nothing is to be copied: read it if it can be read."""
        self.reached = self._problem(os.R_OK | os.X_OK) is None

    def _problem(self, access: int) -> OSError | None:
        # A folder that is not there is no empty mirror: where it should be mounted, nothing would be found.
        try:
            os.listdir(self.root)  # noqa: PTH208  pathlib's way hides errors
        except OSError as error:
            return error
        if not os.access(self.root, access):
            return PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return None

    def _require(self) -> None:
        """What is not found is not there only if the mirror itself is. Raises StorageError."""
        problem = self._problem(os.R_OK | os.X_OK)
        if problem is not None:
            raise StorageError.of(problem, f"mirror: {self.root} cannot be read any more: {problem.strerror}")

    def bring_history(self) -> None:
        """Attempts and log of other machines. Raises StorageError."""
        if not self.reached:
            return
        for name in (ATTEMPTS, LOG):
            here = self.run_folder / name
            before = _content(here)
            together = _merged(_content(self.there / name), before)
            if together != before:
                # In place, as the log is open for appending already.
                here.write_bytes(together)

    # From the mirror

    def receipt(self, folder: Path, key: str) -> Receipt | None:
        """The receipt of the phase of this folder and key, if the mirror has it. Its files are not looked at."""
        if not self.reached:
            return None
        path = self._there(folder) / NAME
        try:
            raw = path.read_bytes()
            receipt = parsed(folder, json.loads(raw))
        except FileNotFoundError:
            self._require()
            return None
        except (ValueError, KeyError, TypeError):
            log.warning("mirror: %s is damaged: the phase counts as unfinished there", path)
            return None
        if receipt.key != key:
            return None
        self._raw[folder] = raw
        return receipt

    def has_begun(self, folder: Path) -> bool:
        """Whether there are checkpoints of this phase."""
        return self.reached and bool(steps_in(self._there(folder) / "checkpoints"))

    def bring_receipt(self, receipt: Receipt) -> None:
        """The receipt alone, for who reads no files of the phase."""
        make_folder(receipt.folder)
        write_bytes(receipt.folder / NAME, self._raw[receipt.folder])

    def bring(self, receipt: Receipt) -> bool:
        """Fetch the files of a finished phase into its folder, the receipt last. False where they are not what it says.

        Then the damaged file and the receipt leave the mirror. Raises StorageError, Interrupted.
        """
        folder, files = receipt.folder, self._files(receipt)
        make_folder(folder)
        for name, facts in receipt.outputs.items():
            if self.should_stop():
                raise Interrupted(f"stopped while fetching {folder.name} from the mirror")
            _make(folder, (folder / name).parent)
            if is_as_recorded(folder / name, facts, verify=True):
                continue
            try:
                if not (files / name).exists():
                    self._require()
                    raise WrongBytesError(f"{files / name} is missing")
                copy_into(files / name, folder / name, facts["sha256"])
            except WrongBytesError as error:
                log.warning("mirror: %s: %s is made again", error, folder.name)
                (self._there(folder) / NAME).unlink(missing_ok=True)
                (files / name).unlink(missing_ok=True)
                return False
            os.utime(folder / name, ns=(facts["mtime_ns"], facts["mtime_ns"]))
        if (self._there(folder) / METRICS).exists():
            copy_into(self._there(folder) / METRICS, folder / METRICS)
        write_bytes(folder / NAME, self._raw[folder])
        log.info("mirror: fetched %s", folder)
        return True

    def bring_checkpoint(self, folder: Path) -> None:
        """Fetch the newest checkpoint of an unfinished phase that verifies, unless as good a one is here.

        A damaged one is named in the log and the one before is used. Raises ModelError if there are some, none is good and
        none is here: starting anew by itself could throw days away. Raises StorageError.
        """
        if not self.reached:
            return
        here, there = folder / "checkpoints", self._there(folder) / "checkpoints"
        found = steps_in(there)
        if not found:
            self._require()
        good = [step for step in steps_in(here) if verified(here, step)]
        for step in reversed(found):
            if good and good[-1] >= step:
                return
            make_folder(here)
            record = read_record(there, step)
            try:
                if record is None or not data_path(there, step).exists():
                    self._require()
                    raise WrongBytesError(f"{data_path(there, step)} is missing, or what tells of it is damaged")
                copy_into(data_path(there, step), data_path(here, step), record["sha256"])
            except WrongBytesError as error:
                log.warning("mirror: %s: moved to %s, the one before is used", error, set_aside(there, step))
                continue
            for name in TOLD:
                if (there.parent / name).exists():
                    copy_into(there.parent / name, folder / name)
            copy_into(record_path(there, step), record_path(here, step))
            log.info("mirror: fetched checkpoint step=%d of %s", step, folder.name)
            return
        if found and not good:
            raise ModelError(
                f"mirror: none of the {len(found)} checkpoints in {there} can be used. Run again to begin this phase anew."
            )

    # To the mirror

    def keep(self, receipt: Receipt, files: bool) -> None:
        """Copy a finished phase when there is time: with its files, or its receipt alone."""
        with self._lock:
            self._finished[receipt.folder] = receipt, files
            if self._followed == receipt.folder:
                self._followed = None

    def follow(self, folder: Path) -> None:
        """Copy the checkpoints of this phase, the newest when there is time, from now on."""
        with self._lock:
            self._followed = folder

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        began = time.monotonic()
        self._left.set()
        while self._thread.is_alive():
            self._thread.join(0.1)
            if self.should_stop() and time.monotonic() - began > self.grace_seconds:
                self.failure = f"{self.root} does not answer"
                break
        if self.failure is not None:
            log.warning("mirror: %s; another machine would not know of the newest state", self.failure)

    def _run(self) -> None:
        wait = POLL_SECONDS
        while not self._left.wait(wait):
            self.catch_up()
            wait = POLL_SECONDS if self.failure is None else min(2 * wait, LONGEST_WAIT_SECONDS)
        self.catch_up()

    def catch_up(self) -> None:
        """Copy what is not there yet. What fails is told of once and tried again the next time."""
        with self._lock:
            finished = list(self._finished.values())
        failures: list[str] = []
        with _noted(failures):
            problem = self._problem(os.R_OK | os.W_OK | os.X_OK)
            if problem is not None:
                raise StorageError(f"{self.root} cannot be used ({problem.strerror})")
        moved = False
        if not failures:
            with _noted(failures):
                moved = self._put_checkpoint()
            for receipt, files in finished:
                with _noted(failures):
                    moved = self._put_phase(receipt, files) or moved
                    with self._lock:
                        self._finished.pop(receipt.folder, None)
            if moved or self._left.is_set():
                with _noted(failures):
                    self._put_history()
        before, self.failure = self.failure, failures[0] if failures else None
        if self.failure is not None and before is None:
            log.warning("mirror: %s; the job goes on, and what is missing there follows", self.failure)
        if self.failure is None and before is not None:
            log.info("mirror: %s has caught up", self.root)

    def _put_phase(self, receipt: Receipt, files: bool) -> bool:
        """Whether anything had to be copied."""
        there, target = self._there(receipt.folder), self._files(receipt)
        raw = (receipt.folder / NAME).read_bytes()
        if _content(there / NAME) == raw:
            return False
        (there / NAME).unlink(missing_ok=True)
        for name, facts in receipt.outputs.items() if files else ():
            if self._left.is_set():
                # Little time may be left, and this is what costs most to lose.
                self._put_checkpoint()
            _make(self.root, (target / name).parent)
            # Its folder is named by the digest of all that is in it.
            if not (target / name).exists():
                copy_into(receipt.folder / name, target / name, facts["sha256"], self._writer)
        self._clear(target)
        _make(self.root, there)
        self._put_told(receipt.folder, there)
        write_bytes(there / NAME, raw, self._writer)
        for step in steps_in(there / "checkpoints"):
            remove(there / "checkpoints", step)
        remove_unrecorded(there / "checkpoints")
        self._clear(there)
        return True

    def _put_checkpoint(self) -> bool:
        """The newest one of the phase that is followed, unless it or newer ones are there. Whether it had to be copied."""
        with self._lock:
            folder = self._followed
        if folder is None:
            return False
        here, there = folder / "checkpoints", self._there(folder) / "checkpoints"
        steps = steps_in(here)
        record = read_record(here, steps[-1]) if steps else None
        if record is None or not record["finite"] or read_record(there, steps[-1]) == record:
            return False
        if len([step for step in steps_in(there) if step > steps[-1]]) >= self.kept:
            # Of an attempt that came farther.
            return False
        _make(self.root, there)
        try:
            copy_into(data_path(here, steps[-1]), data_path(there, steps[-1]), record["sha256"], self._writer)
        except StorageError:
            # Where a newer one is, this one has been removed meanwhile.
            if steps_in(here)[-1:] != steps[-1:]:
                return False
            raise
        self._put_told(folder, there.parent)
        # Not copied: it may be gone by now, while the data that it tells of was still open.
        write_json(record_path(there, steps[-1]), record, self._writer)
        for step in steps_in(there)[: -self.kept]:
            remove(there, step)
        remove_unrecorded(there)
        self._clear(there)
        return True

    def _put_told(self, folder: Path, there: Path) -> None:
        for name in TOLD:
            if (folder / name).exists():
                copy_into(folder / name, there / name, None, self._writer)

    def _put_history(self) -> None:
        there = self.there
        _make(self.root, there)
        for name in (ATTEMPTS, LOG):
            before = _content(there / name)
            together = _merged(before, _content(self.run_folder / name))
            if together != before:
                write_bytes(there / name, together, self._writer)
        self._clear(there)

    def _clear(self, folder: Path) -> None:
        """Remove what killed attempts have left half-copied, of others only what is old: they may be at it."""
        for path in folder.rglob(".*.part"):
            with contextlib.suppress(FileNotFoundError):
                of_this_run = path.is_relative_to(self.there)
                if of_this_run or time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()

    def _there(self, folder: Path) -> Path:
        """The place of a phase's folder: siblings' finished phases are the run's own there."""
        return self.there / folder.name

    def _files(self, receipt: Receipt) -> Path:
        return self.root / "phases" / f"{receipt.folder.name}-{receipt.digest[:12]}"


@contextlib.contextmanager
def _noted(failures: list[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, StorageError) as error:
        failures.append(str(error))


def _make(root: Path, folder: Path) -> None:
    """Make a folder below `root`, which has to be there, and the names of it and of all between them durable."""
    for parent in [*reversed(folder.relative_to(root).parents), folder.relative_to(root)]:
        if parent != Path():
            (root / parent).mkdir(exist_ok=True)
            sync((root / parent).parent)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _merged(first: bytes, second: bytes) -> bytes:
    """All lines of `first`, then those of `second` that it lacks."""
    lines = first.splitlines(keepends=True)
    known = set(lines)
    if lines and not lines[-1].endswith(b"\n"):
        lines[-1] += b"\n"
    return b"".join([*lines, *(line for line in second.splitlines(keepends=True) if line not in known)])
