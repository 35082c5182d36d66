"""A second copy of a run's state, so that another machine can go on: `checkpoint.mirror`.

Below the mirror lie the folders of runs and of scratch, as below `--work`. A finished phase is there when its receipt is, and a
checkpoint when its JSON is, both written after the files they tell of. What is brought back is held against those digests. What a
phase leaves that lies elsewhere anyway (the dataset at its source, the published run at its destination) has its receipt
there and nothing else.
"""

import errno
import logging
import os
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from emotion.errors import Interrupted, ModelError, StorageError
from emotion.files import make_folder, read_json
from emotion.saved import data_path, read_record, record_path, remove, set_aside, steps_in, verified
from job.attempts import ATTEMPTS
from job.preemption import StopRequest
from job.provenance import CONDITIONS
from job.receipts import LOG, METRICS, NAME, Receipt, is_as_recorded, parsed
from job.storage import WrongBytesError, copy_file, is_same_file

log = logging.getLogger(__name__)

Unreachable = Literal["fail", "wait", "anew"]
"""What to do where the mirror cannot be reached at the start: end with 69, wait for it, or go on with what is here."""

POLL_SECONDS = 2.0
TOLD = (METRICS, CONDITIONS)
"""What goes with a checkpoint: how its phase came so far."""
FEWEST_KEPT = 2
"""Checkpoints of a phase: should the newest be damaged, the one before is used."""


