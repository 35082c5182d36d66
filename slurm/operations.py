"""What can be done about a submitted sweep: logs, resubmit, cancel."""

import sys
import time
from collections.abc import Iterator

from emotion.errors import EmotionError, SpecError
from emotion.files import read_json, write_json
from job.spec.load import load_spec
from slurm import slurm_cli
from slurm.checks import refuse_problems
from slurm.cluster import ClusterConfig
from slurm.slurm_cli import ENDED, Site
from slurm.status import statuses
from slurm.submit import submit_tasks
from slurm.sweep_folder import SWEEP, JobRecord, Submission, SweepFolder

FOLLOW_SECONDS = 1.0
QUEUE_SECONDS = 10.0
"""A controller is not asked more often while a log is followed."""


def records_of(folder: SweepFolder, task: int | None) -> list[JobRecord]:
    """The jobs of one task in all submissions, or every job there was. Raises SpecError for a task that is none."""
    if task is not None and not 0 <= task < len(folder.tasks):
        raise SpecError(f"there is no task {task}; the tasks are 0 to {len(folder.tasks) - 1}")
    jobs = [job for submission in folder.submissions() for job in submission.jobs]
    return [job for job in jobs if task is None or (job.what == "task" and job.index == task)]


def logs(folder: SweepFolder, task: int | None, follow: bool) -> Iterator[str]:
    """What the jobs have said, all restarts in order; with `follow` until none of them is in the queue any more."""
    read: dict[str, int] = {}
    asked, live = -QUEUE_SECONDS, True
    while True:
        records = records_of(folder, task)
        if follow and time.monotonic() - asked >= QUEUE_SECONDS:
            asked = time.monotonic()
            states = slurm_cli.queue([record.job for record in records])
            live = any(queued.state not in ENDED for queued in states.values())
        for record in records:
            path = folder.log_path(record.job)
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(read.get(record.job, 0))
                text = file.read()
            if text and (len(records) > 1 and record.job not in read):
                name = record.what if record.what != "task" else f"task {record.index}"
                yield f"==> {name}, job {record.job} <==\n"
            read[record.job] = read.get(record.job, 0) + len(text)
            yield text.decode(errors="replace")
        if not follow or not live:
            return
        sys.stdout.flush()
        time.sleep(FOLLOW_SECONDS)


def resubmit(folder: SweepFolder, site: Site, cluster: ClusterConfig | None) -> tuple[Submission | None, list[int]]:
    """Submit again what has failed or is missing, and nothing else. cluster: other conditions than before.

    Returns the submission and the tasks that are left alone as they are in the queue.
    """
    everything = statuses(folder)
    found = [one for one in everything if one.what == "task"]
    live = [one.index for one in found if one.is_live]
    settled = {one.index for one in found if one.is_live or one.state == "done"}
    missing = [task.index for task in folder.tasks if task.index not in settled and not task.is_published]
    if cluster is not None:
        if cluster.work != folder.cluster.work:
            raise SpecError(
                f"work: {cluster.work}, but this sweep keeps its runs in {folder.cluster.work}; they would begin anew"
            )
        if any(one.is_live for one in everything):
            raise SpecError(
                "--cluster: jobs of this sweep are in the queue and would change, too. Wait for them, cancel them, or leave "
                "--cluster out."
            )
        folder.cluster = cluster
    specs = {index: load_spec(folder.spec_path(index)) for index in missing}
    refuse_problems(list(specs.values()), folder.cluster, site)
    if not missing:
        return None, live
    before = read_json(folder.path / SWEEP)
    # Before sbatch, as a job reads it when it begins.
    write_json(folder.path / SWEEP, {**before, "cluster": folder.cluster.model_dump(mode="json")})
    try:
        return submit_tasks(folder, specs, site), live
    except EmotionError:
        write_json(folder.path / SWEEP, before)
        raise


def cancel(folder: SweepFolder) -> list[str]:
    """Cancel every job of the sweep that is in the queue, for good; returns them."""
    live = []
    for submission in folder.submissions():
        queued = slurm_cli.queue([job.job for job in submission.jobs])
        here = [job for job, facts in queued.items() if facts.state not in ENDED]
        if here:
            # First, so that a task which is just asking to be started again is not.
            folder.cancelled_mark(submission.number).touch()
            live += here
    slurm_cli.cancel(slurm_cli.roots_of(live))
    return live
