"""Distances between two samples of vectors (Fréchet, MMD) with jackknife intervals; Wilson intervals of shares. In float64."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from emotion.errors import DataError

Array = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.floating[Any]]
Positions = npt.NDArray[np.int64]
Summary = TypeVar("Summary")

JACKKNIFE_GROUPS = 20


class Gaussian(NamedTuple):
    """A Gaussian fitted to a sample: mean [d], covariance [d, d] and its symmetric square root [d, d]."""

    mean: Array
    covariance: Array
    root: Array


def gaussian_of(sample: Numbers) -> Gaussian:
    """The Gaussian fitted to a sample [n, d], n at least 2: its mean, and its population covariance moved towards a multiple of
    the identity by Ledoit and Wolf's weight. Raises DataError for other shapes, NaN or infinity.

    Source: Ledoit and Wolf 2004, J. Multivariate Analysis 88:365-411.
    """
    from sklearn.covariance import ledoit_wolf  # its import takes seconds

    sample = _checked(sample)
    covariance = ledoit_wolf(sample)[0]
    values, vectors = np.linalg.eigh(covariance)
    return Gaussian(np.mean(sample, axis=0), covariance, (vectors * np.sqrt(values.clip(0))) @ vectors.T)


def distance_of_gaussians(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance between two Gaussians of the same space, in squared units of the space; at least 0.

    |mean_a - mean_b|² + tr(S_a + S_b - 2 (S_a^½ S_b S_a^½)^½). Between Gaussians fitted to samples it is biased upwards for small
    samples, more so for larger d: keep d low and compare with the distance between two real samples.

    Source: Dowson and Landau 1982, J. Multivariate Analysis 12:450-455; Heusel et al. 2017, arXiv:1706.08500, eq. 6.
    """
    product = a.root @ b.covariance @ a.root
    cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0)).sum()
    shift = a.mean - b.mean
    distance = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(float(distance), 0.0)


def grouped_squared_mmd(a: Numbers, b: Numbers) -> Callable[[Array, Array], float]:
    """Unbiased squared maximum mean discrepancy with the kernel (x·y / d + 1)³. It is 0 on average for equal distributions, so it
    may be negative. Returned as a function of the groups of a and of b that are kept, for `jackknife`; see `kept_groups`.

    a: [n, d], b: [m, d], n and m at least 2. Raises DataError for other shapes, NaN or infinity.

    The kernel is computed once and summed over each pair of groups. At least 2 items of each sample must be kept: without one
    group, this needs at least 3 items in each sample.

    Source: Gretton et al. 2012, JMLR 13:723-773, eq. 3; the kernel of Bińkowski et al. 2018, arXiv:1801.01401, section 4.
    """
    a, b = _checked(a), _checked(b)
    if a.shape[1] != b.shape[1]:
        raise DataError(
            f"distances: expected samples with the same number of features, found {list(a.shape)} and {list(b.shape)}"
        )
    groups_a, groups_b = groups_of(len(a)), groups_of(len(b))
    sizes_a, sizes_b = (np.array([len(group) for group in groups]) for groups in (groups_a, groups_b))
    within_a, within_b = _sums_within(a, groups_a), _sums_within(b, groups_b)
    between = _sums(_cubic_kernel(a, b), groups_a, groups_b)

    def of_groups(kept_a: Array, kept_b: Array) -> float:
        n, m = kept_a @ sizes_a, kept_b @ sizes_b
        mean_a, mean_b = kept_a @ within_a @ kept_a / (n * (n - 1)), kept_b @ within_b @ kept_b / (m * (m - 1))
        return float(mean_a + mean_b - 2 * (kept_a @ between @ kept_b) / (n * m))

    return of_groups


def _sums_within(a: Array, groups: list[Positions]) -> Array:
    """[groups, groups] sums of the kernel within a sample, without the pairs of an item with itself."""
    kernel = _cubic_kernel(a, a)
    np.fill_diagonal(kernel, 0)
    return _sums(kernel, groups, groups)


def _sums(kernel: Array, rows: list[Positions], columns: list[Positions]) -> Array:
    """Sum a kernel [n, m] over groups of rows and columns → [groups of rows, groups of columns]."""
    of_rows = np.add.reduceat(kernel, [group[0] for group in rows], axis=0)
    return np.asarray(np.add.reduceat(of_rows, [group[0] for group in columns], axis=1))


