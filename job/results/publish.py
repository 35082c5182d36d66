"""Phase publish: artifacts out, the manifest last. A folder without a manifest is not published."""

import json
import logging
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emotion.data.faults import read_faults
from emotion.data.leaks import SEEN
from emotion.errors import Interrupted, ModelError, StorageError
from emotion.evaluation.report import write_report
from emotion.files import read_json, sha256_of, write_json, write_text
from job.environment import allocator_setting
from job.results.provenance import (
    MANIFEST_VERSION,
    attempt_records,
    code_facts,
    container_facts,
    input_facts,
    library_versions,
    platform_facts,
    seed_facts,
    torch_facts,
    without_userinfo,
)
from job.run_folder.attempts import read_attempts
from job.run_folder.conditions import comparable_conditions
from job.run_folder.receipts import LOG, METRICS, RECEIPT, parse_receipt, read_notes
from job.spec.model import JobSpec, fingerprint, run_name, to_yaml
from job.storage.protocol import AbsentError, Storage, WrongBytesError

log = logging.getLogger(__name__)

PROMISED = (
    "model/",
    "gan/",
    "samples/",
    "metrics.json",
    "quality.json",
    "predictions.csv",
    "baselines.csv",
    "split.csv",
)
"""What equals byte for byte in two runs of one spec under equal conditions. Report, memory, logs and where it ran may differ."""


@dataclass(frozen=True)
class Artifact:
    """A file or folder of a phase and its place in a published run."""

    phase: str
    name: str
    target: str


ARTIFACTS = (
    Artifact("vit", "model", "model"),
    Artifact("vit", "summary.json", "model/training.json"),
    Artifact("gan", "generator.safetensors", "gan/generator.safetensors"),
    Artifact("gan", "discriminator.safetensors", "gan/discriminator.safetensors"),
    Artifact("gan", "config.json", "gan/config.json"),
    Artifact("gan", SEEN, f"gan/{SEEN}"),
    Artifact("evaluate", "metrics.json", "metrics.json"),
    Artifact("evaluate", "predictions.csv", "predictions.csv"),
    Artifact("evaluate", "baselines.csv", "baselines.csv"),
    Artifact("quality", "quality.json", "quality.json"),
    Artifact("quality", "pictures", "pictures"),
    Artifact("synth", "samples", "samples"),
    Artifact("split", "split.csv", "split.csv"),
    Artifact("split", "left_out.csv", "left_out.csv"),
)


def publish(
    spec: JobSpec,
    inputs: dict[str, Path],
    run_folder: Path,
    target: Storage,
    out: Path,
    should_stop: Callable[[], bool],
    *,
    named: dict[str, str],
    initial: dict[str, str] | None,
) -> None:
    """Put the run together in `out`, copy it to `target`, the manifest last.

    Where a manifest lies already, what it lists is verified and nothing is overwritten. Raises ModelError if that one is of
    other artifacts, Interrupted when asked to stop; entering again begins anew. named: digests of the files that the spec names;
    initial: the run of a warm start, for the manifest.
    """
    run = out / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    for artifact in ARTIFACTS:
        if should_stop():
            raise Interrupted("publish: stopped")
        origin = inputs[artifact.phase] / artifact.name
        if origin.is_dir():
            shutil.copytree(origin, run / artifact.target)
        else:
            (run / artifact.target).parent.mkdir(exist_ok=True)
            shutil.copy2(origin, run / artifact.target)
    write_text(run / "spec.yaml", to_yaml(spec))
    write_json(run / "memory.json", {name: read_json(folder / RECEIPT)["measured"] for name, folder in inputs.items()})
    (run / "logs").mkdir()
    metrics = [folder / METRICS for folder in inputs.values() if (folder / METRICS).exists()]
    lines = "".join(path.read_text(encoding="utf-8") for path in metrics)
    write_text(run / "logs" / METRICS, lines)
    records = [json.loads(line) for line in lines.splitlines()]
    if (run_folder / LOG).exists():
        shutil.copy2(run_folder / LOG, run / "logs" / LOG)
    write_report(run, run_name(spec))

    artifacts = {}
    for path in sorted(run.rglob("*")):
        if path.is_file():
            artifacts[path.relative_to(run).as_posix()] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    hub_weights = read_notes(inputs["vit"]).get("weights_sha256")
    # What is staged is copied, or known by its digests; everything after it is computed.
    computed = {name: read_notes(folder).get("conditions", {}) for name, folder in inputs.items() if name != "stage"}
    manifest = {
        "manifest_version": MANIFEST_VERSION,
        "name": run_name(spec),
        "fingerprint": fingerprint(spec),
        "spec": spec.model_dump(mode="json"),
        "init_from": initial,
        "artifacts": artifacts,
        "left_out": [asdict(fault) for fault in read_faults(run / "left_out.csv")],
        "warnings": [record for record in records if "warning" in record],
        "phases": {name: _phase_record(folder) for name, folder in inputs.items()},
        "inputs": input_facts(inputs["stage"], named, hub_weights),
        "seeds": seed_facts(spec),
        "code": code_facts(),
        "libraries": library_versions(),
        "torch": torch_facts(),
        "python": platform.python_version(),
        "platform": platform_facts(),
        "container": container_facts(),
        "allocator": allocator_setting(),
        "comparable": comparable_conditions(computed),
        "attempts": attempt_records(read_attempts(run_folder), time.time()),
    }
    write_json(run / "manifest.json", without_userinfo(manifest))
    copy_run(run, target, should_stop)


