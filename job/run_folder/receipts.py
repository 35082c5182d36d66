"""Receipts: small files, written last, that record the inputs and outputs of a finished phase."""

import contextlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from emotion.files import digest_of, read_json, sha256_of, sync, write_json
from emotion.training.checkpoint_files import list_steps
from emotion.training.progress_files import METRICS as METRICS
from emotion.training.progress_files import PROGRESS

RECEIPT = "receipt.json"
LOG = "job.log"  # in a run folder: the log of all attempts
NOT_OUTPUTS = {"checkpoints", METRICS, PROGRESS, RECEIPT}


@dataclass(frozen=True)
class FileRecord:
    """Size, hex SHA-256 and, in a receipt, modification time of a file, as recorded when it was written."""

    size: int
    sha256: str
    mtime_ns: int | None = None

    def matches(self, path: Path, verify: bool) -> bool:
        """Whether the file at `path` is the recorded one. Size and, if recorded, modification time are trusted; if the time
        differs (as for a copy), or with `verify`, the digest decides."""
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        if found.st_size != self.size:
            return False
        trusted = not verify and self.mtime_ns in (None, found.st_mtime_ns)
        return trusted or sha256_of(path) == self.sha256


@dataclass(frozen=True)
class Receipt:
    """The receipt of a phase. outputs: path relative to the folder → record; measured: seconds and peak memory; notes: notes of
    the phase, for the manifest."""

    folder: Path
    key: str
    outputs: dict[str, FileRecord]
    measured: dict[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """One digest of the names and contents of all outputs. The keys of later phases are made from it."""
        return digest_of({name: record.sha256 for name, record in self.outputs.items()})

    def changed_output(self, verify: bool) -> Path | None:
        """The first output that is not as recorded, see `FileRecord.matches`; None if all are."""
        for name, record in self.outputs.items():
            if not record.matches(self.folder / name, verify):
                return self.folder / name
        return None


def write_receipt(
    folder: Path,
    phase: str,
    key: str,
    inputs: dict[str, str],
    measured: dict[str, Any],
    notes: dict[str, Any],
    digests: dict[str, str] | None = None,
) -> Receipt:
    """Make every output durable, then write the receipt. All files in `folder` except checkpoints and reports are outputs.
    inputs: phase → key, for the phases it depends on. notes: additions for the manifest. digests: known SHA-256 of outputs."""
    outputs = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not path.is_file() or relative.parts[0] in NOT_OUTPUTS or path.name.startswith("."):
            continue
        if not path.is_symlink():  # a dataset that is read in place is not ours, and already durable
            sync(path)
        found = path.stat()
        sha256 = (digests or {}).get(relative.as_posix()) or sha256_of(path)
        outputs[relative.as_posix()] = FileRecord(found.st_size, sha256, found.st_mtime_ns)
    # The reports of a training are published, too, so they must be durable.
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir() or path == folder / METRICS)]:
        sync(path)
    written = {name: asdict(record) for name, record in outputs.items()}
    content = {"phase": phase, "key": key, "inputs": inputs, "outputs": written, "measured": measured, "notes": notes}
    write_json(folder / RECEIPT, content)
    return Receipt(folder, key, outputs, measured, notes)


def parse_receipt(folder: Path, content: Any) -> Receipt:
    """The receipt of the phase in `folder` from its JSON. Raises KeyError or TypeError if that is not a receipt."""
    outputs = {name: FileRecord(**record) for name, record in dict(content["outputs"]).items()}
    if not all(isinstance(record.sha256, str) for record in outputs.values()):
        raise TypeError("a digest is not text")
    return Receipt(folder, content["key"], outputs, content["measured"], dict(content["notes"]))


def read_receipt(folder: Path, key: str, verify: bool) -> Receipt | None:
    """The receipt of a phase, if the phase is finished, has this key, and all its outputs are as recorded; else None."""
    try:
        receipt = parse_receipt(folder, read_json(folder / RECEIPT))
        finished = receipt.key == key and receipt.changed_output(verify) is None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    return receipt if finished else None


def discard_damaged(folder: Path) -> None:
    """Before a phase runs again: remove a receipt that is no longer valid, and the outputs that differ from it.
    A phase keeps files that look complete; it cannot see that a byte has changed."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        for name, record in parse_receipt(folder, read_json(folder / RECEIPT)).outputs.items():
            path = folder / name
            if path.is_file() and not record.matches(path, verify=True):
                path.unlink()
        # A finished phase has no checkpoints. Without any, the training starts over, and so do its metrics.
        if not list_steps(folder / "checkpoints"):
            (folder / METRICS).unlink(missing_ok=True)
    (folder / RECEIPT).unlink(missing_ok=True)
