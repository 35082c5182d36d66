import csv
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from emotion.errors import DataError
from emotion.evaluation.metrics import ceiling, concordance, metric, paired_difference, scores
from emotion.gan.distances import (
    frechet_distance,
    jackknife,
    notebook_score,
    spectrum_and_roughness,
    squared_mmd,
    wilson_interval,
)


def array(*values):
    return np.array(values, np.float64)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def label_tables(folder: Path) -> dict[int, dict[str, float]]:
    songs = {}
    for name in ("1_2000", "2000_2058"):
        path = folder / "deam_annotations" / f"static_annotations_averaged_songs_{name}.csv"
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, skipinitialspace=True):
                songs[int(row["song_id"])] = {key: float(value) for key, value in row.items()}
    return songs


# Concordance


def test_concordance_of_four_songs_worked_out_in_fractions():
    predicted, actual = [1, 2, 4, 5], [2, 2, 3, 7]
    p, a = [Fraction(x) for x in predicted], [Fraction(x) for x in actual]
    mean_p, mean_a = sum(p) / 4, sum(a) / 4
    covariance = sum((x - mean_p) * (y - mean_a) for x, y in zip(p, a, strict=True)) / 4
    variances = sum((x - mean_p) ** 2 for x in p) / 4 + sum((y - mean_a) ** 2 for y in a) / 4
    expected = 2 * covariance / (variances + (mean_p - mean_a) ** 2)
    assert expected == Fraction(11, 14)
    assert concordance(array(*predicted), array(*actual)) == pytest.approx(11 / 14, abs=1e-15)


def test_concordance_of_a_shifted_prediction_is_2v_over_2v_plus_c_squared():
    actual = array(-1, 0, 1)  # population variance 2/3
    assert concordance(actual + 1, actual) == pytest.approx((4 / 3) / (4 / 3 + 1))


def test_concordance_of_a_scaled_prediction_is_2k_over_1_plus_k_squared():
    actual = array(-1, 0, 1)
    assert concordance(0.5 * actual, actual) == pytest.approx(2 * 0.5 / 1.25)
    assert concordance(-actual, actual) == pytest.approx(-1)


def test_concordance_uses_one_divisor_for_variances_and_covariance():
    actual = array(1, 2, 4)
    assert concordance(actual, actual) == 1.0  # variances over N - 1 beside a covariance over N would give 2/3


def test_concordance_of_a_constant_prediction_is_exactly_zero():
    assert concordance(np.full(7, 0.1), normal(0, 7)) == 0.0


def test_concordance_is_symmetric_and_never_beyond_pearson():
    for seed in range(50):
        a, b = normal(seed, 9), normal(seed + 1000, 9) * 3 + 1
        assert concordance(a, b) == pytest.approx(concordance(b, a))
        assert abs(concordance(a, b)) <= abs(metric("pearson", a, b))


def test_concordance_does_not_lose_its_digits_far_from_zero():
    actual = array(1, 2, 4, 7)
    assert concordance(actual + 1e9 + 1, actual + 1e9) == pytest.approx(concordance(actual + 1, actual), rel=1e-12)


@pytest.mark.parametrize(
    ("predicted", "actual"),
    [
        (array(), array()),
        (array(0.3), array(0.2)),
        (array(0.1, 0.1, 0.1), array(0.1, 0.1, 0.1)),
        (array(1, 2), array(1, 2, 3)),
        (array(1, 2).reshape(2, 1), array(1, 2)),
        (array(1, math.nan), array(1, 2)),
        (array(1, 2), array(1, math.inf)),
    ],
)
def test_concordance_refuses_what_it_cannot_measure(predicted, actual):
    with pytest.raises(DataError):
        concordance(predicted, actual)


# The other metrics


def test_errors_r_squared_and_pearson_of_hand_worked_songs():
    predicted, actual = array(1, 2, 3, 6), array(1, 3, 3, 5)  # errors 0, -1, 0, 1; label variance 2
    assert metric("mae", predicted, actual) == 0.5
    assert metric("rmse", predicted, actual) == pytest.approx(math.sqrt(0.5))
    assert metric("r2", predicted, actual) == pytest.approx(0.75)
    assert metric("pearson", predicted, actual) == pytest.approx(10 / math.sqrt(14 * 8))


def test_r_squared_of_the_mean_is_zero_and_needs_labels_that_vary():
    assert metric("r2", array(2, 2, 2), array(1, 2, 3)) == 0.0
    with pytest.raises(DataError, match="r2"):
        metric("r2", array(1, 2), array(0.1, 0.1))


