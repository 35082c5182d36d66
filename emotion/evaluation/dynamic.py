"""Agreement of predicted curves with dynamic annotations, per song and pooled over all songs.

Source of the two: the task Emotion in Music of MediaEval (Aljanaki, Yang and Soleymani 2017, PLOS ONE 12:e0173392) averages over
songs; the pooled scores also count the differences between songs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from emotion.audio.feature_store import Features
from emotion.data.dynamic import FIRST_SECONDS, DynamicPoint
from emotion.data.song_ids import SongId
from emotion.evaluation.metrics import DIMENSIONS, interval_of, resamples

Array = npt.NDArray[np.float64]
CurveOf = Callable[[npt.NDArray[np.float16]], tuple[Array, npt.NDArray[np.floating[Any]]]]


def dynamic_scores(
    points: Mapping[SongId, Sequence[DynamicPoint]],
    test: Features,
    curve: CurveOf,
    flat: Array,
    *,
    groups: Sequence[str],
    samples: int,
    seed: int,
) -> dict[str, Any] | None:
    """Of the test songs with annotations: {"songs", "points", "from_seconds", "curve": {dimension: …}, "flat": {dimension: …}}.

    curve: log-mel of a song → (seconds [points], values [points, 2]); scored at the times that it has in common with the
    annotations. flat: [songs, 2], the predictions for the songs as a whole; scored as curves, they are what is to be beaten.
    A dimension has "ccc" and "rmse" of all points as one set, "song_ccc" and "song_rmse", means over songs, each with a 95 %
    interval, bootstrap over groups of songs (groups: [songs]; samples, seed). None where no song has a point in common.
    """
    predicted, constant, actual, scored_groups = [], [], [], []
    for index, song in enumerate(test.songs):
        if song.song_id not in points:
            continue
        seconds, values = curve(test.stored(index))
        at = {round(1000 * time): value for time, value in zip(seconds.tolist(), values.astype(np.float64), strict=True)}
        said = [point for point in points[song.song_id] if round(1000 * point.seconds) in at]
        if said:
            predicted.append(np.array([at[round(1000 * point.seconds)] for point in said]))
            constant.append(np.tile(flat[index], (len(said), 1)))
            actual.append(np.array([(point.valence, point.arousal) for point in said]))
            scored_groups.append(groups[index])
    if not actual:
        return None
    counts = [*resamples(scored_groups, samples, seed)]
    scored: dict[str, Any] = {"songs": len(actual), "points": sum(map(len, actual)), "from_seconds": FIRST_SECONDS}
    for name, curves in (("curve", predicted), ("flat", constant)):
        scored[name] = {
            dimension: _scores([song[:, column] for song in curves], [song[:, column] for song in actual], counts)
            for column, dimension in enumerate(DIMENSIONS)
        }
    return scored


def _scores(predicted: Sequence[Array], actual: Sequence[Array], counts: Sequence[Array]) -> dict[str, Any]:
    """predicted, actual: of each song, [points]. counts: see `resamples`."""
    sums = np.array([_sums(p, a) for p, a in zip(predicted, actual, strict=True)])
    own_ccc, own_rmse = _agreement(sums)

    def measured(drawn: Array) -> dict[str, Array]:
        ccc, rmse = _agreement(drawn @ sums)
        # A song whose curve and labels are one and the same number has no CCC.
        known = np.isfinite(own_ccc)
        of_known = drawn[:, known].sum(axis=1)
        song_ccc = np.where(of_known, drawn[:, known] @ own_ccc[known] / np.maximum(of_known, 1), np.nan)
        return {"ccc": ccc, "rmse": rmse, "song_ccc": song_ccc, "song_rmse": drawn @ own_rmse / drawn.sum(axis=1)}

    resampled = [measured(block) for block in counts]
    found: dict[str, Any] = {}
    for name, (value,) in measured(np.ones((1, len(sums)))).items():
        is_defined = bool(np.isfinite(value))
        found[name] = float(value) if is_defined else None
        found[f"{name}_ci"] = interval_of([block[name] for block in resampled]) if is_defined else None
    return found


def _sums(predicted: Array, actual: Array) -> list[float]:
    """Number, sums, sums of squares, and sum of products."""
    squares = [float((first * second).sum()) for first, second in ((predicted, predicted), (actual, actual), (predicted, actual))]
    return [len(actual), float(predicted.sum()), float(actual.sum()), *squares]


def _agreement(sums: Array) -> tuple[Array, Array]:
    """CCC, NaN where it is undefined, and RMSE, [n] each. sums: [n, 6], see `_sums`."""
    mean_p, mean_a, pp, aa, pa = (sums[:, 1:] / sums[:, :1]).T
    variance_p, variance_a, covariance = pp - mean_p**2, aa - mean_a**2, pa - mean_p * mean_a
    spread = variance_p + variance_a + (mean_p - mean_a) ** 2
    ccc = np.divide(2 * covariance, spread, out=np.full(len(sums), np.nan), where=spread > 1e-12)
    return ccc, np.sqrt(np.maximum(pp - 2 * pa + aa, 0))
