"""How good predictions and synthetic clips are: plain functions of arrays. numpy only, in float64.

Labels and predictions are [songs] for one dimension or [songs, 2] = (valence, arousal). Every metric of predictions is
computed by `_measure`, for the songs as they are and for all bootstrap resamples alike.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from emotion.errors import DataError

Array = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.floating[Any]]
Scores = dict[str, float | list[float] | None]

DIMENSIONS = ("valence", "arousal")
JACKKNIFE_GROUPS = 20


def concordance(predicted: Numbers, actual: Numbers) -> float:
    """Lin's concordance correlation coefficient.

    predicted, actual: [songs], any unit, the same for both.
    Returns a value in [-1, 1]; 1 only where predicted == actual. Unlike Pearson's r it falls with a wrong mean or
    scale, which is what we want to know about a regressor that shrinks towards the average mood. A constant prediction
    of labels that vary scores exactly 0.
    Raises DataError for fewer than two songs, or if every value is the same number: 0/0, and returning 0 would enter
    an average as if it had been measured.

    Source: Lin 1989, Biometrics 45:255-268, with population variances.
    """
    return metric("ccc", predicted, actual)


def metric(name: str, predicted: Numbers, actual: Numbers) -> float:
    """One metric of one dimension: "ccc", "mae", "rmse" (both in the unit of the labels), "r2" or "pearson".

    predicted, actual: [songs]. r2 is 1 - squared errors / squared deviations of the labels: 0 for the mean of these very
    labels, below 0 for worse. Raises DataError where it is 0/0 or x/0: ccc where every value is the same number or there
    are fewer than two songs, r2 where every label is the same, pearson there and where every prediction is the same.
    """
    value = float(_measure(*_pair(predicted, actual, 1))[name])
    if np.isnan(value):
        raise DataError(
            f"metrics: {name} needs at least two songs and values that are not all the same number; found {len(actual)} songs "
            f"and a value of 0/0 or x/0"
        )
    return value


def scores(predicted: Numbers, actual: Numbers, bootstrap_samples: int, seed: int) -> dict[str, Scores]:
    """Every metric of both dimensions, each with its 95 % interval, ready for JSON.

    predicted, actual: [songs, 2] = (valence, arousal), in one unit.
    Returns {"valence": {"ccc", "ccc_ci": [low, high], "mae", "mae_ci", "rmse", "rmse_ci", "r2", "r2_ci", "pearson",
    "pearson_ci"}, "arousal": {the same}}. An undefined metric is None, with its interval: r2 where every label is the
    same number, pearson there and for a constant prediction, ccc where it is 0/0. With fewer than three songs every
    interval is None.

    The interval is the percentile bootstrap over songs; one set of resamples serves all metrics and both dimensions.
    For ccc, r2 and pearson a resample in which the metric is undefined or all labels are the same number is left out,
    and the percentiles are those of the others. Songs are drawn by position, so another order of the songs gives the
    same metrics and, within the bootstrap's noise, the same intervals.
    Raises DataError for no songs, other shapes, or a value that is not finite.
    """
    predicted, actual = _pair(predicted, actual, 2)
    point = _measure(predicted.T, actual.T)
    drawn: dict[str, list[Array]] = {name: [] for name in point}
    if len(actual) >= 3:
        for picked in _resamples(len(actual), bootstrap_samples, seed):
            for name, values in _measure(predicted.T[:, picked], actual.T[:, picked], resampled=True).items():
                drawn[name].append(values)
    result: dict[str, Scores] = {}
    for row, dimension in enumerate(DIMENSIONS):
        result[dimension] = {}
        for name, values in point.items():
            value = None if np.isnan(values[row]) else float(values[row])
            result[dimension][name] = value
            samples = [block[row] for block in drawn[name]]
            result[dimension][f"{name}_ci"] = None if value is None else _interval(samples)
    return result


def paired_difference(
    predicted_a: Numbers, predicted_b: Numbers, actual: Numbers, bootstrap_samples: int, seed: int
) -> dict[str, Scores]:
    """CCC of a minus CCC of b on the same songs, with a paired 95 % interval: above 0, a is the better one.

    predicted_a, predicted_b, actual: [songs, 2]. Returns {"valence": {"ccc_difference", "ccc_difference_ci"},
    "arousal": {the same}}; None where a CCC is 0/0, and no interval below three songs. Both are measured on each
    resample, so what is hard about a song hits both and cancels: the interval is narrower than two separate ones
    suggest.
    Raises DataError as `scores` does.
    """
    first, second = _pair(predicted_a, actual, 2)[0].T, _pair(predicted_b, actual, 2)[0].T
    labels = np.asarray(actual, np.float64).T
    point = _measure(first, labels)["ccc"] - _measure(second, labels)["ccc"]
    drawn: list[Array] = []
    if len(actual) >= 3:
        for picked in _resamples(len(actual), bootstrap_samples, seed):
            ccc_a = _measure(first[:, picked], labels[:, picked], resampled=True)["ccc"]
            ccc_b = _measure(second[:, picked], labels[:, picked], resampled=True)["ccc"]
            drawn.append(ccc_a - ccc_b)
    result: dict[str, Scores] = {}
    for row, dimension in enumerate(DIMENSIONS):
        value = None if np.isnan(point[row]) else float(point[row])
        interval = None if value is None else _interval([block[row] for block in drawn])
        result[dimension] = {"ccc_difference": value, "ccc_difference_ci": interval}
    return result


def ceiling(actual: Numbers, rater_sd: Numbers, raters: npt.NDArray[Any]) -> dict[str, dict[str, float]]:
    """What the noise of the labels leaves to be predicted.

    actual: [songs, 2] mean ratings; rater_sd: [songs, 2] standard deviation over the raters of a song, in the same
    unit; raters: [songs] people behind each label. Returns {"valence": {"ccc", "r2", "reliability"}, "arousal": {the
    same}}, all in [0, 1].

    A label is the true mean t of all listeners plus an error of variance rater_sd² / raters; over the songs
    noise = mean(rater_sd² / raters) and var(actual) = var_t + noise, so reliability = var_t / var(actual)
    = 1 - noise / var(actual), clipped to [0, 1]. A predictor that knows t is wrong by the noise alone: its
    R² = 1 - noise / var(actual) = reliability, the best there is. Its covariance with the labels is var_t and its mean
    is right, so its CCC = 2 var_t / (var_t + var(actual)) = 2 var_t / (2 var_t + noise). (Stretched to the spread of
    the labels it would reach sqrt(reliability), a little more, at the cost of R².)

    rater_sd² / raters is unbiased for a deviation with the divisor raters - 1. For one with the divisor raters, as in
    DEAM's files, pass raters - 1 in its place: rater_sd² / (raters - 1) is then the same quantity.
    Raises DataError for other shapes, raters below 1, a negative deviation, or labels that are all the same number.
    """
    labels, deviations = _pair(actual, rater_sd, 2)
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
        result[dimension] = {
            "ccc": 2 * reliability / (1 + reliability),
            "r2": reliability,
            "reliability": reliability,
        }
    return result


def frechet_distance(a: Numbers, b: Numbers, shrink: bool = True) -> float:
    """Squared Fréchet distance between the Gaussians of two samples, in squared units of the space; at least 0.

    a: [n, d], b: [m, d], n and m at least 2. |mean_a - mean_b|² + tr(S_a + S_b - 2 (S_a^½ S_b S_a^½)^½), with
    population covariances, shrunk towards a multiple of the identity (Ledoit and Wolf) unless told otherwise. The root
    is taken of a symmetric product by its eigenvalues, so no complex numbers appear for singular covariances. Biased
    upwards for small samples, the more the larger d is: keep d low and compare with the value of real against real.
    Raises DataError for other shapes or values that are not finite.

    Source: Dowson and Landau 1982, J. Multivariate Analysis 12:450-455; Heusel et al. 2017, arXiv:1706.08500, eq. 6.
    """
    a, b = _two_samples(a, b, least=2)
    covariance_a = _shrunk_covariance(a) if shrink else _covariance(a)
    covariance_b = _shrunk_covariance(b) if shrink else _covariance(b)
    values, vectors = np.linalg.eigh(covariance_a)
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product = root_a @ covariance_b @ root_a
    cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0)).sum()
    shift = a.mean(axis=0) - b.mean(axis=0)
    distance = shift @ shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross
    return max(float(distance), 0.0)


def squared_mmd(a: Numbers, b: Numbers) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x·y / d + 1)³: 0 on average for equal distributions.

    a: [n, d], b: [m, d], n and m at least 2. May be negative. Raises DataError as `frechet_distance` does.

    Source: Gretton et al. 2012, JMLR 13:723-773, eq. 3; the kernel of Bińkowski et al. 2018, arXiv:1801.01401, section
    4.
    """
    a, b = _two_samples(a, b, least=2)
    within_a, within_b, between = _cubic_kernel(a, a), _cubic_kernel(b, b), _cubic_kernel(a, b)
    n, m = len(a), len(b)
    return float(
        (within_a.sum() - np.trace(within_a)) / (n * (n - 1))
        + (within_b.sum() - np.trace(within_b)) / (m * (m - 1))
        - 2 * between.mean()
    )