def test_pearson_of_a_constant_is_refused():
    with pytest.raises(DataError, match="pearson"):
        metric("pearson", np.full(3, 0.1), array(1, 2, 3))


# Scores and intervals


def test_scores_of_a_constant_baseline_are_json_with_null_for_pearson():
    actual = normal(1, 40, 2)
    result = scores(np.full((40, 2), 0.1), actual, 200, seed=0)
    json.dumps(result, allow_nan=False)
    for row, dimension in enumerate(("valence", "arousal")):
        assert result[dimension]["ccc"] == 0.0
        assert result[dimension]["ccc_ci"] == [0.0, 0.0]
        assert result[dimension]["pearson"] is None
        assert result[dimension]["pearson_ci"] is None
        assert result[dimension]["mae"] == pytest.approx(np.abs(actual[:, row] - 0.1).mean())


def test_scores_agree_with_the_single_metrics_and_keep_the_dimensions_apart():
    predicted, actual = normal(2, 30, 2), normal(3, 30, 2)
    result = scores(predicted, actual, 100, seed=0)
    for column, dimension in enumerate(("valence", "arousal")):
        pair = predicted[:, column], actual[:, column]
        assert result[dimension]["ccc"] == pytest.approx(concordance(*pair))
        assert result[dimension]["mae"] == pytest.approx(metric("mae", *pair))
        assert result[dimension]["rmse"] == pytest.approx(metric("rmse", *pair))
        assert result[dimension]["r2"] == pytest.approx(metric("r2", *pair))
        assert result[dimension]["pearson"] == pytest.approx(metric("pearson", *pair))


@pytest.mark.parametrize("songs", [1, 2])
def test_scores_of_one_or_two_songs_have_no_intervals(songs):
    actual = array(0.1, 0.2, 0.4, -0.3).reshape(2, 2)[:songs]
    valence = scores(actual + 0.1, actual, 100, seed=0)["valence"]
    assert [valence[f"{name}_ci"] for name in ("ccc", "mae", "rmse", "r2", "pearson")] == [None] * 5
    assert valence["mae"] == pytest.approx(0.1)
    assert (valence["ccc"] is None) == (songs == 1)
    assert (valence["r2"] is None) == (songs == 1)
    assert (valence["pearson"] is None) == (songs == 1)


def test_labels_that_are_all_one_number_leave_the_errors_and_a_ccc_of_zero():
    result = scores(normal(4, 10, 2), np.full((10, 2), 0.1), 100, seed=0)["arousal"]
    json.dumps(result, allow_nan=False)
    assert result["ccc"] == 0.0
    assert result["ccc_ci"] is None
    assert result["r2"] is None
    assert result["mae_ci"] is not None


def test_the_interval_of_three_errors_is_the_one_counted_by_hand():
    # Errors 0, 0, 3. A mean of 0 has probability 8/27, one of 3 has 1/27 = 3.7 % > 2.5 %.
    predicted = np.zeros((3, 2))
    predicted[2] = 3
    result = scores(predicted, np.zeros((3, 2)) + array(0, 0, 0).reshape(3, 1), 4000, seed=0)
    assert result["valence"]["mae_ci"] == [0.0, 3.0]


def test_resamples_of_one_song_over_and_over_do_not_pull_the_interval_to_zero():
    actual = array(-1, 0, 1).repeat(2).reshape(3, 2)
    result = scores(0.9 * actual, actual, 500, seed=0)["valence"]
    assert result["ccc_ci"][0] > 0.9
    assert result["pearson_ci"] == pytest.approx([1.0, 1.0])
    difference = paired_difference(0.9 * actual, 0.8 * actual, actual, 500, seed=0)["valence"]
    assert difference["ccc_difference_ci"][0] > 0


def test_all_metrics_and_both_dimensions_share_one_set_of_resamples():
    column = normal(5, 25, 1)
    error = normal(6, 25, 1) * 0.3
    result = scores(np.hstack([column + error] * 2), np.hstack([column] * 2), 300, seed=3)
    assert result["valence"] == result["arousal"]
    again = scores(np.hstack([column + error] * 2), np.hstack([column] * 2), 300, seed=3)
    assert again == result
    other = scores(np.hstack([column + error] * 2), np.hstack([column] * 2), 300, seed=4)
    assert other["valence"]["ccc"] == result["valence"]["ccc"]
    assert other["valence"]["ccc_ci"] != result["valence"]["ccc_ci"]


