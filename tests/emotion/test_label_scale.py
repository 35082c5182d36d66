import pytest

from emotion.data.label_scale import label_of, label_sd_of, rating_of


@pytest.mark.parametrize(("rating", "label"), [(1, -1), (3, -0.5), (5, 0), (9, 1)])
def test_ratings_on_1_to_9_are_labels_on_minus_1_to_1_and_back(rating: float, label: float) -> None:
    assert label_of(rating) == label
    assert rating_of(label) == rating


def test_a_standard_deviation_is_scaled_and_not_shifted() -> None:
    assert label_sd_of(2) == 0.5
