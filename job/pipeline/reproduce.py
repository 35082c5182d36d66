"""Runs a published run again and compares digests: of its inputs before anything is trained, of its artifacts at the end."""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from emotion.errors import SHOWN, DataError, ModelError, SpecError, StorageError, first_of, system_reason
from emotion.files import make_folder, write_text
from job.config import StorageConfig
from job.pipeline.folders import JobFolders
from job.preemption import StopRequest
from job.results.manifest import MANIFEST, Manifest, dotted, published_at, read_manifest, stored_manifest
from job.results.provenance import input_digests, software_conditions
from job.run_folder.attempts import ATTEMPTS
from job.run_folder.conditions import device_conditions
from job.run_folder.receipts import RECEIPT
from job.spec.load import load_spec, spec_of
from job.spec.location import Local, parse_location
from job.spec.model import JobSpec, run_name, to_yaml
from job.storage.open import open_storage

log = logging.getLogger(__name__)

COMPARED_OTHERWISE = (
    "data.source",
    "split.lists",
    "split.out_of_fold",
    "vit.weights",
    "vit.teacher",
    "init_from.run",
    "precision",
)
"""Keys of the spec that are not compared as settings: the files that they name are compared by digest, and the precision that
`auto` resolved to is compared as a condition."""
PHASES_IN_PRECISION = ("gan", "synth", "vit")  # phases that compute in the spec's precision
PHASES_IN_FP32 = ("stack", "evaluate")  # regardless of train precision
DIGITS = 12  # length of a digest in messages; manifests have all 64 digits
UNEXPLAINED = (
    "No recorded setting or condition differs: either the manifest was changed, or something counts that it does not record. Run "
    "it once more with another --work to see whether the bytes differ between runs on this machine."
)


def manifest_to_reproduce(argument: str, should_stop: Callable[[], bool]) -> Manifest:
    """Read the manifest of a published run. argument: its path, or the folder of the run, whose files are then verified. Object
    storage is configured by the environment. Raises SpecError if argument is no path; DataError if the manifest or a file is
    missing or damaged, or the manifest is of another version; StorageError if it cannot be read."""
    try:
        location = parse_location(argument)
    except ValueError as error:
        raise SpecError(f"reproduce: {error}.") from None
    is_run = location.path.is_dir() if isinstance(location, Local) else location.name != MANIFEST
    run = location if is_run else location.parent
    file = location / MANIFEST if is_run else location
    storage = open_storage(run, StorageConfig(), should_stop)
    manifest = read_manifest(file.path if isinstance(file, Local) else file, "reproduce", storage)
    try:
        spec_of(manifest.spec)
    except SpecError as error:
        raise DataError(
            f"reproduce: this version cannot read the spec in {file} ({error.problems[0]}). Use the emotion-job that published "
            f"it, {manifest.code.version}."
        ) from error
    if is_run and (problem := manifest.problem(storage)):
        raise DataError(f"reproduce: {run}: {problem}. Copy the run again.")
    return manifest


def folder_for(manifest: Manifest, work: Path) -> Path:
    """A separate work folder below `work` for this reproduction, so that it finds no finished phases of other runs.
    Raises SpecError if `work` is the folder in which the run itself was made or published."""
    folder = work / run_name(spec_of(manifest.spec))
    if (folder / ATTEMPTS).exists() or (folder / MANIFEST).exists():
        raise SpecError(
            f"--work: {folder} is where this run was made or published. A reproduction must not reuse its files; name another "
            f"folder."
        )
    return folder