def test_the_bootstrap_interval_of_the_ccc_covers_the_truth_in_about_95_of_100_samples():
    # Labels of variance 1, predictions 0.8 label + noise of variance 0.2 + shift 0.2: covariance 0.8, variance 0.84.
    truth = 2 * 0.8 / (1 + 0.84 + 0.2**2)
    random = np.random.default_rng(7)
    covered = 0
    for trial in range(100):
        actual = random.normal(size=(80, 2))
        predicted = 0.8 * actual + random.normal(size=(80, 2)) * math.sqrt(0.2) + 0.2
        for result in scores(predicted, actual, 300, seed=trial).values():
            low, high = result["ccc_ci"]
            covered += low <= truth <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_block_boundary_changes_no_interval_and_draws_every_resample():
    # 1,000 songs are drawn 250 resamples at a time: 600 needs three blocks, the last one short.
    actual = normal(8, 1000, 2)
    predicted = actual + normal(9, 1000, 2)
    low, high = scores(predicted, actual, 600, seed=0)["valence"]["mae_ci"]
    error = np.abs(predicted - actual)[:, 0]
    half_width = 1.96 * error.std() / math.sqrt(1000)
    assert (high - low) / 2 == pytest.approx(half_width, rel=0.15)


def test_a_paired_interval_is_narrow_where_both_models_make_the_same_errors():
    actual = normal(10, 100, 2)
    shared = actual + normal(11, 100, 2)
    better, worse = actual + 0.8 * (shared - actual), shared
    single = scores(better, actual, 500, seed=0)["valence"]["ccc_ci"]
    paired = paired_difference(better, worse, actual, 500, seed=0)["valence"]
    assert paired["ccc_difference"] == pytest.approx(
        concordance(better[:, 0], actual[:, 0]) - concordance(worse[:, 0], actual[:, 0])
    )
    assert paired["ccc_difference_ci"][0] > 0
    assert np.ptp(paired["ccc_difference_ci"]) < 0.5 * np.ptp(single)


def test_a_model_differs_from_itself_by_exactly_nothing():
    predicted, actual = normal(12, 20, 2), normal(13, 20, 2)
    nothing = {"ccc_difference": 0.0, "ccc_difference_ci": [0.0, 0.0]}
    assert paired_difference(predicted, predicted, actual, 100, seed=0) == {"valence": nothing, "arousal": nothing}


def test_a_difference_of_two_songs_has_no_interval_and_of_one_is_undefined():
    actual = array(0.1, 0.2, 0.4, -0.3).reshape(2, 2)
    assert paired_difference(actual, actual, actual, 100, seed=0)["valence"]["ccc_difference_ci"] is None
    assert paired_difference(actual[:1], actual[:1], actual[:1], 100, seed=0)["valence"]["ccc_difference"] is None


def test_scores_refuse_arrays_that_do_not_belong_together():
    for predicted, actual in (
        (np.zeros((3, 2)), np.zeros((4, 2))),
        (np.zeros((3, 1)), np.zeros((3, 1))),
        (np.zeros((0, 2)), np.zeros((0, 2))),
        (np.full((3, 2), np.nan), np.zeros((3, 2))),
    ):
        with pytest.raises(DataError):
            scores(predicted, actual, 100, seed=0)
        with pytest.raises(DataError):
            paired_difference(actual, predicted, actual, 100, seed=0)


# Ceiling


@pytest.mark.parametrize("divisor", ["raters - 1", "raters"])
def test_the_ceiling_is_what_a_predictor_that_knows_the_true_mean_reaches(divisor):
    random = np.random.default_rng(14)
    raters = random.integers(4, 12, 3000)
    truth = random.normal(size=(3000, 2)) * array(1.1, 1.3)
    labels, deviations = np.empty((3000, 2)), np.empty((3000, 2))
    for song, people in enumerate(raters):
        ratings = truth[song] + random.normal(size=(people, 2)) * 1.5
        labels[song] = ratings.mean(axis=0)
        deviations[song] = ratings.std(axis=0, ddof=1 if divisor == "raters - 1" else 0)
    result = ceiling(labels, deviations, raters if divisor == "raters - 1" else raters - 1)
    for column, dimension in enumerate(("valence", "arousal")):
        assert result[dimension]["r2"] == pytest.approx(metric("r2", truth[:, column], labels[:, column]), abs=0.015)
        assert result[dimension]["ccc"] == pytest.approx(concordance(truth[:, column], labels[:, column]), abs=0.015)
        assert result[dimension]["reliability"] == result[dimension]["r2"]