class Mirror:
    """Within `with Mirror(…) as mirror:` a thread copies what a run leaves, the newest first, and catches up after failures.

    The run tells it what is finished (`keep`) and what is being worked on (`follow`), and asks it for what is not here. A mirror
    that fails costs a warning, not the run: the end of the block tries once more and says what is missing.
    """

    def __init__(self, root: Path, scratch: Path, run_folder: Path, keep: int) -> None:
        self.root, self.scratch, self.run_folder = root, scratch, run_folder
        self.kept = max(keep, FEWEST_KEPT)
        self.failure: str | None = None
        self.reached = False
        self._finished: dict[Path, tuple[Receipt, bool]] = {}
        self._followed: Path | None = None
        self._lock = threading.Lock()
        self._left = threading.Event()
        # Many jobs may put the same features there at one time.
        self._writer = f".{socket.gethostname()}-{os.getpid()}"
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    # Before a run begins

    def reach(self, unreachable: Unreachable, should_stop: StopRequest) -> None:
        """Look whether the mirror is there. Raises StorageError, or Interrupted when asked to stop while waiting for it."""
        told = False
        while (problem := self._problem()) is not None:
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
            if should_stop() or self._left.wait(POLL_SECONDS):
                raise should_stop.leaving(Interrupted(f"stopped while waiting for the mirror {self.root}"))
        self.reached = True

    def _problem(self) -> OSError | None:
        # A folder that is not there is no empty mirror: where it should be mounted, nothing would be found.
        try:
            next(iter(self.root.iterdir()), None)
        except OSError as error:
            return error
        if not os.access(self.root, os.W_OK | os.X_OK):
            return PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return None

    def bring_history(self) -> None:
        """Attempts and log of other machines, where this one has none of its own yet."""
        there = self._there(self.run_folder)
        if not self.reached or (self.run_folder / ATTEMPTS).exists() or not (there / ATTEMPTS).exists():
            return
        copy_file(there / ATTEMPTS, self.run_folder / ATTEMPTS)
        if (there / LOG).exists():
            here = self.run_folder / LOG
            # In place, as it is open already, for appending.
            here.write_bytes((there / LOG).read_bytes() + (here.read_bytes() if here.exists() else b""))
        log.info("going on from the mirror %s", there)

    # From the mirror

    def receipt(self, folder: Path, key: str) -> Receipt | None:
        """The receipt of the phase of this folder and key, if the mirror has it. Its files are not looked at."""
        if not self.reached:
            return None
        try:
            receipt = parsed(folder, read_json(self._there(folder) / NAME))
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            return None
        return receipt if receipt.key == key else None

    def bring_receipt(self, receipt: Receipt) -> None:
        """The receipt alone, for who reads nothing else of a phase. Raises StorageError."""
        make_folder(receipt.folder)
        copy_file(self._there(receipt.folder) / NAME, receipt.folder / NAME)

    def bring(self, receipt: Receipt, should_stop: StopRequest) -> bool:
        """Fetch the files of a finished phase into its folder, the receipt last. False where they are not what it says.

        Then the mirror's receipt is removed, so that the phase is not finished there either. Raises StorageError, Interrupted.
        """
        folder, there = receipt.folder, self._there(receipt.folder)
        make_folder(folder)
        for name, facts in receipt.outputs.items():
            if should_stop():
                raise Interrupted(f"stopped while fetching {folder.name} from the mirror")
            _make(folder, (folder / name).parent)
            if is_as_recorded(folder / name, facts, verify=True):
                continue
            try:
                if not (there / name).exists():
                    raise WrongBytesError(f"{there / name} is missing")
                copy_file(there / name, folder / name, facts["sha256"])
            except WrongBytesError as error:
                log.warning("mirror: %s: %s is made again", error, folder.name)
                (there / NAME).unlink(missing_ok=True)
                (there / name).unlink(missing_ok=True)
                return False
        if (there / METRICS).exists():
            copy_file(there / METRICS, folder / METRICS)
        copy_file(there / NAME, folder / NAME)
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
        good = [step for step in steps_in(here) if verified(here, step)]
        found = steps_in(there)
        for step in reversed(found):
            if good and good[-1] >= step:
                return
            make_folder(here)
            record = read_record(there, step)
            try:
                if record is None or not data_path(there, step).exists():
                    raise WrongBytesError(f"{data_path(there, step)} is missing, or what tells of it is damaged")
                copy_file(data_path(there, step), data_path(here, step), record["sha256"])
            except WrongBytesError as error:
                log.warning("mirror: %s: moved to %s, the one before is used", error, set_aside(there, step))
                continue
            for name in TOLD:
                if (there.parent / name).exists():
                    copy_file(there.parent / name, folder / name)
            copy_file(record_path(there, step), record_path(here, step))
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
        self._left.set()
        self._thread.join()
        self.catch_up()
        if self.failure is not None:
            log.warning("mirror: %s; another machine would not know of the newest state", self.failure)

    def _run(self) -> None:
        while not self._left.wait(POLL_SECONDS):
            self.catch_up()

    def catch_up(self) -> None:
        """Copy what is not there yet. What fails is told of once and tried again the next time."""
        with self._lock:
            finished, followed = list(self._finished.values()), self._followed
        try:
            problem = self._problem()
            if problem is not None:
                raise StorageError(f"{self.root} cannot be used ({problem.strerror})")
            moved = followed is not None and self._put_checkpoint(followed)
            for receipt, files in finished:
                moved = self._put_phase(receipt, files) or moved
                with self._lock:
                    self._finished.pop(receipt.folder, None)
            if moved or self._left.is_set():
                self._put_history()
        except (OSError, StorageError) as error:
            if self.failure is None:
                log.warning("mirror: %s; the job goes on, and what is missing there follows", error)
            self.failure = str(error)
            return
        if self.failure is not None:
            log.info("mirror: %s has caught up", self.root)
            self.failure = None

    def _put_phase(self, receipt: Receipt, files: bool) -> bool:
        """Whether anything had to be copied."""
        folder, there = receipt.folder, self._there(receipt.folder)
        if (there / NAME).exists():
            return False
        _make(self.root, there)
        for name, facts in receipt.outputs.items() if files else ():
            _make(self.root, (there / name).parent)
            if not is_same_file(folder / name, there / name):
                copy_file(folder / name, there / name, facts["sha256"], self._writer)
        self._put_if_here(folder / METRICS, there / METRICS)
        copy_file(folder / NAME, there / NAME, None, self._writer)
        for step in steps_in(there / "checkpoints"):
            remove(there / "checkpoints", step)
        _clear(there)
        return True

    def _put_checkpoint(self, folder: Path) -> bool:
        """The newest one, unless it is there. Whether it had to be copied."""
        here, there = folder / "checkpoints", self._there(folder) / "checkpoints"
        steps = steps_in(here)
        record = read_record(here, steps[-1]) if steps else None
        if record is None or not record["finite"] or read_record(there, steps[-1]) == record:
            return False
        _make(self.root, there)
        try:
            copy_file(data_path(here, steps[-1]), data_path(there, steps[-1]), record["sha256"], self._writer)
        except StorageError:
            # Where a newer one is, this one has been removed meanwhile.
            if steps_in(here)[-1:] != steps[-1:]:
                return False
            raise
        for name in TOLD:
            self._put_if_here(folder / name, there.parent / name)
        copy_file(record_path(here, steps[-1]), record_path(there, steps[-1]), None, self._writer)
        for step in steps_in(there)[: -self.kept]:
            remove(there, step)
        _clear(there.parent)
        return True

    def _put_history(self) -> None:
        there = self._there(self.run_folder)
        _make(self.root, there)
        for name in (ATTEMPTS, LOG):
            self._put_if_here(self.run_folder / name, there / name)
            for half_written in there.glob(f".{name}.*.part"):
                half_written.unlink(missing_ok=True)

    def _put_if_here(self, source: Path, target: Path) -> None:
        if source.exists():
            copy_file(source, target, None, self._writer)

    def _there(self, folder: Path) -> Path:
        """The place in the mirror of a folder below work or scratch; siblings' finished phases become the run's own."""
        if folder.parent == self.scratch:
            return self.root / "scratch" / folder.name
        if folder == self.run_folder:
            return self.root / folder.name
        return self.root / self.run_folder.name / folder.name


def _make(root: Path, folder: Path) -> None:
    """Make a folder below `root`, and the names of it and of all between them durable."""
    for parent in [*reversed(folder.relative_to(root).parents), folder.relative_to(root)]:
        if parent != Path():
            make_folder(root / parent)


def _clear(folder: Path) -> None:
    """Remove what attempts that were killed have left half-copied."""
    for half_written in folder.rglob(".*.part"):
        half_written.unlink(missing_ok=True)
