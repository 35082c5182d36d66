"""`manifest.json`: the contents of a published run and their provenance. It is written and read through one model.
The manifest is written last: a folder without one is not published. This module needs neither torch nor numpy."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from emotion.config import DataConfig
from emotion.data.faults import Fault
from emotion.errors import DataError, EmotionError, first_of, printable
from emotion.files import write_json
from job.run_folder.attempts import ATTEMPTS
from job.run_folder.receipts import RECEIPT
from job.secrets import scrubbed_json
from job.spec.load import load_spec
from job.spec.location import S3, Local, StoredLocation
from job.spec.model import JobSpec
from job.storage.local_folder import LocalFolder
from job.storage.protocol import AbsentError, Storage, WrongBytesError

MANIFEST = "manifest.json"
PREDICTION_FILES = (
    "model/model.safetensors",
    "model/config.json",
    "model/preprocessing.json",
    "model/embedder.safetensors",
    "stack/stack.safetensors",
    "stack/stack.json",
    "stack/intervals.json",
)
"""Files of a published run that `predict` reads besides the manifest. A run without pretrained weights has no embedder; a run of
an earlier version may have no stack or no intervals."""
LIMITS = ("shortest_seconds", "longest_seconds", "silence_db", "largest_peak")  # keys of data that limit a single song


class _Record(BaseModel):
    """The base of all records. It is strict about types and ignores unknown keys: a later version may write more."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", defer_build=True)


class Artifact(_Record):
    """A published file. size: in bytes."""

    size: int
    sha256: str


class PhaseRecord(_Record):
    """The receipt of a phase, with one digest for all outputs. inputs: phase it depends on → key of that phase."""

    key: str
    inputs: dict[str, str]
    measured: dict[str, JsonValue]
    notes: dict[str, Any]
    outputs_sha256: str


class AttemptRecord(_Record):
    """One attempt at the run. began: ISO 8601, UTC; message: of the error that ended it, if there was one; lost_seconds: seconds
    of work after the last file from which the next attempt could resume."""

    attempt: int
    host: str
    pid: int
    began: str
    duration_seconds: float | None
    reason: str | None
    exit_code: int | None
    message: str | None = None
    lost_seconds: float | None = None


class CodeRecord(_Record):
    """Version and digest of the packages, and their git state."""

    version: str
    source_sha256: str
    revision: str | None
    uncommitted_sha256: str | None


class WarmStartRecord(_Record):
    """The published run from which this one started. run: its location, as in the spec."""

    run: str
    name: str
    manifest_sha256: str


class Manifest(_Record):
    """The manifest. spec: JSON, not a JobSpec, because it may be of an earlier version. inputs: `KEY/FILE` → SHA-256. comparable:
    condition → its value, or a list of values if it changed. Runs of one spec under equal conditions have equal bytes."""

    manifest_version: Literal[1]  # raise it when `reproduce` can no longer read older manifests
    name: str
    fingerprint: str
    spec: dict[str, Any]
    init_from: WarmStartRecord | None
    artifacts: dict[str, Artifact]
    left_out: list[Fault]
    warnings: list[dict[str, JsonValue]]
    phases: dict[str, PhaseRecord]
    inputs: dict[str, str]
    seeds: dict[str, int]
    code: CodeRecord
    libraries: dict[str, str | None]
    torch: dict[str, JsonValue]
    python: str
    platform: dict[str, str | None]
    container: dict[str, str | None] | None
    allocator: dict[str, str | None]
    comparable: dict[str, Any]
    attempts: list[AttemptRecord]
    budget: dict[str, JsonValue] | None = None  # of a run with a budget or a price: job/results/provenance.py

    def write(self, path: Path) -> None:
        """Write the manifest, with secrets removed."""
        write_json(path, scrubbed_json(self.model_dump(mode="json", exclude_unset=True)))

    def changed(self, storage: Storage, names: Iterable[str] | None = None) -> list[str]:
        """Artifacts that are missing or have another digest. names: the ones to check; None: all."""

        def is_unchanged(name: str) -> bool:
            artifact = self.artifacts.get(name)
            if artifact is None:
                return False
            with contextlib.suppress(AbsentError, WrongBytesError):
                return storage.digest(name) == artifact.sha256
            return False

        return [name for name in (self.artifacts if names is None else names) if not is_unchanged(name)]

    def problem(self, storage: Storage, names: Iterable[str] | None = None) -> str:
        """`changed` in words: "samples/1.wav is missing, metrics.json differs from manifest.json"; empty if nothing changed."""
        changed = self.changed(storage, names)
        stored = {entry.name for entry in storage.entries()} if changed else set()
        missing = [name for name in changed if name not in stored]
        differing = [name for name in changed if name in stored]
        parts = [f"{first_of(missing)} {'is' if len(missing) == 1 else 'are'} missing"] if missing else []
        parts += [f"{first_of(differing)} {'differs' if len(differing) == 1 else 'differ'} from {MANIFEST}"] if differing else []
        return ", ".join(parts)


