"""The decision at the end of an attempt whether a task is started again. Pure functions.

task.py calls decide_requeue; sbatch_script.py has the same table in bash, and a test compares both. The first matching row
counts. "Near the limit" is within preemption.grace_seconds + save_seconds + EARLY_SIGNAL_SECONDS of it.

    how the attempt ended                                             outcome    started again
    exit code 0                                                       done       no
    exit code 76: a person asked the job to stop                      stopped    no
    an exit code for which no retry helps (64, 65, 70, 77)            failed     no
    - except 64 within preemption.grace_seconds of the limit          see below, with timed out instead of error
    asked to stop; SLURM no longer runs the job and counts a restart  requeued   by SLURM
    `emotion-slurm cancel` was called for its submission              cancelled  no
    SLURM is preempting the job, or has ended it for that             preempted  up to retries.preemptions times
    asked to stop; SLURM no longer runs the job                       cancelled  no
    not asked to stop, and killed by the launcher for lack of time    timed out  up to retries.time_outs times
    not asked to stop: any other exit code, such as 69, 71 or 73      error      up to retries.errors times; 71: elsewhere
    asked to stop (a signal, or exit code 75) near the limit          timed out  up to retries.time_outs times
    asked to stop                                                     preempted  up to retries.preemptions times
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from emotion.errors import EmotionError, Interrupted, ModelError, SpecError, Stopped, StorageError
from slurm.cluster import RetriesConfig
from slurm.slurm_cli import JobInfo

Cause = Literal["preempted", "timed out", "error"]
Outcome = Literal["done", "stopped", "failed", "requeued", "cancelled", Cause]

KILL_BEFORE_LIMIT_SECONDS = 10.0
"""The launcher kills the job this long before the time limit: SLURM does not requeue a job that has reached its limit."""
EARLY_SIGNAL_SECONDS = 60.0
"""SLURM may send the requested signal before a time limit (sbatch --signal) up to this much too early."""

CLOCK_SECONDS = 2.0
"""Tolerance for SLURM's times: they are whole seconds, and SLURM may need one more to act."""

_ERRORS: list[type[EmotionError]] = [EmotionError, *EmotionError.__subclasses__(), *StorageError.__subclasses__()]
FINAL_EXIT_CODES = frozenset(error.exit_code for error in _ERRORS if not error.retry_helps)


@dataclass(frozen=True)
class AttemptEnd:
    """How an attempt ended.

    stop_requested: whether a stop signal was received. seconds_left: until the time limit, infinity if it is unknown.
    job: SLURM's information about the job, None if SLURM does not answer. restarts: SLURM's count when the attempt started.
    is_cancelled: whether `emotion-slurm cancel` was called for the submission. grace_end: when the grace time of a preemption
    would end, as SLURM reported during it.
    """

    exit_code: int
    stop_requested: bool
    seconds_left: float
    job: JobInfo | None
    restarts: int = 0
    is_cancelled: bool = False
    grace_end: float | None = None

    @property
    def is_preempted(self) -> bool:
        """Whether SLURM is preempting the job, or has ended it for that (PreemptMode=CANCEL).

        A job that was cancelled in its grace time is COMPLETING, too; only its times show the difference.
        """
        job = self.job
        if job is None or job.preempted_at is None:
            return False
        if job.is_running:
            return True
        if job.state not in ("COMPLETING", "PREEMPTED") or job.end is None:
            return False
        if self.grace_end is None:
            return job.end <= job.preempted_at + CLOCK_SECONDS
        return job.end >= self.grace_end - CLOCK_SECONDS


@dataclass(frozen=True)
class Limits:
    """Limits from the spec and the cluster file. Times are in seconds."""

    grace_seconds: float
    save_seconds: float
    retries: RetriesConfig

    @property
    def budgets(self) -> dict[Cause, int]:
        return {"preempted": self.retries.preemptions, "timed out": self.retries.time_outs, "error": self.retries.errors}

    @property
    def near_limit_seconds(self) -> float:
        return self.grace_seconds + self.save_seconds + EARLY_SIGNAL_SECONDS


@dataclass(frozen=True)
class Decision:
    """The decision. outcome: as recorded. cause: the outcome before a used-up budget turned it into failed. requeue: whether to
    start the task again. exit_code: of the launcher."""

    outcome: Outcome
    cause: Outcome
    requeue: bool
    exit_code: int
    text: str


def is_final(exit_code: int, seconds_left: float, limits: Limits) -> bool:
    """Whether the exit code is final. A spec error is not, if the job started so near its limit that it only lacked time."""
    if exit_code == SpecError.exit_code and seconds_left <= limits.grace_seconds:
        return False
    return exit_code in {0, Stopped.exit_code} | FINAL_EXIT_CODES


def outcome_of(end: AttemptEnd, limits: Limits) -> Outcome:
    """The outcome by the table above, regardless of retry budgets."""
    code = end.exit_code
    if is_final(code, end.seconds_left, limits):
        return "done" if code == 0 else "stopped" if code == Stopped.exit_code else "failed"
    asked = end.stop_requested or code == Interrupted.exit_code
    is_ended = asked and end.job is not None and not end.job.is_running
    if is_ended and end.job is not None and end.job.restarts > end.restarts:
        return "requeued"
    if end.is_cancelled:
        return "cancelled"
    if end.is_preempted:
        return "preempted"
    if is_ended:
        return "cancelled"
    if not asked:
        out_of_time = code == SpecError.exit_code or end.seconds_left < KILL_BEFORE_LIMIT_SECONDS
        return "timed out" if out_of_time else "error"
    return "timed out" if end.seconds_left < limits.near_limit_seconds else "preempted"


def decide_requeue(end: AttemptEnd, limits: Limits, used: Mapping[Cause, int]) -> Decision:
    """Decide whether the task is requeued, and what is recorded. used: retries of this submission so far."""
    outcome, code = outcome_of(end, limits), end.exit_code
    if outcome in ("preempted", "timed out", "error"):
        budget = limits.budgets[outcome]
        if used[outcome] < budget:
            text = f"{outcome}: this task is started again ({used[outcome] + 1} of {budget})"
            return Decision(outcome, outcome, True, code, text)
        text = f"{outcome}, and all {budget} retries are used up"
        return Decision("failed", outcome, False, code if outcome == "error" else ModelError.exit_code, text)
    text = {
        "done": "",
        "stopped": "a person asked the job to stop; use emotion-slurm resubmit to resume",
        "failed": f"exit code {code}: a retry would fail, too; see the log of the job",
        "requeued": "SLURM starts this task again",
        "cancelled": "cancelled: this task is not started again",
    }[outcome]
    is_interrupted = outcome in ("requeued", "cancelled")
    return Decision(outcome, outcome, False, Interrupted.exit_code if is_interrupted else code, text)


def retries_used(events: list[dict[str, Any]], submission: int) -> dict[Cause, int]:
    """Cause → number of attempts of this submission that ended by it.

    An attempt without an end was killed: preempted without grace, or lost with its node. It counts as preempted.
    """
    used: dict[Cause, int] = {"preempted": 0, "timed out": 0, "error": 0}
    is_open = False
    for event in events:
        if event.get("submission") != submission:
            continue
        if event.get("event") == "start":
            used["preempted"] += is_open
            is_open = True
        elif event.get("event") == "end":
            is_open = False
            cause = "preempted" if event.get("outcome") == "requeued" else event.get("outcome")
            if cause in used:
                used[cause] += 1
    used["preempted"] += is_open
    return used
