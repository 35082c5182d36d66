"""Table of the attempts of a run for its report: how each ended, and the work lost and repeated."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from emotion.errors import Interrupted, Stopped, counted
from emotion.report.page import NOT_MEASURED, seconds_text

ENDINGS = {
    Interrupted.__name__: "asked to stop",
    Stopped.__name__: "stopped by a person",
    "killed": "killed",
    "Hung": "hung",
    "publishing": "published this run",
    "done": "done",
}


def attempt_rows(attempts: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells of a row: number, begin, machine, duration, ending, work lost and repeated, pause until the next attempt.
    attempts: as in the manifest, in order."""
    rows = []
    for number, attempt in enumerate(attempts, 1):
        is_last = number == len(attempts)
        ending = ENDINGS.get(attempt["reason"], attempt["reason"] or NOT_MEASURED)
        if attempt.get("message"):
            ending += f": {attempt['message']}"
        pause = "" if is_last else _pause(attempt, attempts[number])
        lost = "" if is_last else _text(attempt.get("lost_seconds"))
        rows.append(
            [str(number), _moment(attempt["began"]), attempt["host"], _text(attempt["duration_seconds"]), ending, lost, pause]
        )
    return rows


def goodput_text(attempts: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: the share of the attempts' time that contributed to the result."""
    if not attempts:
        return NOT_MEASURED
    total, share = goodput(attempts)
    if len(attempts) == 1:
        return f"One attempt of {seconds_text(total)}, without an interruption: nothing was computed twice."
    text = f"{counted(len(attempts), 'attempt')} of {seconds_text(total)} in all"
    if share is None:
        return f"{text}. What some of the interruptions cost is not known."
    lost = seconds_text(total * (1 - share))
    return f"{text}, of which {lost} were lost with interruptions and computed again: a goodput of {100 * share:.1f} %."


def goodput(attempts: Sequence[Mapping[str, Any]]) -> tuple[float, float | None]:
    """(seconds in all attempts, the share of them whose work is in the result); no share where a cost is not known."""
    total = sum(attempt["duration_seconds"] or 0.0 for attempt in attempts)
    lost = [attempt.get("lost_seconds") for attempt in attempts[:-1]]
    known = [seconds for seconds in lost if seconds is not None]
    if len(known) < len(lost) or total <= 0:
        return total, None if lost else 1.0
    return total, 1 - min(sum(known) / total, 1.0)


def _pause(attempt: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if attempt["duration_seconds"] is None:
        return NOT_MEASURED
    began, then = (datetime.fromisoformat(one["began"]) for one in (attempt, after))
    return seconds_text(max(0.0, (then - began).total_seconds() - attempt["duration_seconds"]))


def _text(seconds: float | None) -> str:
    return NOT_MEASURED if seconds is None else seconds_text(seconds)


def _moment(began: str) -> str:
    """2026-11-27 10:16:50 of an ISO 8601 time in UTC."""
    return began.removesuffix("+00:00").replace("T", " ")
