"""A second copy of a run's state, from which another machine can resume it: `checkpoint.mirror`.
This module copies to the mirror; job/run_folder/mirror_fetch.py fetches from it and describes its contents."""

import contextlib
import logging
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from emotion.errors import Interrupted, StorageError
from emotion.files import json_bytes
from emotion.threads import waiting
from emotion.training.checkpoint_files import (
    LATEST,
    data_name,
    data_path,
    latest_record,
    list_steps,
    parse_record,
    read_record,
    record_name,
    steps_from_names,
)
from job.preemption import StopRequest
from job.run_folder.attempts import ATTEMPTS
from job.run_folder.mirror_fetch import PHASE_RECORDS, POLL_SECONDS, MirrorReader, content_of, merged_lines
from job.run_folder.receipts import LOG, RECEIPT, Receipt
from job.spec.model import JobSpec

log = logging.getLogger(__name__)

LONGEST_RETRY_PAUSE_SECONDS = 60.0
MIN_CHECKPOINTS = 2  # of a phase: if the newest is damaged, the one before is used


class Mirror(MirrorReader):
    """Within `with Mirror(…) as mirror:` a thread copies the run to the mirror, checkpoints first, and retries after failures.
    The runner announces finished phases (`add_finished`) and the running one (`watch_checkpoints`). If the mirror fails, a
    warning is logged and the run continues. The end of the block waits for the last copy, at most `grace_seconds` if the job was
    asked to stop."""

    def __init__(self, spec: JobSpec, run_folder: Path, should_stop: StopRequest) -> None:
        super().__init__(spec, run_folder, should_stop)
        self.checkpoints_kept = max(spec.checkpoint.keep, MIN_CHECKPOINTS)
        self.grace_seconds = spec.preemption.grace_seconds
        self.failure: str | None = None
        self._finished: dict[Path, tuple[Receipt, bool]] = {}
        self._running: Path | None = None
        self._copied: tuple[Path, int] | None = None  # folder and step of the newest checkpoint that the mirror has
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def add_finished(self, receipt: Receipt, with_outputs: bool) -> None:
        """Tell the thread to copy a finished phase: outputs and receipt, or only the receipt."""
        with self._lock:
            self._finished[receipt.folder] = receipt, with_outputs
            if self._running == receipt.folder:
                self._running = None

    def watch_checkpoints(self, folder: Path) -> None:
        """Make the thread copy each newest checkpoint of this phase until the phase is finished."""
        with self._lock:
            self._running = folder

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        began = time.monotonic()
        self._ended.set()
        while self._thread.is_alive():
            self._thread.join(0.1)
            with waiting():
                is_asked = self.should_stop()
            if is_asked and time.monotonic() - began > self.grace_seconds:
                self.failure = f"{self.url} does not answer"
                break
        if self.failure is not None:
            log.warning("mirror: %s; another machine could not resume from the newest state", self.failure)

    def _run(self) -> None:
        with waiting():  # its requests are not progress of the job
            self._copy_until_ended()

    def _copy_until_ended(self) -> None:
        pause = POLL_SECONDS
        while not self._ended.wait(pause):
            self.copy_missing()
            pause = POLL_SECONDS if self.failure is None else min(2 * pause, LONGEST_RETRY_PAUSE_SECONDS)
        self.copy_missing()

    def copy_missing(self) -> None:
        """Copy what the mirror lacks. A failure is logged once and retried the next time."""
        with self._lock:
            finished = list(self._finished.values())
        failures: list[str] = []
        with _collected(failures):
            if not finished and not self.failure and not self._ended.is_set() and self._new_checkpoint() is None:
                return  # object storage charges for each request
            problem = self._target.problem()
            if problem is not None:
                raise StorageError(f"{self.url} cannot be used ({problem})")
        copied = False
        if not failures:
            with _collected(failures):
                copied = self._copy_checkpoint()
            for receipt, with_outputs in finished:
                with _collected(failures):
                    copied = self._copy_phase(receipt, with_outputs) or copied
                    with self._lock:
                        self._finished.pop(receipt.folder, None)
            if copied or self._ended.is_set():
                with _collected(failures):
                    self._copy_history()
        before, self.failure = self.failure, failures[0] if failures else None
        if self.failure is not None and before is None:
            log.warning("mirror: %s; the job continues, and copying is retried", self.failure)
        if self.failure is None and before is not None:
            log.info("mirror: %s has caught up", self.url)

    def _copy_phase(self, receipt: Receipt, with_outputs: bool) -> bool:
        """Copy a finished phase. Returns whether the mirror lacked any of it."""
        there, target = self._phase_name(receipt.folder), self._outputs_name(receipt)
        content = (receipt.folder / RECEIPT).read_bytes()
        before = self._target.read(f"{there}/{RECEIPT}")
        if before == content:
            return False
        if before is not None:
            self._remove(f"{there}/{RECEIPT}")
        # The name of this folder holds the digest of all outputs, so the files in it need not be copied again.
        known = {entry.name for entry in self._target.entries(target)} if with_outputs else set()
        for name, record in receipt.outputs.items() if with_outputs else ():
            if self._ended.is_set():
                self._copy_checkpoint()  # little time may be left, and the checkpoint would cost most to lose
            if f"{target}/{name}" not in known:
                self._target.put(receipt.folder / name, f"{target}/{name}", record.sha256)
        self._target.clear(target, own=False)
        self._copy_records(receipt.folder)
        self._target.write(f"{there}/{RECEIPT}", content)
        for entry in list(self._target.entries(f"{there}/checkpoints")):
            if "/damaged/" not in entry.name:
                self._remove(entry.name)
        self._target.clear(there, own=True)
        return True

    def _new_checkpoint(self) -> tuple[Path, int, dict[str, Any]] | None:
        """(folder, step, record) of the running phase's newest checkpoint; None if the mirror has it, or if it is not finite."""
        with self._lock:
            folder = self._running
        steps = list_steps(folder / "checkpoints") if folder else []
        if folder is None or not steps or self._copied == (folder, steps[-1]):
            return None
        record = read_record(folder / "checkpoints", steps[-1])
        return (folder, steps[-1], record) if record and record["finite"] else None

    def _copy_checkpoint(self) -> bool:
        """Copy the running phase's newest checkpoint unless the mirror has it or newer ones. Returns whether it was copied."""
        new = self._new_checkpoint()
        if new is None:
            return False
        folder, step, record = new
        there = f"{self._phase_name(folder)}/checkpoints"
        steps = self._steps(self._target, folder)
        if step in steps and parse_record(self._target.read(f"{there}/{record_name(step)}") or b"", step) == record:
            self._write_latest(there, step)  # the copy may have been killed before it wrote this file
            self._copied = folder, step
            return False
        if len([newer for newer in steps if newer > step]) >= self.checkpoints_kept:
            return False  # the newer ones are from another machine that was further on
        try:
            self._target.put(data_path(folder / "checkpoints", step), f"{there}/{data_name(step)}", record["sha256"])
        except StorageError:
            # The training has removed this checkpoint after saving a newer one.
            if list_steps(folder / "checkpoints")[-1:] != [step]:
                return False
            raise
        self._copy_records(folder)
        # From memory: the file of the record may have been removed while the data was copied.
        self._target.write(f"{there}/{record_name(step)}", json_bytes(record))
        self._write_latest(there, step)
        self._copied = folder, step
        names = {entry.name.rpartition("/")[2] for entry in self._target.entries(there) if "/damaged/" not in entry.name}
        kept = steps_from_names(names)[-self.checkpoints_kept :]
        # The JSON goes first: without it the data does not exist.
        for name in sorted(names - {name(step) for step in kept for name in (record_name, data_name)}, reverse=True):
            if re.fullmatch(r"step-\d+\.(json|ckpt)", name):
                self._remove(f"{there}/{name}")
        self._target.clear(there, own=True)
        return True

    def _write_latest(self, there: str, step: int) -> None:
        content = json_bytes(latest_record(step))
        if self._target.read(f"{there}/{LATEST}") != content:
            self._target.write(f"{there}/{LATEST}", content)

    def _copy_records(self, folder: Path) -> None:
        for name in PHASE_RECORDS:
            if (folder / name).exists():
                self._target.write(f"{self._phase_name(folder)}/{name}", (folder / name).read_bytes())

    def _copy_history(self) -> None:
        for name in (ATTEMPTS, LOG):
            there = f"{self._run_name}/{name}"
            before = self._target.read(there) or b""
            merged = merged_lines(before, content_of(self.run_folder / name))
            if merged != before:
                self._target.write(there, merged)
        self._target.clear(self._run_name, own=True)


@contextlib.contextmanager
def _collected(failures: list[str]) -> Iterator[None]:
    """Add the message of a failed copy to `failures`, so that the next copy is still tried."""
    try:
        yield
    except (OSError, StorageError, Interrupted) as error:
        failures.append(str(error))
