"""Checkpoint files: list, verify and remove them. No torch, so that the mirror can use it.

A checkpoint is `step-N.ckpt` and, written after it, its record `step-N.json`: step, size, SHA-256, and whether it is finite.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from emotion.files import make_folder, sha256_of


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
    for path in (record_path(folder, step), data_path(folder, step)):
        if path.exists():
            path.replace(damaged / path.name)
    return damaged
