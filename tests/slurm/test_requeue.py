"""Why a task is started again, or is not."""

from typing import Any

import pytest

from emotion import errors
from slurm.cluster import RetriesConfig
from slurm.requeue import FINAL_EXIT_CODES, AttemptEnd, Limits, decide_requeue, outcome_of, retries_used
from slurm.slurm_cli import JobInfo

HOUR = 3600.0
LIMITS = Limits(grace_seconds=60, save_seconds=10, retries=RetriesConfig(preemptions=3, time_outs=2, errors=1))
UNUSED = retries_used([], 1)
RUNNING = JobInfo("RUNNING", 0, None, None)
PREEMPTED = JobInfo("RUNNING", 0, None, 1.0)


@pytest.mark.parametrize(
    ("code", "asked", "job", "left", "expected"),
    [
        (0, True, PREEMPTED, 5, "done"),
        (76, True, RUNNING, HOUR, "stopped"),
        *((code, False, RUNNING, HOUR, "failed") for code in (64, 65, 70, 77)),
        (65, True, PREEMPTED, 5, "failed"),
        # The job refuses to start when too little time is left.
        (64, False, RUNNING, 60, "timed out"),
        (64, False, RUNNING, 61, "failed"),
        (64, True, PREEMPTED, 50, "preempted"),
        (75, True, PREEMPTED, HOUR, "preempted"),
        (75, True, PREEMPTED, 5, "preempted"),
        (143, True, PREEMPTED, HOUR, "preempted"),
        # A second after the start of a job with a limit of a minute.
        (75, True, PREEMPTED, 59, "preempted"),
        # The signal of the preemption is still on its way to another process of the job.
        (75, True, JobInfo("SIGNALING", 0, None, 1.0), HOUR, "preempted"),
        (75, True, JobInfo("COMPLETING", 0, None, None), HOUR, "cancelled"),
        (75, True, JobInfo("CANCELLED", 0, None, None), HOUR, "cancelled"),
        (75, True, JobInfo("COMPLETING", 1, None, None), HOUR, "requeued"),
        # A site that cancels preempted jobs. Ended without grace, at the end of it (see below), and cancelled.
        (75, True, JobInfo("COMPLETING", 0, 1.0, 1.0), HOUR, "preempted"),
        (143, True, JobInfo("PREEMPTED", 0, 2.0, 1.0), HOUR, "preempted"),
        (75, True, JobInfo("COMPLETING", 0, 9.0, 1.0), HOUR, "cancelled"),
        (75, True, JobInfo("CANCELLED", 0, 1.0, 1.0), HOUR, "cancelled"),
        (75, True, JobInfo("COMPLETING", 1, 1.0, 1.0), HOUR, "requeued"),
        (75, False, RUNNING, 50, "timed out"),
        (75, True, RUNNING, 100, "timed out"),
        (75, True, RUNNING, 131, "preempted"),
        (137, False, RUNNING, 9, "timed out"),
        (75, False, RUNNING, HOUR, "preempted"),  # the notice of a spot instance
        (69, False, RUNNING, HOUR, "error"),
        (71, False, RUNNING, HOUR, "error"),
        (73, False, RUNNING, HOUR, "error"),
        (137, False, RUNNING, HOUR, "error"),
        (1, False, None, HOUR, "error"),
        (75, True, None, HOUR, "preempted"),
    ],
)
def test_the_outcome_follows_from_exit_code_signals_and_slurm(
    code: int, asked: bool, job: JobInfo | None, left: float, expected: str
) -> None:
    assert outcome_of(AttemptEnd(code, asked, left, job), LIMITS) == expected


@pytest.mark.parametrize(("ended", "outcome"), [(61.0, "preempted"), (65.0, "preempted"), (40.0, "cancelled")])
def test_a_job_that_ended_before_its_grace_time_was_over_has_been_cancelled(ended: float, outcome: str) -> None:
    end = AttemptEnd(75, True, HOUR, JobInfo("COMPLETING", 0, ended, 1.0), grace_end=61.0)
    assert outcome_of(end, LIMITS) == outcome


@pytest.mark.parametrize(("code", "outcome"), [(0, "done"), (65, "failed"), (69, "cancelled"), (75, "cancelled")])
def test_tasks_of_a_cancelled_submission_are_not_requeued_and_keep_a_final_outcome(code: int, outcome: str) -> None:
    end = AttemptEnd(code, False, HOUR, RUNNING, is_cancelled=True)
    decision = decide_requeue(end, LIMITS, UNUSED)
    assert (decision.outcome, decision.requeue) == (outcome, False)


@pytest.mark.parametrize(
    ("end", "used", "expected"),
    [
        (AttemptEnd(75, True, HOUR, PREEMPTED), {"preempted": 2}, ("preempted", True, 75)),
        (AttemptEnd(75, True, HOUR, PREEMPTED), {"preempted": 3}, ("failed", False, 70)),
        (AttemptEnd(75, False, 50, RUNNING), {"preempted": 9, "timed out": 1}, ("timed out", True, 75)),
        (AttemptEnd(75, False, 50, RUNNING), {"timed out": 2}, ("failed", False, 70)),
        (AttemptEnd(69, False, HOUR, RUNNING), {"preempted": 9, "timed out": 9}, ("error", True, 69)),
        (AttemptEnd(69, False, HOUR, RUNNING), {"error": 1}, ("failed", False, 69)),
    ],
)
def test_each_cause_has_its_own_budget(end: AttemptEnd, used: dict[Any, int], expected: tuple[str, bool, int]) -> None:
    decision = decide_requeue(end, LIMITS, {**UNUSED, **used})
    assert (decision.outcome, decision.requeue, decision.exit_code) == expected
    assert decision.requeue or "retries are used up" in decision.text


def test_final_exit_codes_are_those_of_errors_for_which_no_retry_helps() -> None:
    found = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.EmotionError)]
    codes = {kind.exit_code for kind in found if not kind.retry_helps}
    assert codes == set(FINAL_EXIT_CODES) == {64, 65, 70, 77}


def test_retries_are_counted_by_cause_and_submission() -> None:
    outcomes = ["error", "preempted", "timed out", "timed out", "requeued"]
    events: list[dict[str, Any]] = [{"event": "start", "submission": 1}, {"event": "end", "submission": 1, "outcome": "error"}]
    for outcome in outcomes:
        events += [{"event": "start", "submission": 2}, {"event": "end", "submission": 2, "outcome": outcome}]
    # One was killed and started again by SLURM; the last one is still open.
    events += [{"event": "start", "submission": 2}, {"event": "start", "submission": 2}]
    assert retries_used(events, 2) == {"preempted": 4, "timed out": 2, "error": 1}
    assert retries_used(events, 3) == {"preempted": 0, "timed out": 0, "error": 0}
