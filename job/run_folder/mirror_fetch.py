"""The contents of a mirror, and fetching a run from there to this machine.

    MIRROR/NAME-KEY12/PHASE-KEY12/    the receipt of a finished phase; checkpoints of an unfinished one; metrics
    MIRROR/NAME-KEY12/                attempts and log, of all machines
    MIRROR/phases/PHASE-KEY12-DIGEST12/    outputs of a finished phase, by their digest: runs share them

A phase is finished in the mirror if its receipt is there; a checkpoint exists if its JSON does. Both are written last, and
fetched files are verified against the digests in them. For a phase with external outputs (the dataset at its source, the
published run at its destination), the mirror has only the receipt.
"""

import io
import itertools
import json
import logging
import os
import socket
import threading
from pathlib import Path
from typing import Literal

from emotion.errors import AccessError, Interrupted, ModelError
from emotion.files import errors_name, make_folder, sync, write_bytes, write_json
from emotion.training.checkpoint_files import (
    LATEST,
    complete_list,
    data_name,
    data_path,
    known_steps,
    parse_latest,
    parse_record,
    read_latest,
    record_name,
    record_path,
    steps_from_names,
    verified_record,
    write_latest,
)
from job.preemption import StopRequest
from job.run_folder.attempts import ATTEMPTS
from job.run_folder.conditions import CONDITIONS
from job.run_folder.receipts import LOG, METRICS, RECEIPT, Receipt, parse_receipt
from job.spec.model import JobSpec
from job.storage.open import open_storage
from job.storage.protocol import AbsentError, Storage, WrongBytesError
from job.storage.transfer import refuse_names

log = logging.getLogger(__name__)

Unreachable = Literal["fail", "wait", "anew"]  # at the start: exit code 69, wait for it, or start with what is here
POLL_SECONDS = 2.0
PHASE_RECORDS = (METRICS, CONDITIONS)  # the phase's records so far; copied with a checkpoint


