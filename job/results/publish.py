"""Phase publish: copies the artifacts out, then the manifest. A folder without a manifest is not published."""

import json
import logging
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from emotion.data.faults import read_faults
from emotion.data.leaks import SEEN
from emotion.data.out_of_fold import OUT_OF_FOLD
from emotion.errors import Interrupted, ModelError, StorageError
from emotion.files import read_json, sha256_of, write_json, write_text
from emotion.report.run_report import write_report
from emotion.training.progress import read_records
from job.environment import allocator_setting
from job.results import provenance
from job.results.manifest import MANIFEST, Artifact, Manifest, PhaseRecord, WarmStartRecord, stored_manifest
from job.results.model_card import CARD, write_card
from job.results.report_facts import report_facts
from job.run_folder.attempts import read_attempts, seconds_of_attempts
from job.run_folder.conditions import comparable_conditions
from job.run_folder.receipts import LOG, METRICS, RECEIPT, Receipt, parse_receipt
from job.secrets import known_secret, scrubbed, scrubbed_json
from job.spec.model import JobSpec, fingerprint, run_name, to_yaml
from job.storage.protocol import Storage

log = logging.getLogger(__name__)

PROMISED = (
    "model/",
    "stack/",
    "gan/",
    "samples/",
    "metrics.json",
    "quality.json",
    "predictions.csv",
    "baselines.csv",
    "split.csv",
    "out_of_fold.json",
)
"""Prefixes of the names of files that are equal byte for byte in two runs of one spec under equal conditions. NOT_PROMISED is
excepted; report, memory and logs may differ."""
NOT_PROMISED = (CARD,)  # it says how long the run took
PROBED_BYTES = 8192  # a file without a zero byte in its first PROBED_BYTES is text
PUBLISHED_FILES = (
    ("vit", "model", "model"),
    ("vit", "summary.json", "model/training.json"),
    ("stack", "stack", "stack"),
    ("gan", "generator.safetensors", "gan/generator.safetensors"),
    ("gan", "discriminator.safetensors", "gan/discriminator.safetensors"),
    ("gan", "config.json", "gan/config.json"),
    ("gan", SEEN, f"gan/{SEEN}"),
    ("evaluate", "metrics.json", "metrics.json"),
    ("evaluate", "predictions.csv", "predictions.csv"),
    ("evaluate", "baselines.csv", "baselines.csv"),
    ("evaluate", OUT_OF_FOLD, OUT_OF_FOLD),
    ("quality", "quality.json", "quality.json"),
    ("quality", "pictures", "pictures"),
    ("synth", "samples", "samples"),
    ("split", "split.csv", "split.csv"),
    ("split", "left_out.csv", "left_out.csv"),
)
"""(phase, file or folder of that phase, its name in the published run). Only a final model has OUT_OF_FOLD."""


def is_promised(name: str) -> bool:
    """Whether a published file is equal byte for byte in two runs of one spec under equal conditions."""
    return name.startswith(PROMISED) and name not in NOT_PROMISED


@dataclass(frozen=True)
class NamedInputs:
    """The inputs that the spec names besides the dataset. digests: `KEY/FILE` → SHA-256; warm_start: the run of a warm start."""

    digests: dict[str, str]
    warm_start: WarmStartRecord | None


def publish(
    spec: JobSpec,
    phases: dict[str, Path],
    named: NamedInputs,
    *,
    run_folder: Path,
    out: Path,
    storage: Storage,
    should_stop: Callable[[], bool],
) -> None:
    """Assemble the run in `out`, then copy it to `storage`, the manifest last. phases: phase → folder. A run that is already
    published there is verified, never overwritten. Raises ModelError if it has other artifacts, StorageError, Interrupted."""
    run = out / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    contents = {name: read_json(folder / RECEIPT) for name, folder in phases.items()}
    receipts = {name: parse_receipt(phases[name], content) for name, content in contents.items()}
    for phase, name, target in PUBLISHED_FILES:
        if should_stop():
            raise Interrupted("publish: stopped")
        origin = phases[phase] / name
        if name == OUT_OF_FOLD and spec.split.out_of_fold is None:
            continue
        if origin.is_dir():
            shutil.copytree(origin, run / target)
        else:
            (run / target).parent.mkdir(exist_ok=True)
            shutil.copy2(origin, run / target)
        _require_as_written(receipts[phase], name, run / target)
    records = {name: PhaseRecord(**content, outputs_sha256=receipts[name].digest) for name, content in contents.items()}
    write_text(run / "spec.yaml", to_yaml(spec))
    write_json(run / "memory.json", {name: record.measured for name, record in records.items()})
    (run / "logs").mkdir()
    reported = [scrubbed_json(record) for folder in phases.values() for record in read_records(folder / METRICS)]
    write_text(run / "logs" / METRICS, "".join(json.dumps(record) + "\n" for record in reported))
    if (run_folder / LOG).exists():
        # Scrubbed again: lines may be of an earlier version, or hold a secret that was not known when they were written.
        write_text(run / "logs" / LOG, scrubbed((run_folder / LOG).read_text(encoding="utf-8", errors="backslashreplace")))
    code = provenance.code_record()
    lines, now = read_attempts(run_folder), time.monotonic()
    attempts = provenance.attempt_records(lines, now)
    stops = records["vit"].notes.get("stopped_by_budget", {})
    budget = provenance.budget_record(spec.budget, sum(seconds_of_attempts(lines, now)), stops)
    write_card(run, spec, records, attempts, code)

    manifest = Manifest(
        manifest_version=1,
        name=run_name(spec),
        fingerprint=fingerprint(spec),
        spec=spec.model_dump(mode="json"),
        init_from=named.warm_start,
        artifacts={},
        left_out=read_faults(run / "left_out.csv"),
        warnings=[record for record in reported if "warning" in record],
        phases=records,
        inputs=provenance.input_digests(phases["stage"], named.digests, records["vit"].notes.get("weights_sha256")),
        seeds=provenance.seeds_of(spec),
        code=code,
        libraries=provenance.library_versions(),
        torch=provenance.torch_details(),
        python=platform.python_version(),
        platform=provenance.platform_details(),
        container=provenance.container_details(),
        allocator=allocator_setting(),
        # Not stage: its files are copies, identified by their digests. Everything after it is computed.
        comparable=comparable_conditions(
            {name: record.notes.get("conditions", {}) for name, record in records.items() if name != "stage"}
        ),
        attempts=attempts,
        **({} if budget is None else {"budget": budget}),
    )
    write_report(run, run_name(spec), report_facts(manifest, spec, phases["stage"]))
    files = sorted(path for path in run.rglob("*") if path.is_file())
    artifacts = {path.relative_to(run).as_posix(): Artifact(size=path.stat().st_size, sha256=sha256_of(path)) for path in files}
    manifest.model_copy(update={"artifacts": artifacts}).write(run / MANIFEST)
    refuse_secrets(run)
    copy_run(run, storage, should_stop)


