"""What a training loop says while it runs: metrics.jsonl for programs, a bar on a terminal, a log line elsewhere."""

import json
import logging
import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from emotion.files import write_json, write_text

log = logging.getLogger(__name__)
LINE_SECONDS = 10.0


class Progress:
    """Counts the steps of one phase.

    `metrics.jsonl` in `folder` gets one JSON object a line with at least time, phase and step (steps done). On going on from
    `first` it is cut back to that step, so that no step is told twice. Off a terminal a log line appears every 10 s.
    `records` holds those objects, also the ones of earlier attempts. A disk that takes none of them does not end the phase: all
    are written once it does.
    """

    def __init__(self, folder: Path, phase: str, first: int, steps: int) -> None:
        self.phase, self.steps, self.done = phase, steps, first
        self.every = max(1, steps // 200)
        self._path, self._behind = folder / "metrics.jsonl", False
        self.records = _records_up_to(self._path, first)
        write_text(self._path, "".join(map(_line, self.records)))
        self._bar = tqdm(total=steps, initial=first, desc=phase, unit="step", disable=not sys.stderr.isatty())
        self._told, self._told_done = time.monotonic(), first
        self._numbers = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def due(self, done: int) -> bool:
        """Whether numbers are to be fetched from the device after `done` steps: about 200 times a phase, not every step."""
        return done % self.every == 0 or done == self.steps

    def advance(self, done: int, **values: float) -> None:
        """After `done` steps; the values among them that are finite are written down."""
        self._bar.update(done - self.done)
        self.done = done
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if values:
            self._numbers = "".join(f" {name}={value:.4g}" for name, value in values.items())
            self._write(values)
            self._bar.set_postfix_str(self._numbers.strip(), refresh=False)
        now = time.monotonic()
        if now - self._told >= LINE_SECONDS or done == self.steps:
            rate = (done - self._told_done) / (now - self._told) if now > self._told else 0.0
            self._report(rate)
            if self._bar.disable:
                log.info(
                    "phase=%s step=%d/%d%s steps_per_second=%.3g", self.phase, done, self.steps, self._numbers, rate
                )
            self._told, self._told_done = now, done

    def _report(self, rate: float) -> None:
        """`progress.json` in the folder, for programs that ask how far a training is. Format: job/run_folder/progress.py."""
        record = {"step": self.done, "steps": self.steps, "steps_per_second": rate, "time": round(time.time(), 3)}
        with suppress(OSError):
            write_json(self._path.with_name("progress.json"), record)

    def told(self, name: str) -> list[float]:
        """All values of one number, in order."""
        return [record[name] for record in self.records if name in record]

    def warn(self, name: str, text: str | None) -> None:
        """Say in log and metrics, once under a name, what looks wrong and which setting to change; None is nothing to say."""
        if text is None or any(record.get("warning") == name for record in self.records):
            return
        log.warning("phase=%s step=%d warning=%s %s", self.phase, self.done, name, text)
        self._write({"warning": name, "text": text})

    def _write(self, values: dict[str, Any]) -> None:
        record = {"time": round(time.time(), 3), "phase": self.phase, "step": self.done, **values}
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
                log.warning("%s cannot be written (%s); the phase goes on", self._path, error.strerror)
            self._behind = True


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _records_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """The whole lines of a metrics file that tell of no more than `step` steps; a torn last line is dropped."""
    if not path.exists():
        return []
    kept: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record["step"] > step:
            break
        kept.append(record)
    return kept