def spec_to_reproduce(manifest: Manifest, folder: Path, overrides: tuple[str, ...]) -> JobSpec:
    """The run's spec with the recorded device, precision, micro-batches, and steps after which a budget ended a training; without
    destination, mirror and time limits. Values that attempts or phases recorded differently are not changed. The spec is also
    written to `folder`. Raises SpecError, StorageError."""
    spec = spec_of(manifest.spec).model_dump(mode="json")
    # They belong to the machine, the destination and the owner of the published run.
    for section in ("artifacts", "preemption", "notify", "track"):
        spec.pop(section, None)
    spec["checkpoint"].pop("mirror", None)

    def recorded(key: str, phases: Sequence[str], default: Any) -> Any:
        first, *others = [manifest.comparable.get(f"{phase}.{key}") for phase in phases]
        # A list holds the values of a condition that changed.
        is_common = first is not None and not isinstance(first, list) and all(value == first for value in others)
        return first if is_common else default

    for key in ("kind", "threads", "deterministic"):
        spec["device"][key] = recorded(key, PHASES_IN_PRECISION, spec["device"][key])
    spec["precision"] = recorded("precision", PHASES_IN_PRECISION, spec["precision"])
    for phase in ("gan", "vit"):
        spec[phase]["micro_batch"] = recorded("micro_batch", [phase], spec[phase]["micro_batch"])
    if spec["budget"]["minutes"] is not None:
        # This machine may be faster or slower: a training that the budget ended there ends here after as many steps.
        stops = manifest.phases["vit"].notes.get("stopped_by_budget", {})
        spec["budget"]["stop_after"] = [stops[phase]["step"] if phase in stops else None for phase in ("gan", "vit")]
    path = folder / "spec.yaml"
    try:
        make_folder(folder)
        write_text(path, to_yaml(spec_of(spec)))
    except OSError as error:
        raise StorageError.of(error, f"{path}: cannot be written ({system_reason(error)}); see --work.") from error
    return load_spec(path, overrides)


def reproduce_run(manifest: Manifest, spec: JobSpec, folders: JobFolders, should_stop: StopRequest) -> str:
    """Run `spec`, compare with the manifest, and return a message for the user if all bytes are equal. Raises DataError for
    changed inputs, before anything is trained, ModelError for changed artifacts, and whatever a run raises."""
    # Imported only now: they need a prepared environment.
    from emotion.vit.weights import hub_weights_sha256
    from job.pipeline.fetch_inputs import fetch_inputs, named_file_digests
    from job.pipeline.runner import run_job
    from job.results.publish import is_promised

    conditions = conditions_here(spec)
    settings = changed_settings(manifest, spec)
    for line in settings + changed_conditions(manifest.comparable, conditions):
        log.warning("reproduce: %s", line)
    staged = run_job(spec, folders, "stage", False, should_stop)
    fetched = fetch_inputs(spec, folders.scratch, should_stop)
    inputs = input_digests(staged, named_file_digests(spec, fetched), hub_weights_sha256(fetched.vit_config(spec)))
    refuse_changed_inputs(manifest.inputs, staged, inputs, folders.work / "datasets")
    log.info("reproduce: the %d input files are equal", len(inputs))
    run_job(spec, folders, "publish", False, should_stop)

    folder = published_at(spec, folders.run_folder(spec))
    ours = stored_manifest(open_storage(folder, spec.storage, should_stop))
    assert ours is not None
    earlier = sorted(name for name, value in ours.comparable.items() if value != conditions.get(name))
    if earlier:
        text = "reproduce: an earlier attempt made some of %s under other conditions (%s). Remove %s to run all of it here."
        log.warning(text, folder, first_of(earlier), folders.work)
    expected, found = (
        {name: artifact.sha256 for name, artifact in one.artifacts.items() if is_promised(name)} for one in (manifest, ours)
    )
    if files := changed_files(expected, found):
        reasons = settings + changed_conditions(manifest.comparable, ours.comparable)
        heading = f"reproduce: {len(files)} of {len({*expected, *found})} files in {folder} differ from the manifest:"
        explanation = _with_lines("Differences that may be the cause:", reasons) if reasons else UNEXPLAINED
        raise ModelError(f"{_with_lines(heading, files)}\n{explanation}")
    return f"reproduced: {len(expected)} files are equal to those of {folders.work.name}, in {folder}"


