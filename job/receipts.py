"""Receipts: small files, written last, that say what a finished phase was made from and what it left."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotion.files import digest_of, read_json, sha256_of, sync, write_json

NAME = "receipt.json"
ATTEMPTS, LOG = "attempts.jsonl", "job.log"
"""Files of a run folder: who tried and how it ended; what was said."""
NOT_OUTPUTS = {"checkpoints", "metrics.jsonl", NAME}


@dataclass(frozen=True)
class Receipt:
    """`outputs`: path relative to the folder → {"size", "sha256", "mtime_ns"}; `measured`: seconds and peak memory."""

    folder: Path
    key: str
    outputs: dict[str, dict[str, Any]]
    measured: dict[str, Any]

    @property
    def digest(self) -> str:
        """One digest of all outputs' names and contents: what the keys of later phases are made of."""
        return digest_of({name: facts["sha256"] for name, facts in self.outputs.items()})


def write_receipt(folder: Path, phase: str, key: str, inputs: dict[str, str], measured: dict[str, Any]) -> Receipt:
    """Make every output durable, then say so. Anything in `folder` but checkpoints and metrics is an output."""
    outputs = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not path.is_file() or relative.parts[0] in NOT_OUTPUTS or path.name.startswith("."):
            continue
        sync(path)
        facts = path.stat()
        outputs[relative.as_posix()] = {
            "size": facts.st_size,
            "sha256": sha256_of(path),
            "mtime_ns": facts.st_mtime_ns,
        }
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(path)
    write_json(folder / NAME, {"phase": phase, "key": key, "inputs": inputs, "outputs": outputs, "measured": measured})
    return Receipt(folder, key, outputs, measured)


def discard_damaged(folder: Path) -> None:
    """Remove a receipt that does not hold any more, and the outputs that are not what it says, before a phase begins anew.

    A phase keeps what it finds whole; it has no way to see that a byte changed.
    """
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        outputs = read_json(folder / NAME)["outputs"]
        for name, facts in outputs.items():
            path = folder / name
            if path.is_file() and sha256_of(path) != facts["sha256"]:
                path.unlink()
    (folder / NAME).unlink(missing_ok=True)


def read_receipt(folder: Path, key: str, verify: bool) -> Receipt | None:
    """The receipt of a phase that is finished, made from `key`, and whose outputs are all as they were; else None.

    Size and modification time are trusted; where the time differs (a copy), or with `verify`, the digest decides.
    """
    try:
        record = read_json(folder / NAME)
        receipt = Receipt(folder, record["key"], record["outputs"], record["measured"])
        if receipt.key != key:
            return None
        for name, facts in receipt.outputs.items():
            found = (folder / name).stat()
            if found.st_size != facts["size"]:
                return None
            if (verify or found.st_mtime_ns != facts["mtime_ns"]) and sha256_of(folder / name) != facts["sha256"]:
                return None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    return receipt
