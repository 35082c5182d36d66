"""Coverage of the stack's prediction intervals: the share of the test songs of a setting's folds that are inside them."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from emotion.data.out_of_fold import Pair
from emotion.data.song_ids import SongId
from emotion.evaluation.conformal import PERCENT, coverage
from emotion.evaluation.metrics import DIMENSIONS

Bounds: TypeAlias = tuple[Pair, Pair]  # (lower, upper)


def bounds_of(row: Mapping[str, str]) -> Bounds | None:
    """The interval in a row of predictions.csv; None in runs of earlier versions."""
    if "valence_lower" not in row:
        return None
    lower, upper = (tuple(float(row[f"{dimension}_{end}"]) for dimension in DIMENSIONS) for end in ("lower", "upper"))
    return (lower[0], lower[1]), (upper[0], upper[1])


def coverage_over_folds(folds: Sequence[tuple[Mapping[SongId, Pair], Mapping[SongId, Bounds]]]) -> dict[str, dict[str, Any]]:
    """Per dimension, `conformal.coverage` of all songs as one set, "by_fold" and "mean_over_folds"; empty without intervals.

    folds: for each fold, the labels and the bounds of its songs.
    """
    tables = [np.array([(actual[song], *bounds[song]) for song in actual]) for actual, bounds in folds if bounds]
    if not tables:
        return {}
    found = {}
    for column, dimension in enumerate(DIMENSIONS):
        by_fold = [coverage(*table[:, :, column].T)["coverage"] for table in tables]
        pooled = coverage(*np.concatenate(tables)[:, :, column].T)
        found[dimension] = {**pooled, "by_fold": by_fold, "mean_over_folds": float(np.mean(by_fold))}
    return found


def coverage_text(seed: str, found: dict[str, dict[str, Any]]) -> str:
    """The coverage as a line of Markdown; empty without intervals."""
    if not found:
        return ""
    shown = []
    for dimension, row in found.items():
        low, high = row["coverage_ci"]
        fold = f"mean over folds {row['mean_over_folds']:.2f}, mean width {row['mean_width']:.2f}"
        shown.append(f"{dimension} of {row['coverage']:.2f} [{low:.2f}, {high:.2f}] of the songs ({fold})")
    return f"- seed {seed}: the stack's {PERCENT} % intervals hold {', '.join(shown)}"
