"""Distances between two samples of vectors, and 95 % intervals of distances and of shares. In float64."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from emotion.errors import DataError

Array = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.floating[Any]]

JACKKNIFE_GROUPS = 20


def frechet_distance(a: Numbers, b: Numbers, shrink: bool = True) -> float:
    """Squared Fréchet distance between Gaussians fitted to two samples, in squared units of the space; at least 0.

    a: [n, d], b: [m, d], n and m at least 2. |mean_a - mean_b|² + tr(S_a + S_b - 2 (S_a^½ S_b S_a^½)^½), with
    population covariances; shrink: moved towards a multiple of the identity by Ledoit and Wolf's weight. Biased upwards for
    small samples, more so for larger d: keep d low and compare with the distance between two real samples.
    Raises DataError for other shapes, NaN or infinity.

    Source: Dowson and Landau 1982, J. Multivariate Analysis 12:450-455; Heusel et al. 2017, arXiv:1706.08500, eq. 6;
    Ledoit and Wolf 2004, J. Multivariate Analysis 88:365-411.
    """
    from sklearn.covariance import empirical_covariance, ledoit_wolf  # its import takes seconds

    a, b = _checked(a, b)
    covariance_a, covariance_b = (ledoit_wolf(x)[0] if shrink else empirical_covariance(x) for x in (a, b))
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
    Source: Gretton et al. 2012, JMLR 13:723-773, eq. 3; the kernel of Bińkowski et al. 2018, arXiv:1801.01401, section 4.
    """
    a, b = _checked(a, b)
    within_a, within_b, between = _cubic_kernel(a, a), _cubic_kernel(b, b), _cubic_kernel(a, b)
    n, m = len(a), len(b)
    mean_a = (within_a.sum() - np.trace(within_a)) / (n * (n - 1))
    mean_b = (within_b.sum() - np.trace(within_b)) / (m * (m - 1))
    return float(mean_a + mean_b - 2 * between.mean())


def jackknife(statistic: Callable[..., Array], samples: Sequence[npt.NDArray[Any]]) -> tuple[Array, Array]:
    """The values of a statistic of independent samples, and half the widths of their 95 % intervals; both [k].

    statistic: takes the samples, each [items, ...], and returns [k] numbers. Each sample has at least 2 items, independent and
    in random order. From each sample in turn one twentieth after the other is left out; the variances from all samples are
    added, and the interval is Student's with the degrees of freedom of the smallest sample. For a true distance of 0 it is 1.4
    times too wide, as the jackknife doubles the variance of quadratic statistics.

    Source: Shao and Tu 1995, The Jackknife and Bootstrap (groups); Arvesen 1969, Ann. Math. Stat. 40:2076-2100 (samples).
    """
    variance, fewest = np.zeros(()), JACKKNIFE_GROUPS
    for position, sample in enumerate(samples):
        groups = np.array_split(np.arange(len(sample)), min(JACKKNIFE_GROUPS, len(sample)))
        values = []
        for group in groups:
            rest = np.delete(sample, group, axis=0)
            values.append(statistic(*samples[:position], rest, *samples[position + 1 :]))
        variance = variance + (len(groups) - 1) * np.var(values, axis=0)
        fewest = min(fewest, len(groups))
    return statistic(*samples), stdtrit(fewest - 1, 0.975) * np.sqrt(variance)


def wilson_interval(share: float, trials: int) -> list[float]:
    """95 % interval [low, high] of a probability; share: of successes among `trials` (at least 1) independent trials.

    Source: Wilson 1927, J. American Statistical Association 22:209-212.
    """
    # scipy's binomtest has the same interval with more digits of z; with them the published numbers would change.
    z2 = 1.959964**2 / trials
    middle = (share + z2 / 2) / (1 + z2)
    half = (z2 * share * (1 - share) + z2**2 / 4) ** 0.5 / (1 + z2)
    # min and max: after rounding, the share itself may lie slightly outside.
    return [max(min(middle - half, share), 0.0), min(max(middle + half, share), 1.0)]


def _checked(a: Numbers, b: Numbers) -> tuple[Array, Array]:
    """Both as float64. Raises DataError unless they are finite [n, d] and [m, d], n and m at least 2."""
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    shapes = f"{list(first.shape)} and {list(second.shape)}"
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or not first.shape[1]:
        raise DataError(f"distances: expected two samples [items, features] with the same number of features, found {shapes}")
    if min(len(first), len(second)) < 2:
        raise DataError(f"distances: expected at least 2 items in each sample, found {shapes}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise DataError(f"distances: expected finite numbers, found NaN or infinity in samples of {shapes}")
    return first, second


def _cubic_kernel(a: Array, b: Array) -> Array:
    """[n, d], [m, d] → [n, m]. Multiplied out, as numpy's power takes ten times as long."""
    base = a @ b.T / a.shape[1] + 1
    return np.asarray(base * base * base)