def jackknife(statistic: Callable[..., Array], samples: Sequence[npt.NDArray[Any]]) -> tuple[Array, Array]:
    """Value of a statistic of independent samples, and half the width of its 95 % interval.

    statistic: takes the samples, each [items, ...], and returns [k] numbers. Items are independent and in no particular
    order; each sample has at least 2. Of every sample one twentieth after the other is left out (one item of a sample
    below 20), the variances that this gives are added up, and the interval is Student's with the degrees of freedom of
    the smallest sample. An interval of a distance that is 0 is 1.4 times as wide as it need be: leaving items out doubles
    the variance of what is quadratic in them.

    Source: Shao and Tu 1995, The Jackknife and Bootstrap (groups); Arvesen 1969, Annals of Mathematical
    Statistics 40:2076-2100 (several samples).
    """
    from scipy.special import stdtrit  # takes a while, which a table of scores need not wait for

    variance, fewest = np.zeros(()), JACKKNIFE_GROUPS
    for which, sample in enumerate(samples):
        groups = np.array_split(np.arange(len(sample)), min(JACKKNIFE_GROUPS, len(sample)))
        values = []
        for group in groups:
            rest = np.delete(sample, group, axis=0)
            values.append(statistic(*samples[:which], rest, *samples[which + 1 :]))
        variance = variance + (len(groups) - 1) * np.var(values, axis=0)
        fewest = min(fewest, len(groups))
    return statistic(*samples), stdtrit(fewest - 1, 0.975) * np.sqrt(variance)


