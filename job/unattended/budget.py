"""`budget.minutes`: how much of it a run has used in all attempts, and when its trainings have to end.

The trainings end before the budget does, because synthesis, evaluation and publishing follow. The time reserved for these is a
tenth of the budget, at least one minute (but never more than half) and at most twenty. The GAN gets at most half of the time that
is left when it begins, the ViT the rest. Each makes at least one step; a linear probe is not shortened. If the budget ends before
the GAN begins, there is no model, and the job ends with exit code 70; staged songs and features are kept.

The result of a run that a budget has cut short depends on the speed of the machine. The steps after which its trainings ended are
conditions (`comparable` in the manifest), and `reproduce` ends them at these steps, without a clock: `budget.stop_after`.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from emotion.errors import ModelError
from emotion.files import append_json_line
from job.config import BudgetConfig
from job.run_folder.attempts import ATTEMPTS, read_attempts, seconds_of_attempts

RESERVED_SHARE = 0.1
LEAST_RESERVED_SECONDS, MOST_RESERVED_SECONDS = 60.0, 1200.0
RECORD_SECONDS = 60.0
"""Interval between records of the used time. If an attempt is killed, up to this much of its time is not counted."""
SPENT = "spent"  # the kind of these records in attempts.jsonl
TRAININGS = ("gan", "vit")
BEFORE_ANY_MODEL = ("stage", "features", "split")


class Budget:
    """The budget of one run, in this attempt. Without budget.minutes, nothing is recorded and nothing ends early."""

    def __init__(self, config: BudgetConfig, run_folder: Path, attempt: int) -> None:
        self._config, self._path, self._attempt = config, run_folder / ATTEMPTS, attempt
        self._began = time.monotonic()
        events = read_attempts(run_folder)
        self._before = sum(seconds_of_attempts(events))
        # Used time when a training began for the first time, so that its share is the same in all attempts.
        self._began_after = {
            event["phase"]: event["total"] for event in events if event.get("event") == SPENT and "phase" in event
        }

    @property
    def has_clock(self) -> bool:
        return self._config.minutes is not None and self._config.stop_after is None

    @property
    def seconds(self) -> float:
        """Seconds used by all attempts."""
        return self._before + time.monotonic() - self._began

    def is_used_up(self, phase: str) -> Callable[[int], bool]:
        """Start a phase; returns a function for its training: steps done → whether training must end. Where the clock decides
        that it must, the used time is recorded, so that a later attempt, too, finds it used up."""
        if self._config.stop_after is not None and phase in TRAININGS:
            last = self._config.stop_after[TRAININGS.index(phase)]
            return lambda step: last is not None and step >= last
        if not self.has_clock or phase not in TRAININGS:
            return lambda _: False
        if phase not in self._began_after:
            self._began_after[phase] = self.seconds
            self.record(phase=phase, total=round(self.seconds, 3))
        end = training_seconds(self._config)
        if phase == "gan":
            end = (self._began_after[phase] + end) / 2

        def must_end(_: int) -> bool:
            if self.seconds < end:
                return False
            self.record()
            return True

        return must_end

    def ends_in(self, phase: str) -> bool:
        """Whether the whole budget is used up in a phase before the GAN, so that there is no model yet."""
        return phase in BEFORE_ANY_MODEL and self.has_clock and self.seconds >= 60 * (self._config.minutes or 0)

    def refuse_to_continue(self, phase: str) -> None:
        raise ModelError(
            f"budget.minutes: all {self._config.minutes:g} minutes are used up in {phase}, before there is a model, so nothing "
            f"is published. Raise budget.minutes: staged songs and features are used again."
        )

    def record(self, **fields: Any) -> None:
        with suppress(OSError):  # a full disk must not end the job for this record
            used = round(time.monotonic() - self._began, 3)
            append_json_line(
                self._path, {"time": round(time.time(), 3), "attempt": self._attempt, "event": SPENT, "seconds": used, **fields}
            )


@contextmanager
def budget_of(config: BudgetConfig, run_folder: Path, attempt: int) -> Iterator[Budget]:
    """The budget of a run whose attempt has been recorded. During the block, a thread records how much of it is used."""
    budget, ended = Budget(config, run_folder, attempt), threading.Event()

    def record_now_and_then() -> None:
        while not ended.wait(min(RECORD_SECONDS, 3 * (config.minutes or 10))):
            budget.record()

    if budget.has_clock:
        threading.Thread(target=record_now_and_then, name="budget", daemon=True).start()
    try:
        yield budget
    finally:
        ended.set()


def training_seconds(config: BudgetConfig) -> float:
    """Seconds of the budget that may be used before the last training must end."""
    assert config.minutes is not None
    whole = 60 * config.minutes
    reserved = min(max(RESERVED_SHARE * whole, LEAST_RESERVED_SECONDS), MOST_RESERVED_SECONDS, whole / 2)
    return whole - reserved