def _require_as_written(receipt: Receipt, name: str, copy: Path) -> None:
    """Raise ModelError if the copy of an output, a file or a folder, differs from its record."""
    for output, record in receipt.outputs.items():
        path = PurePosixPath(output)
        if path.is_relative_to(name) and not record.matches(copy / path.relative_to(name), verify=True):
            raise ModelError(f"publish: a copy of {receipt.folder / output} is not what the phase wrote. Run again.")


def refuse_secrets(run: Path) -> None:
    """Raise ModelError if a text file below `run` holds a known secret. The last check before publishing."""
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        content = path.read_bytes()
        name = None if b"\0" in content[:PROBED_BYTES] else known_secret(content.decode(errors="replace"))
        if name is not None:
            raise ModelError(
                f"publish: {path.relative_to(run)} holds the value of {name}; nothing was published. Take it out of the "
                f"dataset's names and labels, or unset {name}, and run it again."
            )


def copy_run(run: Path, storage: Storage, should_stop: Callable[[], bool]) -> None:
    """Copy the artifacts in the manifest of `run`, then the manifest. If the storage already has a manifest, verify against it.
    A second call continues after a first one that was killed. Raises ModelError, StorageError, Interrupted."""
    content = (run / MANIFEST).read_bytes()
    manifest = Manifest.model_validate_json(content)
    if storage.read(MANIFEST):
        storage.clear("", own=True)  # a killed attempt may have left a temporary file next to the manifest
        verify_published(storage, manifest)
        log.info("phase=publish already published and verified folder=%s", storage.url)
        return
    storage.create()
    storage.clear("", own=True)
    if storage.read(MANIFEST) == b"":
        storage.remove(MANIFEST)  # left by a writer without hard links that was killed after claiming the name
    try:
        for name, artifact in manifest.artifacts.items():
            if should_stop():
                raise Interrupted("publish: stopped")
            # Read each time: if two machines publish one run at once, the slower must not overwrite the other's files.
            if storage.read(MANIFEST) is not None:
                break
            storage.put(run / name, name, artifact.sha256)
        else:
            sizes = {entry.name: entry.size for entry in storage.entries()}
            _require_written(storage, [name for name, artifact in manifest.artifacts.items() if sizes.get(name) != artifact.size])
        published = storage.write_new(MANIFEST, content)
        if published:  # a storage may acknowledge a write that it has not done
            _require_written(storage, [] if storage.read(MANIFEST) == content else [MANIFEST])
    except StorageError:
        if storage.read(MANIFEST) is None:  # the other machine may have removed this one's unfinished uploads
            raise
        published = False
    if published:
        log.info("phase=publish published folder=%s", storage.url)
    else:
        verify_published(storage, manifest)


def _require_written(storage: Storage, absent: list[str]) -> None:
    """Raise StorageError for files whose write the storage has acknowledged, but which it does not have."""
    if absent:
        raise StorageError(
            f"publish: {storage.url}/{absent[0]} was written, but is not there or differs. Run again; if it stays so, see the "
            f"storage's own log."
        )


def verify_published(storage: Storage, ours: Manifest) -> None:
    """Raise ModelError unless the published run is intact and has the same reproducible artifacts as ours."""
    theirs = stored_manifest(storage)
    problem = f"{MANIFEST} cannot be read" if theirs is None else theirs.problem(storage)
    if theirs is None or problem:
        raise ModelError(f"publish: {storage.url} is published, but {problem}. Move the folder away and run again.")
    names = {name for name in {*ours.artifacts, *theirs.artifacts} if is_promised(name)}
    different = sorted(name for name in names if ours.artifacts.get(name) != theirs.artifacts.get(name))
    if different:
        raise ModelError(
            f"publish: {storage.url} holds another result of this spec ({different[0]} differs), and a published run is never "
            f"overwritten. Move it away or set artifacts.destination."
        )