def wilson_interval(share: float, trials: int) -> list[float]:
    """95 % interval [low, high] of a probability from the share of successes among independent trials, at least 1.

    Unlike most it is of use for shares of 0 and 1, and for few trials.

    Source: Wilson 1927, J. American Statistical Association 22:209-212.
    """
    z2 = 1.959964**2 / trials
    middle = (share + z2 / 2) / (1 + z2)
    half = (z2 * share * (1 - share) + z2**2 / 4) ** 0.5 / (1 + z2)
    # Rounding may put the share itself a hair outside.
    return [max(min(middle - half, share), 0.0), min(max(middle + half, share), 1.0)]


def spectrum_and_roughness(clips: Iterable[npt.NDArray[Any]]) -> tuple[Array, float]:
    """What `notebook_score` needs to know about a set of clips, read one clip at a time.

    clips: log-mels [frames, mels] of any lengths, at least 2 frames. Returns the mean over all frames [mels] and the
    mean |difference between neighbouring frames|. Raises DataError without clips, or for another shape or a value that
    is not finite.
    """
    total = np.zeros(0)
    frames = steps = 0
    change = 0.0
    for index, clip in enumerate(clips):
        if clip.ndim != 2 or len(clip) < 2 or (index and clip.shape[1] != len(total)) or not np.isfinite(clip).all():
            raise DataError(
                f"metrics: clip {index} must be a finite log-mel [frames, mels] of at least 2 frames and as many mel "
                f"bands as the others; found shape {list(clip.shape)}"
            )
        wide = clip.astype(np.float64)
        total = wide.sum(axis=0) + (total if index else 0.0)
        frames += len(wide)
        steps += (len(wide) - 1) * wide.shape[1]
        change += float(np.abs(np.diff(wide, axis=0)).sum())
    if not frames:
        raise DataError("metrics: needs at least one clip, found none")
    return total / frames, change / steps


