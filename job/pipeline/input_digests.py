"""Digests of the other inputs that a spec names besides the dataset, for phase keys and the manifest."""

from pathlib import Path
from typing import Any, get_args

from emotion.config import Part
from emotion.data.splits import Split
from emotion.errors import StorageError
from emotion.files import sha256_of
from job.pipeline.fetch_inputs import FetchedInputs
from job.pipeline.warm_start import verified_digests
from job.spec.model import JobSpec


def split_list_digests(spec: JobSpec) -> dict[str, str]:
    """Split → SHA-256 of its list of song ids; empty where the spec names no lists."""
    folder = spec.split.lists
    return {name: digest_of_file(Path(folder) / f"{name}.txt") for name in get_args(Split)} if folder else {}


def warm_start_digests(spec: JobSpec, fetched: FetchedInputs, part: Part) -> dict[str, str]:
    """Name → SHA-256 of the files of the warm start's run that the GAN or the ViT use."""
    if spec.init_from is None or fetched.warm_start_run is None:
        return {}
    return verified_digests(spec.init_from, fetched.warm_start_run, part)


def named_file_digests(spec: JobSpec, fetched: FetchedInputs) -> dict[str, str]:
    """`KEY/FILE` → SHA-256 of all these inputs. KEY: of the spec."""
    digests = {f"split.lists/{name}.txt": digest for name, digest in split_list_digests(spec).items()}
    if fetched.weights:
        digests["vit.weights"] = digest_of_file(fetched.weights)
    for part in get_args(Part):
        digests |= {f"init_from.run/{name}": digest for name, digest in warm_start_digests(spec, fetched, part).items()}
    return digests


def digest_of_file(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise StorageError.of(
            error, f"{path}: {error.strerror}, but the spec names it. Correct the spec or put the file there."
        ) from error


def key_digests(spec: JobSpec, fetched: FetchedInputs, part: Part) -> dict[str, Any]:
    """Key parts of the GAN or the ViT. Without a warm start nothing is added, so the key is that of a spec without one."""
    used = warm_start_digests(spec, fetched, part)
    parts: dict[str, Any] = {}
    if spec.init_from is not None and used:
        parts["init_from"] = {"normalisation": spec.init_from.normalisation, **used}
    if part == "vit" and fetched.weights:
        parts["weights"] = digest_of_file(fetched.weights)
    return parts
