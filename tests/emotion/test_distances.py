import math

import numpy as np
import pytest
from scipy.linalg import sqrtm

from emotion.errors import DataError
from emotion.gan.distances import (
    Gaussian,
    distance_of_gaussians,
    gaussian_of,
    grouped_squared_mmd,
    jackknife,
    kept_groups,
    wilson_interval,
    without_each_group,
)


def array(*values):
    return np.array(values, np.float64)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def two_values(mean: float, deviation: float) -> np.ndarray:
    """Two values with exactly this mean and population deviation."""
    return array(mean - deviation, mean + deviation)


def trace_of_root_2x2(first: np.ndarray, second: np.ndarray) -> float:
    """tr((A B)^½) of 2 x 2 covariances, from the eigenvalues l, m of A B: (√l + √m)² = l + m + 2 √(l m)."""
    product = first @ second
    return math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))


def shrunk_covariance(sample: np.ndarray) -> np.ndarray:
    """Ledoit and Wolf 2004, lemmas 3.2 to 3.5: with the norm ||A||² = tr(A Aᵀ) / d, the weight of the multiple of the identity is
    b² / d², b² the mean of ||x xᵀ - S||² over the items, over n."""
    items, dimensions = sample.shape
    centred = sample - sample.mean(axis=0)
    covariance = centred.T @ centred / items
    target = np.eye(dimensions) * np.trace(covariance) / dimensions
    away = ((covariance - target) ** 2).sum()
    uncertain = sum(((np.outer(x, x) - covariance) ** 2).sum() for x in centred) / items**2
    weight = min(uncertain, away) / away
    return weight * target + (1 - weight) * covariance


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    return distance_of_gaussians(gaussian_of(a), gaussian_of(b))


def unshrunk(sample: np.ndarray) -> Gaussian:
    covariance = np.cov(sample.T, ddof=0)
    return Gaussian(sample.mean(axis=0), covariance, np.real(sqrtm(covariance)))


def squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """By its definition: mean kernels of different items of one sample, and twice that of items of both."""

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):
        return kernel(x, x)[~np.eye(len(x), dtype=bool)].mean()

    return within(a) + within(b) - 2 * kernel(a, b).mean()


def whole_squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
    return grouped_squared_mmd(a, b)(kept_groups(len(a))[0], kept_groups(len(b))[0])


def test_a_gaussian_has_the_mean_and_the_shrunk_covariance_of_its_sample():
    # Ledoit and Wolf's weight by hand: S = diag(4.5, 0.5) is 2.5 ± 2, so ||S - 2.5 I||² = 8. Of each item ||x xᵀ - S||² is
    # 4.5² + 0.5² = 20.5; 4 · 20.5 / 4² = 5.125. The weight is 5.125 / 8, and 1 - 5.125 / 8 of the 2 remain.
    sample = array(3, 0, -3, 0, 0, 1, 0, -1).reshape(4, 2) + array(5, 7)
    gaussian = gaussian_of(sample)
    remains = 2 * (1 - 5.125 / 8)
    assert gaussian.mean == pytest.approx(array(5, 7))
    assert gaussian.covariance == pytest.approx(np.diag([2.5 + remains, 2.5 - remains]))
    assert gaussian.root == pytest.approx(np.diag([math.sqrt(2.5 + remains), math.sqrt(2.5 - remains)]))


@pytest.mark.parametrize("shape", [(12, 2), (60, 5), (7, 20)])
def test_the_covariance_of_correlated_features_is_shrunk_by_the_published_formula_and_its_root_is_symmetric(shape):
    sample = normal(14, *shape) @ normal(13, shape[1], shape[1])
    gaussian = gaussian_of(sample)
    assert gaussian.covariance == pytest.approx(shrunk_covariance(sample))
    assert gaussian.root @ gaussian.root == pytest.approx(gaussian.covariance)
    assert gaussian.root == pytest.approx(gaussian.root.T)


def test_frechet_distance_in_one_dimension_is_shift_squared_plus_difference_of_deviations_squared():
    a, b = two_values(1, 2).reshape(-1, 1), two_values(4, 7).reshape(-1, 1)
    assert frechet(a, b) == pytest.approx(3**2 + 5**2)


def test_frechet_distance_of_independent_axes_is_the_sum_over_the_axes():
    def gaussian(means, deviations):
        return Gaussian(array(*means), np.diag(array(*deviations) ** 2), np.diag(array(*deviations)))

    a, b = gaussian((0, 5), (1, 3)), gaussian((2, 5), (4, 1))
    assert distance_of_gaussians(a, b) == pytest.approx((4 + 9) + (0 + 4))