def _cubic_kernel(a: Array, b: Array) -> Array:
    """(x·y / d + 1)³ for [n, d] and [m, d] → [n, m]. Multiplied out, as numpy's power takes ten times as long."""
    base = a @ b.T / a.shape[1] + 1
    return np.asarray(base * base * base)


def groups_of(items: int) -> list[Positions]:
    """Positions of the items in each jackknife group: min(JACKKNIFE_GROUPS, items) contiguous parts of about equal size."""
    return np.array_split(np.arange(items), min(JACKKNIFE_GROUPS, items))


def kept_groups(items: int) -> list[Array]:
    """For `jackknife`: masks [groups] of 1 (kept) and 0. First with all groups, then without each group in turn."""
    groups = len(groups_of(items))
    return [np.ones(groups), *(1 - np.eye(groups))]


def without_each_group(summary: Callable[[Numbers], Summary], sample: Numbers) -> list[Summary]:
    """For `jackknife`: the summary of a sample [items, ...], then of the sample without each group in turn."""
    return [summary(sample), *(summary(np.delete(sample, group, axis=0)) for group in groups_of(len(sample)))]


def jackknife(statistic: Callable[..., Array], samples: Sequence[Sequence[Any]]) -> tuple[Array, Array]:
    """The values of a statistic of independent samples, and half the widths of their 95 % intervals; both [k].

    samples: for each sample the summary of all its items, then the summaries without each group in turn (`without_each_group`,
    `kept_groups`), so that each summary is computed once. statistic: takes one summary per sample and returns [k] numbers. The
    items of a sample are independent and in random order; a statistic that needs 2 items needs samples of at least 3.

    From each sample one group at a time is left out: about a twentieth of the items, or one item if there are fewer than
    20 (`groups_of`). The variances of all samples are added. The interval is Student's with the degrees of freedom of the sample
    with the fewest groups. For a true distance of 0 it is 1.4 times too wide, as the jackknife doubles the variance of quadratic
    statistics.

    Source: Shao and Tu 1995, The Jackknife and Bootstrap (groups); Arvesen 1969, Ann. Math. Stat. 40:2076-2100 (samples).
    """
    whole = [sample[0] for sample in samples]
    variance, fewest = np.zeros(()), JACKKNIFE_GROUPS
    for position, sample in enumerate(samples):
        values = [statistic(*whole[:position], part, *whole[position + 1 :]) for part in sample[1:]]
        # `jackknife_variance` of emotion/evaluation/metrics.py rounds differently, which would change the published numbers.
        variance = variance + (len(values) - 1) * np.var(values, axis=0)
        fewest = min(fewest, len(values))
    return statistic(*whole), stdtrit(fewest - 1, 0.975) * np.sqrt(variance)


def wilson_interval(share: float, trials: int) -> list[float]:
    """95 % interval [low, high] of a probability. share: successes / trials. trials: independent trials, at least 1.

    Source: Wilson 1927, J. American Statistical Association 22:209-212.
    """
    # scipy's binomtest uses more digits of z, which would change the published numbers.
    z2 = 1.959964**2 / trials
    middle = (share + z2 / 2) / (1 + z2)
    half = (z2 * share * (1 - share) + z2**2 / 4) ** 0.5 / (1 + z2)
    # min and max, as rounding may put the share slightly outside of its interval.
    return [max(min(middle - half, share), 0.0), min(max(middle + half, share), 1.0)]


def _checked(sample: Numbers) -> Array:
    """The sample as float64. Raises DataError unless it is [n, d] and finite, n at least 2."""
    checked = np.asarray(sample, np.float64)
    shape = list(checked.shape)
    if checked.ndim != 2 or not checked.shape[1]:
        raise DataError(f"distances: expected a sample [items, features], found {shape}")
    if len(checked) < 2:
        raise DataError(f"distances: expected at least 2 items in a sample, found {shape}")
    if not np.isfinite(checked).all():
        raise DataError(f"distances: expected finite numbers, found NaN or infinity in a sample of {shape}")
    return checked
