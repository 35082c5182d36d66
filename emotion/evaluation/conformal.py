"""Prediction intervals by conformal prediction: a prediction plus and minus a quantile of errors on songs held out of its fit.

Such an interval holds the label of a new song with the probability LEVEL, for any distribution of the errors, on two conditions:
the new song is exchangeable with the held-out ones, and one rule of prediction was fixed before these were seen. The second is
not met here: the settings of the regressors, the epoch of the ViT and whether it has a share were chosen on the held-out songs,
and the published stack is fitted to all of them again. So LEVEL is not guaranteed, and the coverage is measured on test songs:
see emotion/README.md, "How sure a prediction is".

There is one width for all songs. A width that follows a song's difficulty needs a second regressor, fitted to the sizes of few
errors: on DEAM's labels with openSMILE features such intervals were not narrower.

The level is 90 %: it needs nine songs, where 95 % needs nineteen, and with fewer the interval is the whole range.

Sources: Vovk, Gammerman and Shafer 2005, Algorithmic Learning in a Random World; Lei et al. 2018, JASA 113:1094-1111, algorithm
2; for errors from folds instead of one split, Barber et al. 2021, Annals of Statistics 49:486-507.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emotion.errors import DataError
from emotion.evaluation.metrics import DIMENSIONS
from emotion.files import read_json, write_json

Array = npt.NDArray[np.float64]

PERCENT = 90
LEVEL = PERCENT / 100
INTERVALS = "intervals.json"  # in the folder of the stack
LOWEST, HIGHEST = -1.0, 1.0  # of labels


@dataclass(frozen=True)
class HalfWidths:
    """width: [2] = (valence, arousal), infinite where the interval is the whole range; songs: [2], the errors behind each."""

    width: Array
    songs: npt.NDArray[np.int64]

    def around(self, predicted: Array) -> tuple[Array, Array]:
        """Lower and upper ends, [songs, 2] each, in [-1, 1]. predicted: [songs, 2] in [-1, 1]."""
        return (predicted - self.width).clip(LOWEST, HIGHEST), (predicted + self.width).clip(LOWEST, HIGHEST)


def half_width(errors: Array) -> float:
    """The ceil((n + 1) LEVEL)-th smallest of n absolute errors [n]; infinite where n is smaller than that: fewer than nine.

    For exchangeable errors without ties the next one is at most that with a probability from LEVEL to LEVEL + 1 / (n + 1).
    """
    rank = -(-(len(errors) + 1) * PERCENT // 100)  # of whole numbers, so that nothing is rounded
    return float(np.sort(np.abs(errors))[rank - 1]) if rank <= len(errors) else float("inf")


def half_widths(held_out: Array, labels: Array) -> HalfWidths:
    """held_out: [songs, 2], predictions by what was not fitted to the song; NaN where there is none. labels: [songs, 2]."""
    errors = [labels[known, column] - held_out[known, column] for column, known in enumerate(np.isfinite(held_out.T))]
    return HalfWidths(np.array([half_width(found) for found in errors]), np.array([len(found) for found in errors]))


def coverage(labels: Array, lower: Array, upper: Array) -> dict[str, Any]:
    """The share of labels inside their intervals, [songs] each, with a 95 % interval, and the mean width of the intervals.

    The interval is exact for independent songs (Clopper and Pearson 1934, Biometrika 26:404-413); songs of few groups are not.
    """
    from scipy.special import betaincinv

    inside, songs = int(((labels >= lower) & (labels <= upper)).sum()), len(labels)
    low = float(betaincinv(inside, songs - inside + 1, 0.025)) if inside else 0.0
    high = float(betaincinv(inside + 1, songs - inside, 0.975)) if inside < songs else 1.0
    return {"coverage": inside / songs, "coverage_ci": [low, high], "mean_width": float((upper - lower).mean())}


def coverage_of(widths: HalfWidths, predicted: Array, labels: Array) -> dict[str, dict[str, Any]]:
    """`coverage` per dimension, with the half width, None for the whole range, and the held-out songs behind it.

    predicted, labels: [songs, 2].
    """
    lower, upper = widths.around(predicted)
    found = _as_json(widths)
    return {
        dimension: {**coverage(labels[:, column], lower[:, column], upper[:, column]), **found[dimension]}
        for column, dimension in enumerate(DIMENSIONS)
    }


def write_intervals(found: dict[str, HalfWidths], folder: Path) -> None:
    """found: predictor ("stack", "model") → its half widths."""
    write_json(folder / INTERVALS, {"level": LEVEL, **{name: _as_json(widths) for name, widths in found.items()}})


def read_intervals(folder: Path) -> dict[str, HalfWidths]:
    """Predictor → half widths, as `write_intervals` wrote them; empty for a run of an earlier version, which has none.

    Raises DataError where the file is damaged.
    """
    if not (folder / INTERVALS).exists():
        return {}
    try:
        read = read_json(folder / INTERVALS)
        if read.pop("level") != LEVEL:
            raise ValueError(f"the level is not {LEVEL}")
        return {name: _from_json(widths) for name, widths in read.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder / INTERVALS}: expected the widths of intervals ({type(error).__name__}: {error}). Copy the published run "
            f"again."
        ) from error


def _as_json(widths: HalfWidths) -> dict[str, dict[str, Any]]:
    return {
        dimension: {"half_width": float(width) if np.isfinite(width) else None, "held_out_songs": int(songs)}
        for dimension, width, songs in zip(DIMENSIONS, widths.width, widths.songs, strict=True)
    }


def _from_json(value: dict[str, dict[str, Any]]) -> HalfWidths:
    found = [value[dimension] for dimension in DIMENSIONS]
    widths = [float("inf") if row["half_width"] is None else float(row["half_width"]) for row in found]
    return HalfWidths(np.array(widths), np.array([int(row["held_out_songs"]) for row in found]))
