"""Distances between sets of clips, with intervals, and the notebook's own score."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from emotion.errors import DataError
from emotion.evaluation.metrics import Array, Numbers, _measure, _pair

JACKKNIFE_GROUPS = 20


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
