"""A second copy of a run's state, so that another machine can go on: `checkpoint.mirror`.

    MIRROR/NAME-KEY12/PHASE-KEY12/    the receipt of a finished phase; checkpoints of an unfinished one; metrics
    MIRROR/NAME-KEY12/                attempts and log, of all machines
    MIRROR/phases/PHASE-KEY12-DIGEST12/    files of a finished phase, by the digest of all of them: many runs share them

A phase is finished there when its receipt is there, a checkpoint exists when its JSON does; both are written last, and what is
brought back is held against the digests in them. What a phase leaves that lies elsewhere anyway (the dataset at its source, the
published run at its destination) has its receipt there and nothing else.
"""

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from emotion.errors import AccessError, Interrupted, ModelError, StorageError
from emotion.files import json_bytes, make_folder, sync, write_bytes, write_json
from emotion.training.checkpoint_files import (
    data_name,
    data_path,
    list_steps,
    parse_record,
    read_record,
    record_name,
    record_path,
    steps_from_names,
    verified_record,
)
from job.preemption import StopRequest
from job.run_folder.attempts import ATTEMPTS
from job.run_folder.conditions import CONDITIONS
from job.run_folder.receipts import LOG, METRICS, NAME, Receipt, is_as_recorded, parsed
from job.spec.model import JobSpec
from job.storage.open import open_storage
from job.storage.protocol import AbsentError, Storage, WrongBytesError
from job.storage.transfer import refuse_names

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


