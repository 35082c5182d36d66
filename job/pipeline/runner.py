"""Runs a job: each phase that is not finished, in order.
The same command starts a run, resumes it, and does nothing once it is finished."""

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emotion.errors import DataError, EmotionError, Interrupted, ModelError, StorageError, as_failure
from emotion.files import digest_of, make_folder, write_text
from emotion.terminal import shown_as, shown_for_now, size_text
from emotion.training.checkpoint_files import remove_all
from job.pipeline.context import PhaseContext
from job.pipeline.estimate import duration, expected
from job.pipeline.fetch_inputs import FetchedInputs, fetch_inputs
from job.pipeline.final_model import check_final_model
from job.pipeline.folders import JobFolders, make_folders
from job.pipeline.peak_memory import peak_memory, reset_peak_memory
from job.pipeline.phases import BY_NAME, PHASES, PROGRESS_FILES, Phase
from job.preemption import StopRequest
from job.results.manifest import published_at
from job.results.provenance import software_conditions
from job.run_folder.attempts import recorded_attempt
from job.run_folder.conditions import read_conditions, record_conditions
from job.run_folder.lease import leased
from job.run_folder.lost_work import cost_of_last_attempt, last_sign_of_life
from job.run_folder.mirror import Mirror
from job.run_folder.mirror_fetch import Unreachable
from job.run_folder.progress import write_progress
from job.run_folder.receipts import Receipt, discard_damaged, read_receipt, write_receipt
from job.spec.model import JobSpec, run_name, to_yaml
from job.unattended.budget import Budget, budget_of
from job.unattended.notify import Notifier, notified
from job.unattended.trackers import Trackers, tracked
from job.unattended.watchdog import watched

log = logging.getLogger(__name__)


@dataclass
class Run:
    """The state of one attempt, or of a plan. in_mirror: finished phases whose outputs are in the mirror and not yet here."""

    spec: JobSpec
    fetched: FetchedInputs
    folders: JobFolders
    verify: bool
    should_stop: StopRequest
    mirror: Mirror | None
    unattended: "Unattended | None" = None
    receipts: dict[str, Receipt] = field(default_factory=dict)
    in_mirror: set[str] = field(default_factory=set)
    is_announced: bool = False

    @property
    def folder(self) -> Path:
        return self.folders.run_folder(self.spec)


@dataclass(frozen=True)
class Unattended:
    """The budget that limits the job, and the notifier and trackers that report on it."""

    budget: Budget
    notifier: Notifier
    trackers: Trackers


class _OutputsChangedError(Exception):
    """A finished phase ran again and its outputs differ from before, so the keys of the phases after it are out of date."""


def run_job(
    spec: JobSpec,
    folders: JobFolders,
    until: str,
    verify: bool,
    should_stop: StopRequest,
    mirror_unreachable: Unreachable = "fail",
) -> Path:
    """Run every unfinished phase up to and including `until`. Returns its folder. Raises BusyError, ModelError after too many
    attempts killed or hung without progress, Interrupted, Stopped, and what a phase raises."""
    run_folder = make_folders(spec, folders)
    alive_at = last_sign_of_life(run_folder)
    with contextlib.ExitStack() as stack:
        notifier = stack.enter_context(notified(spec.notify, run_folder))
        watchdog = stack.enter_context(watched(should_stop, spec.preemption.hang_minutes, run_folder))
        attempt = stack.enter_context(leased(run_folder, should_stop))
        mirror = Mirror(spec, run_folder, should_stop) if spec.mirror else None
        try:
            if mirror is not None:
                mirror.connect(mirror_unreachable)
                mirror.fetch_history()
                stack.enter_context(mirror)
            sizes = mirror.file_sizes if mirror else dict
            cost = cost_of_last_attempt(run_folder, folders.scratch, PROGRESS_FILES, alive_at)
            recorded = recorded_attempt(run_folder, attempt, folders.scratch, PROGRESS_FILES, sizes, cost)
            notifier.warn_if_unusable()
            notifier.interrupted()
            watchdog.record_hang = stack.enter_context(recorded)
            budget = stack.enter_context(budget_of(spec.budget, run_folder, attempt))
            trackers = stack.enter_context(tracked(spec.track, spec, run_folder))
            fetched = fetch_inputs(spec, folders.scratch, should_stop)
            unattended = Unattended(budget, notifier, trackers)
            return _run_phases(Run(spec, fetched, folders, verify, should_stop, mirror, unattended), until)
        except Interrupted as interrupted:
            raise should_stop.as_requested(interrupted) from None
        except OSError as error:
            raise as_failure(error) from error
        except (MemoryError, RuntimeError) as error:
            from emotion.training.memory_backoff import is_out_of_memory

            # Inside a training step the training itself retries with a smaller micro-batch.
            if not is_out_of_memory(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"out of memory: {reason}. Give the job more memory or lower vit.clip_seconds or gan.clip_seconds."
            ) from error