def read_manifest(path: Path | S3, reader: str, storage: Storage | None = None) -> Manifest:
    """The manifest in a file. reader: the command or the spec key that names the file, for messages. storage: the file's folder;
    needed for object storage. Raises DataError if the manifest is missing, damaged or of another version; StorageError if it
    cannot be read."""
    content = (storage or LocalFolder(Path(str(path.parent)))).read(path.name)
    if content is None:
        meant = where_published(path.parent) if isinstance(path, Path) else ""
        meant = meant or "The manifest is written last: a job that has not finished has none."
        raise DataError(f"{reader}: there is no {path}. Expected a published run, NAME-KEY12 below published/. {meant}")
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        text = ": ".join([".".join(map(str, problem["loc"])), problem["msg"]]).removeprefix(": ")
        raise DataError(
            f"{reader}: {path} is not a manifest that this version can read ({text}). Copy the run again, or use the "
            f"emotion-job that published it."
        ) from error


def stored_manifest(storage: Storage) -> Manifest | None:
    """The manifest of the run that is published here; None if it is missing or invalid."""
    content = storage.read(MANIFEST)
    with contextlib.suppress(ValidationError):
        return None if content is None else Manifest.model_validate_json(content)
    return None


def verified_manifest(model: Path) -> Manifest | None:
    """The manifest of a published run. model: the folder of the run, or its model/. Raises DataError if a file of model or stack
    does not match the manifest. None without a manifest: the model is then not verified."""
    published = model if (model / MANIFEST).exists() else model.absolute().parent
    if not (published / MANIFEST).exists():
        return None
    manifest = read_manifest(published / MANIFEST, "model")
    problem = manifest.problem(LocalFolder(published), [name for name in PREDICTION_FILES if name in manifest.artifacts])
    if problem:
        raise DataError(f"model: {published}: {problem}. Copy the run again.")
    return manifest


def published_at(spec: JobSpec, run_folder: Path) -> StoredLocation:
    """Where the run is published: DESTINATION/NAME-KEY12, by default in `published/` next to the run folder."""
    return (spec.destination or Local(run_folder.parent / "published")) / run_folder.name


def runs_below(path: Path) -> list[Path]:
    """Published runs in a folder, or in its folder published/, sorted."""
    return sorted(manifest.parent for pattern in ("*", "published/*") for manifest in path.glob(f"{pattern}/{MANIFEST}"))


def where_published(path: Path) -> str:
    """For a path that is not a published run, a sentence that names the run that may be meant: that of a work folder or of a
    phase in it, or the runs below the path. Empty if there is none."""
    for folder in (path.absolute(), path.absolute().parent):
        if (folder / ATTEMPTS).is_file():
            return _where_work_folder_is_published(folder)
    found = runs_below(path)
    return f"It holds published runs: {first_of([printable(run) for run in found], 3)}. Name one of them." if found else ""


def _where_work_folder_is_published(run_folder: Path) -> str:
    said = f"{printable(run_folder)} is the work folder of a run"
    try:
        published = published_at(load_spec(run_folder / "spec.yaml"), run_folder)
    except EmotionError:  # the spec may be of another version
        return f"{said}, whose result is elsewhere: name that. By default it is in published/, beside the work folder."
    if isinstance(published, Local):
        is_published = (published.path / MANIFEST).is_file()
    else:  # no request to object storage for a mere message
        is_published = any(run_folder.glob(f"publish-*/{RECEIPT}"))
    if is_published:
        return f"{said}, whose result is in {printable(published)}: name that."
    return (
        f"{said} that is not published yet: `emotion-job run {printable(run_folder / 'spec.yaml')} --work "
        f"{printable(run_folder.parent)}` resumes it, and prints the folder of its result."
    )


def song_limits(manifest: Manifest | None) -> DataConfig:
    """The limits that a run has set for its songs; the default limits without a manifest."""
    limits = {name: value for name, value in (manifest.spec["data"] if manifest else {}).items() if name in LIMITS}
    return DataConfig.model_validate({"source": "none", **limits})


def dotted(spec: dict[str, Any]) -> dict[str, Any]:
    """Dotted key → value of a spec, such as gan.epochs."""
    found: dict[str, Any] = {}
    for name, value in spec.items():
        found |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return found