class Mirror:
    """Within `with Mirror(…) as mirror:` a thread copies what a run leaves, checkpoints first, and catches up after failures.

    The run tells it what is finished (`keep`) and what is being worked on (`follow`), and asks it for what is not here. A mirror
    that fails costs a warning, not the run. The end of the block waits for the last copy; once the job is asked to stop, for
    `grace_seconds` at most.
    """

    def __init__(self, spec: JobSpec, run_folder: Path, should_stop: StopRequest) -> None:
        assert spec.mirror is not None
        self.url, self.run_folder = str(spec.mirror), run_folder
        self.kept = max(spec.checkpoint.keep, FEWEST_KEPT)
        self.should_stop, self.grace_seconds = should_stop, spec.preemption.grace_seconds
        self.failure: str | None = None
        self.reached = False
        # What is copied there when the job stops is what matters most: that is not to be given up for being asked to stop.
        # Many jobs may put the same files there at one time.
        self._to = open_storage(spec.mirror, spec.storage, lambda: False, f".{socket.gethostname()}-{os.getpid()}")
        self._from = open_storage(spec.mirror, spec.storage, should_stop)
        self._raw: dict[Path, bytes] = {}
        self._finished: dict[Path, tuple[Receipt, bool]] = {}
        self._followed: Path | None = None
        self._newest: tuple[Path, int] | None = None
        """The checkpoint that is known to be there."""
        self._keeps_all = False
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    # Before a run begins

    def reach(self, unreachable: Unreachable) -> None:
        """Look whether the mirror can be used. Raises StorageError, or Interrupted when asked to stop while waiting for it."""
        told = False
        while (problem := self._from.problem()) is not None:
            text = f"checkpoint.mirror: {self.url} cannot be used ({problem}), so it is not known what it holds"
            if unreachable == "fail":
                raise type(problem)(
                    f"{text}. Make a folder or mount it, and see to a store; or --mirror-unreachable wait, or anew with what is "
                    f"here."
                )
            if unreachable == "anew":
                log.warning("%s: going on with what is here", text)
                return
            if not told:
                log.warning("%s: waiting for it", text)
                told = True
            if self.should_stop() or self._left.wait(POLL_SECONDS):
                raise Interrupted(f"stopped while waiting for the mirror {self.url}")
        self.reached = True

    def look(self) -> None:
        """Where nothing is to be copied: read it if it can be read."""
        self.reached = self._from.problem() is None

    def _require(self) -> None:
        """What is not found is not there only if the mirror itself is. Raises StorageError."""
        problem = self._from.problem()
        if problem is not None:
            raise type(problem)(f"mirror: {self.url} cannot be read any more: {problem}")

    def bring_history(self) -> None:
        """Attempts and log of other machines. Raises StorageError."""
        if not self.reached:
            return
        for name in (ATTEMPTS, LOG):
            here = self.run_folder / name
            before = _content(here)
            together = _merged(self._from.read(f"{self._run_name}/{name}") or b"", before)
            if together != before:
                # In place, as the log is open for appending already.
                here.write_bytes(together)

    def sizes(self) -> dict[str, int]:
        """Name → size of what is there of this run."""
        if not self.reached:
            return {}
        below = f"{self._run_name}/"
        return {entry.name.removeprefix(below): entry.size for entry in self._from.entries(self._run_name)}

    # From the mirror

    def receipt(self, folder: Path, key: str) -> Receipt | None:
        """The receipt of the phase of this folder and key, if the mirror has it. Its files are not looked at."""
        if not self.reached:
            return None
        name = f"{self._there(folder)}/{NAME}"
        raw = self._from.read(name)
        if raw is None:
            self._require()
            return None
        try:
            receipt = parsed(folder, json.loads(raw))
        except (ValueError, KeyError, TypeError):
            log.warning("mirror: %s/%s is damaged: the phase counts as unfinished there", self.url, name)
            return None
        if receipt.key != key:
            return None
        self._raw[folder] = raw
        return receipt

    def has_begun(self, folder: Path) -> bool:
        """Whether there are checkpoints of this phase."""
        return self.reached and bool(self._steps(self._from, folder))

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
        refuse_names(list(receipt.outputs), f"{self.url}/{self._there(folder)}")
        for name, facts in receipt.outputs.items():
            if self.should_stop():
                raise Interrupted(f"stopped while fetching {folder.name} from the mirror")
            make_folder((folder / name).parent)
            if is_as_recorded(folder / name, facts, verify=True):
                continue
            try:
                self._get(f"{files}/{name}", folder / name, facts["sha256"])
            except WrongBytesError as error:
                log.warning("mirror: %s: %s is made again", error, folder.name)
                self._discard(f"{self._there(folder)}/{NAME}")
                self._discard(f"{files}/{name}")
                return False
            os.utime(folder / name, ns=(facts["mtime_ns"], facts["mtime_ns"]))
        self._bring_told(folder, METRICS)
        for parent in sorted({(folder / name).parent for name in receipt.outputs}):
            sync(parent)
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
        here, there = folder / "checkpoints", f"{self._there(folder)}/checkpoints"
        found = self._steps(self._from, folder)
        if not found:
            self._require()
        good = [step for step in list_steps(here) if verified_record(here, step)]
        for step in reversed(found):
            if good and good[-1] >= step:
                return
            make_folder(here)
            raw = self._from.read(f"{there}/{record_name(step)}")
            record = parse_record(raw or b"", step)
            try:
                if record is None:
                    self._require()
                    raise WrongBytesError(f"{self.url}/{there}/{record_name(step)} is damaged")
                self._get(f"{there}/{data_name(step)}", data_path(here, step), record["sha256"])
            except WrongBytesError as error:
                log.warning("mirror: %s: moved to %s/damaged, the one before is used", error, there)
                for name in (record_name(step), data_name(step)):
                    self._discard(f"{there}/{name}", f"{there}/damaged/{name}")
                continue
            for name in TOLD:
                self._bring_told(folder, name)
            write_json(record_path(here, step), record)
            log.info("mirror: fetched checkpoint step=%d of %s", step, folder.name)
            return
        if found and not good:
            raise ModelError(
                f"mirror: none of the {len(found)} checkpoints in {self.url}/{there} can be used. Run again to begin this phase "
                f"anew."
            )

    def _get(self, name: str, target: Path, sha256: str) -> None:
        """Raises WrongBytesError also for what is not there, as long as the mirror is."""
        try:
            self._from.get(name, target, sha256)
        except AbsentError as error:
            self._require()
            raise WrongBytesError(f"{self.url}/{name} is missing") from error

    def _bring_told(self, folder: Path, name: str) -> None:
        told = self._from.read(f"{self._there(folder)}/{name}")
        if told is not None:
            write_bytes(folder / name, told)

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
                self.failure = f"{self.url} does not answer"
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
            if not finished and not self.failure and not self._left.is_set() and self._unknown_checkpoint() is None:
                # A store counts, and charges for, each question.
                return
            problem = self._to.problem()
            if problem is not None:
                raise StorageError(f"{self.url} cannot be used ({problem})")
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
            log.info("mirror: %s has caught up", self.url)

    def _put_phase(self, receipt: Receipt, files: bool) -> bool:
        """Whether anything had to be copied."""
        there, target = self._there(receipt.folder), self._files(receipt)
        raw = (receipt.folder / NAME).read_bytes()
        before = self._to.read(f"{there}/{NAME}")
        if before == raw:
            return False
        if before is not None:
            self._discard(f"{there}/{NAME}")
        # Their folder is named by the digest of all that is in it.
        known = {entry.name for entry in self._to.entries(target)} if files else set()
        for name, facts in receipt.outputs.items() if files else ():
            if self._left.is_set():
                # Little time may be left, and this is what costs most to lose.
                self._put_checkpoint()
            if f"{target}/{name}" not in known:
                self._to.put(receipt.folder / name, f"{target}/{name}", facts["sha256"])
        self._to.clear(target, own=False)
        self._put_told(receipt.folder)
        self._to.write(f"{there}/{NAME}", raw)
        for entry in list(self._to.entries(f"{there}/checkpoints")):
            if "/damaged/" not in entry.name:
                self._discard(entry.name)
        self._to.clear(there, own=True)
        return True

    def _unknown_checkpoint(self) -> tuple[Path, int, dict[str, Any]] | None:
        """(folder, step, record) of the newest one here of the phase that is followed, unless it is known to be there."""
        with self._lock:
            folder = self._followed
        steps = list_steps(folder / "checkpoints") if folder else []
        if folder is None or not steps or self._newest == (folder, steps[-1]):
            return None
        record = read_record(folder / "checkpoints", steps[-1])
        return (folder, steps[-1], record) if record and record["finite"] else None

    def _put_checkpoint(self) -> bool:
        """The newest one of the phase that is followed, unless it or newer ones are there. Whether it had to be copied."""
        unknown = self._unknown_checkpoint()
        if unknown is None:
            return False
        folder, step, record = unknown
        there = f"{self._there(folder)}/checkpoints"
        steps = self._steps(self._to, folder)
        if step in steps and parse_record(self._to.read(f"{there}/{record_name(step)}") or b"", step) == record:
            self._newest = folder, step
            return False
        if len([newer for newer in steps if newer > step]) >= self.kept:
            # Of an attempt that came farther.
            return False
        try:
            self._to.put(data_path(folder / "checkpoints", step), f"{there}/{data_name(step)}", record["sha256"])
        except StorageError:
            # Where a newer one is, this one has been removed meanwhile.
            if list_steps(folder / "checkpoints")[-1:] != [step]:
                return False
            raise
        self._put_told(folder)
        # Not copied: it may be gone by now, while the data that it tells of was still open.
        self._to.write(f"{there}/{record_name(step)}", json_bytes(record))
        self._newest = folder, step
        names = {entry.name.rpartition("/")[2] for entry in self._to.entries(there) if "/damaged/" not in entry.name}
        kept = steps_from_names(names)[-self.kept :]
        # The JSON goes first: without it the data does not exist.
        for name in sorted(names - {name(step) for step in kept for name in (record_name, data_name)}, reverse=True):
            if re.fullmatch(r"step-\d+\.(json|ckpt)", name):
                self._discard(f"{there}/{name}")
        self._to.clear(there, own=True)
        return True

    def _discard(self, name: str, to: str | None = None) -> None:
        """Remove a file, or move it. Where that is denied, as in a locked bucket, it stays, and so do all from then on."""
        if self._keeps_all:
            return
        try:
            if to is None:
                self._to.remove(name)
            else:
                self._to.move(name, to)
        except AccessError as error:
            self._keeps_all = True
            log.warning("mirror: %s Old checkpoints stay there.", error)

    def _put_told(self, folder: Path) -> None:
        for name in TOLD:
            if (folder / name).exists():
                self._to.write(f"{self._there(folder)}/{name}", (folder / name).read_bytes())

    def _put_history(self) -> None:
        for name in (ATTEMPTS, LOG):
            there = f"{self._run_name}/{name}"
            before = self._to.read(there) or b""
            together = _merged(before, _content(self.run_folder / name))
            if together != before:
                self._to.write(there, together)
        self._to.clear(self._run_name, own=True)

    def _steps(self, place: Storage, folder: Path) -> list[int]:
        below = f"{self._there(folder)}/checkpoints/"
        return steps_from_names(entry.name.removeprefix(below) for entry in place.entries(below.rstrip("/")))

    @property
    def _run_name(self) -> str:
        return self.run_folder.name

    def _there(self, folder: Path) -> str:
        """The place of a phase's folder: siblings' finished phases are the run's own there."""
        return f"{self._run_name}/{folder.name}"

    def _files(self, receipt: Receipt) -> str:
        return f"phases/{receipt.folder.name}-{receipt.digest[:12]}"


@contextlib.contextmanager
def _noted(failures: list[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, StorageError, Interrupted) as error:
        failures.append(str(error))


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