def test_the_ceiling_stays_within_zero_and_one():
    labels = array(-1, -1, 1, 1).reshape(2, 2)
    nothing_left = ceiling(labels, np.full((2, 2), 9.0), array(2, 2))["valence"]
    assert nothing_left == {"ccc": 0.0, "r2": 0.0, "reliability": 0.0}
    everything = ceiling(labels, np.zeros((2, 2)), array(2, 2))["arousal"]
    assert everything == {"ccc": 1.0, "r2": 1.0, "reliability": 1.0}


def test_the_ceiling_refuses_no_raters_and_labels_that_are_all_one_number():
    labels = array(-1, -1, 1, 1).reshape(2, 2)
    for actual, deviation, raters in (
        (labels, np.ones((2, 2)), array(0, 5)),
        (labels, np.ones((2, 2)), array(5)),
        (labels, -np.ones((2, 2)), array(5, 5)),
        (np.full((2, 2), 0.1), np.ones((2, 2)), array(5, 5)),
    ):
        with pytest.raises(DataError):
            ceiling(actual, deviation, raters)


def test_the_ceiling_of_deam_with_ten_raters_each_is_the_known_one(real_data):
    songs = list(label_tables(real_data).values())
    labels = np.array([[song["valence_mean"], song["arousal_mean"]] for song in songs])
    deviations = np.array([[song["valence_std"], song["arousal_std"]] for song in songs])
    result = ceiling(labels, deviations, np.full(len(songs), 10))
    assert result["valence"]["r2"] == pytest.approx(0.825, abs=0.001)
    assert result["arousal"]["r2"] == pytest.approx(0.861, abs=0.001)
    # It depends on no unit.
    assert ceiling((labels - 5) / 4, deviations / 4, np.full(len(songs), 10))["valence"]["r2"] == pytest.approx(
        result["valence"]["r2"]
    )


@pytest.mark.parametrize(("first_id", "last_id", "raters"), [(1, 2000, 10), (2001, 2058, 5)])
def test_deam_divides_its_deviations_by_the_number_of_raters(real_data, first_id, last_id, raters):
    # Ratings are whole: the sum of their squares, got from mean and deviation, is whole, and odd where their sum is.
    songs = [song for song_id, song in label_tables(real_data).items() if first_id <= song_id <= last_id]
    possible = {raters: 0, raters - 1: 0}
    for song in songs:
        total = round(song["arousal_mean"] * raters)
        for divisor in possible:
            low, high = ((song["arousal_std"] + slack) ** 2 * divisor + total**2 / raters for slack in (-0.005, 0.005))
            possible[divisor] += any(
                n % 2 == total % 2 for n in range(math.ceil(low - 1e-6), math.floor(high + 1e-6) + 1)
            )
    assert possible[raters] > 0.8 * len(songs)
    assert possible[raters - 1] < 0.2 * len(songs)


# Distances


def spread(mean: float, deviation: float) -> np.ndarray:
    """Two values with exactly this mean and population deviation."""
    return array(mean - deviation, mean + deviation)


def trace_of_root_2x2(first: np.ndarray, second: np.ndarray) -> float:
    """tr((A B)^½) for 2 x 2 covariances: the square of the sum of two roots is their squares' sum + 2 their product."""
    product = first @ second
    return math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))


@pytest.mark.parametrize("shrink", [True, False])
def test_frechet_distance_in_one_dimension_is_shift_squared_plus_difference_of_deviations_squared(shrink):
    a, b = spread(1, 2).reshape(-1, 1), spread(4, 7).reshape(-1, 1)
    assert frechet_distance(a, b, shrink=shrink) == pytest.approx(3**2 + 5**2)


def test_frechet_distance_of_independent_axes_is_the_sum_over_the_axes():
    def grid(x, y):
        return np.array([[i, j] for i in x for j in y])

    a, b = grid(spread(0, 1), spread(5, 3)), grid(spread(2, 4), spread(5, 1))
    assert frechet_distance(a, b, shrink=False) == pytest.approx((4 + 9) + (0 + 4))


