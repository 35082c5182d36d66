"""Metrics of predicted labels, with bootstrap intervals, and the ceiling that label noise sets. numpy only, in float64.

Labels and predictions are [songs] for one dimension or [songs, 2] = (valence, arousal).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from emotion.errors import DataError

Array = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.floating[Any]]
Scores = dict[str, float | list[float] | None]
DIMENSIONS = ("valence", "arousal")


def concordance(predicted: Numbers, actual: Numbers) -> float:
    """Lin's concordance correlation coefficient.

    predicted, actual: [songs], any unit, the same for both. Returns a value in [-1, 1]; 1 only where predicted == actual. Unlike
    Pearson's r it falls with a wrong mean or scale, which is what we want to know about a regressor that shrinks towards the
    average mood. A constant prediction of labels that vary scores exactly 0. Raises DataError for fewer than two songs, or if
    every value is the same number: 0/0, and returning 0 would enter an average as if it had been measured. Source: Lin 1989,
    Biometrics 45:255-268, with population variances.
    """
    return metric("ccc", predicted, actual)


def validation_concordance(predicted: Numbers, actual: Numbers) -> float:
    """`concordance` for model selection: 0 instead of an error if all predictions and labels are the same number.

    Raises DataError for fewer than two songs.
    """
    is_constant = len(actual) > 1 and np.ptp([*predicted, *actual]) == 0
    return 0.0 if is_constant else concordance(predicted, actual)


def metric(name: str, predicted: Numbers, actual: Numbers) -> float:
    """One metric of one dimension: "ccc", "mae", "rmse" (both in the unit of the labels), "r2" or "pearson".

    predicted, actual: [songs]. r2 is 1 - squared errors / squared deviations of the labels: 0 for predicting the mean of
    these labels, negative for worse. Raises DataError where the metric is undefined: ccc if every value is the same number
    or there are fewer than two songs, r2 if all labels are the same, pearson if all labels or all predictions are.
    """
    value = float(_all_metrics(*_checked(predicted, actual, axes=1))[name])
    if np.isnan(value):
        raise DataError(
            f"metrics: {name} needs at least two songs and values that are not all the same number; it is undefined (0/0 or "
            f"x/0) for these {len(actual)} songs"
        )
    return value


def scores(
    predicted: Numbers, actual: Numbers, *, groups: Sequence[str] | None, bootstrap_samples: int, seed: int
) -> dict[str, Scores]:
    """Every metric of both dimensions, each with its 95 % interval, as JSON values.

    predicted, actual: [songs, 2] = (valence, arousal), in the same unit. groups: [songs], such as artists; None: each song is one
    of its own. Returns {"valence": {"ccc", "ccc_ci": [low, high], "mae", "mae_ci", "rmse", "rmse_ci", "r2", "r2_ci", "pearson",
    "pearson_ci"}, "arousal": {the same}}. A metric that is undefined (see `metric`) is None, and so is its interval. With fewer
    than three groups every interval is None.

    The intervals are percentile bootstrap intervals, from one set of resamples for all metrics and both dimensions. Whole groups
    are drawn, as errors for songs of one group are alike: drawing single songs gives intervals that are too narrow. With few
    groups they are too narrow as well. Resamples in which a metric is undefined, or a ccc has constant labels, are left out of
    its percentiles. Raises DataError for no songs, other shapes, or NaN or infinity. Source: the cluster bootstrap, Davison and
    Hinkley 1997, Bootstrap Methods and their Application, section 3.8.
    """
    predicted, actual = _checked(predicted, actual, axes=2)

    def measured(drawn: Array | None) -> dict[str, Array]:
        return _all_metrics(predicted.T, actual.T, drawn)

    return _with_intervals(
        measured, range(len(actual)) if groups is None else groups, bootstrap_samples=bootstrap_samples, seed=seed
    )


def paired_difference(
    predicted_a: Numbers,
    predicted_b: Numbers,
    actual: Numbers,
    *,
    groups: Sequence[str] | None,
    bootstrap_samples: int,
    seed: int,
) -> dict[str, Scores]:
    """CCC of a minus CCC of b on the same songs, with a paired 95 % interval. Positive: a is better.

    predicted_a, predicted_b, actual: [songs, 2]; groups: as for `scores`. Returns {"valence": {"ccc_difference",
    "ccc_difference_ci"}, "arousal": {the same}}; None where a CCC is undefined, and no interval for fewer than three groups. Both
    CCCs are computed on the same resamples, so a song's difficulty cancels: the interval is narrower than two separate ones.
    Raises DataError as `scores`.
    """
    predictions = [_checked(predicted, actual, axes=2)[0].T for predicted in (predicted_a, predicted_b)]
    labels = np.asarray(actual, np.float64).T

    def measured(drawn: Array | None) -> dict[str, Array]:
        first, second = (_all_metrics(predicted, labels, drawn)["ccc"] for predicted in predictions)
        return {"ccc_difference": first - second}

    return _with_intervals(
        measured, range(len(actual)) if groups is None else groups, bootstrap_samples=bootstrap_samples, seed=seed
    )


def resamples(groups: Sequence[object], samples: int, seed: int) -> Iterator[Array]:
    """Blocks [resamples, songs] of a few megabytes: how often each song was drawn, where as many groups as there are were drawn
    with replacement, each with all of its songs. groups: [songs]; fewer than three different ones give no resamples."""
    random = np.random.Generator(np.random.PCG64(seed))
    number = {group: index for index, group in enumerate(sorted(set(groups), key=str))}
    if len(number) < 3:
        return
    of_song = np.array([number[group] for group in groups])
    block = max(1, 250_000 // len(of_song))
    for start in range(0, samples, block):
        drawn = random.multinomial(len(number), np.full(len(number), 1 / len(number)), min(block, samples - start))
        yield drawn[:, of_song].astype(np.float64)


def jackknife_variance(without_each: Numbers) -> float:
    """Variance of a statistic, by its values without each group of songs in turn, [groups].

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, eq. 11.5.
    """
    groups = len(without_each)
    return float((groups - 1) / groups * ((without_each - without_each.mean()) ** 2).sum())


def ceiling(actual: Numbers, rater_sd: Numbers, raters: npt.NDArray[Any]) -> dict[str, dict[str, float]]:
    """The best scores that a predictor can reach on average, given the noise of the labels.

    actual: [songs, 2] mean ratings; rater_sd: [songs, 2] deviation over the raters of a song, in the same unit; raters: [songs]
    their number. Returns {"valence": {"ccc", "r2", "reliability"}, "arousal": {the same}}, all in [0, 1].

    A label is the true mean t of all listeners plus an error of variance rater_sd² / raters. Over the songs, noise =
    mean(rater_sd² / raters) and var(actual) = var_t + noise, so reliability = var_t / var(actual) = 1 - noise / var(actual),
    clipped to [0, 1]. A predictor that knows t has no error but the noise: its R² = 1 - noise / var(actual) = reliability, the
    highest possible. With the factor a about its mean it has the CCC 2 a var_t / (a² var_t + var(actual)), which is highest where
    the variances are equal, a² = var(actual) / var_t, and is √reliability there: as for Pearson's r, Lord and Novick 1968,
    Statistical Theories of Mental Test Scores, section 3.9.

    rater_sd² / raters is unbiased for deviations with divisor raters - 1. DEAM's have divisor raters: pass raters - 1 for them.
    Raises DataError for other shapes, raters below 1, a negative deviation, or labels that are all the same number.
    """
    labels, deviations = _checked(actual, rater_sd, axes=2)
    people = np.asarray(raters, np.float64)
    if people.shape != (len(labels),) or not (people >= 1).all() or not (deviations >= 0).all():
        raise DataError(
            f"metrics: the ceiling needs [{len(labels)}] raters, all at least 1, and deviations of at least 0; found "
            f"raters {people} and a smallest deviation of {deviations.min():g}. Correct evaluate.raters_per_excerpt, "
            "evaluate.raters_per_full_song or the label files."
        )
    result: dict[str, dict[str, float]] = {}
    for column, dimension in enumerate(DIMENSIONS):
        variance = float(labels[:, column].var())
        if np.ptp(labels[:, column]) == 0:
            raise DataError(f"metrics: the ceiling needs labels that vary; every {dimension} is {labels[0, column]:g}")
        noise = float((deviations[:, column] ** 2 / people).mean())
        reliability = min(max(1 - noise / variance, 0.0), 1.0)
        result[dimension] = {"ccc": reliability**0.5, "r2": reliability, "reliability": reliability}
    return result


def _all_metrics(predicted: Array, actual: Array, drawn: Array | None = None) -> dict[str, Array]:
    """Every metric along the last axis, [..., songs] → [...] or, of resamples, [..., resamples]; NaN where undefined.

    drawn: see `resamples`. The CCC of a resample is also NaN if all of its labels are the same number, as such a resample says
    nothing about the other songs.
    """
    weights = np.ones((1, actual.shape[-1])) if drawn is None else drawn
    songs = weights.sum(axis=-1)
    first = (weights > 0).argmax(axis=-1)

    def mean(values: Array) -> Array:
        return np.asarray((values * weights).sum(axis=-1) / songs)

    def deviations(values: Array) -> Array:
        # Relative to the first song drawn, so that those of a constant are exactly 0; 0.1 minus the mean of 0.1s is not.
        offset = values[..., None, :] - values[..., first, None]
        return np.asarray(offset - mean(offset)[..., None])

    predicted_deviation, actual_deviation = deviations(predicted), deviations(actual)
    predicted_variance, actual_variance = mean(predicted_deviation**2), mean(actual_deviation**2)
    covariance = mean(predicted_deviation * actual_deviation)
    error = (predicted - actual)[..., None, :]
    squared_error = mean(error**2)
    spread = predicted_variance + actual_variance + mean(error) ** 2
    if actual.shape[-1] < 2:
        spread = np.zeros_like(spread)
    if drawn is not None:
        spread = np.where(actual_variance > 0, spread, 0.0)
    correlation = _quotient(covariance, np.sqrt(predicted_variance) * np.sqrt(actual_variance))
    found = {
        "ccc": _quotient(2 * covariance, spread),
        "mae": mean(np.abs(error)),
        "rmse": np.asarray(np.sqrt(squared_error)),
        "r2": 1 - _quotient(squared_error, actual_variance),
        "pearson": np.clip(correlation, -1.0, 1.0),
    }
    return found if drawn is not None else {name: values[..., 0] for name, values in found.items()}


def _quotient(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, NaN where the denominator is 0."""
    undefined = np.full(np.shape(denominator), np.nan)
    return np.asarray(np.divide(numerator, denominator, out=undefined, where=np.asarray(denominator) > 0))