def plan_job(spec: JobSpec, folders: JobFolders) -> list[tuple[str, str]]:
    """[(phase, state)] in the order of the phases. The key of a phase is known once those that it depends on are finished."""
    should_stop = StopRequest()
    mirror = Mirror(spec, folders.run_folder(spec), should_stop) if spec.mirror else None
    run = Run(spec, fetch_inputs(spec, folders.scratch, should_stop), folders, False, should_stop, mirror)
    if mirror is not None:
        mirror.try_connect()
    plan = []
    if mirror is not None and not mirror.connected:
        plan.append(("mirror", f"{mirror.url} cannot be used"))
    for phase in PHASES:
        if not all(name in run.receipts for name in phase.dependencies):
            plan.append((phase.name, "to do"))
            continue
        key = phase_key(phase, spec, run.fetched, run.receipts, should_stop)
        receipt = find_finished(phase, key, run)
        mirrored = None if receipt else find_mirrored(phase, key, run)
        if receipt:
            run.receipts[phase.name] = receipt
            plan.append((phase.name, f"done in {receipt.folder}"))
        elif mirrored:
            run.receipts[phase.name] = mirrored
            plan.append((phase.name, f"done in the mirror {spec.checkpoint.mirror}"))
        elif (folder := own_folder(phase, key, spec, folders)).exists():
            plan.append((phase.name, f"started in {folder}"))
        elif mirror is not None and mirror.has_checkpoint(folder):
            plan.append((phase.name, f"started in the mirror {mirror.url}"))
        else:
            plan.append((phase.name, "to do"))
    return plan


def _run_phases(run: Run, until: str) -> Path:
    write_text(run.folder / "spec.yaml", to_yaml(run.spec))
    while True:
        try:
            return _run_up_to(run, until)
        except _OutputsChangedError as changed:
            log.warning("%s: the phases after it start over", changed)
            run.receipts.clear()
            run.in_mirror.clear()


def _run_up_to(run: Run, until: str) -> Path:
    checked = False
    for phase in PHASES:
        key = phase_key(phase, run.spec, run.fetched, run.receipts, run.should_stop)
        receipt = find_finished(phase, key, run)
        if receipt is None:
            receipt = find_mirrored(phase, key, run)
            run.in_mirror.update([phase.name] if receipt else [])
        if receipt is None:
            _announce(run, phase, key, until)
            if not checked:
                check_final_model(run.spec, run.fetched)  # whichever phase is the first: all are to be as in the folds
                for later in PHASES[PHASES.index(phase) :]:
                    if run.should_stop():
                        raise Interrupted("stopped before the first phase")
                    later.check(run.spec, run.fetched, run.should_stop)
                    if later.name == until:
                        break
                checked = True
            receipt = _run_phase(phase, key, run)
        elif phase.name in run.in_mirror:
            log.info("phase=%s is done in the mirror", phase.name)
        else:
            log.info("phase=%s is done folder=%s", phase.name, receipt.folder)
            _track(phase, receipt.folder, run)
            _mirror_finished(phase, receipt, run)
        run.receipts[phase.name] = receipt
        if phase.name == until:
            break
    if until != PHASES[-1].name:
        _require_outputs(phase, run)
    return run.receipts[until].folder


