"""Checkpoint files: list, verify and remove them. No torch, so that the mirror can use it.

A checkpoint is `step-N.ckpt` and, written after it, its record `step-N.json`: step, size, SHA-256, and whether it is finite.
The file `latest`, written last, holds the step of the newest one; 0 before the first. It is needed because the directory listing
of a network file system can be stale, and an empty listing would restart a training.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from emotion.errors import StorageError
from emotion.files import make_folder, read_json_lines, sha256_of, sync, write_json
from emotion.training.progress_files import METRICS

LATEST = "latest"
LOOK_AGAIN_SECONDS = (0.2, 0.5, 1.0, 2.0)


def data_name(step: int) -> str:
    return f"step-{step}.ckpt"


def record_name(step: int) -> str:
    return f"step-{step}.json"


def data_path(folder: Path, step: int) -> Path:
    return folder / data_name(step)


def record_path(folder: Path, step: int) -> Path:
    return folder / record_name(step)


def list_steps(folder: Path) -> list[int]:
    """The steps of all checkpoints with a record, whole or damaged, in ascending order.

    Raises OSError for a folder that exists and cannot be read: it must not pass for an empty one.
    """
    try:
        names = os.listdir(folder)  # noqa: PTH208  Path.glob hides errors
    except FileNotFoundError:
        return []
    return steps_from_names(names)


def steps_from_names(names: Iterable[str]) -> list[int]:
    """The same from the names of files in a folder."""
    return sorted(int(match[1]) for match in (re.fullmatch(r"step-(\d+)\.json", name) for name in names) if match)


def known_steps(folder: Path, pauses: Iterable[float] = LOOK_AGAIN_SECONDS) -> list[int]:
    """The same as `list_steps`, but empty only where no checkpoint is expected: none was made, or all are in `damaged/`.

    Raises StorageError where `latest` names a step after those in the list that is not found by its name, and where there is
    neither a checkpoint nor `latest`, but the metrics beside the folder have steps. It looks again after each of the pauses.
    """

    def look() -> tuple[list[int], str | None]:
        steps, latest = list_steps(folder), read_latest(folder)
        if latest is None:
            reported = 0 if steps else _reported_step(folder.parent / METRICS)
            return steps, f"{folder.parent / METRICS} has step {reported}" if reported else None
        # An earlier version resumed from a smaller step and did not update `latest`.
        if latest <= max(steps, default=0) or (folder / "damaged" / record_name(latest)).exists():
            return steps, None
        if record_path(folder, latest).exists():
            return sorted([*steps, latest]), None
        return steps, f"{folder / LATEST} names step {latest}"

    return complete_list(look, str(folder), pauses)


def complete_list(
    look: Callable[[], tuple[list[int], str | None]], folder: str, pauses: Iterable[float] = LOOK_AGAIN_SECONDS
) -> list[int]:
    """The steps that `look` finds once nothing is missing. look: (steps, what shows that one is missing). Raises StorageError."""
    for pause in (*pauses, None):
        steps, missing = look()
        if missing is None:
            return steps
        if pause is not None:
            time.sleep(pause)
    found = f"the newest checkpoint that can be found is step {steps[-1]}" if steps else "no checkpoint can be found"
    resume = f" To resume from step {steps[-1]}, delete {folder}/{LATEST}." if steps else ""
    raise StorageError(
        f"checkpoint: {missing}, but {found}: the list of {folder} is out of date, or files were deleted. Run it again.{resume} "
        f"To restart this phase, delete the folder around it; a training never restarts by itself."
    )


def read_latest(folder: Path) -> int | None:
    """The step in `latest`; None where it is missing, as in folders of earlier versions, or damaged."""
    try:
        return parse_latest((folder / LATEST).read_bytes())
    except FileNotFoundError:
        return None


def parse_latest(raw: bytes | None) -> int | None:
    try:
        step = json.loads(raw or b"")["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def write_latest(folder: Path, step: int) -> None:
    """step: of the newest checkpoint, which is durable; 0 before the first."""
    if read_latest(folder) != step:
        write_json(folder / LATEST, latest_record(step))


def latest_record(step: int) -> dict[str, int]:
    return {"step": step}


def _reported_step(metrics: Path) -> int:
    """The largest step in a file of metrics; 0 where it has none."""
    steps = [record.get("step") for record in read_json_lines(metrics)]
    return max((step for step in steps if isinstance(step, int)), default=0)


def read_record(folder: Path, step: int) -> dict[str, Any] | None:
    """The record of a checkpoint, or None where it is missing or damaged. The data is not read."""
    try:
        return parse_record(record_path(folder, step).read_bytes(), step)
    except FileNotFoundError:
        return None


def parse_record(raw: bytes, step: int) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(raw)
        types = {"finite": bool, "size": int, "sha256": str}
        is_valid = record["step"] == step and all(isinstance(record[name], kind) for name, kind in types.items())
    except (ValueError, KeyError, TypeError):
        return None
    return record if is_valid else None


def verified_record(folder: Path, step: int) -> dict[str, Any] | None:
    """The record of a checkpoint if its data matches it, else None."""
    record, data = read_record(folder, step), data_path(folder, step)
    if record is None:
        return None
    try:
        matches = data.stat().st_size == record["size"] and sha256_of(data) == record["sha256"]
    except FileNotFoundError:
        return None
    return record if matches else None


def remove_checkpoint(folder: Path, step: int) -> None:
    """Remove the record first: without it the data does not count."""
    record_path(folder, step).unlink(missing_ok=True)
    data_path(folder, step).unlink(missing_ok=True)


def remove_unrecorded(folder: Path) -> None:
    """Remove data without a record, left by a save or copy that was interrupted."""
    for data in folder.glob("step-*.ckpt"):
        if not data.with_suffix(".json").exists():
            data.unlink(missing_ok=True)


def move_to_damaged(folder: Path, step: int) -> Path:
    """Move a damaged checkpoint to `damaged/`; returns that folder."""
    damaged = folder / "damaged"
    make_folder(damaged)
    if read_latest(folder) == step:
        write_latest(folder, max((other for other in list_steps(folder) if other != step), default=step))
    for path in (record_path(folder, step), data_path(folder, step)):
        if path.exists():
            path.replace(damaged / path.name)
    sync(damaged)
    return damaged


def remove_all(folder: Path) -> None:
    """Remove the checkpoints of a finished phase, `latest` first, so that a kill meanwhile causes no error later."""
    (folder / LATEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
