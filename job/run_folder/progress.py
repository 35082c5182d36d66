"""The progress of a run, for `emotion-slurm status`, in two small JSON files. Standard library only: a login node imports this.

    RUN/progress.json                {"folder", "phase", "state", "time"}, written by the runner when a phase begins and ends
    RUN/PHASE-KEY12/progress.json    {"step", "steps", "steps_per_second", "time"}, written by a training every 10 s

`time` is in seconds since 1970. emotion/training/progress.py writes the second file and knows nothing of the first.
"""

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from emotion.files import read_json, write_json
from emotion.training.progress_files import PROGRESS as PROGRESS

State = Literal["running", "done"]


@dataclass(frozen=True)
class RunProgress:
    """The newest phase of a run. The numbers of steps are None until its training has reported for the first time.
    `state` stays "running" after the job was killed. time: of the newest report."""

    phase: str
    state: State
    time: float
    step: int | None = None
    steps: int | None = None
    steps_per_second: float | None = None


def write_progress(run_folder: Path, phase: str, phase_folder: Path, state: State) -> None:
    """Record that a phase has started or is done. Write errors are ignored: a full disk must not end the job for this file."""
    record = {"phase": phase, "state": state, "folder": phase_folder.name, "time": round(time.time(), 3)}
    with suppress(OSError):
        if state == "running":
            (phase_folder / PROGRESS).unlink(missing_ok=True)  # the report of an earlier attempt
        write_json(run_folder / PROGRESS, record)


def read_progress(run_folder: Path) -> RunProgress | None:
    """The progress of a run; None if no phase has started, or if the file cannot be read."""
    try:
        run = read_json(run_folder / PROGRESS)
        found = RunProgress(run["phase"], run["state"], run["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with suppress(OSError, ValueError, KeyError, TypeError):
        steps = read_json(run_folder / run["folder"] / PROGRESS)
        return replace(found, **{**steps, "time": max(steps["time"], run["time"])})
    return found
