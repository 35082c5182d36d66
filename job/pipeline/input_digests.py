"""What the spec names beside the dataset, by content: parts of phase keys, and entries of the manifest."""

from pathlib import Path
from typing import Any, get_args

from emotion.config import Part
from emotion.data.splits import Split
from emotion.errors import StorageError
from emotion.files import sha256_of
from job.pipeline.fetch_inputs import FetchedInputs
from job.pipeline.warm_start import warm_start_digests
from job.spec.model import JobSpec


def split_list_digests(spec: JobSpec) -> dict[str, str]:
    """Split → SHA-256 of its list of song ids, where the spec names lists."""
    folder = spec.split.lists
    return {name: digest_of_file(Path(folder) / f"{name}.txt") for name in get_args(Split)} if folder else {}


def initial_run_digests(spec: JobSpec, fetched: FetchedInputs, part: Part) -> dict[str, str]:
    """Name → SHA-256 of the files of an earlier run that GAN or ViT use."""
    if spec.init_from is None or fetched.initial_run is None:
        return {}
    return warm_start_digests(spec.init_from, fetched.initial_run, part)


def named_file_digests(spec: JobSpec, fetched: FetchedInputs) -> dict[str, str]:
    """`KEY/FILE` → SHA-256 of all these files, KEY being the spec's."""
    found = {f"split.lists/{name}.txt": digest for name, digest in split_list_digests(spec).items()}
    if fetched.weights:
        found["vit.weights"] = digest_of_file(fetched.weights)
    for part in get_args(Part):
        found |= {f"init_from.run/{name}": digest for name, digest in initial_run_digests(spec, fetched, part).items()}
    return found


def digest_of_file(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise StorageError.of(
            error, f"{path}: {error.strerror}, but the spec names it. Correct the spec or put the file there."
        ) from error


def key_digests(spec: JobSpec, fetched: FetchedInputs, part: Part) -> dict[str, Any]:
    """Of GAN or ViT, for its key. Without a warm start the key is the one of a spec that has no such section."""
    used = initial_run_digests(spec, fetched, part)
    found: dict[str, Any] = {}
    if spec.init_from is not None and used:
        found["init_from"] = {"normalisation": spec.init_from.normalisation, **used}
    if part == "vit" and fetched.weights:
        found["weights"] = digest_of_file(fetched.weights)
    return found