def notebook_score(
    real_spectrum: Numbers,
    synthetic_spectrum: Numbers,
    real_roughness: float,
    synthetic_roughness: float,
    frechet: float,
) -> dict[str, float]:
    """The score out of 100 of the notebook this project grew from, so that its 50 to 70 can be compared with ours.

    real_spectrum, synthetic_spectrum: [mels] mean over clips and frames; real_roughness, synthetic_roughness: mean
    |difference along time| (both from `spectrum_and_roughness`); frechet: Fréchet distance in a space of few dimensions
    (the notebook's, on pixels, cannot be computed from so few clips).

    fd_score = max(0, 100 - 10 frechet); freq_score = 100 x Pearson's r of the spectra, which may be negative;
    smooth_score = max(0, 100 - 100 |1 - synthetic_roughness / real_roughness|); overall = 0.4, 0.4 and 0.2 of them.
    Where a spectrum is flat or the real clips never change, the term is 0/0 or x/0 and counts as 0. It sees neither
    labels, nor diversity, nor copies: one more column, never the measure to steer by.
    Raises DataError for spectra of different shapes or numbers that are not finite.
    """
    if not (np.isfinite([real_roughness, synthetic_roughness, frechet]).all() and frechet >= 0):
        raise DataError(
            "metrics: the notebook's score needs finite numbers and a distance of at least 0, found roughness "
            f"{real_roughness:g} and {synthetic_roughness:g}, distance {frechet:g}"
        )
    synthetic, real = _pair(synthetic_spectrum, real_spectrum, 1)
    correlation = float(_measure(synthetic, real)["pearson"])
    fd_score = max(0.0, 100 - 10 * frechet)
    freq_score = 0.0 if np.isnan(correlation) else 100 * correlation
    smooth_score = 0.0
    if real_roughness > 0:
        smooth_score = max(0.0, 100 - 100 * abs(1 - synthetic_roughness / real_roughness))
    return {
        "fd_score": fd_score,
        "freq_score": freq_score,
        "smooth_score": smooth_score,
        "overall": 0.4 * fd_score + 0.4 * freq_score + 0.2 * smooth_score,
    }


def _measure(predicted: Array, actual: Array, resampled: bool = False) -> dict[str, Array]:
    """Every metric along the last axis, [..., songs] → [...]; NaN where undefined.

    resampled: also NaN for a CCC of labels that are all the same number, where the formula says 0: such a resample
    comes from drawing one song over and over and says nothing about the songs.
    """
    # Counted from the first song: the deviations of a constant are then exactly 0; 0.1 minus the mean of 0.1s is not.
    predicted_offset = predicted - predicted[..., :1]
    actual_offset = actual - actual[..., :1]
    predicted_deviation = predicted_offset - predicted_offset.mean(axis=-1, keepdims=True)
    actual_deviation = actual_offset - actual_offset.mean(axis=-1, keepdims=True)
    predicted_variance = (predicted_deviation**2).mean(axis=-1)
    actual_variance = (actual_deviation**2).mean(axis=-1)
    covariance = (predicted_deviation * actual_deviation).mean(axis=-1)
    error = predicted - actual
    squared_error = (error**2).mean(axis=-1)
    spread = predicted_variance + actual_variance + error.mean(axis=-1) ** 2
    if actual.shape[-1] < 2:
        spread = np.zeros_like(spread)
    if resampled:
        spread = np.where(actual_variance > 0, spread, 0.0)
    correlation = _quotient(covariance, np.sqrt(predicted_variance) * np.sqrt(actual_variance))
    return {
        "ccc": _quotient(2 * covariance, spread),
        "mae": np.asarray(np.abs(error).mean(axis=-1)),
        "rmse": np.asarray(np.sqrt(squared_error)),
        "r2": 1 - _quotient(squared_error, actual_variance),
        "pearson": np.clip(correlation, -1.0, 1.0),
    }


