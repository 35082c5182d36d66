"""The published run that `init_from` names: which of its files are used, whether they are whole, whether they fit the spec."""

from pathlib import Path
from typing import Any

from emotion.config import InitConfig, Part
from emotion.errors import DataError, SpecError, StorageError
from emotion.files import read_json, sha256_of
from job.spec.model import JobSpec

WEIGHTS: dict[Part, tuple[str, ...]] = {
    "gan": ("gan/generator.safetensors", "gan/discriminator.safetensors"),
    "vit": ("model/model.safetensors", "model/seen_songs.txt"),
}
CONSTANTS: dict[Part, tuple[str, str]] = {
    "gan": ("gan/config.json", "gan/seen_songs.txt"),
    "vit": ("model/preprocessing.json", "model/trained_songs.txt"),
}
"""The file with the normalisation, and the list of the songs behind it, which training has seen."""

FIT: dict[Part, tuple[str, ...]] = {"gan": ("latent", "width"), "vit": ("model", "channels")}
"""Settings that decide about the shapes of weights. A clip may have another length: the GAN takes any, and position embeddings
of a ViT are resampled."""


def files_used(init: InitConfig, part: Part) -> tuple[str, ...]:
    """What GAN or ViT use of a published run. Where it does not start from the run, that may be the constants of the other."""
    if init.gan if part == "gan" else init.vit:
        return (*WEIGHTS[part], *CONSTANTS[part])
    if init.normalisation == "kept":
        return CONSTANTS["vit" if part == "gan" else "gan"]
    return ()


def initial_digests(init: InitConfig, run: Path, part: Part) -> dict[str, str]:
    """Name → SHA-256 of the files used, each hashed now. Raises StorageError unless the run has all, as its manifest says."""
    artifacts = read_manifest(run)["artifacts"]
    digests = {}
    for name in files_used(init, part):
        if name not in artifacts:
            raise StorageError(
                f"init_from: {run} has no {name}, which is needed to go on from it: an earlier version published it. Set "
                f"init_from.{part} to false, or name another run."
            )
        try:
            digests[name] = sha256_of(run / name)
        except OSError as error:
            raise StorageError.of(
                error, f"init_from: {run / name}: {error.strerror}, but the manifest lists it. Copy the run again."
            ) from error
        if digests[name] != artifacts[name]["sha256"]:
            raise StorageError(
                f"init_from: {run / name} is damaged: it is not what manifest.json beside it says. Copy the run again."
            )
    return digests


def read_manifest(run: Path) -> dict[str, Any]:
    """Raises StorageError where there is none, or no readable one."""
    path = run / "manifest.json"
    try:
        manifest: dict[str, Any] = read_json(path)
        _ = manifest["name"], manifest["artifacts"], manifest["spec"]
        return manifest
    except OSError as error:
        raise StorageError.of(
            error,
            f"init_from: {path}: {error.strerror}. Expected a published run, whose manifest comes last; name the folder "
            f"NAME-KEY12 below published/.",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"init_from: {path} is not the manifest of a published run ({type(error).__name__}: {error}). Copy the run again."
        ) from error


def check_initial(spec: JobSpec, run: Path | None) -> None:
    """Raise StorageError where a file that is used is missing or damaged, SpecError where the spec does not fit the run.

    Nothing to do for a spec that starts from nothing.
    """
    init = spec.init_from
    if init is None or run is None:
        return
    for part in ("gan", "vit"):
        initial_digests(init, run, part)
    name, theirs = Path(init.run).name, read_manifest(run)["spec"]
    keys = [("mel", key) for key in type(spec.mel).model_fields]
    keys += [("gan", key) for key in FIT["gan"] if init.gan] + [("vit", key) for key in FIT["vit"] if init.vit]
    differences = []
    for section, key in keys:
        here, there = getattr(getattr(spec, section), key), theirs.get(section, {}).get(key)
        if here != there:
            differences.append(f"{section}.{key} is {here} here, {there} in {name}")
    if differences:
        raise SpecError(
            f"init_from: the weights do not fit: {'; '.join(differences)}. Take the settings of that run, or start anew "
            f"without init_from."
        )
    if init.gan and init.vit and init.normalisation == "kept":
        constants = [read_json(run / CONSTANTS[part][0])["normalisation"] for part in ("gan", "vit")]
        if constants[0] != constants[1]:
            raise DataError(
                f"init_from: {CONSTANTS['gan'][0]} and {CONSTANTS['vit'][0]} of {name} have different normalisations, and GAN "
                f"and ViT share one. Set init_from.normalisation to new, or start one of them anew."
            )


def initial_record(init: InitConfig, run: Path) -> dict[str, str]:
    """Which run it was, for the manifest."""
    name: str = read_manifest(run)["name"]
    return {"run": init.run, "name": name, "manifest_sha256": sha256_of(run / "manifest.json")}
