"""The checks by `check` of the model and the files that a spec names. They need no torch and read no files."""

from collections.abc import Collection, Mapping

from emotion.errors import DataError, SpecError
from emotion.training.absent_weights import absent
from emotion.vit.model_names import not_a_vit, require_known
from job.pipeline.fetch_inputs import named_files
from job.spec.location import S3, Local
from job.spec.model import JobSpec
from job.storage.local_folder import LocalFolder, refuse_folder
from job.storage.stage import absent_source


def require_named_inputs(spec: JobSpec, models: Mapping[str, bool]) -> None:
    """Raise the errors that `run` would: SpecError for a vit.model that timm does not have or that is no ViT, and for weights of
    another model; DataError for files and folders that are not on this machine, one line each; the error of LocalFolder.problem
    for an unusable mirror. models: model of the installed timm → whether it may be a ViT; empty without timm."""
    if models:
        require_known(spec.vit.model, models)
        if not models[spec.vit.model]:
            raise not_a_vit(spec.vit.model)
    word = spec.vit.weights
    if spec.weights is None and word not in ("random", "pretrained") and word.partition(".")[0] != spec.vit.model:
        raise SpecError(
            f"vit.weights: {word!r} is not a weights tag of vit.model {spec.vit.model!r}, whose name it does not begin with, "
            f"and no path, as it has no slash. Correct it, or write pretrained or random."
        )
    if missing := _missing(spec):
        raise DataError("\n".join(missing))
    if isinstance(spec.mirror, Local) and (problem := LocalFolder(spec.mirror.path).problem()) is not None:
        raise type(problem)(f"checkpoint.mirror: {spec.mirror} cannot be used ({problem}). Create or mount the folder.")


def _missing(spec: JobSpec) -> list[str]:
    found = []
    if isinstance(spec.source, Local) and not spec.source.path.is_dir():
        found.append(str(absent_source(spec.source.path)))
    if isinstance(spec.weights_file, Local) and not spec.weights_file.path.exists():
        found.append(str(absent(spec.weights_file.path, "vit.weights")))
    for key, path in named_files(spec).items():
        if not path.exists():
            found.append(f"{key}: there is no file {path}. Correct the path.")
        try:
            refuse_folder(path, key)
        except DataError as error:
            found.append(str(error))
    return found


def not_checked(spec: JobSpec, models: Collection[str]) -> str:
    """A line with the model and files that only `run` checks; empty if there are none."""
    from_run = spec.init_from is not None and spec.init_from.vit
    found = []
    if not models:
        found.append("vit.model, as timm is not installed here")
    if spec.weights is None and spec.vit.weights != "random" and not from_run:
        found.append(f"vit.weights ({spec.vit.weights}, from the hub)")
    elif isinstance(spec.weights, Local) and not models:
        found.append("vit.weights, for the same reason")
    if spec.vit.depth is not None and not isinstance(spec.weights, Local):
        found.append("vit.depth, whether the model has as many blocks")
    stored = {"data.manifest": spec.dataset_manifest, "vit.weights": spec.weights, "vit.teacher": spec.teacher}
    stored |= {"init_from.run": spec.warm_start_run}
    found += [f"{key} ({location})" for key, location in stored.items() if isinstance(location, S3)]
    return f"not checked: {'; '.join(found)}" if found else ""
