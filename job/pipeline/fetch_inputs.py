"""Fetches and hashes the other inputs of a spec besides the dataset: weights, a teacher, a run for a warm start, split lists."""

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from emotion.config import InitConfig, Part, VitConfig
from emotion.data.leaks import SEEN, TRAINED
from emotion.data.splits import Split
from emotion.errors import DataError, StorageError, system_reason
from emotion.files import digest_of, make_folder, sha256_of, write_bytes
from job.pipeline.warm_start import files_used, verified_digests, warm_start_manifest
from job.preemption import StopRequest
from job.results.manifest import MANIFEST
from job.run_folder.lease import leased
from job.spec.location import S3, Local, StoredLocation
from job.spec.model import JobSpec
from job.storage.local_folder import LocalFolder, refuse_folder
from job.storage.open import open_storage
from job.storage.protocol import AbsentError, WrongBytesError
from job.storage.transfer import is_same_file, require_space

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FetchedInputs:
    """Local paths of the inputs; None for those that the spec does not name. A local path of the spec is used in place.
    digests: file → hex SHA-256 when it was first read; the keys, the manifest and the loading of the file use the same one."""

    weights: Path | None
    warm_start_run: Path | None
    teacher: Path | None = None
    digests: dict[Path, str] = field(default_factory=dict, compare=False)

    def digest(self, path: Path) -> str:
        """Hex SHA-256 of a file that the spec names. Raises StorageError."""
        if path not in self.digests:
            self.digests[path] = _digest_of_file(path)
        return self.digests[path]

    def require_unchanged(self, *paths: Path | None) -> None:
        """Raise DataError if a file has changed since it was first read."""
        for path in paths:
            if path is not None and path in self.digests and _digest_of_file(path) != self.digests[path]:
                raise DataError(
                    f"{path}: changed while the job ran: expected the SHA-256 {self.digests[path]}. Put the file back, or run it "
                    f"again to use the new one."
                )

    def vit_config(self, spec: JobSpec) -> VitConfig:
        """The section `vit` with local paths for teacher and weights. weights: a file, or the model of a warm start's run."""
        weights = self.warm_start_run / "model" if spec.init_from and spec.init_from.vit and self.warm_start_run else self.weights
        paths = {"weights": weights, "teacher": self.teacher}
        return spec.vit.model_copy(update={key: str(path) for key, path in paths.items() if path})

    def init_config(self, spec: JobSpec) -> InitConfig | None:
        """The section `init_from` with a local path as its run."""
        return spec.init_from.model_copy(update={"run": str(self.warm_start_run)}) if spec.init_from else None


def fetch_inputs(spec: JobSpec, scratch: Path, should_stop: StopRequest) -> FetchedInputs:
    """Fetch inputs in object storage to SCRATCH/fetched. Raises DataError, StorageError, Interrupted.
    Copies of earlier attempts are reused: files of a run by their digests, others by size and ETag."""
    run = spec.warm_start_run
    for key, path in named_files(spec).items():
        refuse_folder(path, key)

    def fetched(location: StoredLocation | None, key: str) -> Path | None:
        return _fetched_file(location, key, spec, scratch, should_stop) if isinstance(location, S3) else _path(location)

    return FetchedInputs(
        weights=fetched(spec.weights_file, "vit.weights"),
        teacher=fetched(spec.teacher, "vit.teacher"),
        warm_start_run=_fetched_run(run, spec, scratch, should_stop) if isinstance(run, S3) else _path(run),
    )


def _path(location: Local | None) -> Path | None:
    return location.path if location else None


def _fetched_file(location: S3, key: str, spec: JobSpec, scratch: Path, should_stop: StopRequest) -> Path:
    storage = open_storage(location.parent, spec.storage, should_stop)
    try:
        entry = storage.entry(location.name)
    except AbsentError as error:
        raise DataError(f"{key}: {str(error).removeprefix('storage: ')}") from error
    file = scratch / "fetched" / digest_of([str(location), entry.tag, entry.size])[:12] / location.name
    make_folder(file.parent)
    with leased(file.parent, should_stop, wait=True):
        if not is_same_file(file, entry):
            require_space(file.parent, entry.size, 1)
            log.info("%s: fetching %s, %.0f MB", key, location, entry.size / 1e6)
            storage.get(location.name, file, None, entry)
        # A model that a job has published: also the files that say how to make its inputs, and which songs it has seen.
        if key == "vit.weights" and location.name == "model.safetensors":
            for name in ("preprocessing.json", SEEN, TRAINED):
                content = storage.read(name)
                if content is not None:
                    write_bytes(file.with_name(name), content)
    return file