def _checked(predicted: Numbers, actual: Numbers, *, axes: int) -> tuple[Array, Array]:
    """Both as float64. Raises DataError unless they have the same shape, [songs] or [songs, 2], and are finite."""
    first, second = np.asarray(predicted, np.float64), np.asarray(actual, np.float64)
    expected = "[songs]" if axes == 1 else "[songs, 2]"
    if first.shape != second.shape or first.ndim != axes or (axes == 2 and first.shape[1] != 2) or not len(first):
        raise DataError(
            f"metrics: expected two arrays {expected} of the same shape with at least one song, "
            f"found {list(first.shape)} and {list(second.shape)}"
        )
    for array in (first, second):
        bad = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))
        if len(bad):
            raise DataError(f"metrics: expected finite numbers, found {array[bad[0]]} at position {bad[0]} of {len(array)}")
    return first, second


def _with_intervals(
    measured: Callable[[Array | None], dict[str, Array]], groups: Sequence[object], *, bootstrap_samples: int, seed: int
) -> dict[str, Scores]:
    """Each metric of each dimension with its interval, NaN as None.

    measured: takes None, or a block of `resamples`; returns metric → [2] or [2, resamples].
    """
    point = measured(None)
    drawn = [measured(block) for block in resamples(groups, bootstrap_samples, seed)]
    result: dict[str, Scores] = {dimension: {} for dimension in DIMENSIONS}
    for row, dimension in enumerate(DIMENSIONS):
        for name, values in point.items():
            value = None if np.isnan(values[row]) else float(values[row])
            interval = None if value is None else interval_of([block[name][row] for block in drawn])
            result[dimension] |= {name: value, f"{name}_ci": interval}
    return result


def interval_of(blocks: list[Array]) -> list[float] | None:
    """2.5th and 97.5th percentile of the samples that are not NaN; None where there are none."""
    samples = np.concatenate(blocks) if blocks else np.zeros(0)
    defined = samples[~np.isnan(samples)]
    if not len(defined):
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return [float(low), float(high)]