def conditions_here(spec: JobSpec) -> dict[str, Any]:
    """Condition → value, as the manifest of a run on this machine would record it."""
    from emotion.training.device import resolve_device

    device = device_conditions(resolve_device(spec.device, spec.precision).describe())
    found: dict[str, Any] = dict(software_conditions())
    for phase in (*PHASES_IN_PRECISION, *PHASES_IN_FP32):
        found |= {f"{phase}.{name}": value for name, value in device.items()}
    found |= {f"{phase}.precision": "fp32" for phase in PHASES_IN_FP32}
    for phase, section in (("gan", spec.gan), ("vit", spec.vit)):
        found[f"{phase}.micro_batch"] = section.micro_batch or section.batch_size
        if device["kind"] == "cuda":
            found[f"{phase}.cuda_graphs"] = True
    for phase, last in zip(("gan", "vit"), spec.budget.stop_after or (), strict=False):
        found |= {} if last is None else {f"{phase}.stopped_after": last}
    return found


def changed_conditions(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """A line for each condition that differs between the run and its reproduction, or under which equal bytes are unlikely."""
    lines = []
    for name in sorted({*there, *here}):
        old, new = there.get(name), here.get(name)
        if isinstance(old, list):
            lines.append(f"{name} was {_shown(old)}: it changed while the run was made, so equal bytes are not to be expected")
        elif old != new:
            lines.append(f"{name} was {_shown(old)} and is {_shown(new)} here")
        elif name.endswith(".deterministic") and not old:
            lines.append(f"{name} was false: equal bytes are not to be expected")
    return lines


def changed_settings(manifest: Manifest, spec: JobSpec) -> list[str]:
    """One line per spec key that --set changed and that affects the results."""
    old, new = (dotted(one.result_fields()) for one in (spec_of(manifest.spec), spec))
    return [
        f"{key} was {_shown(old.get(key))} and is {_shown(new.get(key))} here"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and key not in COMPARED_OTHERWISE
    ]


def refuse_changed_inputs(expected: dict[str, str], staged: Path, found: dict[str, str], manifests: Path) -> None:
    """Raise DataError unless both have the same names and digests. manifests: folder of the dataset manifests from staging."""
    files = changed_files(expected, found)
    if not files:
        return
    # The right files may come with the size and time of the wrong ones, so the staged copies must not be trusted again.
    for name in found:
        if name.startswith("data.source/") and found[name] != expected.get(name):
            (staged / name.removeprefix("data.source/")).unlink(missing_ok=True)
    (staged / RECEIPT).unlink(missing_ok=True)
    shutil.rmtree(manifests, ignore_errors=True)
    heading = f"reproduce: {len(files)} of {len({*expected, *found})} input files differ from the manifest:"
    raise DataError(
        f"{_with_lines(heading, files)}\nNothing was trained. Restore the files of the run, or name them with --set "
        "(data.source, split.lists, split.out_of_fold, vit.weights, vit.teacher). Generated songs depend on the versions of "
        "numpy and soundfile."
    )


def changed_files(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """A line for each file that differs, is missing or is new. Both arguments: name → SHA-256."""
    lines = []
    for name in sorted({*expected, *found}):
        if name not in found:
            lines.append(f"{name} is missing, expected {_shown(expected[name])}")
        elif name not in expected:
            lines.append(f"{name} is new, found {_shown(found[name])}")
        elif expected[name] != found[name]:
            lines.append(f"{name} differs, expected {_shown(expected[name])}, found {_shown(found[name])}")
    return lines


def _with_lines(heading: str, lines: list[str]) -> str:
    """The heading and, indented, the first lines and the number of the rest."""
    rest = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n  ".join([heading, *lines[:SHOWN], *rest])


def _shown(value: Any) -> str:
    """The value on one line; a digest is shortened."""
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if value is None:
        return "(none)"
    text = str(value)
    return text[:DIGITS] if len(text) == 64 else text
