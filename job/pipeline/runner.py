"""Runs a job: each phase that has no matching receipt, in order. The same command starts, goes on, and does nothing."""

import contextlib
import logging
import resource
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emotion.errors import Interrupted, ModelError, SpecError, StorageError
from emotion.files import digest_of, make_folder, write_text
from job.pipeline.context import Work
from job.pipeline.fetch_inputs import with_near_files
from job.pipeline.phases import BY_NAME, PHASES, Phase
from job.preemption import StopRequest
from job.results.provenance import software_conditions
from job.run_folder.attempts import recorded
from job.run_folder.conditions import note_conditions, noted_conditions
from job.run_folder.lease import leased
from job.run_folder.mirror import Mirror, Unreachable
from job.run_folder.receipts import Receipt, discard_damaged, read_receipt, write_receipt
from job.spec.location import GENERATED, S3
from job.spec.model import JobSpec, run_name, to_yaml

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places:
    """`work` keeps what must not be lost; `scratch` what can be made again and may be shared by many jobs."""

    work: Path
    scratch: Path

    def run_folder(self, spec: JobSpec) -> Path:
        return self.work / run_name(spec)


def places_of(work: Path, scratch: Path | None) -> Places:
    """As given on the command line; scratch lies inside work by default."""
    return Places(work.absolute(), (scratch or work / "scratch").absolute())


def make_folders(spec: JobSpec, places: Places) -> Path:
    """Make the run's folder and scratch, and return the former. Raises StorageError where that cannot be.

    Raises SpecError for a place inside the dataset: what is staged there would be found as part of it.
    """
    run_folder = places.run_folder(spec)
    source = None if spec.data.source.startswith((GENERATED, S3)) else Path(spec.data.source).resolve()
    mirror = (
        spec.checkpoint.mirror and not spec.checkpoint.mirror.startswith(S3) and Path(spec.checkpoint.mirror).resolve()
    )
    for name, place in (("--work", places.work), ("--scratch", places.scratch)):
        if source and place.resolve().is_relative_to(source):
            raise SpecError(f"{name}: {place} lies inside data.source {source}. Name a folder outside of the dataset.")
        if mirror and (mirror.is_relative_to(place.resolve()) or place.resolve().is_relative_to(mirror)):
            raise SpecError(
                f"checkpoint.mirror: {mirror} and {name} {place} lie in each other. Name a folder elsewhere."
            )
    try:
        make_folder(run_folder)
        places.scratch.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError.of(
            error, f"{error.filename}: cannot make this folder ({error.strerror}); see --work, --scratch."
        ) from error
    return run_folder


@dataclass
class Run:
    """What lasts from the first phase to the last. `away`: finished phases whose files are in the mirror, not here."""

    spec: JobSpec
    places: Places
    verify: bool
    should_stop: StopRequest
    mirror: Mirror | None
    receipts: dict[str, Receipt] = field(default_factory=dict)
    away: set[str] = field(default_factory=set)

    @property
    def folder(self) -> Path:
        return self.places.run_folder(self.spec)


class _RemadeError(Exception):
    """A finished phase had to be made again and left something else: the keys of those after it do not hold any more."""


def run_job(
    spec: JobSpec,
    places: Places,
    until: str,
    verify: bool,
    should_stop: StopRequest,
    mirror_unreachable: Unreachable = "fail",
) -> Path:
    """Bring the run as far as the phase `until` and return that phase's folder.

    Raises BusyError if another process runs this spec here, ModelError after too many attempts that were killed and left
    nothing new, what the stop request says after it, and whatever a phase raises.
    """
    run_folder = make_folders(spec, places)
    with contextlib.ExitStack() as stack:
        attempt = stack.enter_context(leased(run_folder, should_stop))
        mirror = mirror_of(spec, places, should_stop)
        try:
            if mirror is not None:
                mirror.reach(mirror_unreachable)
                mirror.bring_history()
                stack.enter_context(mirror)
            stack.enter_context(recorded(run_folder, attempt, places.scratch, mirror.sizes if mirror else dict))
            near = with_near_files(spec, places.scratch, should_stop)
            return _run_phases(Run(near, places, verify, should_stop, mirror), until)
        except Interrupted as interrupted:
            raise should_stop.leaving(interrupted) from None
        except OSError as error:
            raise StorageError.of(error) from error
        except (MemoryError, RuntimeError) as error:
            from emotion.training.memory_backoff import is_out_of_memory

            # In a step of a training it is mended there.
            if not is_out_of_memory(error):
                raise
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"out of memory: {said}. Give the job more of it, or lower vit.max_crops, vit.clip_seconds or gan.clip_seconds."
            ) from error


