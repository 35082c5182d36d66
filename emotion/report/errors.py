"""Errors of a model by quadrant of the plane and by group, and the songs with the largest errors."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from emotion.evaluation.metrics import DIMENSIONS, scores
from emotion.report.page import signed, with_interval

Numbers = npt.NDArray[np.float64]

QUADRANTS = {
    (False, True): "unpleasant, excited",
    (True, True): "pleasant, excited",
    (False, False): "unpleasant, calm",
    (True, False): "pleasant, calm",
}
"""(valence is at least 0, arousal is at least 0) → name."""
FEWEST_SONGS = 2  # of a group in the table: one song says nothing about a group
MOST_GROUPS = 10


def quadrant_rows(groups: Sequence[str], actual: Numbers, predicted: Numbers, **settings: int) -> list[list[str]]:
    """Cells of a row: quadrant of the label, songs, MAE of both dimensions with intervals, mean error of both.
    groups: [songs]; actual, predicted: [songs, 2]; settings: bootstrap_samples and seed of the intervals, as for `scores`."""
    inside = actual >= 0
    rows = []
    for signs, name in QUADRANTS.items():
        picked = (inside == signs).all(axis=1)
        inner = [group for group, is_inside in zip(groups, picked, strict=True) if is_inside]
        rows.append(_row(name, inner, actual[picked], predicted[picked], settings))
    return rows


def group_rows(
    names: Sequence[str], actual: Numbers, predicted: Numbers, *, groups: Sequence[str] | None, **settings: int
) -> tuple[list[list[str]], int]:
    """Rows as `quadrant_rows`, and how many groups there are of at least FEWEST_SONGS songs. Of these, the MOST_GROUPS with the
    largest mean distance of the predictions from the labels. names: the group or genre of each song; songs without one are
    left out. groups: [songs], for the intervals; None: single songs, as within one group."""
    members: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        if name:
            members.setdefault(name, []).append(index)
    large = {name: found for name, found in sorted(members.items()) if len(found) >= FEWEST_SONGS}
    distances = distance(actual, predicted)
    worst = sorted(large, key=lambda name: (-float(distances[large[name]].mean()), name))[:MOST_GROUPS]
    rows = []
    for name in worst:
        inner = None if groups is None else [groups[index] for index in large[name]]
        rows.append(_row(name, inner, actual[large[name]], predicted[large[name]], settings))
    return rows, len(large)


def worst_songs(actual: Numbers, predicted: Numbers, songs: int) -> list[int]:
    """Indices of the songs with the largest distance between label and prediction, largest first; at most so many."""
    found: list[int] = np.argsort(-distance(actual, predicted), kind="stable")[:songs].tolist()
    return found


def distance(actual: Numbers, predicted: Numbers) -> Numbers:
    """[songs]: between label and prediction on the plane."""
    difference = predicted - actual
    return np.asarray(np.hypot(difference[:, 0], difference[:, 1]))


def _row(name: str, groups: Sequence[str] | None, actual: Numbers, predicted: Numbers, settings: dict[str, int]) -> list[str]:
    if not len(actual):
        return [name, "0", "", "", "", ""]
    samples, seed = settings["bootstrap_samples"], settings["seed"]
    found = scores(predicted, actual, groups=groups, bootstrap_samples=samples, seed=seed)
    means = (predicted - actual).mean(axis=0).tolist()
    return [
        name,
        str(len(actual)),
        *(with_interval(found[dimension], "mae", 2) for dimension in DIMENSIONS),
        *(signed(mean) for mean in means),
    ]
