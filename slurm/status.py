"""The state of a submitted sweep, from the queue and the files of the sweep and its runs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from emotion.errors import counted
from emotion.files import read_json_lines
from job.run_folder.progress import RunProgress, read_progress
from slurm import slurm_cli
from slurm.requeue import Cause
from slurm.slurm_cli import ENDED_STATES, QueueEntry
from slurm.sweep_folder import JobKind, JobRecord, SweepFolder

WAITED_FOR = ("Dependency", "Priority", "Resources")


@dataclass(frozen=True)
class JobStatus(JobRecord):
    """The state of the newest job of a task, or of the newest job that prepares or collects.

    state: done, failed, stopped, cancelled or lost, else SLURM's state in lower case, such as running or pending.
    details: the reason for the state, or the node. attempts: number of attempts started in all submissions. ended: outcome →
    number of attempts. run: folder of a task's run; None for other jobs.
    """

    label: str
    state: str
    details: str
    attempts: int
    ended: dict[str, int]
    progress: RunProgress | None
    run: str | None

    @property
    def is_live(self) -> bool:
        return self.state.upper() not in ENDED_STATES | {"DONE", "STOPPED", "LOST"}

    @property
    def seconds_to_go(self) -> float | None:
        """Remaining seconds of this phase; None if no training has reported its rate."""
        progress = self.progress
        if progress is None or progress.step is None or progress.steps is None or not progress.steps_per_second:
            return None
        return (progress.steps - progress.step) / progress.steps_per_second


def statuses(folder: SweepFolder) -> list[JobStatus]:
    """The states of the jobs that prepare, of every task, and of the job that collects, in this order. Only the newest submission
    of each counts."""
    newest: dict[tuple[JobKind, int], JobRecord] = {}
    for submission in folder.submissions():
        newest |= {(job.kind, job.index): job for job in submission.jobs}
    entries = slurm_cli.read_queue([job.job for job in newest.values()])
    found = [_status(folder, job, entries.get(job.job)) for job in newest.values()]
    states = slurm_cli.accounting_states([status.job for status in found if status.state == "lost"])
    found = [
        replace(status, state=states[status.job].lower(), details="according to sacct") if status.job in states else status
        for status in found
    ]
    return sorted(found, key=lambda status: (get_args(JobKind).index(status.kind), status.index))


def _status(folder: SweepFolder, record: JobRecord, entry: QueueEntry | None) -> JobStatus:
    task, is_task = folder.tasks[record.index], record.kind == "task"
    events = read_json_lines(folder.attempts_path(record.kind, record.index))
    ends = [event for event in events if event.get("event") == "end"]
    outcomes = [str(event.get("outcome")) for event in ends]
    own = [event for event in events if event.get("job") == record.job]
    last: dict[str, Any] = next((event for event in reversed(own) if event.get("event") == "end"), {})
    if is_task and task.is_published:
        state, details = "done", ""
    elif entry is not None and entry.state not in ENDED_STATES:
        is_waiting = entry.state == "PENDING" and entry.reason not in ("None", "")
        state, details = entry.state.lower(), entry.reason if is_waiting else entry.node
        raised = [event["memory_gib"] for event in own if "memory_gib" in event]
        details += f" {raised[-1]:.4g} GiB, as it was out of memory" if raised else ""
    elif is_task and outcomes[-1:] == ["done"] and task.published_folder is not None:
        state, details = "lost", f"it was done, but {task.published} is gone"
    elif last and last.get("outcome") not in (*get_args(Cause), "requeued", "out of memory"):
        state, details = str(last.get("outcome")), str(last.get("text", ""))
    elif own and own[-1].get("event") == "refused":
        state, details = "preempted", str(own[-1].get("text", ""))
    elif entry is not None and entry.state == "PREEMPTED":
        state, details = "preempted", "preempted before it could save; this site does not requeue: use emotion-slurm resubmit"
    elif entry is not None:
        # If a job was cancelled while it waited, SLURM still reports what it waited for.
        state, details = entry.state.lower(), entry.reason if entry.reason not in ("None", *WAITED_FOR) else ""
    else:
        state, details = "lost", "no longer in the queue, and no record of how it ended"
    return JobStatus(
        **asdict(record),
        label=task.label if is_task else "",
        state=state,
        details=details,
        attempts=sum(event.get("event") == "start" for event in events),
        ended={outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)},
        progress=read_progress(folder.run_folder(record.index)) if record.kind != "collect" else None,
        run=str(folder.run_folder(record.index)) if is_task else None,
    )


def as_json(found: Sequence[JobStatus]) -> list[dict[str, Any]]:
    records = []
    for status in found:
        seconds = status.seconds_to_go
        records.append({**asdict(status), "seconds_to_go": None if seconds is None else round(seconds)})
    return records


def as_table(folder: SweepFolder, found: Sequence[JobStatus]) -> str:
    rows = [["task", "job", "state", "phase", "step", "steps/s", "to go", "attempts", "details"]]
    for status in found:
        cells = ["", "", "", ""]
        progress, seconds = status.progress, status.seconds_to_go
        if progress is not None and (status.kind == "task" or status.state in ("running", "completing")):
            step = "" if progress.step is None else f"{progress.step}/{progress.steps}"
            rate = "" if progress.steps_per_second is None else f"{progress.steps_per_second:.3g}"
            to_go = "" if seconds is None or status.state != "running" else _duration(seconds)
            cells = [progress.phase, step, rate, to_go]
        ended = ", ".join(f"{count} {outcome}" for outcome, count in status.ended.items() if outcome != "done")
        attempts = f"{status.attempts} ({ended})" if ended else str(status.attempts)
        name = str(status.index) if status.kind == "task" else status.kind
        details = "  ".join(text for text in (status.label, status.details) if text)
        rows.append([name, status.job, status.state, *cells, attempts, details])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    states = [status.state for status in found if status.kind == "task"]
    total = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    collected = folder.path / "collected" / "collected.md"
    lines.append(f"{counted(len(states), 'task')}: {total}" + (f"; {collected}" if collected.exists() else ""))
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