@pytest.mark.parametrize("shrink", [True, False])
def test_frechet_distance_of_correlated_gaussians_follows_the_closed_form_of_two_dimensions(shrink):
    from sklearn.covariance import ledoit_wolf

    a = normal(15, 12, 2) @ array(2, 1, 0, 0.5).reshape(2, 2)
    b = normal(16, 9, 2) @ array(1, -1, 0.3, 2).reshape(2, 2) + array(1, 0)
    covariance_a, covariance_b = np.cov(a.T, ddof=0), np.cov(b.T, ddof=0)
    if shrink:
        covariance_a, covariance_b = ledoit_wolf(a)[0], ledoit_wolf(b)[0]
    shift = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    cross = trace_of_root_2x2(covariance_a, covariance_b)
    expected = shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross
    assert frechet_distance(a, b, shrink=shrink) == pytest.approx(expected)


def test_frechet_distance_is_finite_symmetric_and_zero_to_itself_with_fewer_items_than_dimensions():
    a, b = normal(17, 5, 40), normal(18, 7, 40)
    for shrink in (True, False):
        assert frechet_distance(a, b, shrink) == pytest.approx(frechet_distance(b, a, shrink))
        assert 0 < frechet_distance(a, b, shrink) < 200
        assert frechet_distance(a, a, shrink) == pytest.approx(0, abs=1e-5)


def test_shrinkage_lowers_the_distance_between_two_samples_of_one_gaussian():
    a, b = normal(19, 60, 40), normal(20, 60, 40)
    assert frechet_distance(a, b) < 0.5 * frechet_distance(a, b, shrink=False)


def test_squared_mmd_equals_the_double_loop():
    a, b = normal(21, 4, 3), normal(22, 5, 3) + 0.5

    def kernel(x, y):
        return (sum(x * y) / 3 + 1) ** 3

    within_a = sum(kernel(a[i], a[j]) for i in range(4) for j in range(4) if i != j) / 12
    within_b = sum(kernel(b[i], b[j]) for i in range(5) for j in range(5) if i != j) / 20
    between = sum(kernel(x, y) for x in a for y in b) / 20
    assert squared_mmd(a, b) == pytest.approx(within_a + within_b - 2 * between)


def test_squared_mmd_is_zero_on_average_for_one_distribution_and_not_for_a_shifted_one():
    same, shifted = [], []
    for seed in range(150):
        a, b = normal(seed, 30, 4), normal(seed + 5000, 24, 4)
        same.append(squared_mmd(a, b))
        shifted.append(squared_mmd(a, b + 0.7))
    standard_error = np.std(same) / math.sqrt(150)
    assert abs(np.mean(same)) < 3 * standard_error
    assert np.mean(shifted) > 0.5
    assert np.mean(np.array(shifted) > 0) > 0.95


def test_distances_refuse_samples_that_do_not_fit():
    fine = normal(25, 6, 3)
    for other in (normal(26, 6, 2), normal(26, 1, 3), normal(26, 6), np.full((6, 3), np.nan)):
        for distance in (frechet_distance, squared_mmd):
            with pytest.raises(DataError):
                distance(fine, other)


# Intervals


def test_the_jackknife_of_a_mean_is_students_interval():
    # Deviations of 1..5 from 3: 10 / 4 is their variance; 2.776445 is Student's quantile for 4 degrees of freedom.
    value, half = jackknife(lambda x: np.array([x.mean()]), [array(1, 2, 3, 4, 5)])
    assert value.tolist() == [3]
    assert half.tolist() == pytest.approx([2.776445 * math.sqrt(2.5 / 5)])


def test_the_jackknife_adds_the_variances_of_its_samples_and_takes_the_degrees_of_the_smaller():
    def statistic(x, y):
        return np.array([x.mean() - y.mean(), y.mean()])

    (difference, _), (half, half_of_y) = jackknife(statistic, [array(1, 2, 3, 4, 5), array(0, 0, 3)])
    assert difference == 2
    assert half == pytest.approx(4.302653 * math.sqrt(2.5 / 5 + 3 / 3))
    assert half_of_y == pytest.approx(4.302653 * math.sqrt(3 / 3))


def test_the_jackknife_of_a_large_sample_leaves_out_a_twentieth_at_a_time():
    sizes = []

    def statistic(x):
        sizes.append(len(x))
        return np.array([x.mean()])

    _, half = jackknife(statistic, [normal(27, 2000)])
    assert sorted(sizes) == [1900] * 20 + [2000]
    assert half[0] == pytest.approx(2.093024 / math.sqrt(2000), rel=0.5)