def _announce(run: Run, first: Phase, key: str, until: str) -> None:
    """Log, once, which phases are to do and how long they will take. first: the first unfinished phase."""
    if run.is_announced:
        return
    run.is_announced = True
    receipts, to_do, started = dict(run.receipts), [first.name], {first.name: own_folder(first, key, run.spec, run.folders)}
    for phase in PHASES[PHASES.index(first) + 1 : PHASES.index(BY_NAME[until]) + 1]:
        # The key of a phase is known once those that it depends on are finished.
        if all(name in receipts for name in phase.dependencies):
            key = phase_key(phase, run.spec, run.fetched, receipts, run.should_stop)
            receipt = find_finished(phase, key, run)
            if receipt is not None:
                receipts[phase.name] = receipt
                continue
            started[phase.name] = own_folder(phase, key, run.spec, run.folders)
        to_do.append(phase.name)
    estimate = expected(run.spec, run.folders, to_do, started)
    done = [phase.name for phase in PHASES if phase.name in receipts]
    lines = [f"{run_name(run.spec)} in {run.folder}", f"to do: {', '.join(to_do)}"]
    lines += [f"done before: {', '.join(done)}"] if done else []
    lines += [f"expected: {estimate.text()}", "Ctrl-C saves and stops; the same command resumes"]
    text = "run=%s to_do=%s expected: %s"
    log.info(text, run_name(run.spec), ",".join(to_do), estimate.text(), extra=shown_as("\n".join(lines)))


def find_mirrored(phase: Phase, key: str, run: Run) -> Receipt | None:
    """The mirror's receipt of a phase. Its outputs are fetched when an unfinished phase needs them."""
    if run.mirror is None:
        return None
    receipt = run.mirror.find_receipt(own_folder(phase, key, run.spec, run.folders), key)
    return receipt if receipt and phase.outputs_exist(run.spec, run.folder, receipt.notes, False, run.should_stop) else None


def _require_outputs(phase: Phase, run: Run) -> None:
    """Fetch the outputs of a phase that is finished in the mirror; run the phase again if they are missing or damaged there."""
    if phase.name not in run.in_mirror:
        return
    assert run.mirror is not None
    expected = run.receipts[phase.name]
    with _locked(phase, expected.folder, run):
        found = find_finished(phase, expected.key, run)
        if found is None and not phase.external_outputs and run.mirror.fetch_outputs(expected):
            found = expected
    run.in_mirror.remove(phase.name)
    run.receipts[phase.name] = found or _run_phase(phase, expected.key, run)
    if run.receipts[phase.name].digest != expected.digest:
        raise _OutputsChangedError(f"{phase.name} ran again and its outputs differ from the mirror's receipt")


def _locked(phase: Phase, folder: Path, run: Run) -> contextlib.AbstractContextManager[object]:
    """A lease on a folder in scratch, which other jobs share. The folders of the run are covered by the lease on it."""
    make_folder(folder)
    return leased(folder, run.should_stop, wait=True) if phase.kept_in == "scratch" else contextlib.nullcontext()


def _track(phase: Phase, folder: Path, run: Run) -> None:
    if run.unattended is not None:
        run.unattended.trackers.watch(phase.name, folder)


def _mirror_finished(phase: Phase, receipt: Receipt, run: Run) -> None:
    if run.mirror is not None:
        run.mirror.add_finished(receipt, with_outputs=not phase.external_outputs)


def phase_key(
    phase: Phase, spec: JobSpec, fetched: FetchedInputs, receipts: Mapping[str, Receipt], should_stop: StopRequest
) -> str:
    """A digest of everything that a phase's outputs depend on. receipts: those of the phases it depends on."""
    fields = spec.result_fields()
    return digest_of(
        {
            "phase": phase.name,
            "version": phase.version,
            "sections": {name: fields[name] for name in phase.sections},
            "parts": phase.key_parts(spec, fetched, should_stop),
            "inputs": {name: receipts[name].digest for name in phase.dependencies},
        }
    )


def own_folder(phase: Phase, key: str, spec: JobSpec, folders: JobFolders) -> Path:
    parent = folders.scratch if phase.kept_in == "scratch" else folders.run_folder(spec)
    return parent / f"{phase.name}-{key[:12]}"


def find_finished(phase: Phase, key: str, run: Run) -> Receipt | None:
    """The receipt of a finished phase with this key: in the run's own folder, or in that of another run in --work."""
    own = own_folder(phase, key, run.spec, run.folders)
    candidates = [own]
    # External outputs belong to one run; everything else can be shared.
    if phase.kept_in == "work" and not phase.external_outputs:
        candidates += sorted(run.folders.work.glob(f"*/{own.name}"))
    for folder in candidates:
        receipt = read_receipt(folder, key, run.verify)
        if receipt and phase.outputs_exist(run.spec, run.folder, receipt.notes, run.verify, run.should_stop):
            return receipt
    return None


