"""Warm start: which files of the published run in `init_from` are used, whether they are intact and whether they fit the spec."""

from pathlib import Path

from emotion.config import InitConfig, Part
from emotion.errors import DataError, SpecError
from emotion.files import read_json, sha256_of
from job.results.manifest import MANIFEST, Manifest, WarmStartRecord, dotted, read_manifest
from job.spec.model import JobSpec
from job.storage.local_folder import LocalFolder

WEIGHTS: dict[Part, tuple[str, ...]] = {
    "gan": ("gan/generator.safetensors", "gan/discriminator.safetensors"),
    "vit": ("model/model.safetensors", "model/seen_songs.txt"),
}
EMBEDDER = "model/embedder.safetensors"
"""Used with the ViT's weights if the run has it, which is so if it began with pretrained weights."""
CONSTANTS: dict[Part, tuple[str, str]] = {
    "gan": ("gan/config.json", "gan/seen_songs.txt"),
    "vit": ("model/preprocessing.json", "model/trained_songs.txt"),
}
"""The file with the normalisation, and the list of the songs that it was computed from."""
SHAPE_SETTINGS: dict[Part, tuple[str, ...]] = {
    "gan": ("gan.latent", "gan.width"),
    "vit": ("vit.model", "vit.depth", "vit.channels"),
}
"""Settings that determine the shapes of weights. The length of clips may differ: the GAN accepts any, and the ViT's position
embeddings are resampled."""


def files_used(init: InitConfig, part: Part) -> tuple[str, ...]:
    """Files of the run that GAN or ViT use. A network without a warm start may still use the constants of the other one."""
    if init.gan if part == "gan" else init.vit:
        return (*WEIGHTS[part], *CONSTANTS[part], *([EMBEDDER] if part == "vit" else []))
    if init.normalisation == "kept":
        return CONSTANTS["vit" if part == "gan" else "gan"]
    return ()


def verified_digests(init: InitConfig, run: Path, part: Part) -> dict[str, str]:
    """Name → SHA-256 of the files used. Raises DataError unless each is listed in the run's manifest and verifies."""
    manifest = warm_start_manifest(run)
    names = [name for name in files_used(init, part) if name != EMBEDDER or name in manifest.artifacts]
    for name in names:
        if name not in manifest.artifacts:
            raise DataError(
                f"init_from: {run} has no {name}, which a warm start needs: an earlier version published it. Set "
                f"init_from.{part} to false, or name another run."
            )
    if problem := manifest.problem(LocalFolder(run), names):
        raise DataError(f"init_from: {run}: {problem}. Copy the run again.")
    return {name: manifest.artifacts[name].sha256 for name in names}


def warm_start_manifest(run: Path) -> Manifest:
    return read_manifest(run / MANIFEST, "init_from")


def check_warm_start(spec: JobSpec, run: Path | None) -> None:
    """Verify the run's files and compare its settings with the spec. run: local folder; None without a warm start. Raises
    DataError for a missing or damaged file and for unequal normalisations, SpecError for settings that do not fit."""
    init = spec.init_from
    if init is None or run is None:
        return
    for part in ("gan", "vit"):
        verified_digests(init, run, part)
    name, theirs = Path(init.run).name, dotted(warm_start_manifest(run).spec)
    keys = [f"mel.{key}" for key in type(spec.mel).model_fields]
    keys += SHAPE_SETTINGS["gan"] if init.gan else ()
    keys += SHAPE_SETTINGS["vit"] if init.vit else ()
    ours = dotted(spec.model_dump(mode="json"))
    pairs = [(key, ours[key], theirs.get(key)) for key in keys]
    differences = [f"{key} is {_text(a)} here, {_text(b)} in {name}" for key, a, b in pairs if a != b]
    if differences:
        raise SpecError(
            f"init_from: the weights do not fit: {'; '.join(differences)}. Take the settings of that run, or leave out init_from."
        )
    if init.gan and init.vit and init.normalisation == "kept":
        gan, vit = (read_json(run / CONSTANTS[part][0])["normalisation"] for part in ("gan", "vit"))
        if gan != vit:
            raise DataError(
                f"init_from: {CONSTANTS['gan'][0]} and {CONSTANTS['vit'][0]} of {name} have different normalisations, and GAN "
                f"and ViT share one. Set init_from.normalisation to new, or one of init_from.gan and init_from.vit to false."
            )


def _text(value: object) -> str:
    return "null" if value is None else str(value)


def warm_start_record(init: InitConfig, run: Path) -> WarmStartRecord:
    """Entry of the manifest of a run with a warm start. run: local folder."""
    return WarmStartRecord(run=init.run, name=warm_start_manifest(run).name, manifest_sha256=sha256_of(run / MANIFEST))
