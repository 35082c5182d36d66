"""Receipts: small files, written last, that say what a finished phase was made from and what it left."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotion.files import digest_of, read_json, sha256_of, sync, write_json

NAME = "receipt.json"
LOG = "job.log"
"""In a run folder: what was said."""
METRICS = "metrics.jsonl"
"""In a phase's folder: the numbers told on the way."""
NOT_OUTPUTS = {"checkpoints", METRICS, NAME}


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
        return digest_of_outputs(self.outputs)


def digest_of_outputs(outputs: dict[str, dict[str, Any]]) -> str:
    return digest_of({name: facts["sha256"] for name, facts in outputs.items()})


def write_receipt(
    folder: Path,
    phase: str,
    key: str,
    inputs: dict[str, str],
    measured: dict[str, Any],
    notes: dict[str, Any],
    digests: dict[str, str] | None = None,
) -> Receipt:
    """Make every output durable, then say so. Anything in `folder` but checkpoints and metrics is an output.

    digests: of outputs of which the SHA-256 is known already.
    """
    outputs = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not path.is_file() or relative.parts[0] in NOT_OUTPUTS or path.name.startswith("."):
            continue
        # What is read in place is not ours, and durable already.
        if not path.is_symlink():
            sync(path)
        facts = path.stat()
        outputs[relative.as_posix()] = {
            "size": facts.st_size,
            "sha256": (digests or {}).get(relative.as_posix()) or sha256_of(path),
            "mtime_ns": facts.st_mtime_ns,
        }
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(path)
    record = {"phase": phase, "key": key, "inputs": inputs, "outputs": outputs, "measured": measured, "notes": notes}
    write_json(folder / NAME, record)
    return Receipt(folder, key, outputs, measured)


def is_as_recorded(path: Path, facts: dict[str, Any], verify: bool) -> bool:
    """Whether a file is what a receipt says of it.

    Size and, where recorded, modification time are trusted; where the time differs (a copy), or with `verify`, the digest
    decides.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    if found.st_size != facts["size"]:
        return False
    trusted = not verify and found.st_mtime_ns == facts.get("mtime_ns", found.st_mtime_ns)
    return bool(trusted or sha256_of(path) == facts["sha256"])


def discard_damaged(folder: Path) -> None:
    """Remove a receipt that does not hold any more, and the outputs that are not what it says, before a phase begins anew.

    A phase keeps what it finds whole; it has no way to see that a byte changed.
    """
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        outputs = read_json(folder / NAME)["outputs"]
        for name, facts in outputs.items():
            path = folder / name
            if path.is_file() and not is_as_recorded(path, facts, verify=True):
                path.unlink()
    (folder / NAME).unlink(missing_ok=True)


def parsed(folder: Path, record: Any) -> Receipt:
    """The receipt of the phase in `folder` from its JSON. Raises KeyError or TypeError for another one."""
    if not all(isinstance(facts["sha256"], str) for facts in dict(record["outputs"]).values()):
        raise TypeError("a digest is no text")
    return Receipt(folder, record["key"], record["outputs"], record["measured"])


def read_receipt(folder: Path, key: str, verify: bool) -> Receipt | None:
    """The receipt of a phase that is finished, made from `key`, and whose outputs are all as recorded; else None."""
    try:
        receipt = parsed(folder, read_json(folder / NAME))
        whole = receipt.key == key and all(
            is_as_recorded(folder / name, facts, verify) for name, facts in receipt.outputs.items()
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    return receipt if whole else None
