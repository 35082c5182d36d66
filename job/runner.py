"""Runs a job: each phase that has no matching receipt, in order. The same command starts, goes on, and does nothing."""

import contextlib
import logging
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotion.errors import Interrupted, SpecError, StorageError
from emotion.files import digest_of, make_folder, write_text
from job.attempts import recorded
from job.lease import leased
from job.phases import PHASES, Phase
from job.preemption import StopRequest
from job.receipts import Receipt, discard_damaged, read_receipt, write_receipt
from job.spec import GENERATED, JobSpec, run_name, to_yaml
from job.work import Work

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
    source = Path(spec.data.source).resolve()
    for name, place in (("--work", places.work), ("--scratch", places.scratch)):
        if not spec.data.source.startswith(GENERATED) and place.resolve().is_relative_to(source):
            raise SpecError(f"{name}: {place} lies inside data.source {source}. Name a folder outside of the dataset.")
    try:
        make_folder(run_folder)
        places.scratch.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError.of(
            error, f"{error.filename}: cannot make this folder ({error.strerror}); see --work, --scratch."
        ) from error
    return run_folder


def run_job(spec: JobSpec, places: Places, until: str, verify: bool, should_stop: StopRequest) -> Path:
    """Bring the run as far as the phase `until` and return that phase's folder.

    Raises BusyError if another process runs this spec here, ModelError after too many attempts that were killed and left
    nothing new, what the stop request says after it, and whatever a phase raises.
    """
    run_folder = make_folders(spec, places)
    with leased(run_folder, should_stop) as attempt, recorded(run_folder, attempt, places.scratch):
        try:
            return _run_phases(spec, places, until, verify, should_stop)
        except Interrupted as interrupted:
            raise should_stop.leaving(interrupted) from None
        except OSError as error:
            raise StorageError.of(error) from error


def _run_phases(spec: JobSpec, places: Places, until: str, verify: bool, should_stop: StopRequest) -> Path:
    write_text(places.run_folder(spec) / "spec.yaml", to_yaml(spec))
    receipts: dict[str, Receipt] = {}
    checked = False
    for phase in PHASES:
        key = phase_key(phase, spec, receipts)
        receipt = find_finished(phase, key, spec, places, verify)
        if receipt is None:
            if not checked:
                for later in PHASES[PHASES.index(phase) :]:
                    if should_stop():
                        raise Interrupted("stopped before anything was begun")
                    later.check(spec)
                    if later.name == until:
                        break
                checked = True
            receipt = _run_phase(phase, key, spec, places, receipts, verify, should_stop)
        else:
            log.info("phase=%s is done folder=%s", phase.name, receipt.folder)
        receipts[phase.name] = receipt
        if phase.name == until:
            break
    return receipts[until].folder


def plan_job(spec: JobSpec, places: Places) -> list[tuple[str, str]]:
    """[(phase, what stands)] without running anything. The key of a phase is known once those it needs are done."""
    receipts: dict[str, Receipt] = {}
    plan = []
    for phase in PHASES:
        if not all(name in receipts for name in phase.needs):
            plan.append((phase.name, "to do"))
            continue
        key = phase_key(phase, spec, receipts)
        receipt = find_finished(phase, key, spec, places, verify=False)
        if receipt:
            receipts[phase.name] = receipt
            plan.append((phase.name, f"done in {receipt.folder}"))
        elif own_folder(phase, key, spec, places).exists():
            plan.append((phase.name, f"begun in {own_folder(phase, key, spec, places)}"))
        else:
            plan.append((phase.name, "to do"))
    return plan


def phase_key(phase: Phase, spec: JobSpec, receipts: dict[str, Receipt]) -> str:
    """Everything that decides a phase's outputs, as one digest."""
    what = spec.what()
    return digest_of(
        {
            "phase": phase.name,
            "version": phase.version,
            "sections": {name: what[name] for name in phase.sections},
            "facts": phase.facts(spec),
            "inputs": {name: receipts[name].digest for name in phase.needs},
        }
    )


def own_folder(phase: Phase, key: str, spec: JobSpec, places: Places) -> Path:
    parent = places.scratch if phase.place == "scratch" else places.run_folder(spec)
    return parent / f"{phase.name}-{key[:12]}"


def find_finished(phase: Phase, key: str, spec: JobSpec, places: Places, verify: bool) -> Receipt | None:
    """This phase's receipt in the run's own folder or, the same key, in that of a sibling under the same work folder."""
    if not phase.still_stands(spec, places.run_folder(spec), verify):
        return None
    own = own_folder(phase, key, spec, places)
    candidates = [own]
    # What is published belongs to one run; everything before it may be anybody's.
    if phase.place == "work" and phase.name != "publish":
        candidates += sorted(places.work.glob(f"*/{own.name}"))
    for folder in candidates:
        receipt = read_receipt(folder, key, verify)
        if receipt is not None:
            return receipt
    return None


def _run_phase(
    phase: Phase,
    key: str,
    spec: JobSpec,
    places: Places,
    receipts: dict[str, Receipt],
    verify: bool,
    should_stop: StopRequest,
) -> Receipt:
    folder = own_folder(phase, key, spec, places)
    make_folder(folder)
    with contextlib.ExitStack() as stack:
        if phase.place == "scratch":
            stack.enter_context(leased(folder, should_stop, wait=True))
            # Another job may have finished it while we waited.
            finished = find_finished(phase, key, spec, places, verify)
            if finished:
                return finished
        if should_stop():
            raise Interrupted(f"{phase.name}: stopped before it began")
        log.info("phase=%s begins folder=%s", phase.name, folder)
        discard_damaged(folder)
        started = time.monotonic()
        _reset_peak_memory()
        inputs = {name: receipts[name].folder for name in phase.needs}
        work = Work(spec, inputs, folder, places.run_folder(spec), should_stop)
        phase.run(work)
        measured: dict[str, Any] = {"seconds": round(time.monotonic() - started, 3), **_peak_memory()}
        if work.memory:
            measured["memory"] = work.memory
        if work.used_device:
            measured["device"] = work.used_device
        needed = {name: receipts[name].key for name in phase.needs}
        receipt = write_receipt(folder, phase.name, key, needed, measured, work.notes)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        log.info("phase=%s ends seconds=%.1f", phase.name, measured["seconds"])
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