class MirrorReader:
    """Fetches the state that other machines have left in the mirror. Until `connect` succeeds, the mirror counts as empty."""

    def __init__(self, spec: JobSpec, run_folder: Path, should_stop: StopRequest) -> None:
        assert spec.mirror is not None
        self.url, self.run_folder, self.should_stop = str(spec.mirror), run_folder, should_stop
        self.connected = False
        self._source = open_storage(spec.mirror, spec.storage, should_stop)
        # Copying to the mirror matters most when the job stops, so a stop request does not interrupt it. Many jobs may write the
        # same files at one time, hence the name of the writer.
        self._target = open_storage(spec.mirror, spec.storage, lambda: False, f".{socket.gethostname()}-{os.getpid()}")
        self._receipts: dict[Path, bytes] = {}  # content of receipts in the mirror, by the folder of their phase here
        self._removal_denied = False
        self._ended = threading.Event()

    # Layout

    @property
    def _run_name(self) -> str:
        return self.run_folder.name

    def _phase_name(self, folder: Path) -> str:
        """The name of a phase's folder in the mirror. A finished phase of another run in --work counts as one of this run."""
        return f"{self._run_name}/{folder.name}"

    def _outputs_name(self, receipt: Receipt) -> str:
        return f"phases/{receipt.folder.name}-{receipt.digest[:12]}"

    def _steps(self, storage: Storage, folder: Path) -> list[int]:
        below = f"{self._phase_name(folder)}/checkpoints/"
        return steps_from_names(entry.name.removeprefix(below) for entry in storage.entries(below.rstrip("/")))

    def _known_steps(self, folder: Path) -> list[int]:
        """The steps of a phase's checkpoints in the mirror. Raises StorageError if the checkpoint that `latest` names is
        missing."""
        there = f"{self._phase_name(folder)}/checkpoints"

        def look() -> tuple[list[int], str | None]:
            steps, latest = self._steps(self._source, folder), parse_latest(self._source.read(f"{there}/{LATEST}"))
            if latest is None or latest <= max(steps, default=0):
                return steps, None
            if self._source.read(f"{there}/{record_name(latest)}") is not None:
                return sorted([*steps, latest]), None
            return steps, f"{self.url}/{there}/{LATEST} names step {latest}"

        return complete_list(look, f"{self.url}/{there}")

    # Before a run starts

    def connect(self, unreachable: Unreachable) -> None:
        """Check whether the mirror can be used. Raises StorageError; Interrupted when asked to stop while waiting for it."""
        waiting = False
        while (problem := self._source.problem()) is not None:
            text = f"checkpoint.mirror: {self.url} cannot be used ({problem}), so a newer state of this run may be there"
            if unreachable == "fail":
                raise type(problem)(
                    f"{text}. Create or mount the folder, or make the object storage reachable; or use --mirror-unreachable wait "
                    f"to wait for it, or anew to start with what is on this machine."
                )
            if unreachable == "anew":
                log.warning("%s: starting with what is on this machine", text)
                return
            if not waiting:
                log.warning("%s: waiting for it", text)
                waiting = True
            if self.should_stop() or self._ended.wait(POLL_SECONDS):
                raise Interrupted(f"stopped while waiting for the mirror {self.url}")
        self.connected = True

    def try_connect(self) -> None:
        """Read the mirror if it is reachable. Used by a plan, which copies nothing."""
        self.connected = self._source.problem() is None

    def _require_readable(self) -> None:
        """Raise StorageError if the mirror itself is gone: a file that was not found may then exist."""
        problem = self._source.problem()
        if problem is not None:
            raise type(problem)(f"mirror: {self.url} cannot be read any more: {problem}")

    def fetch_history(self) -> None:
        """Merge attempts and log of other machines into those of the run folder. Raises StorageError."""
        if not self.connected:
            return
        for name in (ATTEMPTS, LOG):
            path = self.run_folder / name
            here = content_of(path)
            merged = merged_lines(self._source.read(f"{self._run_name}/{name}") or b"", here)
            if merged == here:
                continue
            if name == LOG:
                with errors_name(path):
                    path.write_bytes(merged)  # in place, as the log is open for appending already
            else:
                write_bytes(path, merged)

    def file_sizes(self) -> dict[str, int]:
        """Name → size of this run's files in the mirror."""
        if not self.connected:
            return {}
        below = f"{self._run_name}/"
        return {entry.name.removeprefix(below): entry.size for entry in self._source.entries(self._run_name)}

    # Finished phases

    def find_receipt(self, folder: Path, key: str) -> Receipt | None:
        """The receipt of the phase with this folder and key, if the mirror has it. Its outputs are not verified."""
        if not self.connected:
            return None
        name = f"{self._phase_name(folder)}/{RECEIPT}"
        content = self._source.read(name)
        if content is None:
            self._require_readable()
            return None
        try:
            receipt = parse_receipt(folder, json.loads(content))
        except (ValueError, KeyError, TypeError):
            log.warning("mirror: %s/%s is damaged: the phase counts as unfinished there", self.url, name)
            return None
        if receipt.key != key:
            return None
        self._receipts[folder] = content
        return receipt

    def fetch_receipt(self, receipt: Receipt) -> None:
        """Fetch only the receipt, for later phases that do not read the outputs of this one."""
        make_folder(receipt.folder)
        write_bytes(receipt.folder / RECEIPT, self._receipts[receipt.folder])

    def fetch_outputs(self, receipt: Receipt) -> bool:
        """Fetch the outputs of a finished phase into its folder, the receipt last. Returns False if one is missing or damaged;
        that file and the receipt are then removed from the mirror. Raises StorageError, Interrupted."""
        folder, outputs = receipt.folder, self._outputs_name(receipt)
        make_folder(folder)
        refuse_names(list(receipt.outputs), f"{self.url}/{self._phase_name(folder)}")
        for name, record in receipt.outputs.items():
            if self.should_stop():
                raise Interrupted(f"stopped while fetching {folder.name} from the mirror")
            make_folder((folder / name).parent)
            if record.matches(folder / name, verify=True):
                continue
            try:
                self._get(f"{outputs}/{name}", folder / name, record.sha256)
            except WrongBytesError as error:
                log.warning("mirror: %s: %s runs again", error, folder.name)
                self._remove(f"{self._phase_name(folder)}/{RECEIPT}")
                self._remove(f"{outputs}/{name}")
                return False
            if record.mtime_ns is not None:
                os.utime(folder / name, ns=(record.mtime_ns, record.mtime_ns))
        self._fetch_record(folder, METRICS)
        for parent in sorted({(folder / name).parent for name in receipt.outputs}):
            sync(parent)
        write_bytes(folder / RECEIPT, self._receipts[folder])
        log.info("mirror: fetched %s", folder)
        return True

    # Checkpoints of an unfinished phase

    def has_checkpoint(self, folder: Path) -> bool:
        return self.connected and bool(self._steps(self._source, folder))

    def fetch_checkpoint(self, folder: Path) -> None:
        """Fetch the newest undamaged checkpoint of an unfinished phase, unless this machine has one at least as new.
        Raises StorageError; ModelError if all are damaged and none is here, as an automatic restart could waste days of work."""
        if not self.connected:
            return
        here, there = folder / "checkpoints", f"{self._phase_name(folder)}/checkpoints"
        found = self._known_steps(folder)
        if not found:
            self._require_readable()
        usable = [step for step in known_steps(here) if verified_record(here, step)]
        for step in reversed(found):
            if usable and usable[-1] >= step:
                return
            make_folder(here)
            if read_latest(here) is None:
                write_latest(here, 0)  # a partly fetched checkpoint must not be used
            record = parse_record(self._source.read(f"{there}/{record_name(step)}") or b"", step)
            try:
                if record is None:
                    self._require_readable()
                    raise WrongBytesError(f"{self.url}/{there}/{record_name(step)} is damaged")
                self._get(f"{there}/{data_name(step)}", data_path(here, step), record["sha256"])
            except WrongBytesError as error:
                log.warning("mirror: %s: moved to %s/damaged, the one before is used", error, there)
                self._remove(f"{there}/{LATEST}")
                for name in (record_name(step), data_name(step)):
                    self._remove(f"{there}/{name}", move_to=f"{there}/damaged/{name}")
                continue
            for name in PHASE_RECORDS:
                self._fetch_record(folder, name)
            write_json(record_path(here, step), record)
            write_latest(here, step)
            log.info("mirror: fetched checkpoint step=%d of %s", step, folder.name)
            return
        if found and not usable:
            raise ModelError(
                f"mirror: none of the {len(found)} checkpoints in {self.url}/{there} can be used. Run again to restart this "
                f"phase."
            )

    def _get(self, name: str, target: Path, sha256: str) -> None:
        """Fetch a file. Raises WrongBytesError if it is damaged or missing, StorageError if the mirror itself is gone."""
        try:
            self._source.get(name, target, sha256)
        except AbsentError as error:
            self._require_readable()
            raise WrongBytesError(f"{self.url}/{name} is missing") from error

    def _fetch_record(self, folder: Path, name: str) -> None:
        content = self._source.read(f"{self._phase_name(folder)}/{name}")
        if content is not None:
            write_bytes(folder / name, content)

    def _remove(self, name: str, move_to: str | None = None) -> None:
        """Remove or move a file. If access is denied, as in a locked bucket, later removals are skipped."""
        if self._removal_denied:
            return
        try:
            if move_to is None:
                self._target.remove(name)
            else:
                self._target.move(name, move_to)
        except AccessError as error:
            self._removal_denied = True
            log.warning("mirror: %s Old checkpoints stay there.", error)


def content_of(path: Path) -> bytes:
    """The content of a file; empty if it does not exist."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def merged_lines(first: bytes, second: bytes) -> bytes:
    """`first`, then the lines of `second` from the first one on that `first` does not have, or not in this order.

    So no line of either is lost, not even one that is there several times, and merging `second` again changes nothing. If one
    begins with the other, the longer one.
    """
    if first.startswith(second):
        return first
    if second.startswith(first):
        return second
    rest = iter(io.BytesIO(first))
    # `in` reads `rest` up to the line that it finds, so the next line is looked for after that one.
    added = list(itertools.dropwhile(lambda line: line in rest, io.BytesIO(second)))
    end = b"\n" if added and not first.endswith(b"\n") else b""
    return b"".join([first, end, *added])
