"""What a job still has to do, without doing any of it."""

from job.pipeline.fetch_inputs import fetch_inputs
from job.pipeline.folders import JobFolders
from job.pipeline.phases import PHASES
from job.pipeline.runner import Run, find_finished, find_mirrored, mirror_of, own_folder, phase_key
from job.preemption import StopRequest
from job.spec.model import JobSpec


def plan_job(spec: JobSpec, folders: JobFolders) -> list[tuple[str, str]]:
    """[(phase, what stands)] without running anything. The key of a phase is known once those it needs are done."""
    should_stop = StopRequest()
    mirror = mirror_of(spec, folders, should_stop)
    run = Run(spec, fetch_inputs(spec, folders.scratch, should_stop), folders, False, should_stop, mirror)
    if mirror is not None:
        mirror.look()
    plan = []
    if mirror is not None and not mirror.reached:
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
        elif own_folder(phase, key, spec, folders).exists():
            plan.append((phase.name, f"begun in {own_folder(phase, key, spec, folders)}"))
        elif mirror is not None and mirror.has_begun(own_folder(phase, key, spec, folders)):
            plan.append((phase.name, f"begun in the mirror {mirror.url}"))
        else:
            plan.append((phase.name, "to do"))
    return plan