def covered(distance, shift: float, trials: int) -> list[bool]:
    """Whether the interval of (made to held) - (train to held) holds 0; shift: of the clips that are made."""
    found = []
    for seed in range(trials):
        made, train, held = normal(seed, 14, 3) + shift, normal(seed + 5000, 14, 3), normal(seed + 9000, 8, 3)
        (value,), (half,) = jackknife(
            lambda made, train, held: np.array([distance(made, held) - distance(train, held)]), [made, train, held]
        )
        found.append(abs(value) < half)
    return found


@pytest.mark.parametrize("distance", [frechet_distance, squared_mmd])
def test_the_difference_of_two_distances_covers_zero_for_one_distribution_and_not_for_a_shifted_one(distance):
    assert np.mean(covered(distance, shift=0, trials=60)) >= 0.9
    assert np.mean(covered(distance, shift=2, trials=10)) <= 0.2


def test_the_interval_of_a_kernel_distance_covers_its_known_value():
    # In one dimension (xy + 1)³ compares the moments: 3 times the first, 3 times the second, once the third. Those of
    # N(0, 1) are 0, 1, 0, and those of N(1, 1) are 1, 2, 4: 3 + 3 + 16 = 22.
    found = []
    for seed in range(100):
        (value,), (half,) = jackknife(
            lambda a, b: np.array([squared_mmd(a, b)]), [normal(seed, 60, 1), normal(seed + 5000, 60, 1) + 1]
        )
        found.append(abs(value - 22) < half)
    assert 0.88 <= np.mean(found) <= 0.99


def test_wilsons_interval_of_shares_worked_out_by_hand():
    # For 0 of n the upper end is z² / (n + z²).
    assert wilson_interval(0, 10) == pytest.approx([0, 3.841459 / 13.841459])
    assert wilson_interval(1, 10) == pytest.approx([10 / 13.841459, 1])
    assert wilson_interval(0.5, 10) == pytest.approx([0.236593, 0.763407], abs=1e-5)
    assert wilson_interval(1, 14)[1] == 1


# The notebook's score


def test_spectrum_and_roughness_of_clips_of_two_lengths():
    clips = [array(0, 10, 2, 10).reshape(2, 2), array(1, 10, 1, 11, 2, 12).reshape(3, 2)]
    spectrum, roughness = spectrum_and_roughness(iter(clips))
    np.testing.assert_allclose(spectrum, [6 / 5, 53 / 5])
    assert roughness == pytest.approx((2 + 0 + 0 + 1 + 1 + 1) / 6)


def test_spectrum_of_half_precision_clips_does_not_overflow():
    spectrum, _ = spectrum_and_roughness([np.full((2000, 1), -80, np.float16)])
    assert spectrum[0] == -80


@pytest.mark.parametrize(
    "clips", [[], [np.zeros((1, 4))], [np.zeros((3, 4)), np.zeros((3, 5))], [np.full((3, 4), np.nan)]]
)
def test_spectrum_refuses_clips_that_do_not_fit(clips):
    with pytest.raises(DataError):
        spectrum_and_roughness(clips)


def test_notebook_score_of_a_hand_worked_case():
    spectrum = array(-60, -40, -20, -30)
    result = notebook_score(spectrum, 0.5 * spectrum + 3, real_roughness=2.0, synthetic_roughness=1.6, frechet=3.0)
    assert result == pytest.approx({"fd_score": 70, "freq_score": 100, "smooth_score": 80, "overall": 84})


def test_notebook_score_takes_negative_correlation_but_no_negative_distance_term():
    spectrum = array(1, 2, 3)
    result = notebook_score(spectrum, -spectrum, real_roughness=1.0, synthetic_roughness=5.0, frechet=50.0)
    assert result == pytest.approx({"fd_score": 0, "freq_score": -100, "smooth_score": 0, "overall": -40})


def test_notebook_score_counts_flat_spectra_and_still_clips_as_zero():
    result = notebook_score(np.full(5, 0.1), array(1, 2, 3, 4, 5), 0.0, 0.0, frechet=0.0)
    assert result == {"fd_score": 100.0, "freq_score": 0.0, "smooth_score": 0.0, "overall": 40.0}


def test_notebook_score_refuses_numbers_that_are_not_finite():
    spectrum = array(1, 2, 3)
    for real, synthetic, frechet in ((math.nan, 1, 1), (1, math.inf, 1), (1, 1, math.nan), (1, 1, -1)):
        with pytest.raises(DataError):
            notebook_score(spectrum, spectrum, real, synthetic, frechet)