def mirror_of(spec: JobSpec, places: Places, should_stop: StopRequest) -> Mirror | None:
    """The mirror that the spec names."""
    if spec.checkpoint.mirror is None:
        return None
    run_folder, grace = places.run_folder(spec), spec.preemption.grace_seconds
    return Mirror(spec.checkpoint.mirror, run_folder, spec.checkpoint.keep, should_stop, grace, spec.storage)


def _run_phases(run: Run, until: str) -> Path:
    write_text(run.folder / "spec.yaml", to_yaml(run.spec))
    while True:
        try:
            return _go_through(run, until)
        except _RemadeError as remade:
            log.warning("%s: what was made from it before is of no use here", remade)
            run.receipts.clear()
            run.away.clear()


def _go_through(run: Run, until: str) -> Path:
    checked = False
    for phase in PHASES:
        key = phase_key(phase, run.spec, run.receipts, run.should_stop)
        receipt = find_finished(phase, key, run)
        if receipt is None:
            receipt = find_mirrored(phase, key, run)
            run.away.update([phase.name] if receipt else [])
        if receipt is None:
            if not checked:
                for later in PHASES[PHASES.index(phase) :]:
                    if run.should_stop():
                        raise Interrupted("stopped before anything was begun")
                    later.check(run.spec, run.should_stop)
                    if later.name == until:
                        break
                checked = True
            receipt = _run_phase(phase, key, run)
        elif phase.name in run.away:
            log.info("phase=%s is done in the mirror", phase.name)
        else:
            log.info("phase=%s is done folder=%s", phase.name, receipt.folder)
            _keep(phase, receipt, run)
        run.receipts[phase.name] = receipt
        if phase.name == until:
            break
    if until != PHASES[-1].name:
        _bring(phase, run)
    return run.receipts[until].folder


def find_mirrored(phase: Phase, key: str, run: Run) -> Receipt | None:
    """The mirror's receipt of a phase. Its files are fetched when a phase that is still to do needs them."""
    if run.mirror is None or not phase.still_stands(run.spec, run.folder, False, run.should_stop):
        return None
    return run.mirror.receipt(own_folder(phase, key, run.spec, run.places), key)


def _bring(phase: Phase, run: Run) -> None:
    """Have the files of a finished phase here: from the mirror or, where that has none or damaged ones, made again."""
    if phase.name not in run.away:
        return
    assert run.mirror is not None
    promised = run.receipts[phase.name]
    with _owned(phase, promised.folder, run):
        found = find_finished(phase, promised.key, run)
        if found is None and not phase.lies_elsewhere and run.mirror.bring(promised):
            found = promised
    run.away.remove(phase.name)
    run.receipts[phase.name] = found or _run_phase(phase, promised.key, run)
    if run.receipts[phase.name].digest != promised.digest:
        raise _RemadeError(f"{phase.name} was made again and is not what the mirror's receipt says")


def _owned(phase: Phase, folder: Path, run: Run) -> contextlib.AbstractContextManager[object]:
    """The lease on a folder in scratch, which is shared; the one on the run folder is held already."""
    make_folder(folder)
    return leased(folder, run.should_stop, wait=True) if phase.place == "scratch" else contextlib.nullcontext()


def _keep(phase: Phase, receipt: Receipt, run: Run) -> None:
    if run.mirror is not None:
        run.mirror.keep(receipt, files=not phase.lies_elsewhere)


def plan_job(spec: JobSpec, places: Places) -> list[tuple[str, str]]:
    """[(phase, what stands)] without running anything. The key of a phase is known once those it needs are done."""
    receipts: dict[str, Receipt] = {}
    should_stop = StopRequest()
    spec = with_near_files(spec, places.scratch, should_stop)
    mirror = mirror_of(spec, places, should_stop)
    run = Run(spec, places, False, should_stop, mirror)
    if mirror is not None:
        mirror.look()
    plan = []
    if mirror is not None and not mirror.reached:
        plan.append(("mirror", f"{mirror.url} cannot be used"))
    for phase in PHASES:
        if not all(name in receipts for name in phase.after):
            plan.append((phase.name, "to do"))
            continue
        key = phase_key(phase, spec, receipts, should_stop)
        receipt = find_finished(phase, key, run)
        mirrored = None if receipt else find_mirrored(phase, key, run)
        if receipt:
            receipts[phase.name] = receipt
            plan.append((phase.name, f"done in {receipt.folder}"))
        elif mirrored:
            receipts[phase.name] = mirrored
            plan.append((phase.name, f"done in the mirror {spec.checkpoint.mirror}"))
        elif own_folder(phase, key, spec, places).exists():
            plan.append((phase.name, f"begun in {own_folder(phase, key, spec, places)}"))
        elif mirror is not None and mirror.has_begun(own_folder(phase, key, spec, places)):
            plan.append((phase.name, f"begun in the mirror {mirror.url}"))
        else:
            plan.append((phase.name, "to do"))
    return plan