def copy_run(run: Path, target: Storage, should_stop: Callable[[], bool]) -> None:
    """Copy what `run`'s manifest lists to `target`, the manifest last; where one lies there already, verify instead.

    Raises ModelError, StorageError, Interrupted. Entered again, it goes over what an earlier attempt left.
    """
    raw = (run / "manifest.json").read_bytes()
    artifacts = json.loads(raw)["artifacts"]
    if target.read("manifest.json") is not None:
        verify_published(target, artifacts)
        log.info("phase=publish already published and verified folder=%s", target.url)
        return
    target.create()
    target.clear("", own=True)
    try:
        for name, facts in artifacts.items():
            if should_stop():
                raise Interrupted("publish: stopped")
            # Asked each time: of two machines that publish one run at once, the slower must not write over the other's.
            if target.read("manifest.json") is not None:
                break
            target.put(run / name, name, facts["sha256"])
        published = target.write_new("manifest.json", raw)
    except StorageError:
        # The other machine may have cleared away what this one was sending.
        if target.read("manifest.json") is None:
            raise
        published = False
    if published:
        log.info("phase=publish published folder=%s", target.url)
    else:
        verify_published(target, artifacts)


def verify_published(place: Storage, ours: dict[str, dict[str, Any]]) -> None:
    """Raise ModelError unless `place` holds what its manifest lists and that is the same model as ours."""
    damaged = unlike_manifest(place, verify=True)
    if damaged:
        raise ModelError(
            f"publish: {place.url} is published but {damaged} is not what its manifest says. Move the folder away and run again."
        )
    theirs = json.loads(place.read("manifest.json") or b"")["artifacts"]
    promised = {name for name in {*ours, *theirs} if name.startswith(PROMISED)}
    different = sorted(
        name for name in promised if ours.get(name, {}).get("sha256") != theirs.get(name, {}).get("sha256")
    )
    if different:
        raise ModelError(
            f"publish: {place.url} holds another result of this spec ({different[0]} differs), and nothing published is ever "
            f"overwritten. Move it away or set artifacts.destination."
        )


def unlike_manifest(place: Storage, verify: bool) -> str | None:
    """The first artifact that is not as the manifest says, by its size or, with `verify`, by its digest.

    It is manifest.json itself where that is none; None where all is well.
    """
    raw = place.read("manifest.json")
    if raw is None:
        return "manifest.json"
    sizes = {entry.name: entry.size for entry in place.entries()}
    try:
        for name, facts in json.loads(raw)["artifacts"].items():
            if sizes.get(name) != facts["size"] or (verify and not _has_digest(place, name, facts["sha256"])):
                return str(name)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json"
    return None


def _has_digest(place: Storage, name: str, sha256: str) -> bool:
    try:
        return place.digest(name) == sha256
    except (AbsentError, WrongBytesError):
        return False


def _phase_record(folder: Path) -> dict[str, Any]:
    receipt = read_json(folder / RECEIPT)
    outputs = parse_receipt(folder, receipt).digest
    return {"outputs_sha256": outputs, **{name: receipt[name] for name in ("key", "inputs", "measured", "notes")}}