def _fetched_run(location: S3, spec: JobSpec, scratch: Path, should_stop: StopRequest) -> Path:
    storage = open_storage(location, spec.storage, should_stop)
    raw = storage.read("manifest.json")
    if raw is None:
        raise DataError(
            f"init_from: there is no {location}/manifest.json. Expected a published run, whose manifest comes last; name the "
            f"prefix NAME-KEY12 below the destination of that run."
        )
    assert spec.init_from is not None
    folder = scratch / "fetched" / hashlib.sha256(raw).hexdigest()[:12]
    make_folder(folder)
    with leased(folder, should_stop, wait=True):
        write_bytes(folder / "manifest.json", raw)
        manifest = warm_start_manifest(folder)
        for part in get_args(Part):
            # A file that the manifest lacks is an error in the phase that needs it; not all runs have an embedder.
            for name in files_used(spec.init_from, part):
                if name in manifest.artifacts and manifest.changed(LocalFolder(folder), [name]):
                    make_folder((folder / name).parent)
                    log.info("init_from: fetching %s/%s", location, name)
                    try:
                        storage.get(name, folder / name, manifest.artifacts[name].sha256)
                    except (AbsentError, WrongBytesError) as error:
                        raise DataError(f"init_from: {str(error).removeprefix('storage: ')}") from error
    return folder


def split_lists(spec: JobSpec) -> dict[str, Path]:
    """Split → file with the list of its song ids; empty if the spec names no lists."""
    folder = spec.split.lists
    return {name: Path(folder) / f"{name}.txt" for name in get_args(Split)} if folder else {}


def split_list_digests(spec: JobSpec, fetched: FetchedInputs) -> dict[str, str]:
    return {name: fetched.digest(path) for name, path in split_lists(spec).items()}


def out_of_fold_file(spec: JobSpec) -> Path | None:
    return Path(spec.split.out_of_fold) if spec.split.out_of_fold else None


def named_files(spec: JobSpec) -> dict[str, Path]:
    """Key of the spec → local path that must be a file. vit.weights is not included, because it may be a folder."""
    named = {"data.manifest": spec.dataset_manifest, "vit.teacher": spec.teacher}
    named |= {"init_from.run": spec.warm_start_run / MANIFEST if spec.warm_start_run else None}
    files = {key: location.path for key, location in named.items() if isinstance(location, Local)}
    files |= {f"split.lists ({name})": path for name, path in split_lists(spec).items()}
    if (path := out_of_fold_file(spec)) is not None:
        files["split.out_of_fold"] = path
    return files


def out_of_fold_digest(spec: JobSpec, fetched: FetchedInputs) -> dict[str, str]:
    """Key part of the phases of a final model that read out_of_fold.json; empty without it, so other specs keep their keys."""
    path = out_of_fold_file(spec)
    return {"out_of_fold": fetched.digest(path)} if path else {}


def named_file_digests(spec: JobSpec, fetched: FetchedInputs) -> dict[str, str]:
    """`KEY` or `KEY/FILE` → SHA-256 of all these inputs, for the manifest. KEY: key of the spec."""
    digests = {f"split.lists/{name}.txt": digest for name, digest in split_list_digests(spec, fetched).items()}
    digests |= {f"split.{name}": digest for name, digest in out_of_fold_digest(spec, fetched).items()}
    if fetched.weights:
        digests["vit.weights"] = fetched.digest(fetched.weights)
    if fetched.teacher:
        digests["vit.teacher"] = fetched.digest(fetched.teacher)
    for part in get_args(Part):
        digests |= {f"init_from.run/{name}": digest for name, digest in _warm_start_digests(spec, fetched, part).items()}
    return digests


def key_digests(spec: JobSpec, fetched: FetchedInputs, part: Part) -> dict[str, Any]:
    """Key parts of the GAN or the ViT. An absent input or budget adds nothing, so that specs without it keep their keys."""
    used = _warm_start_digests(spec, fetched, part)
    parts: dict[str, Any] = {}
    if spec.init_from is not None and used:
        parts["init_from"] = {"normalisation": spec.init_from.normalisation, **used}
    if part == "vit" and fetched.weights:
        parts["weights"] = fetched.digest(fetched.weights)
    if part == "vit" and fetched.teacher:
        parts["teacher"] = fetched.digest(fetched.teacher)
    if spec.budget.minutes is not None:
        parts["budget_minutes"] = spec.budget.minutes
    return parts | (out_of_fold_digest(spec, fetched) if part == "vit" else {})


def _warm_start_digests(spec: JobSpec, fetched: FetchedInputs, part: Part) -> dict[str, str]:
    if spec.init_from is None or fetched.warm_start_run is None:
        return {}
    return verified_digests(spec.init_from, fetched.warm_start_run, part)


def _digest_of_file(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is no file, but the spec names it as one. Correct the spec.")
    try:
        return sha256_of(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DataError(f"{path}: {error.strerror}, but the spec names it. Correct the spec or put the file there.") from error
    except OSError as error:
        text = f"{path}: {system_reason(error)}, but the spec names it. Correct the spec or put the file there."
        raise StorageError.of(error, text) from error
