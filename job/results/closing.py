"""The closing lines of a run: how good the stack is, where the report is, and what to do next."""

import logging
import os
from pathlib import Path
from typing import Any

from emotion.terminal import shown_as
from job.results.scores import DIMENSIONS, best_baseline, newest_metrics
from job.spec.location import Generated, Local, StoredLocation
from job.spec.model import JobSpec, run_name

log = logging.getLogger(__name__)


def say_result(spec: JobSpec, published: StoredLocation, run_folder: Path) -> None:
    """Log the closing lines, so that they are on the screen and in job.log."""
    for line in closing_lines(spec, published, run_folder):
        log.info("%s", line, extra=shown_as(line))


def closing_lines(spec: JobSpec, published: StoredLocation, run_folder: Path) -> list[str]:
    """The scores, the place of the report and the next step. published: the folder of the run's results."""
    lines = []
    metrics = newest_metrics(run_folder, *([published.path] if isinstance(published, Local) else []))
    if metrics is not None:
        lines += [_verdict(metrics, dimension) for dimension in DIMENSIONS]
    return [*lines, f"report   {_short(published)}/report.html", f"next     {_next(spec, published)}"]


def _verdict(metrics: dict[str, Any], dimension: str) -> str:
    """valence  CCC 0.49 [0.14, 0.73] (stack); best baseline 0.53 (boosting)"""
    best = best_baseline(metrics, dimension)
    beside = "no baseline has one" if best is None else f"best baseline {best[1]:z.2f} ({best[0]})"
    return f"{dimension}  CCC {_with_interval(metrics['stack'][dimension])} (stack); {beside}"


def _with_interval(row: dict[str, Any]) -> str:
    if row["ccc"] is None:
        return "undefined"
    interval = row["ccc_ci"]
    return f"{row['ccc']:z.2f}" + ("" if interval is None else f" [{interval[0]:z.2f}, {interval[1]:z.2f}]")


def _next(spec: JobSpec, published: StoredLocation) -> str:
    if isinstance(spec.source, Generated):
        return "emotion-job init FOLDER writes a spec for your own songs"
    if spec.split.protocol != "kfold" or not isinstance(published, Local):
        return f"emotion-job predict {_short(published)} SONG.mp3"
    beside, names = published.path.parent, _runs_of_folds(spec)
    missing = [fold for fold, name in enumerate(names) if not (beside / name / "manifest.json").exists()]
    if missing:
        return f"the other folds: the same command with --set split.fold={missing[0]}" + (", …" if len(missing) > 1 else "")
    # Not spec.name-*: that may be runs of other settings, and of other specs, too.
    return f"emotion-job collect {' '.join(f'{_short(Local(beside))}/{name}' for name in names)}"


def _runs_of_folds(spec: JobSpec) -> list[str]:
    """The names of the runs of all folds of the same spec."""
    splits = [spec.split.model_copy(update={"fold": fold}) for fold in range(spec.split.folds)]
    return [run_name(spec.model_copy(update={"split": split})) for split in splits]


def _short(location: StoredLocation) -> str:
    """The location as text; a path below the current folder is relative to it."""
    if not isinstance(location, Local):
        return str(location)
    below = os.path.relpath(location.path)
    return str(location.path) if below.startswith("..") else below
