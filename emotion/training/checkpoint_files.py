"""Checkpoints as files: which there are in a folder, and which of them are whole. Without torch, so that they can be copied too.

A checkpoint is `step-N.ckpt` and, written after it, `step-N.json` with its step, size, SHA-256 and whether every number in it
is finite. It exists when its JSON does and the digest matches.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from emotion.files import sha256_of


def data_name(step: int) -> str:
    return f"step-{step}.ckpt"


def record_name(step: int) -> str:
    return f"step-{step}.json"


def data_path(folder: Path, step: int) -> Path:
    return folder / data_name(step)


def record_path(folder: Path, step: int) -> Path:
    return folder / record_name(step)


def steps_in(folder: Path) -> list[int]:
    """The steps of all checkpoints whose JSON is there, whole or damaged, in ascending order.

    Raises OSError for a folder that is there and cannot be read: it must not pass for an empty one.
    """
    try:
        names = os.listdir(folder)  # noqa: PTH208  pathlib's way hides errors
    except FileNotFoundError:
        return []
    return steps_among(names)


def steps_among(names: Iterable[str]) -> list[int]:
    """The same of the names of files in a folder."""
    return sorted(int(match[1]) for match in (re.fullmatch(r"step-(\d+)\.json", name) for name in names) if match)


def read_record(folder: Path, step: int) -> dict[str, Any] | None:
    """What the JSON of a checkpoint says, None where that is nothing sensible. The data is not looked at."""
    try:
        return parsed_record(record_path(folder, step).read_bytes(), step)
    except FileNotFoundError:
        return None


def parsed_record(raw: bytes, step: int) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(raw)
        sensible = (
            record["step"] == step
            and isinstance(record["finite"], bool)
            and isinstance(record["size"], int)
            and isinstance(record["sha256"], str)
        )
    except (ValueError, KeyError, TypeError):
        return None
    return record if sensible else None


def verified(folder: Path, step: int) -> dict[str, Any] | None:
    """The record of a checkpoint if its data is what the record says, else None."""
    record, data = read_record(folder, step), data_path(folder, step)
    if record is None:
        return None
    try:
        good = data.stat().st_size == record["size"] and sha256_of(data) == record["sha256"]
    except FileNotFoundError:
        return None
    return record if good else None


def remove(folder: Path, step: int) -> None:
    """The JSON goes first: without it the data does not exist."""
    record_path(folder, step).unlink(missing_ok=True)
    data_path(folder, step).unlink(missing_ok=True)


def remove_unrecorded(folder: Path) -> None:
    """Remove data without a JSON: of a save or copy that did not come to its end."""
    for data in folder.glob("step-*.ckpt"):
        if not data.with_suffix(".json").exists():
            data.unlink(missing_ok=True)


def set_aside(folder: Path, step: int) -> Path:
    """Move a damaged checkpoint where it is none any more; returns that folder."""
    damaged = folder / "damaged"
    damaged.mkdir(exist_ok=True)
    for path in (record_path(folder, step), data_path(folder, step)):
        if path.exists():
            path.replace(damaged / path.name)
    return damaged
