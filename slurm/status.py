"""How a submitted sweep is, from the queue and its own files; and what can be done about it."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emotion.files import read_json_lines
from slurm import slurm_cli
from slurm.slurm_cli import ENDED, Queued
from slurm.sweep_folder import JobRecord, SweepFolder, What

TAIL_BYTES = 64 * 1024
LOG = "job.log"


@dataclass(frozen=True)
class Progress:
    """What the log of a run says last. rate: steps per second; seconds_to_go: of this phase."""

    phase: str = ""
    step: int | None = None
    steps: int | None = None
    rate: float | None = None

    @property
    def seconds_to_go(self) -> float | None:
        if self.step is None or self.steps is None or not self.rate:
            return None
        return (self.steps - self.step) / self.rate


@dataclass(frozen=True)
class TaskStatus:
    """state: done, failed, stopped, cancelled, lost, or what the queue says, such as running or pending."""

    index: int
    what: What
    label: str
    job: str
    state: str
    text: str
    attempts: int
    ended: dict[str, int]
    progress: Progress
    run: str

    @property
    def is_live(self) -> bool:
        return self.state.upper() not in ENDED | {"DONE", "STOPPED", "LOST"}


def statuses(folder: SweepFolder) -> list[TaskStatus]:
    """Of the jobs that prepare, of every task, of the job that collects: as the newest submission of each has it."""
    newest: dict[tuple[What, int], JobRecord] = {}
    for submission in folder.submissions():
        newest |= {(job.what, job.index): job for job in submission.jobs}
    queued = slurm_cli.queue([job.job for job in newest.values()])
    found = [_status(folder, job, queued.get(job.job)) for job in newest.values()]
    unknown = [one.job for one in found if one.state == "lost"]
    accounted = slurm_cli.accounted(unknown)
    found = [_replaced(one, accounted[one.job].lower()) if one.job in accounted else one for one in found]
    return sorted(found, key=lambda one: (("prepare", "task", "collect").index(one.what), one.index))


def _status(folder: SweepFolder, record: JobRecord, queued: Queued | None) -> TaskStatus:
    task = folder.tasks[record.index]
    events = read_json_lines(folder.attempts_path(record.what, record.index))
    ends = [event for event in events if event.get("event") == "end"]
    kinds = [str(event.get("kind")) for event in ends]
    starts = sum(event.get("event") == "start" for event in events)
    mine = [event for event in ends if event.get("job") == record.job]
    last = mine[-1] if mine else None
    live = queued is not None and queued.state not in ENDED
    if record.what == "task" and task.is_published:
        state, text = "done", ""
    elif live and queued is not None:
        waits = queued.state == "PENDING" and queued.reason not in ("None", "")
        state, text = queued.state.lower(), queued.reason if waits else queued.node
    elif record.what == "task" and kinds[-1:] == ["done"] and task.published_folder is not None:
        state, text = "lost", f"it was done, but {task.published} is gone"
    elif last is not None and last.get("kind") not in ("preempted", "timed out", "error", "requeued"):
        state, text = str(last.get("kind")), str(last.get("text", ""))
    elif queued is not None:
        state, text = queued.state.lower(), queued.reason if queued.reason != "None" else ""
    else:
        state, text = "lost", "no longer in the queue, and nothing says how it ended"
    return TaskStatus(
        index=record.index,
        what=record.what,
        label=task.label if record.what == "task" else "",
        job=record.job,
        state=state,
        text=text,
        attempts=starts,
        ended={kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        progress=read_progress(folder.run_folder(record.index) / LOG) if record.what != "collect" else Progress(),
        run=task.run if record.what == "task" else "",
    )


def _replaced(one: TaskStatus, state: str) -> TaskStatus:
    return TaskStatus(**{**vars(one), "state": state, "text": "as the accounting says"})


def read_progress(log: Path) -> Progress:
    """From the lines that a job writes every 10 s and at each phase."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return Progress()
    progress = Progress()
    for line in text.splitlines():
        if found := re.search(r" phase=(\w+) (?:begins|ends|is done)", line):
            progress = Progress(found[1])
        elif found := re.search(r" phase=(\w+) step=(\d+)/(\d+).* steps_per_second=(\S+)", line):
            progress = Progress(found[1], int(found[2]), int(found[3]), _number(found[4]))
    return progress


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def as_json(folder: SweepFolder, found: Sequence[TaskStatus]) -> list[dict[str, Any]]:
    records = []
    for one in found:
        seconds = one.progress.seconds_to_go
        run = str(folder.cluster.work_folder / one.run) if one.run else None
        records.append({**asdict(one), "run": run, "seconds_to_go": None if seconds is None else round(seconds)})
    return records


def as_table(folder: SweepFolder, found: Sequence[TaskStatus]) -> str:
    rows = [["task", "job", "state", "phase", "step", "steps/s", "to go", "attempts", "what"]]
    for one in found:
        progress = one.progress if one.state in ("running", "completing") or one.what == "task" else Progress()
        step = "" if progress.step is None else f"{progress.step}/{progress.steps}"
        rate = "" if progress.rate is None else f"{progress.rate:.3g}"
        running = one.state == "running"
        togo = "" if progress.seconds_to_go is None or not running else _length(progress.seconds_to_go)
        ended = ", ".join(f"{count} {kind}" for kind, count in one.ended.items() if kind != "done")
        attempts = f"{one.attempts} ({ended})" if ended else str(one.attempts)
        name = str(one.index) if one.what == "task" else one.what
        what = "  ".join(text for text in (one.label, one.text) if text)
        rows.append([name, one.job, one.state, progress.phase, step, rate, togo, attempts, what])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    tasks = [one for one in found if one.what == "task"]
    counts = {state: sum(one.state == state for one in tasks) for state in dict.fromkeys(one.state for one in tasks)}
    total = ", ".join(f"{count} {state}" for state, count in counts.items())
    collected = folder.path / "collected" / "collected.md"
    lines.append(f"{len(tasks)} tasks: {total}" + (f"; {collected}" if collected.exists() else ""))
    return "\n".join(lines)


def _length(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02}" if minutes else f"{seconds:.0f} s"
