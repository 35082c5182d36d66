"""Commands for a submitted sweep: logs, resubmit, cancel."""

import sys
import time
from collections.abc import Iterator

from emotion.errors import EmotionError, SpecError
from emotion.files import read_json, write_json
from job.spec.load import load_spec
from slurm import slurm_cli
from slurm.checks import refuse_problems
from slurm.cluster import ClusterConfig
from slurm.slurm_cli import ENDED_STATES, Site
from slurm.status import statuses
from slurm.submit import submit_tasks
from slurm.sweep_folder import SWEEP, Submission, SweepFolder

FOLLOW_SECONDS = 1.0  # how often followed logs are read
QUEUE_SECONDS = 10.0  # how often the queue is read meanwhile


def logs(folder: SweepFolder, task: int | None, follow: bool) -> Iterator[str]:
    """The output of one task's jobs, or of all jobs. With `follow`, it continues until none of them is in the queue.

    Raises SpecError for a task that does not exist.
    """
    if task is not None and not 0 <= task < len(folder.tasks):
        raise SpecError(f"there is no task {task}; the tasks are 0 to {len(folder.tasks) - 1}")
    read: dict[str, int] = {}
    asked, is_live = -QUEUE_SECONDS, True
    while True:
        records = [job for submission in folder.submissions() for job in submission.jobs]
        if task is not None:
            records = [job for job in records if job.kind == "task" and job.index == task]
        if follow and time.monotonic() - asked >= QUEUE_SECONDS:
            asked = time.monotonic()
            entries = slurm_cli.read_queue([record.job for record in records])
            is_live = any(entry.state not in ENDED_STATES for entry in entries.values())
        for record in records:
            path = folder.log_path(record.job)
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(read.get(record.job, 0))
                content = file.read()
            if content and len(records) > 1 and record.job not in read:
                name = f"task {record.index}" if record.kind == "task" else record.kind
                yield f"==> {name}, job {record.job} <==\n"
            read[record.job] = read.get(record.job, 0) + len(content)
            yield content.decode(errors="replace")
        if not follow or not is_live:
            return
        sys.stdout.flush()
        time.sleep(FOLLOW_SECONDS)


def resubmit(folder: SweepFolder, site: Site, cluster: ClusterConfig | None) -> tuple[Submission | None, list[int]]:
    """Submit the tasks that failed or are missing. cluster: replaces the cluster file of the sweep; None keeps it.

    Returns the submission (None if there is nothing to submit), and the tasks that are still in the queue.
    """
    found = statuses(folder)
    tasks = [status for status in found if status.kind == "task"]
    live = [status.index for status in tasks if status.is_live]
    settled = {status.index for status in tasks if status.is_live or status.state == "done"}
    missing = [task.index for task in folder.tasks if task.index not in settled and not task.is_published]
    if cluster is not None:
        if cluster.work != folder.cluster.work:
            raise SpecError(
                f"work: {cluster.work}, but this sweep keeps its runs in {folder.cluster.work}; they would restart from nothing"
            )
        if any(status.is_live for status in found):
            raise SpecError(
                "--cluster: jobs of this sweep are in the queue and would change, too. Wait for them, cancel them, or omit "
                "--cluster."
            )
        folder.cluster = cluster
    specs = {index: load_spec(folder.spec_path(index)) for index in missing}
    refuse_problems(list(specs.values()), folder.cluster, site)
    if not missing:
        return None, live
    before = read_json(folder.path / SWEEP)
    # Written before sbatch, because jobs read it when they start.
    write_json(folder.path / SWEEP, {**before, "cluster": folder.cluster.model_dump(mode="json")})
    try:
        return submit_tasks(folder, specs, site), live
    except EmotionError:
        write_json(folder.path / SWEEP, before)
        raise


def cancel(folder: SweepFolder) -> list[str]:
    """Cancel all jobs of the sweep that are in the queue, and return their ids. None of them is started again."""
    cancelled = []
    for submission in folder.submissions():
        entries = slurm_cli.read_queue([job.job for job in submission.jobs])
        live = [job for job, entry in entries.items() if entry.state not in ENDED_STATES]
        if live:
            # Before scancel, so that a task that ends at this moment does not requeue itself.
            folder.cancelled_mark(submission.number).touch()
            cancelled += live
    slurm_cli.cancel(slurm_cli.root_ids(cancelled))
    return cancelled