def phase_key(phase: Phase, spec: JobSpec, receipts: dict[str, Receipt], should_stop: StopRequest) -> str:
    """Everything that decides a phase's outputs, as one digest."""
    what = spec.what()
    return digest_of(
        {
            "phase": phase.name,
            "version": phase.version,
            "sections": {name: what[name] for name in phase.sections},
            "facts": phase.facts(spec, should_stop),
            "inputs": {name: receipts[name].digest for name in phase.after},
        }
    )


def own_folder(phase: Phase, key: str, spec: JobSpec, places: Places) -> Path:
    parent = places.scratch if phase.place == "scratch" else places.run_folder(spec)
    return parent / f"{phase.name}-{key[:12]}"


def find_finished(phase: Phase, key: str, run: Run) -> Receipt | None:
    """This phase's receipt in the run's own folder or, the same key, in that of a sibling under the same work folder."""
    if not phase.still_stands(run.spec, run.folder, run.verify, run.should_stop):
        return None
    own = own_folder(phase, key, run.spec, run.places)
    candidates = [own]
    # What is published belongs to one run; everything before it may be anybody's.
    if phase.place == "work" and phase.name != "publish":
        candidates += sorted(run.places.work.glob(f"*/{own.name}"))
    for folder in candidates:
        receipt = read_receipt(folder, key, run.verify)
        if receipt is not None:
            return receipt
    return None


def _run_phase(phase: Phase, key: str, run: Run) -> Receipt:
    for name in phase.needs:
        _bring(BY_NAME[name], run)
    for name in set(phase.told_by) & run.away:
        assert run.mirror is not None
        with _owned(BY_NAME[name], run.receipts[name].folder, run):
            if not read_receipt(run.receipts[name].folder, run.receipts[name].key, verify=False):
                run.mirror.bring_receipt(run.receipts[name])
    folder = own_folder(phase, key, run.spec, run.places)
    with _owned(phase, folder, run):
        if phase.place == "scratch":
            # Another job may have finished it while we waited.
            finished = find_finished(phase, key, run)
            if finished:
                _keep(phase, finished, run)
                return finished
        if run.should_stop():
            raise Interrupted(f"{phase.name}: stopped before it began")
        log.info("phase=%s begins folder=%s", phase.name, folder)
        discard_damaged(folder)
        if run.mirror is not None:
            run.mirror.bring_checkpoint(folder)
            run.mirror.follow(folder)
        note_conditions(folder, software_conditions())
        started = time.monotonic()
        _reset_peak_memory()
        inputs = {name: run.receipts[name].folder for name in phase.after}
        work = Work(run.spec, inputs, folder, run.folder, run.should_stop)
        phase.run(work)
        work.notes["conditions"] = noted_conditions(folder)
        measured: dict[str, Any] = {"seconds": round(time.monotonic() - started, 3), **_peak_memory()}
        if work.memory:
            measured["memory"] = work.memory
        if work.used_device:
            measured["device"] = work.used_device
        needed = {name: run.receipts[name].key for name in phase.after}
        receipt = write_receipt(folder, phase.name, key, needed, measured, work.notes, work.digests)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        log.info("phase=%s ends seconds=%.1f", phase.name, measured["seconds"])
        _keep(phase, receipt, run)
        return receipt


def _reset_peak_memory() -> None:
    """Let the kernel count the peak of this phase alone, where it can (proc(5), clear_refs)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _peak_memory() -> dict[str, int]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                peak = int(line.split()[1]) * 1024
    found = {"peak_process_bytes": peak}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found["peak_device_bytes"] = torch.cuda.max_memory_allocated()
        found["peak_reserved_device_bytes"] = torch.cuda.max_memory_reserved()
    return found
