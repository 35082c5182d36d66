"""What is used as files and lies in a store, copied near: weights, what is used of an earlier run, runs to collect."""

import hashlib
import logging
from pathlib import Path
from typing import get_args

from emotion.config import InitConfig, Part
from emotion.errors import StorageError
from emotion.files import digest_of, make_folder, write_bytes
from job.pipeline.warm_start import files_used, read_manifest
from job.preemption import StopRequest
from job.run_folder.lease import leased
from job.run_folder.receipts import is_as_recorded
from job.spec.location import S3
from job.spec.model import JobSpec
from job.storage.open import place_of
from job.storage.transfer import is_same_file, require_space

log = logging.getLogger(__name__)


def with_near_files(spec: JobSpec, scratch: Path, should_stop: StopRequest) -> JobSpec:
    """The same spec, with what it names in a store near; it says the same still. Raises StorageError, Interrupted.

    What is here from an earlier time is used again: files of a run by their digests, weights by their version in the store.
    """
    changed: dict[str, object] = {}
    if spec.init_from is not None and spec.init_from.run.startswith(S3):
        changed["init_from"] = _run_near(spec.init_from, spec, scratch, should_stop)
    if spec.vit.weights.startswith(S3):
        parent, _, name = spec.vit.weights_file.rpartition("/")
        place = place_of(parent, spec.storage, should_stop)
        entry = place.entry(name)
        file = scratch / "near" / digest_of([spec.vit.weights_file, entry.tag, entry.size])[:12] / name
        make_folder(file.parent)
        with leased(file.parent, should_stop, wait=True):
            if not is_same_file(file, entry):
                require_space(file.parent, entry.size, 1)
                log.info("weights: fetching %s, %.0f MB", spec.vit.weights_file, entry.size / 1e6)
                place.get(name, file, None, entry)
        changed["vit"] = spec.vit.brought_to(file)
    return spec.model_copy(update=changed) if changed else spec


def _run_near(init: InitConfig, spec: JobSpec, scratch: Path, should_stop: StopRequest) -> InitConfig:
    place = place_of(init.run, spec.storage, should_stop)
    raw = place.read("manifest.json")
    if raw is None:
        raise StorageError(
            f"init_from: there is no {init.run}/manifest.json. Expected a published run, whose manifest comes last; name the "
            f"prefix NAME-KEY12 below the destination of that run."
        )
    folder = scratch / "near" / hashlib.sha256(raw).hexdigest()[:12]
    make_folder(folder)
    init = init.brought_to(folder)
    with leased(folder, should_stop, wait=True):
        write_bytes(folder / "manifest.json", raw)
        artifacts = read_manifest(init)["artifacts"]
        for part in get_args(Part):
            # A file that the manifest lacks is told of by whoever needs it.
            for name in files_used(init, part):
                if name in artifacts and not is_as_recorded(folder / name, artifacts[name], verify=True):
                    make_folder((folder / name).parent)
                    log.info("init_from: fetching %s/%s", init.run, name)
                    place.get(name, folder / name, artifacts[name]["sha256"])
    return init
