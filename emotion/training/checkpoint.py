"""Checkpoints: the state that a training resumes from. The files and their digests: emotion/training/checkpoint_files.py.

The digest is verified before anything is deserialised. Only tensors and plain values are unpickled.
"""

import errno
import hashlib
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Protocol, Self, cast

import torch
from torch.utils._pytree import tree_leaves

from emotion.config import CheckpointConfig
from emotion.errors import ModelError, StorageError, system_reason
from emotion.files import make_folder, write_json, written_atomically
from emotion.terminal import shown_as
from emotion.training.checkpoint_files import (
    data_path,
    known_steps,
    list_steps,
    move_to_damaged,
    read_latest,
    read_record,
    record_path,
    remove_checkpoint,
    remove_unrecorded,
    verified_record,
    write_latest,
)

log = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stateful(Protocol):
    """A network, optimizer, average or anything else with these two methods."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Checkpoint:
    """Saves and restores the objects of a training loop.

        checkpoint = Checkpoint(out / "checkpoints", config, generator=G, g_opt=g_opt)
        with checkpoint:
            for step in range(checkpoint.restore(), steps):
                ...
                if checkpoint.due() or should_stop():
                    checkpoint.save(step + 1)
                    if should_stop():
                        checkpoint.wait_until_durable()
                        raise Interrupted

    All objects are in one file, so that no two can be of different steps. `save` copies the state to the host and a thread
    writes it. A full or broken disk does not end the training: the previous checkpoint stays, `failure` holds the
    reason, and the next save tries again. `wait_until_durable`, called before a safe stop, raises the failure.

    before: steps of earlier trainings in this folder. Callers count the steps of this training from 0; names of files count
    those of all trainings. is_restored: whether `restore` has found one, which may be of step 0.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, before: int = 0, /, **objects: Stateful) -> None:
        self.folder = folder
        self.config = config
        self.before = before
        self.objects = objects
        self.failure: str | None = None
        self.is_restored = False
        self._last_save = time.monotonic()
        self._durable_step: int | None = None
        self._host_copies: dict[str, torch.Tensor] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[int, Future[bool]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._wait()
        finally:
            self._writer.shutdown()

    def restore(self) -> int:
        """Load the newest checkpoint that verifies and return its number of steps done; 0 where there is none.

        Moves damaged checkpoints to `damaged/`. A silent restart could lose days of work, so raises ModelError if none of the
        checkpoints is usable, and StorageError if an expected one cannot be found. If a folder holds several trainings, call
        `restore` for the first one first. It checks all checkpoints.
        """
        found = [step for step in known_steps(self.folder) if step >= self.before]
        for step in reversed(found):
            record = verified_record(self.folder, step)
            if record is None:
                self._move_to_damaged(step)
                continue
            if not record["finite"]:
                log.warning("checkpoint step=%d holds NaN or infinity: using the previous one", step)
                continue
            data = data_path(self.folder, step)
            state = torch.load(data, map_location="cpu", weights_only=True)
            if set(state) != set(self.objects):
                raise ModelError(
                    f"checkpoint: {data} holds {sorted(state)}, expected {sorted(self.objects)}. It was written by another "
                    f"version; delete {self.folder.parent} to restart this phase."
                )
            try:
                for name, stateful in self.objects.items():
                    stateful.load_state_dict(state[name])
            except (RuntimeError, ValueError, KeyError, TypeError) as error:
                raise ModelError(
                    f"checkpoint: {data} does not fit the networks and optimizers of this version "
                    f"({' '.join(str(error).split())[:200]}). Delete {self.folder.parent} to restart this phase."
                ) from error
            log.info("checkpoint restored step=%d", step, extra=shown_as(f"resumes after step {step - self.before}"))
            self._durable_step, self.is_restored = step, True
            write_latest(self.folder, step)  # later ones are damaged or not finite
            return step - self.before
        if self.before:
            return 0
        if found or read_latest(self.folder):
            raise ModelError(
                f"checkpoint: none of the checkpoints in {self.folder} can be used (damaged or not finite). Delete the folder "
                f"{self.folder.parent} to restart this phase."
            )
        make_folder(self.folder)
        write_latest(self.folder, 0)
        return 0

    def due(self) -> bool:
        """Whether to save now. Raises ModelError where the last checkpoint holds NaN or infinity."""
        if self._writing is not None and self._writing[1].done():
            self._wait()
        return time.monotonic() - self._last_save >= self.config.every_seconds

    def save(self, step: int) -> None:
        """Copy the state after `step` steps and start to write it. Skips a step that is already durable."""
        self._wait()
        step += self.before
        if step == self._durable_step:
            return
        state = {name: self._to_host(stateful.state_dict(), name) for name, stateful in self.objects.items()}
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        self._writing = step, self._writer.submit(self._write, step, state)
        self._last_save = time.monotonic()

    def wait_until_durable(self) -> None:
        """Wait for the last save. Raises StorageError where it failed, which a safe stop must not hide."""
        self._wait()
        if self.failure is not None:
            steps = list_steps(self.folder)
            rest = f"step {steps[-1]} is the newest one that is" if steps else "there is none before it"
            raise StorageError(f"checkpoint: {self.failure}; {rest}. Make room or name another --work, and run again.")

    def _to_host(self, value: Any, name: str) -> Any:
        """The same value with its tensors copied into host buffers, which every save reuses."""
        if isinstance(value, torch.Tensor):
            buffer = self._host_copies.get(name)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._host_copies[name] = buffer
            return buffer.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {key: self._to_host(item, f"{name}/{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._to_host(item, f"{name}/{index}") for index, item in enumerate(value))
        return value

    def _wait(self) -> None:
        if self._writing is None:
            return
        (step, writing), self._writing = self._writing, None
        try:
            finite = writing.result()
        except OSError as error:
            self.failure = f"the state could not be saved: {StorageError.of(error)}"
            log.warning("checkpoint: %s; the training continues", self.failure)
            return
        self.failure, self._durable_step = None, step
        if not finite:
            raise ModelError(
                f"checkpoint: weights or optimizer hold NaN or infinity; the last good state is in {self.folder}. Lower the "
                f"learning rates of this phase, or set precision to fp32."
            )

    def _write(self, step: int, state: dict[str, Any]) -> bool:
        """In the thread: write, read back, remove older checkpoints. Returns whether all is finite. Raises OSError."""
        make_folder(self.folder)
        finite = _is_finite(state)
        try:
            self._write_once(step, state, finite)
        except OSError as error:
            removable = self._removable(step)
            if error.errno not in DISK_FULL or not removable:
                raise
            log.warning("checkpoint: %s; removing steps %s to make room", system_reason(error), removable)
            for older in removable:
                remove_checkpoint(self.folder, older)
            self._write_once(step, state, finite)
        self._rotate()
        return finite

    def _write_once(self, step: int, state: dict[str, Any], finite: bool) -> None:
        with written_atomically(data_path(self.folder, step)) as file:
            hashed = _HashingFile(file)
            try:
                torch.save(state, cast(IO[bytes], hashed))
            except RuntimeError as error:
                # torch's writer drops the error of the disk.
                raise hashed.error or error from error
        record = {"step": step, "size": hashed.size, "sha256": hashed.digest.hexdigest(), "finite": finite}
        write_json(record_path(self.folder, step), record)
        try:
            is_whole = verified_record(self.folder, step) == record
        except OSError:
            is_whole = False
        if not is_whole:
            self._move_to_damaged(step)
            raise OSError(errno.EIO, "the file that was written does not read back", str(data_path(self.folder, step)))
        write_latest(self.folder, step)

    def _removable(self, step: int) -> list[int]:
        """Checkpoints that may be removed while `step` is not durable: all but the newest and the last finite one."""
        others = [other for other in list_steps(self.folder) if other != step]
        finite = [other for other in others if self._is_recorded_finite(other)]
        return [other for other in others if other not in (*others[-1:], *finite[-1:])]

    def _rotate(self) -> None:
        """Keep the newest `keep` and the last finite one; remove files that a killed attempt left unfinished."""
        steps = list_steps(self.folder)
        kept = {*steps[-self.config.keep :], *[step for step in steps if self._is_recorded_finite(step)][-1:]}
        for step in steps:
            if step not in kept:
                remove_checkpoint(self.folder, step)
        remove_unrecorded(self.folder)
        for half_written in self.folder.glob(".step-*.part"):
            half_written.unlink()

    def _is_recorded_finite(self, step: int) -> bool:
        """Whether the record says so. Reading the data again would take too long."""
        record = read_record(self.folder, step)
        return record is not None and record["finite"]

    def _move_to_damaged(self, step: int) -> None:
        damaged = move_to_damaged(self.folder, step)
        log.warning("checkpoint step=%d is damaged: moved to %s, using the previous one", step, damaged)


class _HashingFile:
    """Digests what is written to a file, to compare it with what is read back."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, chunk: bytes) -> int:
        self.digest.update(chunk)
        self.size += len(chunk)
        try:
            return self._file.write(chunk)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _is_finite(state: dict[str, Any]) -> bool:
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