def _run_phase(phase: Phase, key: str, run: Run) -> Receipt:
    unattended = run.unattended
    assert unattended is not None, "a plan runs no phase"
    for name in phase.needs:
        _require_outputs(BY_NAME[name], run)
    for name in set(phase.receipt_dependencies) & run.in_mirror:
        assert run.mirror is not None
        with _locked(BY_NAME[name], run.receipts[name].folder, run):
            if not read_receipt(run.receipts[name].folder, run.receipts[name].key, verify=False):
                run.mirror.fetch_receipt(run.receipts[name])
    folder = own_folder(phase, key, run.spec, run.folders)
    with _locked(phase, folder, run):
        if phase.kept_in == "scratch":
            finished = find_finished(phase, key, run)  # another job may have finished it while we waited
            if finished:
                _mirror_finished(phase, finished, run)
                return finished
        if run.should_stop():
            raise Interrupted(f"{phase.name}: stopped before it started")
        log.info("phase=%s begins folder=%s", phase.name, folder, extra=shown_for_now(f"{phase.name} …"))
        write_progress(run.folder, phase.name, folder, "running")
        discard_damaged(folder)
        if run.mirror is not None:
            run.mirror.fetch_checkpoint(folder)
            run.mirror.watch_checkpoints(folder)
        _track(phase, folder, run)
        record_conditions(folder, software_conditions())
        started = time.monotonic()
        reset_peak_memory()
        inputs = {name: run.receipts[name].folder for name in phase.dependencies}

        def should_stop() -> bool:
            return run.should_stop() or unattended.budget.ends_in(phase.name)

        context = PhaseContext(run.spec, run.fetched, inputs, folder, run.folder, should_stop)
        context.is_used_up = unattended.budget.is_used_up(phase.name)
        try:
            phase.run(context)
        except Interrupted:
            if run.should_stop.reason is None and unattended.budget.ends_in(phase.name):
                unattended.budget.refuse_to_continue(phase.name)
            raise
        except Exception as error:
            if type(as_failure(error)) in (EmotionError, ModelError, DataError):  # a fault of the inputs may be its cause
                _discard_changed_inputs(phase, run, error)
            raise
        context.notes["conditions"] = read_conditions(folder)
        seconds = round(time.monotonic() - started, 3)
        measured: dict[str, Any] = {"seconds": seconds, **peak_memory(context.other_processes_bytes)}
        if context.memory:
            measured["memory"] = context.memory
        if context.used_device:
            measured["device"] = context.used_device
        needed = {name: run.receipts[name].key for name in phase.dependencies}
        receipt = write_receipt(folder, phase.name, key, needed, measured, context.notes, context.digests)
        remove_all(folder / "checkpoints")
        used = size_text(measured.get("peak_reserved_device_bytes", measured["peak_process_bytes"]))
        shown = shown_as(f"{phase.name:10}{duration(seconds):>10}   {used:>8}")
        log.info("phase=%s ends seconds=%.1f", phase.name, seconds, extra=shown)
        write_progress(run.folder, phase.name, folder, "done")
        if phase.name == PHASES[-1].name:
            unattended.notifier.published = str(published_at(run.spec, run.folder))
        _mirror_finished(phase, receipt, run)
        return receipt


def _discard_changed_inputs(phase: Phase, run: Run, error: Exception) -> None:
    """Raise an error if an output that the phase reads has other bytes than when it was written, as after a fault of a disk:
    StorageError after removing it, so that the next attempt computes it again; ModelError if it is of another run."""
    log.info("phase=%s compares its inputs with their digests", phase.name)
    for name in phase.needs:
        needed, receipt = BY_NAME[name], run.receipts[name]
        if needed.external_outputs or run.should_stop():
            continue
        is_own = needed.kept_in == "scratch" or receipt.folder.parent == run.folder
        with _locked(needed, receipt.folder, run):
            # Another job may have computed it again meanwhile.
            found = read_receipt(receipt.folder, receipt.key, verify=False)
            changed = None if found is None else found.changed_output(verify=True)
            if changed is None:
                continue
            if is_own:
                discard_damaged(receipt.folder)
        text = f"{changed} is not what the phase {name} wrote, and {phase.name} has failed."
        if not is_own:
            raise ModelError(f"{text} It is of another run. Run again with --verify.") from error
        raise StorageError(f"{text} It was removed: run again, and it is computed again.") from error
