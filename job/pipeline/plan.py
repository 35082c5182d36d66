"""Which phases of a job are finished, without running any."""

from job.pipeline.fetch_inputs import fetch_inputs
from job.pipeline.folders import JobFolders
from job.pipeline.phases import PHASES
from job.pipeline.runner import Run, find_finished, find_mirrored, own_folder, phase_key
from job.preemption import StopRequest
from job.run_folder.mirror import Mirror
from job.spec.model import JobSpec


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
        elif own_folder(phase, key, spec, folders).exists():
            plan.append((phase.name, f"started in {own_folder(phase, key, spec, folders)}"))
        elif mirror is not None and mirror.has_checkpoint(own_folder(phase, key, spec, folders)):
            plan.append((phase.name, f"started in the mirror {mirror.url}"))
        else:
            plan.append((phase.name, "to do"))
    return plan