def test_frechet_distance_of_correlated_samples_follows_the_closed_form_of_two_dimensions():
    a = normal(15, 12, 2) @ array(2, 1, 0, 0.5).reshape(2, 2)
    b = normal(16, 9, 2) @ array(1, -1, 0.3, 2).reshape(2, 2) + array(1, 0)
    covariance_a, covariance_b = shrunk_covariance(a), shrunk_covariance(b)
    shift = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    cross = trace_of_root_2x2(covariance_a, covariance_b)
    expected = shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross
    assert frechet(a, b) == pytest.approx(expected)


def test_frechet_distance_is_finite_symmetric_and_zero_to_itself_with_fewer_items_than_dimensions():
    a, b = normal(17, 5, 40), normal(18, 7, 40)
    assert frechet(a, b) == pytest.approx(frechet(b, a))
    assert 0 < frechet(a, b) < 200
    assert frechet(a, a) == pytest.approx(0, abs=1e-5)


def test_shrinkage_lowers_the_distance_between_two_samples_of_one_gaussian():
    a, b = normal(19, 60, 40), normal(20, 60, 40)
    assert frechet(a, b) < 0.5 * distance_of_gaussians(unshrunk(a), unshrunk(b))


def test_squared_mmd_equals_the_double_loop():
    a, b = normal(21, 4, 3), normal(22, 5, 3) + 0.5

    def kernel(x, y):
        return (sum(x * y) / 3 + 1) ** 3

    within_a = sum(kernel(a[i], a[j]) for i in range(4) for j in range(4) if i != j) / 12
    within_b = sum(kernel(b[i], b[j]) for i in range(5) for j in range(5) if i != j) / 20
    between = sum(kernel(x, y) for x in a for y in b) / 20
    assert whole_squared_mmd(a, b) == pytest.approx(within_a + within_b - 2 * between)


def test_squared_mmd_is_zero_on_average_for_one_distribution_and_not_for_a_shifted_one():
    same, shifted = [], []
    for seed in range(150):
        a, b = normal(seed, 30, 4), normal(seed + 5000, 24, 4)
        same.append(whole_squared_mmd(a, b))
        shifted.append(whole_squared_mmd(a, b + 0.7))
    standard_error = np.std(same) / math.sqrt(150)
    assert abs(np.mean(same)) < 3 * standard_error
    assert np.mean(shifted) > 0.5
    assert np.mean(np.array(shifted) > 0) > 0.95


@pytest.mark.parametrize("sample", [normal(26, 1, 3), normal(26, 6), normal(26, 6, 0), np.full((6, 3), np.nan)])
def test_samples_of_other_shapes_and_nan_are_refused(sample):
    fine = normal(25, 6, 3)
    with pytest.raises(DataError):
        gaussian_of(sample)
    for samples in ((fine, sample), (sample, fine)):
        with pytest.raises(DataError):
            grouped_squared_mmd(*samples)


def test_samples_of_different_features_are_refused():
    with pytest.raises(DataError):
        grouped_squared_mmd(normal(25, 6, 3), normal(26, 6, 2))


def test_the_jackknife_interval_of_a_mean_is_students_interval():
    # Deviations of 1..5 from 3: 10 / 4 is their variance; 2.776445 is Student's quantile for 4 degrees of freedom.
    value, half = jackknife(lambda mean: np.array([mean]), [without_each_group(np.mean, array(1, 2, 3, 4, 5))])
    assert value.tolist() == [3]
    assert half.tolist() == pytest.approx([2.776445 * math.sqrt(2.5 / 5)])


def test_the_jackknife_adds_the_variances_of_its_samples_and_uses_the_degrees_of_freedom_of_the_smaller():
    def statistic(x, y):
        return np.array([x - y, y])

    samples = [without_each_group(np.mean, sample) for sample in (array(1, 2, 3, 4, 5), array(0, 0, 3))]
    (difference, _), (half, half_of_y) = jackknife(statistic, samples)
    assert difference == 2
    assert half == pytest.approx(4.302653 * math.sqrt(2.5 / 5 + 3 / 3))
    assert half_of_y == pytest.approx(4.302653 * math.sqrt(3 / 3))


