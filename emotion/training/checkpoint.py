"""State to go on from.

A checkpoint is two files (emotion/training/checkpoint_files.py): the data, and a JSON with its digest, which is verified
before anything is deserialised. Nothing is ever unpickled beyond tensors and plain values.
"""

import errno
import hashlib
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self, cast

import torch

from emotion.config import CheckpointConfig
from emotion.errors import ModelError, StorageError
from emotion.files import make_folder, write_json, written_atomically
from emotion.training.checkpoint_files import (
    data_path,
    read_record,
    record_path,
    remove,
    remove_unrecorded,
    set_aside,
    steps_in,
    verified,
)

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stateful(Protocol):
    """A network, optimizer, scaler, average or anything else with these two methods."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Checkpoint:
    """Names a loop's objects once; `restore` and `save` are symmetric.

        checkpoint = Checkpoint(out / "checkpoints", config, generator=G, g_opt=g_opt)
        with checkpoint:
            for step in range(checkpoint.restore(), steps):
                ...
                if checkpoint.due() or should_stop():
                    checkpoint.save(step + 1)
                    if should_stop():
                        checkpoint.leave()
                        raise Interrupted

    All objects go into one file, so that no two of them can be of different steps. `save` copies the state to the host and
    leaves writing to a thread: the loop waits for the copy alone, or for the write before where that still goes on.

    A disk that is full or broken does not end the training: the checkpoint before stays, `failure` says what happened, and the
    next save tries anew. `leave`, which a safe stop ends with, raises it.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, **objects: Stateful) -> None:
        self.folder = folder
        self.config = config
        self.objects = objects
        self.failure: str | None = None
        self._last_save = time.monotonic()
        self._saved: int | None = None
        self._copies: dict[str, torch.Tensor] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[int, Future[bool]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._wait()
        finally:
            self._writer.shutdown()

    def restore(self) -> int:
        """Load the newest checkpoint that verifies and return its number of steps done; 0 where there is none.

        A damaged one is moved to `damaged/`, named in the log, and the one before is used. Raises ModelError if there were
        checkpoints and none of them is good: starting anew by itself could throw days away.
        """
        found = steps_in(self.folder)
        for step in reversed(found):
            record = verified(self.folder, step)
            if record is None:
                self._set_aside(step)
                continue
            if not record["finite"]:
                log.warning("checkpoint step=%d holds NaN or infinity: the one before is used", step)
                continue
            data = data_path(self.folder, step)
            state = torch.load(data, map_location="cpu", weights_only=True)
            if set(state) != set(self.objects):
                raise ModelError(
                    f"checkpoint: {data} holds {sorted(state)}, expected {sorted(self.objects)}. It was written by another "
                    f"version; delete {self.folder} to begin this phase anew."
                )
            for name, thing in self.objects.items():
                thing.load_state_dict(state[name])
            log.info("checkpoint restored step=%d", step)
            self._saved = step
            return step
        if found:
            raise ModelError(
                f"checkpoint: none of the {len(found)} checkpoints in {self.folder} can be used (damaged or not finite). "
                f"Delete the folder to begin this phase anew."
            )
        return 0

    def due(self) -> bool:
        """Whether to save now. Raises ModelError where the last one saved was found to hold NaN or infinity."""
        if self._writing is not None and self._writing[1].done():
            self._wait()
        return time.monotonic() - self._last_save >= self.config.every_seconds

    def save(self, step: int) -> None:
        """Copy the state after `step` steps, and begin to make it durable. One that is durable already stays as it is."""
        self._wait()
        if step == self._saved:
            return
        state = {name: self._copied(thing.state_dict(), name) for name, thing in self.objects.items()}
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        self._writing = step, self._writer.submit(self._write, step, state)
        self._last_save = time.monotonic()

    def leave(self) -> None:
        """Wait until the last save is durable. Raises StorageError where it could not be: what a safe stop must not hide."""
        self._wait()
        if self.failure is not None:
            steps = steps_in(self.folder)
            rest = f"step {steps[-1]} is the newest one that is" if steps else "there is none before it"
            raise StorageError(f"checkpoint: {self.failure}; {rest}. Make room or name another --work, and run again.")

    def _copied(self, value: Any, name: str) -> Any:
        """The same value with its tensors copied into host buffers that every save uses again."""
        if isinstance(value, torch.Tensor):
            buffer = self._copies.get(name)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._copies[name] = buffer
            return buffer.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {key: self._copied(item, f"{name}/{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copied(item, f"{name}/{place}") for place, item in enumerate(value))
        return value

    def _wait(self) -> None:
        if self._writing is None:
            return
        (step, writing), self._writing = self._writing, None
        try:
            finite = writing.result()
        except OSError as error:
            self.failure = f"the state could not be saved: {error.strerror or error}"
            log.warning("checkpoint: %s; the training goes on", self.failure)
            return
        self.failure, self._saved = None, step
        if not finite:
            raise ModelError(
                f"checkpoint: weights or optimizer hold NaN or infinity; the last good state is in {self.folder}. Lower the "
                f"learning rates of this phase, or set precision to fp32."
            )

    def _write(self, step: int, state: dict[str, Any]) -> bool:
        """In the thread: make it durable, read it back, remove older ones; whether all is finite. Raises OSError."""
        make_folder(self.folder)
        finite = _is_finite(state)
        try:
            self._write_once(step, state, finite)
        except OSError as error:
            spare = self._spare(step)
            if error.errno not in FULL or not spare:
                raise
            log.warning("checkpoint: %s; makes room by removing steps %s", error.strerror, spare)
            for older in spare:
                remove(self.folder, older)
            self._write_once(step, state, finite)
        self._rotate()
        return finite

    def _write_once(self, step: int, state: dict[str, Any], finite: bool) -> None:
        with written_atomically(data_path(self.folder, step)) as file:
            hashed = _HashingFile(file)
            try:
                torch.save(state, cast(IO[bytes], hashed))
            except RuntimeError as error:
                # What the disk said is lost on the way through torch's writer.
                raise hashed.error or error from error
        record = {"step": step, "size": hashed.size, "sha256": hashed.digest.hexdigest(), "finite": finite}
        write_json(record_path(self.folder, step), record)
        try:
            is_whole = verified(self.folder, step) == record
        except OSError:
            is_whole = False
        if not is_whole:
            self._set_aside(step)
            raise OSError(errno.EIO, "what was written does not read back", str(data_path(self.folder, step)))

    def _spare(self, step: int) -> list[int]:
        """What may go while `step` is not durable yet: all others but the newest of them and the last finite one."""
        others = [other for other in steps_in(self.folder) if other != step]
        finite = [other for other in others if self._says_finite(other)]
        return [other for other in others if other not in (*others[-1:], *finite[-1:])]

    def _rotate(self) -> None:
        """Keep the newest `keep` and the last finite one, and nothing that a killed attempt has left half-done."""
        steps = steps_in(self.folder)
        kept = set(steps[-self.config.keep :])
        finite = [step for step in steps if self._says_finite(step)]
        kept.update(finite[-1:])
        for step in steps:
            if step not in kept:
                remove(self.folder, step)
        remove_unrecorded(self.folder)
        for half_written in self.folder.glob(".step-*.part"):
            half_written.unlink()

    def _says_finite(self, step: int) -> bool:
        """By its record alone: the newest ones have just been read or written, older ones not."""
        record = read_record(self.folder, step)
        return record is not None and record["finite"]

    def _set_aside(self, step: int) -> None:
        log.warning(
            "checkpoint step=%d is damaged: moved to %s, the one before is used", step, set_aside(self.folder, step)
        )


class _HashingFile:
    """Passes writes on and digests them: what was meant to be written, to compare with what is read back."""

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


def _is_finite(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(_is_finite(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_is_finite(item) for item in value)
    return True
