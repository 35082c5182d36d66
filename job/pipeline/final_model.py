"""Checks that the out_of_fold.json named in a spec comes from folds with the same settings as the spec."""

from emotion.data.out_of_fold import read_out_of_fold
from emotion.errors import DataError, first_of
from job.pipeline.fetch_inputs import FetchedInputs, named_file_digests, out_of_fold_file
from job.results.settings import setting_of
from job.spec.model import JobSpec

NOT_COMPARED = ("split.", "data.source", "precision")
"""Prefixes of keys that are not compared. A final model has another split, the phase split compares its songs one by one, and the
precision that `auto` stands for depends on the device."""


def check_final_model(spec: JobSpec, fetched: FetchedInputs | None) -> None:
    """Raise DataError if the file is missing or damaged, or if the folds had other settings or input files. fetched: None to
    check the spec only, as `check` does; files that the spec names, such as weights, are then not compared."""
    path = out_of_fold_file(spec)
    if path is None:
        return
    found, ours = read_out_of_fold(path), setting_of(spec.model_dump(mode="json"))
    files = named_file_digests(spec, fetched) if fetched else {}
    files = {name: digest for name, digest in files.items() if not name.startswith("split.")}
    by_content = {name.partition("/")[0] for name in found.inputs if fetched is None or name in files}
    differences = [
        f"{key} is {ours.get(key)} here, {found.setting.get(key)} there"
        for key in sorted({*ours, *found.setting} - by_content)
        if ours.get(key) != found.setting.get(key) and not key.startswith(NOT_COMPARED)
    ]
    differences += [f"{name} is another file" for name, digest in sorted(files.items()) if found.inputs.get(name) != digest]
    if differences:
        raise DataError(
            f"split.out_of_fold: {path} is of folds with other settings: {first_of(differences)}. Run the final.yaml beside it, "
            f"or run and collect folds with these settings."
        )