def test_the_jackknife_of_a_large_sample_leaves_out_a_twentieth_at_a_time():
    sample = normal(27, 2000)
    assert without_each_group(len, sample) == [2000] + [1900] * 20
    _, half = jackknife(lambda mean: np.array([mean]), [without_each_group(np.mean, sample)])
    assert half[0] == pytest.approx(2.093024 / math.sqrt(2000), rel=0.5)


@pytest.mark.parametrize("sizes", [(7, 5), (45, 23)])
def test_squared_mmd_without_a_group_is_that_of_the_remaining_items(sizes):
    a, b = normal(29, sizes[0], 3), normal(30, sizes[1], 3) + 0.5
    of_groups = grouped_squared_mmd(a, b)
    whole_a, *kept_a = kept_groups(len(a))
    whole_b, *kept_b = kept_groups(len(b))
    for kept, rest in zip(kept_a, without_each_group(np.asarray, a)[1:], strict=True):
        assert of_groups(kept, whole_b) == pytest.approx(squared_mmd(rest, b))
    for kept, rest in zip(kept_b, without_each_group(np.asarray, b)[1:], strict=True):
        assert of_groups(whole_a, kept) == pytest.approx(squared_mmd(a, rest))


def frechet_of_groups(synthetic, training, held_out):
    def statistic(synthetic, training, held_out):
        return np.array([distance_of_gaussians(synthetic, held_out) - distance_of_gaussians(training, held_out)])

    return jackknife(statistic, [without_each_group(gaussian_of, sample) for sample in (synthetic, training, held_out)])


def mmd_of_groups(synthetic, training, held_out):
    of_synthetic, of_training = grouped_squared_mmd(synthetic, held_out), grouped_squared_mmd(training, held_out)

    def statistic(synthetic, training, held_out):
        return np.array([of_synthetic(synthetic, held_out) - of_training(training, held_out)])

    return jackknife(statistic, [kept_groups(len(sample)) for sample in (synthetic, training, held_out)])


@pytest.mark.parametrize(("of_groups", "distance"), [(frechet_of_groups, frechet), (mmd_of_groups, squared_mmd)])
def test_the_interval_from_groups_is_that_of_distances_computed_anew_for_each_part(of_groups, distance):
    samples = [normal(31, 44, 3) + 1, normal(32, 41, 3), normal(33, 30, 3)]

    def statistic(synthetic, training, held_out):
        return np.array([distance(synthetic, held_out) - distance(training, held_out)])

    value, half = jackknife(statistic, [without_each_group(np.asarray, sample) for sample in samples])
    assert of_groups(*samples) == (pytest.approx(value), pytest.approx(half))


def covered(of_groups, shift: float, trials: int) -> list[bool]:
    """Per trial, whether the interval of (synthetic to validation) - (training to validation) covers 0; shift: of synthetic."""
    found = []
    for seed in range(trials):
        samples = [normal(seed, 14, 3) + shift, normal(seed + 5000, 14, 3), normal(seed + 9000, 8, 3)]
        (value,), (half,) = of_groups(*samples)
        found.append(abs(value) < half)
    return found


@pytest.mark.parametrize("of_groups", [frechet_of_groups, mmd_of_groups])
def test_the_interval_of_a_difference_covers_zero_for_one_distribution_and_not_for_a_shifted_one(of_groups):
    assert np.mean(covered(of_groups, shift=0, trials=60)) >= 0.9
    assert np.mean(covered(of_groups, shift=2, trials=10)) <= 0.2


def test_the_interval_of_a_kernel_distance_covers_its_known_value():
    # In one dimension (xy + 1)³ gives 3 (difference of first moments)² + 3 (second)² + (third)². The moments of N(0, 1)
    # are 0, 1, 0 and those of N(1, 1) are 1, 2, 4: 3 + 3 + 16 = 22.
    found = []
    for seed in range(100):
        distance = grouped_squared_mmd(normal(seed, 60, 1), normal(seed + 5000, 60, 1) + 1)
        (value,), (half,) = jackknife(lambda a, b, distance=distance: np.array([distance(a, b)]), [kept_groups(60)] * 2)
        found.append(abs(value - 22) < half)
    assert 0.88 <= np.mean(found) <= 0.99


def test_wilson_intervals_worked_out_by_hand():
    # For 0 of n the upper end is z² / (n + z²).
    assert wilson_interval(0, 10) == pytest.approx([0, 3.841459 / 13.841459])
    assert wilson_interval(1, 10) == pytest.approx([10 / 13.841459, 1])
    assert wilson_interval(0.5, 10) == pytest.approx([0.236593, 0.763407], abs=1e-5)
    assert wilson_interval(1, 14)[1] == 1
