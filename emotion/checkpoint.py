"""State to go on from.

A checkpoint is `step-N.ckpt` and, written after it, `step-N.json` with its size, SHA-256 and whether every number in it is
finite. It exists when its JSON does and the digest matches; the digest is verified before anything is deserialised, and
nothing is ever unpickled beyond tensors and plain values.
"""

import hashlib
import logging
import time
from pathlib import Path
from typing import IO, Any, Protocol, cast

import torch

from emotion.config import CheckpointConfig
from emotion.errors import ModelError
from emotion.files import read_json, sha256_of, write_json, written_atomically

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """A network, optimizer, scaler, average or anything else with these two methods."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Checkpoint:
    """Names a loop's objects once; `restore` and `save` are symmetric.

        checkpoint = Checkpoint(out / "checkpoints", config, generator=G, g_opt=g_opt)
        for step in range(checkpoint.restore(), steps):
            ...
            if checkpoint.due() or should_stop():
                checkpoint.save(step + 1)

    All objects go into one file, so that no two of them can be of different steps.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, **objects: Stateful) -> None:
        self.folder = folder
        self.config = config
        self.objects = objects
        self._last_save = time.monotonic()

    def restore(self) -> int:
        """Load the newest checkpoint that verifies and return its number of steps done; 0 where there is none.

        A damaged one is moved to `damaged/`, named in the log, and the one before is used. Raises ModelError if there were
        checkpoints and none of them is good: starting anew by itself could throw days away.
        """
        found = self._steps()
        for step in reversed(found):
            record = self._verified(step)
            if record is None:
                self._set_aside(step)
                continue
            if not record["finite"]:
                log.warning("checkpoint step=%d holds NaN or infinity: the one before is used", step)
                continue
            state = torch.load(self._data(step), map_location="cpu", weights_only=True)
            if set(state) != set(self.objects):
                raise ModelError(
                    f"checkpoint: {self._data(step)} holds {sorted(state)}, expected {sorted(self.objects)}. It was written "
                    f"by another version; delete {self.folder} to begin this phase anew."
                )
            for name, thing in self.objects.items():
                thing.load_state_dict(state[name])
            log.info("checkpoint restored step=%d", step)
            return step
        if found:
            raise ModelError(
                f"checkpoint: none of the {len(found)} checkpoints in {self.folder} can be used (damaged or not finite). "
                f"Delete the folder to begin this phase anew."
            )
        return 0

    def due(self) -> bool:
        return time.monotonic() - self._last_save >= self.config.every_seconds

    def save(self, step: int) -> None:
        """Make the state after `step` steps durable, then remove checkpoints beyond the newest `keep`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {name: thing.state_dict() for name, thing in self.objects.items()}
        with written_atomically(self._data(step)) as file:
            hashed = _HashingFile(file)
            torch.save(state, cast(IO[bytes], hashed))
        record = {"step": step, "size": hashed.size, "sha256": hashed.digest.hexdigest(), "finite": _is_finite(state)}
        write_json(self._record(step), record)
        self._last_save = time.monotonic()
        self._rotate()

    def _rotate(self) -> None:
        """Keep the newest `keep` and the last finite one. The JSON goes first: without it the data does not exist."""
        steps = self._steps()
        kept = set(steps[-self.config.keep :])
        finite = [step for step in steps if self._says_finite(step)]
        kept.update(finite[-1:])
        for step in steps:
            if step not in kept:
                self._record(step).unlink()
        for data in self.folder.glob("step-*.ckpt"):
            if not data.with_suffix(".json").exists():
                data.unlink()

    def _data(self, step: int) -> Path:
        return self.folder / f"step-{step}.ckpt"

    def _record(self, step: int) -> Path:
        return self.folder / f"step-{step}.json"

    def _steps(self) -> list[int]:
        return sorted(int(path.stem.removeprefix("step-")) for path in self.folder.glob("step-*.json"))

    def _verified(self, step: int) -> dict[str, Any] | None:
        """The record of a checkpoint if its data is what the record says, else None."""
        data = self._data(step)
        try:
            record = read_json(self._record(step))
            good = (
                record["step"] == step
                and isinstance(record["finite"], bool)
                and data.stat().st_size == record["size"]
                and sha256_of(data) == record["sha256"]
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return record if good else None

    def _says_finite(self, step: int) -> bool:
        """By its record alone, which may be damaged: the newest ones have just been read or written, older ones not."""
        try:
            return read_json(self._record(step))["finite"] is True
        except (ValueError, KeyError, TypeError):
            return False

    def _set_aside(self, step: int) -> None:
        damaged = self.folder / "damaged"
        damaged.mkdir(exist_ok=True)
        for path in (self._record(step), self._data(step)):
            if path.exists():
                path.replace(damaged / path.name)
        log.warning("checkpoint step=%d is damaged: moved to %s, the one before is used", step, damaged)


class _HashingFile:
    """Passes writes on and digests them, so that a checkpoint is read only once: when it is restored."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, chunk: bytes) -> int:
        self.digest.update(chunk)
        self.size += len(chunk)
        return self._file.write(chunk)

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
