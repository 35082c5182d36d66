import csv
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from emotion.errors import DataError
from emotion.evaluation.metrics import ceiling, concordance, metric, paired_difference, scores


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


def test_concordance_of_four_songs_equals_the_exact_fraction():
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


def test_concordance_has_the_same_divisor_in_variances_and_covariance():
    actual = array(1, 2, 4)
    assert concordance(actual, actual) == 1.0  # variances over N - 1 and a covariance over N would give 2/3


def test_concordance_of_a_constant_prediction_is_exactly_zero():
    assert concordance(np.full(7, 0.1), normal(0, 7)) == 0.0


def test_concordance_is_symmetric_and_at_most_pearson():
    for seed in range(50):
        a, b = normal(seed, 9), normal(seed + 1000, 9) * 3 + 1
        assert concordance(a, b) == pytest.approx(concordance(b, a))
        assert abs(concordance(a, b)) <= abs(metric("pearson", a, b))


def test_concordance_is_precise_far_from_zero():
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
def test_concordance_refuses_undefined_cases_and_other_shapes(predicted, actual):
    with pytest.raises(DataError):
        concordance(predicted, actual)


# The other metrics


def test_errors_r_squared_and_pearson_worked_out_by_hand():
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


def test_scores_of_a_constant_baseline_have_no_pearson_and_are_valid_json():
    actual = normal(1, 40, 2)
    result = scores(np.full((40, 2), 0.1), actual, groups=None, bootstrap_samples=200, seed=0)
    json.dumps(result, allow_nan=False)
    for row, dimension in enumerate(("valence", "arousal")):
        assert result[dimension]["ccc"] == 0.0
        assert result[dimension]["ccc_ci"] == [0.0, 0.0]
        assert result[dimension]["pearson"] is None
        assert result[dimension]["pearson_ci"] is None
        assert result[dimension]["mae"] == pytest.approx(np.abs(actual[:, row] - 0.1).mean())


def test_scores_equal_the_single_metrics_of_each_dimension():
    predicted, actual = normal(2, 30, 2), normal(3, 30, 2)
    result = scores(predicted, actual, groups=None, bootstrap_samples=100, seed=0)
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
    valence = scores(actual + 0.1, actual, groups=None, bootstrap_samples=100, seed=0)["valence"]
    assert [valence[f"{name}_ci"] for name in ("ccc", "mae", "rmse", "r2", "pearson")] == [None] * 5
    assert valence["mae"] == pytest.approx(0.1)
    assert (valence["ccc"] is None) == (songs == 1)
    assert (valence["r2"] is None) == (songs == 1)
    assert (valence["pearson"] is None) == (songs == 1)


def test_constant_labels_give_errors_and_a_ccc_of_zero_without_interval():
    result = scores(normal(4, 10, 2), np.full((10, 2), 0.1), groups=None, bootstrap_samples=100, seed=0)["arousal"]
    json.dumps(result, allow_nan=False)
    assert result["ccc"] == 0.0
    assert result["ccc_ci"] is None
    assert result["r2"] is None
    assert result["mae_ci"] is not None


def test_the_interval_of_three_errors_worked_out_by_hand():
    # Errors 0, 0, 3. A mean of 0 has probability 8/27, one of 3 has 1/27 = 3.7 % > 2.5 %.
    predicted = np.zeros((3, 2))
    predicted[2] = 3
    result = scores(predicted, np.zeros((3, 2)) + array(0, 0, 0).reshape(3, 1), groups=None, bootstrap_samples=4000, seed=0)
    assert result["valence"]["mae_ci"] == [0.0, 3.0]


def test_resamples_of_a_single_song_do_not_pull_the_interval_to_zero():
    actual = array(-1, 0, 1).repeat(2).reshape(3, 2)
    result = scores(0.9 * actual, actual, groups=None, bootstrap_samples=500, seed=0)["valence"]
    assert result["ccc_ci"][0] > 0.9
    assert result["pearson_ci"] == pytest.approx([1.0, 1.0])
    difference = paired_difference(0.9 * actual, 0.8 * actual, actual, groups=None, bootstrap_samples=500, seed=0)["valence"]
    assert difference["ccc_difference_ci"][0] > 0


def test_all_metrics_and_both_dimensions_share_one_set_of_resamples():
    column = normal(5, 25, 1)
    error = normal(6, 25, 1) * 0.3
    result = scores(np.hstack([column + error] * 2), np.hstack([column] * 2), groups=None, bootstrap_samples=300, seed=3)
    assert result["valence"] == result["arousal"]
    again = scores(np.hstack([column + error] * 2), np.hstack([column] * 2), groups=None, bootstrap_samples=300, seed=3)
    assert again == result
    other = scores(np.hstack([column + error] * 2), np.hstack([column] * 2), groups=None, bootstrap_samples=300, seed=4)
    assert other["valence"]["ccc"] == result["valence"]["ccc"]
    assert other["valence"]["ccc_ci"] != result["valence"]["ccc_ci"]


