import numpy as np
import pytest

from emotion.errors import DataError
from emotion.evaluation.conformal import (
    INTERVALS,
    HalfWidths,
    coverage,
    coverage_of,
    half_width,
    half_widths,
    read_intervals,
    write_intervals,
)

INFINITE = float("inf")


@pytest.mark.parametrize(
    ("songs", "rank"),
    # ceil(0.9 (n + 1)) by hand: 9, 9.9, 17.1, 18, 27, 90, 90.9, 900.
    [(9, 9), (10, 10), (18, 18), (19, 18), (29, 27), (99, 90), (100, 91), (999, 900)],
)
def test_the_half_width_is_the_error_of_the_finite_sample_rank(songs: int, rank: int) -> None:
    errors = np.random.default_rng(songs).permutation(songs) + 1.0
    assert half_width(errors) == rank
    # Errors to either side count alike.
    assert half_width(errors * np.where(errors % 2, 1, -1)) == rank


@pytest.mark.parametrize("songs", [0, 1, 8])
def test_fewer_than_nine_songs_leave_the_whole_range(songs: int) -> None:
    assert half_width(np.full(songs, 0.01)) == INFINITE


@pytest.mark.parametrize(("songs", "promised"), [(9, 9 / 10), (10, 10 / 11), (19, 18 / 20), (25, 24 / 26)])
def test_exchangeable_errors_are_covered_as_often_as_the_rank_says(songs: int, promised: float) -> None:
    # Heavy tails, so that no formula for normal errors would do. The new error is the last of n + 1 exchangeable ones.
    trials = 4000
    errors = np.random.default_rng(songs).standard_t(2, (trials, songs + 1))
    covered = np.mean([abs(new) <= half_width(known) for *known, new in errors])
    assert covered == pytest.approx(promised, abs=4 * (promised * (1 - promised) / trials) ** 0.5)


def test_songs_without_a_held_out_prediction_do_not_count() -> None:
    labels = np.zeros((12, 2))
    held_out = np.column_stack([np.arange(12) / 100, np.arange(12) / 50])
    held_out[9:, 0] = np.nan
    held_out[3:, 1] = np.nan
    found = half_widths(held_out, labels)
    assert found.songs.tolist() == [9, 3]
    assert found.width.tolist() == [0.08, INFINITE]


def test_bounds_are_clipped_to_the_scale_of_the_labels() -> None:
    lower, upper = HalfWidths(np.array([0.25, INFINITE]), np.array([20, 2])).around(np.array([[0.5, 0.5], [-0.875, 0.0]]))
    np.testing.assert_array_equal(lower, [[0.25, -1], [-1, -1]])
    np.testing.assert_array_equal(upper, [[0.75, 1], [-0.625, 1]])


def test_the_coverage_is_a_share_with_the_exact_binomial_interval() -> None:
    labels = np.array([0.0, 0.5, -0.5, 0.25, 0.75] * 2)
    # Ends belong to the interval: 0.5 and -0.5 are inside, 0.75 is not. 8 of 10.
    found = coverage(labels, np.full(10, -0.5), np.full(10, 0.5))
    assert found["coverage"] == 0.8
    assert found["coverage_ci"] == pytest.approx([0.4439, 0.9748], abs=1e-4)  # Clopper and Pearson's, from tables
    assert found["mean_width"] == 1
    # All or none inside: the other end solves p^10 = 0.025.
    assert coverage(labels, np.full(10, -1), np.full(10, 1.0))["coverage_ci"] == pytest.approx([0.025**0.1, 1])
    assert coverage(labels, np.full(10, 0.9), np.full(10, 1.0))["coverage_ci"] == pytest.approx([0, 1 - 0.025**0.1])


def test_each_dimension_has_the_coverage_of_its_own_width() -> None:
    widths = HalfWidths(np.array([0.1, INFINITE]), np.array([30, 4]))
    found = coverage_of(widths, np.zeros((4, 2)), np.array([[0.05, 0.9], [0.2, -1], [-0.3, 1], [-0.1, 0]]))
    assert (found["valence"]["coverage"], found["valence"]["half_width"], found["valence"]["held_out_songs"]) == (0.5, 0.1, 30)
    assert (found["arousal"]["coverage"], found["arousal"]["half_width"], found["arousal"]["mean_width"]) == (1, None, 2)


def test_widths_read_back_are_the_same(tmp_path) -> None:
    written = {
        "stack": HalfWidths(np.array([1 / 3, INFINITE]), np.array([40, 5])),
        "model": HalfWidths(np.ones(2), np.ones(2, int)),
    }
    write_intervals(written, tmp_path)
    read = read_intervals(tmp_path)
    for name, widths in written.items():
        assert read[name].width.tolist() == widths.width.tolist()
        assert read[name].songs.tolist() == widths.songs.tolist()


def test_a_run_without_intervals_has_none_and_damaged_ones_are_a_fault_of_the_data(tmp_path) -> None:
    assert read_intervals(tmp_path) == {}
    for text in ("{", "[]", '{"stack": {}}', '{"level": 0.8}', '{"level": 0.9, "stack": {"valence": {}}}'):
        (tmp_path / INTERVALS).write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="expected the widths of intervals"):
            read_intervals(tmp_path)
