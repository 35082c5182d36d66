"""Running a published run again and comparing digests: of its inputs before anything is trained, of its artifacts at the end."""

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emotion.errors import SHOWN, DataError, ModelError, SpecError, StorageError, first_of
from emotion.files import make_folder, read_json, write_text
from job.preemption import StopRequest
from job.results.provenance import MANIFEST_VERSION, input_facts, software_conditions
from job.run_folder.attempts import ATTEMPTS
from job.run_folder.conditions import device_conditions
from job.run_folder.receipts import RECEIPT, changed_artifacts
from job.spec.load import load_spec, spec_of
from job.spec.model import JobSpec, run_name, to_yaml
from job.storage.open import open_storage

if TYPE_CHECKING:
    from job.pipeline.folders import JobFolders

log = logging.getLogger(__name__)

OF_THE_OLD_PLACE = ("artifacts", "preemption")
"""Sections of a spec that say where results went, and when a machine had to be left."""
SAME_ELSEWHERE = ("data.source", "split.lists", "vit.weights", "init_from.run", "precision")
"""Of a spec: the first four are known by their content, which is compared, and what `auto` resolved to is a condition."""
IN_PRECISION = ("gan", "synth", "vit")
"""Phases that compute in the spec's precision; `evaluate` always does in fp32."""
DIGITS = 12
"""Of a digest that a message shows; the manifests have all of it."""
NOTHING = "(nothing)"
UNEXPLAINED = (
    "Nothing that is recorded differs: either the manifest was changed, or something counts that it does not record. Run it once "
    "more with another --work to see whether the bytes are others each time."
)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a published run, by its path or the folder around it, whose files are then held against it.

    Raises DataError for what is none, is of another version or is damaged, StorageError where it cannot be read.
    """
    folder = path
    path = path / "manifest.json" if path.is_dir() else path
    try:
        manifest = read_json(path)
        used, version = manifest["code"]["version"], manifest.get("manifest_version")
        if version != MANIFEST_VERSION:
            raise DataError(
                f"reproduce: {path} is a manifest of version {version or NOTHING}, expected {MANIFEST_VERSION}. Use the "
                f"emotion-job that published it, {used}."
            )
        promised = {**manifest["inputs"], **{name: facts["sha256"] for name, facts in manifest["artifacts"].items()}}
        if not all(isinstance(digest, str) for digest in promised.values()):
            raise TypeError("a digest is no text")
        dict(manifest["comparable"])
        spec_of(manifest["spec"])
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"reproduce: there is no {path}. Name a published run or its manifest.json, which comes last: a job that has not "
            f"ended has none."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"reproduce: {path} is not the manifest of a published run ({type(error).__name__}: {error}). Copy the run again."
        ) from error
    except SpecError as error:
        raise DataError(
            f"reproduce: the spec in {path} is none of this version ({error.problems[0]}). Use the emotion-job that published "
            f"it, {used}."
        ) from error
    except OSError as error:
        raise StorageError.of(error) from error
    if path.parent == folder and (changed := changed_artifacts(folder)):
        raise DataError(
            f"reproduce: {folder} is damaged: {first_of(changed)} is not what its manifest says. Copy it again."
        )
    return dict(manifest)


def folder_for(manifest: dict[str, Any], work: Path) -> Path:
    """A work folder below `work` for this reproduction alone, so that it finds no finished phases of other runs.

    Raises SpecError where `work` is the one that the run itself was made or published in.
    """
    folder = work / run_name(spec_of(manifest["spec"]))
    if (folder / ATTEMPTS).exists() or (folder / "manifest.json").exists():
        raise SpecError(
            f"--work: {folder} is where this run was made or published. Nothing in it is used again; name another folder."
        )
    return folder


def spec_to_reproduce(manifest: dict[str, Any], folder: Path, overrides: tuple[str, ...]) -> JobSpec:
    """The run's spec, with what device, precision and micro-batches had resolved to, without what belongs to its old place.

    It is left in `folder` as a file. Where attempts or phases of the run had different conditions, the spec says nothing of them.
    Raises SpecError for wrong overrides, StorageError.
    """
    spec = spec_of(manifest["spec"]).model_dump(mode="json")
    for section in OF_THE_OLD_PLACE:
        del spec[section]
    spec["checkpoint"].pop("mirror", None)
    recorded = manifest["comparable"]
    for key in ("kind", "threads", "deterministic"):
        spec["device"][key] = _only([recorded.get(f"{phase}.{key}") for phase in IN_PRECISION], spec["device"][key])
    spec["precision"] = _only([recorded.get(f"{phase}.precision") for phase in IN_PRECISION], spec["precision"])
    for phase in ("gan", "vit"):
        spec[phase]["micro_batch"] = _only([recorded.get(f"{phase}.micro_batch")], spec[phase]["micro_batch"])
    path = folder / "spec.yaml"
    try:
        make_folder(folder)
        write_text(path, to_yaml(spec_of(spec)))
    except OSError as error:
        raise StorageError.of(error, f"{path}: cannot be written ({error.strerror}); see --work.") from error
    return load_spec(path, overrides)


def _only(values: list[Any], otherwise: Any) -> Any:
    """What was recorded, where that is one value."""
    first = values[0]
    recorded = first is not None and not isinstance(first, list) and all(value == first for value in values)
    return first if recorded else otherwise


def reproduce_run(manifest: dict[str, Any], spec: JobSpec, folders: "JobFolders", should_stop: StopRequest) -> str:
    """Run `spec`, compare with the manifest, and return what there is to say where all bytes are equal.

    Raises DataError for other inputs, before anything is trained, ModelError for other artifacts, and whatever a run raises.
    """
    # Imported only now: they need an environment that is prepared.
    from emotion.vit.weights import hub_weights_sha256
    from job.pipeline.fetch_inputs import fetch_inputs
    from job.pipeline.input_digests import named_file_digests
    from job.pipeline.phase_functions import published_at
    from job.pipeline.runner import run_job
    from job.results.publish import PROMISED

    recorded, here = manifest["comparable"], conditions_here(spec)
    settings = other_settings(manifest, spec)
    for line in settings + differences(recorded, here):
        log.warning("reproduce: %s", line)
    staged = run_job(spec, folders, "stage", False, should_stop)
    fetched = fetch_inputs(spec, folders.scratch, should_stop)
    found = input_facts(staged, named_file_digests(spec, fetched), hub_weights_sha256(fetched.vit_config(spec)))
    refuse_other_inputs(manifest["inputs"], staged, found, folders.work / "datasets")
    log.info("reproduce: the %d input files are equal", len(manifest["inputs"]))
    run_job(spec, folders, "publish", False, should_stop)

    folder = published_at(spec, folders.run_folder(spec))
    ours = json.loads(open_storage(folder, spec.storage, should_stop).read("manifest.json") or b"")
    earlier = sorted(name for name, value in ours["comparable"].items() if value != here.get(name))
    if earlier:
        log.warning(
            "reproduce: an earlier attempt made some of %s under other conditions (%s). Remove %s to run all of it here.",
            folder,
            first_of(earlier),
            folders.work,
        )
    expected, found = (
        {name: facts["sha256"] for name, facts in one["artifacts"].items() if name.startswith(PROMISED)}
        for one in (manifest, ours)
    )
    files = other_files(expected, found)
    if files:
        reasons = settings + differences(recorded, ours["comparable"])
        raise ModelError(
            _listed(
                f"reproduce: {len(files)} of {len({*expected, *found})} files in {folder} are not those of the manifest:",
                files,
            )
            + "\n"
            + (_listed("What differs and may be why:", reasons) if reasons else UNEXPLAINED)
        )
    return f"reproduced: {len(expected)} files are equal to those of {folders.work.name}, in {folder}"


def conditions_here(spec: JobSpec) -> dict[str, Any]:
    """What makes bytes comparable, as the manifest of a run on this machine would have it."""
    from emotion.training.device import resolve_device

    device = device_conditions(resolve_device(spec.device, spec.precision).describe())
    found = software_conditions()
    for phase in (*IN_PRECISION, "evaluate"):
        found |= {f"{phase}.{name}": value for name, value in device.items()}
    found["evaluate.precision"] = "fp32"
    for phase, section in (("gan", spec.gan), ("vit", spec.vit)):
        found[f"{phase}.micro_batch"] = section.micro_batch or section.batch_size
    return found


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """A line for each fact that differs between the run and its reproduction, or that does not let bytes be equal."""
    lines = []
    for name in sorted({*there, *here}):
        old, new = there.get(name), here.get(name)
        if isinstance(old, list):
            lines.append(
                f"{name} was {_shown(old)}: it changed while the run was made, so equal bytes are not to be expected"
            )
        elif old != new:
            lines.append(f"{name} was {_shown(old)} and is {_shown(new)} here")
        elif name.endswith(".deterministic") and not old:
            lines.append(f"{name} was false: equal bytes are not to be expected")
    return lines


def other_settings(manifest: dict[str, Any], spec: JobSpec) -> list[str]:
    """A line for each value of the spec that --set has changed so that something else is computed."""
    old, new = (_flat(one.result_fields()) for one in (spec_of(manifest["spec"]), spec))
    return [
        f"{key} was {_shown(old.get(key))} and is {_shown(new.get(key))} here"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and key not in SAME_ELSEWHERE
    ]


def refuse_other_inputs(expected: dict[str, str], staged: Path, found: dict[str, str], manifests: Path) -> None:
    """Raise DataError unless both have the same files with the same digests. manifests: those that staging left."""
    files = other_files(expected, found)
    if not files:
        return
    # Whoever puts the right ones in their place may give them the old size and time; what was staged must not stand for them.
    for name in found:
        if name.startswith("data.source/") and found[name] != expected.get(name):
            (staged / name.removeprefix("data.source/")).unlink(missing_ok=True)
    (staged / RECEIPT).unlink(missing_ok=True)
    shutil.rmtree(manifests, ignore_errors=True)
    raise DataError(
        _listed(
            f"reproduce: {len(files)} of {len({*expected, *found})} input files are not those of the manifest:", files
        )
        + "\nNothing was trained. Put the files of the run in their place, or name them with --set (data.source, split.lists, "
        "vit.weights). Made songs are other ones with other versions of numpy and soundfile."
    )


def other_files(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """A line for each file that differs, is missing or is new; of two mappings from names to digests."""
    lines = []
    for name in sorted({*expected, *found}):
        if name not in found:
            lines.append(f"{name} is missing, expected {expected[name][:DIGITS]}")
        elif name not in expected:
            lines.append(f"{name} is new, found {found[name][:DIGITS]}")
        elif expected[name] != found[name]:
            lines.append(f"{name} differs, expected {expected[name][:DIGITS]}, found {found[name][:DIGITS]}")
    return lines


def _listed(text: str, lines: list[str]) -> str:
    """A heading, then a line for each of the first."""
    rest = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n  ".join([text, *lines[:SHOWN], *rest])


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    """Dotted key → value."""
    found: dict[str, Any] = {}
    for name, value in sections.items():
        found |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return found


def _shown(value: Any) -> str:
    """On one line; of a digest the beginning."""
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if value is None:
        return NOTHING
    text = str(value)
    return text[:DIGITS] if len(text) == 64 else text