def test_the_bootstrap_interval_of_the_ccc_covers_the_true_value_in_about_95_of_100_samples():
    # Labels of variance 1, predictions 0.8 label + noise of variance 0.2 + shift 0.2: covariance 0.8, variance 0.84.
    truth = 2 * 0.8 / (1 + 0.84 + 0.2**2)
    random = np.random.default_rng(7)
    covered = 0
    for trial in range(100):
        actual = random.normal(size=(80, 2))
        predicted = 0.8 * actual + random.normal(size=(80, 2)) * math.sqrt(0.2) + 0.2
        for result in scores(predicted, actual, groups=None, bootstrap_samples=300, seed=trial).values():
            low, high = result["ccc_ci"]
            covered += low <= truth <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_resamples_drawn_in_several_blocks_give_the_expected_width():
    # 1,000 songs are drawn 250 resamples at a time: 600 needs three blocks, the last one short.
    actual = normal(8, 1000, 2)
    predicted = actual + normal(9, 1000, 2)
    low, high = scores(predicted, actual, groups=None, bootstrap_samples=600, seed=0)["valence"]["mae_ci"]
    error = np.abs(predicted - actual)[:, 0]
    half_width = 1.96 * error.std() / math.sqrt(1000)
    assert (high - low) / 2 == pytest.approx(half_width, rel=0.15)


def test_a_paired_interval_is_narrow_where_both_models_make_the_same_errors():
    actual = normal(10, 100, 2)
    shared = actual + normal(11, 100, 2)
    better, worse = actual + 0.8 * (shared - actual), shared
    single = scores(better, actual, groups=None, bootstrap_samples=500, seed=0)["valence"]["ccc_ci"]
    paired = paired_difference(better, worse, actual, groups=None, bootstrap_samples=500, seed=0)["valence"]
    assert paired["ccc_difference"] == pytest.approx(
        concordance(better[:, 0], actual[:, 0]) - concordance(worse[:, 0], actual[:, 0])
    )
    assert paired["ccc_difference_ci"][0] > 0
    assert np.ptp(paired["ccc_difference_ci"]) < 0.5 * np.ptp(single)


def test_the_difference_of_a_model_from_itself_is_exactly_zero():
    predicted, actual = normal(12, 20, 2), normal(13, 20, 2)
    nothing = {"ccc_difference": 0.0, "ccc_difference_ci": [0.0, 0.0]}
    assert paired_difference(predicted, predicted, actual, groups=None, bootstrap_samples=100, seed=0) == {
        "valence": nothing,
        "arousal": nothing,
    }


def test_a_difference_of_two_songs_has_no_interval_and_of_one_is_undefined():
    actual = array(0.1, 0.2, 0.4, -0.3).reshape(2, 2)
    assert (
        paired_difference(actual, actual, actual, groups=None, bootstrap_samples=100, seed=0)["valence"]["ccc_difference_ci"]
        is None
    )
    assert (
        paired_difference(actual[:1], actual[:1], actual[:1], groups=None, bootstrap_samples=100, seed=0)["valence"][
            "ccc_difference"
        ]
        is None
    )


def test_scores_refuse_other_shapes_no_songs_and_nan():
    for predicted, actual in (
        (np.zeros((3, 2)), np.zeros((4, 2))),
        (np.zeros((3, 1)), np.zeros((3, 1))),
        (np.zeros((0, 2)), np.zeros((0, 2))),
        (np.full((3, 2), np.nan), np.zeros((3, 2))),
    ):
        with pytest.raises(DataError):
            scores(predicted, actual, groups=None, bootstrap_samples=100, seed=0)
        with pytest.raises(DataError):
            paired_difference(actual, predicted, actual, groups=None, bootstrap_samples=100, seed=0)


def test_copies_of_a_song_in_its_group_leave_the_intervals_as_they_are():
    predicted, actual, names = normal(15, 12, 2), normal(16, 12, 2), [f"artist {number}" for number in range(12)]
    single = scores(predicted, actual, groups=names, bootstrap_samples=300, seed=0)
    copies = [np.repeat(values, 5, axis=0) for values in (predicted, actual)]
    grouped = scores(*copies, groups=np.repeat(names, 5).tolist(), bootstrap_samples=300, seed=0)
    for dimension, found in grouped.items():
        assert found == pytest.approx({name: pytest.approx(value) for name, value in single[dimension].items()})
    ungrouped = scores(*copies, groups=None, bootstrap_samples=300, seed=0)
    assert np.ptp(ungrouped["valence"]["mae_ci"]) < 0.6 * np.ptp(grouped["valence"]["mae_ci"])


