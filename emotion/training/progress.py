"""How a phase reports while it runs: metrics.jsonl for programs, lines in the log, a bar on a terminal."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

from emotion.errors import system_reason
from emotion.files import read_json_lines, write_json, write_text
from emotion.progress_bar import ProgressBar, bytes_in_use
from emotion.terminal import shown_as
from emotion.training.progress_files import METRICS, PROGRESS

log = logging.getLogger(__name__)


WITHOUT, WITH = "without synthetic clips", "with synthetic clips"
"""Names of the two trainings of the ViT with `vit.synthetic: auto`."""


@dataclass(frozen=True)
class TrainingPart:
    """One of several trainings that a phase does one after another. Each counts its steps from 0; files count those of all.

    name: in every record of it; before: steps of the trainings before it, total: of all, both at most.
    """

    name: str = ""
    before: int = 0
    total: int | None = None


WHOLE = TrainingPart()


class Progress:
    """Counts the steps of one phase, or of one part of it.

    `metrics.jsonl` in `folder` gets one JSON object a line with at least time, phase and step (steps done). A resumed phase cuts
    it back to its first step, so that no step is recorded twice. `records` holds the same objects. A full disk does not end the
    phase: missing lines are written later. Records of a part have its name as `training` and its own count as `training_step`.
    """

    def __init__(self, folder: Path, phase: str, first: int, steps: int, part: TrainingPart = WHOLE) -> None:
        self.phase, self.steps, self.done, self.part = phase, steps, first, part
        self.total = part.total or steps
        self.every = max(1, steps // 200)
        self._path, self._behind = folder / METRICS, False
        self.records = _records_up_to(self._path, part.before + first)
        write_text(self._path, "".join(map(_line, self.records)))
        self._bar = ProgressBar(phase, self.total, done=part.before + first, last=part.before + steps)
        self._logged_at, self._logged_done, self._paused_seconds = time.monotonic(), first, 0.0
        self._numbers = ""
        self._newest: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def due(self, done: int) -> bool:
        """Whether to fetch numbers from the device after `done` steps: about 200 times a phase, not every step."""
        return done % self.every == 0 or done == self.steps

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block, a validation or a save, out of the rate."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._paused_seconds += time.monotonic() - started

    def advance(self, done: int, **values: float) -> None:
        """Record that `done` steps are done, with those of the values that are finite."""
        self.done = done
        self.record(done, values, time.time())
        if self._bar.advance_to(self.part.before + done, shown(self._newest)):
            now = time.monotonic()
            steps, seconds = done - self._logged_done, now - self._logged_at - self._paused_seconds
            rate = steps / seconds if self.steps > 1 and steps > 0 and seconds > 0 else None
            self._report(rate)
            self._log(rate)
            self._logged_at, self._logged_done, self._paused_seconds = now, done, 0.0

    def _log(self, rate: float | None) -> None:
        at = self.part.before + self.done
        text = ""
        if rate is not None:
            text = f" steps_per_second={rate:.3g} seconds_to_go={(self.total - at) / rate:.0f}"
            text += f" memory_mib={used / 2**20:.0f}" if (used := bytes_in_use()) else ""
        log.info("phase=%s step=%d/%d%s%s", self.phase, at, self.total, self._numbers, text)

    def record(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Record those of the values after `step` steps that are finite. seconds: since 1970, when they were measured."""
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if values:
            self._numbers = "".join(f" {name}={value:.4g}" for name, value in values.items())
            self._newest |= values
            self._write(values, step, seconds)

    def _report(self, rate: float | None) -> None:
        """`progress.json` in the folder, for programs that ask how far a training is. Format: job/run_folder/progress.py."""
        done = self.part.before + self.done
        record = {"step": done, "steps": self.total, "steps_per_second": rate, "time": round(time.time(), 3)}
        with contextlib.suppress(OSError):
            write_json(self._path.with_name(PROGRESS), record)

    def values(self, name: str) -> list[float]:
        """All recorded values of one name, in order; of the part alone, where it is one."""
        return [record[name] for record in self._own_records() if name in record]

    def warn_once(self, name: str, text: str | None, step: int | None = None) -> None:
        """Log and record a warning, at most once per name; None is no warning. step: steps done when it arose, if not now."""
        if text is None or any(record.get("warning") == name for record in self._own_records()):
            return
        step = self.done if step is None else step
        at = self.part.before + step
        log.warning(
            "phase=%s step=%d warning=%s %s", self.phase, at, name, text, extra=shown_as(f"{self.phase}, step {at}: {text}")
        )
        self._write({"warning": name, "text": text}, step, time.time())

    def _own_records(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record.get("training", "") == self.part.name]

    def _write(self, values: dict[str, Any], step: int, seconds: float) -> None:
        own = {"training": self.part.name, "training_step": step} if self.part.name else {}
        step += self.part.before
        # A resumed phase cuts the file at the first later step.
        assert not self.records or self.records[-1]["step"] <= step, f"step {step} is recorded after {self.records[-1]}"
        record = {"time": round(seconds, 3), "phase": self.phase, "step": step, **own, **values}
        self.records.append(record)
        try:
            if self._behind:
                write_text(self._path, "".join(map(_line, self.records)))
            else:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(_line(record))
            self._behind = False
        except OSError as error:
            if not self._behind:
                log.warning("%s cannot be written (%s); the phase continues", self._path, system_reason(error))
            self._behind = True


def shown(numbers: Mapping[str, float]) -> list[str]:
    """What a bar says of the newest numbers of a training, in few characters, the most important first."""
    texts = []
    if {"d_loss", "g_loss"} <= numbers.keys():
        texts.append(f"loss D {numbers['d_loss']:.3g} G {numbers['g_loss']:.3g}")
    elif "loss" in numbers:
        texts.append(f"loss {numbers['loss']:.3g}")
    if "d_accuracy" in numbers:
        texts.append(f"D acc {numbers['d_accuracy']:.0%}")
    if "validation_ccc" in numbers:
        texts.append(f"CCC {numbers['validation_ccc']:.2f}")
    return texts


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, in order; empty if there is no file. Damaged lines, and records without a field of all, are
    left out."""
    return [
        record
        for record in read_json_lines(path)
        if isinstance(record.get("step"), int) and isinstance(record.get("phase"), str) and "time" in record
    ]


def _records_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """The records of a metrics file before the first of more than `step` steps."""
    return list(takewhile(lambda record: record["step"] <= step, read_records(path)))