def _quotient(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, NaN where the denominator is 0."""
    undefined = np.full(np.shape(denominator), np.nan)
    return np.asarray(np.divide(numerator, denominator, out=undefined, where=np.asarray(denominator) > 0))


def _pair(predicted: Numbers, actual: Numbers, axes: int) -> tuple[Array, Array]:
    """Both as float64, or DataError where they cannot be compared."""
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
            raise DataError(
                f"metrics: expected finite numbers, found {array[bad[0]]} at position {bad[0]} of {len(array)}"
            )
    return first, second


def _resamples(songs: int, bootstrap_samples: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Blocks [resamples, songs] of indices drawn with replacement, some megabytes at a time."""
    random = np.random.Generator(np.random.PCG64(seed))
    block = max(1, 250_000 // songs)
    for start in range(0, bootstrap_samples, block):
        yield random.integers(0, songs, (min(block, bootstrap_samples - start), songs))


def _interval(blocks: list[Array]) -> list[float] | None:
    """2.5th and 97.5th percentile of the defined samples; None where there are none."""
    samples = np.concatenate(blocks) if blocks else np.zeros(0)
    defined = samples[~np.isnan(samples)]
    if not len(defined):
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return [float(low), float(high)]


def _two_samples(a: Numbers, b: Numbers, least: int) -> tuple[Array, Array]:
    """Both as float64, or DataError where no distance can be taken."""
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    shapes = f"{list(first.shape)} and {list(second.shape)}"
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or first.shape[1] == 0:
        raise DataError(
            f"metrics: a distance needs two samples [items, features] of equally many features, found {shapes}"
        )
    if min(len(first), len(second)) < least:
        raise DataError(f"metrics: this distance needs at least {least} items in each sample, found {shapes}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise DataError(f"metrics: a distance needs finite numbers; found NaN or infinity in samples of {shapes}")
    return first, second


def _cubic_kernel(a: Array, b: Array) -> Array:
    """[n, m] of [n, d] and [m, d]. Multiplied out: numpy's power takes ten times as long."""
    base = a @ b.T / a.shape[1] + 1
    return np.asarray(base * base * base)


def _covariance(x: Array) -> Array:
    """Population covariance [d, d] of [n, d]."""
    centred = x - x.mean(axis=0)
    return np.asarray(centred.T @ centred / len(x))


def _shrunk_covariance(x: Array) -> Array:
    """Covariance moved towards the mean variance times the identity, by the weight that minimises the expected error.

    Source: Ledoit and Wolf 2004, J. Multivariate Analysis 88:365-411, section 3.3 (their norms are divided by d; the
    quotient does not notice).
    """
    n, d = x.shape
    centred = x - x.mean(axis=0)
    covariance = centred.T @ centred / n
    target = np.trace(covariance) / d * np.eye(d)
    from_target = float(((covariance - target) ** 2).sum())
    if from_target == 0:
        return np.asarray(covariance)
    # Mean over songs of |x xᵀ - S|² = mean |x|⁴ - |S|²; once more divided by n it is the error of S.
    error = float((((centred**2).sum(axis=1) ** 2).mean() - (covariance**2).sum()) / n)
    weight = min(error / from_target, 1.0)
    return np.asarray(weight * target + (1 - weight) * covariance)