def test_with_errors_that_a_group_shares_only_intervals_over_groups_cover_the_true_value():
    # Labels and errors: half of their variances is of the group. Labels have variance 1, errors 0.5, predictions their sum.
    truth = 2 * 1 / (1 + 1.5)
    random = np.random.default_rng(17)
    covered = {True: 0, False: 0}
    names = np.repeat(np.arange(40), 5).astype(str).tolist()
    for trial in range(100):
        actual, error = (np.repeat(random.normal(size=(40, 2)), 5, axis=0) + random.normal(size=(200, 2)) for _ in "ab")
        predicted = actual / math.sqrt(2) + error / 2
        for by_group in covered:
            found = scores(
                predicted, actual / math.sqrt(2), groups=names if by_group else None, bootstrap_samples=200, seed=trial
            )
            covered[by_group] += sum(low <= truth <= high for low, high in (row["ccc_ci"] for row in found.values()))
    assert covered[False] / 200 < 0.88 < covered[True] / 200


def test_two_groups_have_no_intervals():
    actual = normal(18, 6, 2)
    assert scores(actual + 0.1, actual, groups=[*"aaabbb"], bootstrap_samples=100, seed=0)["valence"]["mae_ci"] is None


# Ceiling


@pytest.mark.parametrize("divisor", ["raters - 1", "raters"])
def test_the_ceiling_is_the_score_of_the_best_multiple_of_the_true_mean(divisor):
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
        stretched = [concordance(factor * truth[:, column], labels[:, column]) for factor in np.arange(0.8, 1.6, 0.01)]
        assert result[dimension]["ccc"] == pytest.approx(max(stretched), abs=0.01)
        assert result[dimension]["reliability"] == result[dimension]["r2"]


def test_the_ceiling_stays_within_zero_and_one():
    labels = array(-1, -1, 1, 1).reshape(2, 2)
    nothing_left = ceiling(labels, np.full((2, 2), 9.0), array(2, 2))["valence"]
    assert nothing_left == {"ccc": 0.0, "r2": 0.0, "reliability": 0.0}
    everything = ceiling(labels, np.zeros((2, 2)), array(2, 2))["arousal"]
    assert everything == {"ccc": 1.0, "r2": 1.0, "reliability": 1.0}


def test_the_ceiling_refuses_wrong_raters_negative_deviations_and_constant_labels():
    labels = array(-1, -1, 1, 1).reshape(2, 2)
    for actual, deviation, raters in (
        (labels, np.ones((2, 2)), array(0, 5)),
        (labels, np.ones((2, 2)), array(5)),
        (labels, -np.ones((2, 2)), array(5, 5)),
        (np.full((2, 2), 0.1), np.ones((2, 2)), array(5, 5)),
    ):
        with pytest.raises(DataError):
            ceiling(actual, deviation, raters)


def test_the_ceiling_of_deam_with_ten_raters_each_is_the_known_value(real_data):
    songs = list(label_tables(real_data).values())
    labels = np.array([[song["valence_mean"], song["arousal_mean"]] for song in songs])
    deviations = np.array([[song["valence_std"], song["arousal_std"]] for song in songs])
    result = ceiling(labels, deviations, np.full(len(songs), 10))
    assert result["valence"]["r2"] == pytest.approx(0.825, abs=0.001)
    assert result["arousal"]["r2"] == pytest.approx(0.861, abs=0.001)
    # It does not depend on the unit.
    assert ceiling((labels - 5) / 4, deviations / 4, np.full(len(songs), 10))["valence"]["r2"] == pytest.approx(
        result["valence"]["r2"]
    )


@pytest.mark.parametrize(("first_id", "last_id", "raters"), [(1, 2000, 10), (2001, 2058, 5)])
def test_deam_divides_its_deviations_by_the_number_of_raters(real_data, first_id, last_id, raters):
    # Ratings are integers: the sum of their squares, from mean and deviation, is an integer, and odd if their sum is.
    songs = [song for song_id, song in label_tables(real_data).items() if first_id <= song_id <= last_id]
    possible = {raters: 0, raters - 1: 0}
    for song in songs:
        total = round(song["arousal_mean"] * raters)
        for divisor in possible:
            low, high = ((song["arousal_std"] + slack) ** 2 * divisor + total**2 / raters for slack in (-0.005, 0.005))
            possible[divisor] += any(n % 2 == total % 2 for n in range(math.ceil(low - 1e-6), math.floor(high + 1e-6) + 1))
    assert possible[raters] > 0.8 * len(songs)
    assert possible[raters - 1] < 0.2 * len(songs)
