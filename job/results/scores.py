"""Reads the scores that the phase evaluate wrote, for programs that must not import numpy, as the science does."""

import contextlib
from pathlib import Path
from typing import Any

from emotion.files import read_json

DIMENSIONS = ("valence", "arousal")  # those of emotion/evaluation/metrics.py


def newest_metrics(run_folder: Path, *others: Path) -> dict[str, Any] | None:
    """metrics.json of the first folder in `others` that has it, else of the newest phase evaluate; None if there is none."""
    evaluated = sorted(run_folder.glob("evaluate-*/"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for folder in (*others, *evaluated):
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = read_json(folder / "metrics.json")
            return found
    return None


def best_baseline(metrics: dict[str, Any], dimension: str) -> tuple[str, float] | None:
    """Name and CCC of the baseline with the highest CCC; None if no baseline has one."""
    baselines = {name: scores[dimension]["ccc"] for name, scores in sorted(metrics["baselines"].items())}
    scored = {name: float(ccc) for name, ccc in baselines.items() if ccc is not None}
    return max(scored.items(), key=lambda item: item[1], default=None)
