import json

import pytest

from emotion.data.label_scale import label_of, label_sd_of, rating_of, scale_json


@pytest.mark.parametrize(("rating", "label"), [(1, -1), (3, -0.5), (5, 0), (9, 1)])
def test_ratings_on_1_to_9_are_labels_on_minus_1_to_1_and_back(rating: float, label: float) -> None:
    assert label_of(rating) == label
    assert rating_of(label) == rating


def test_the_ends_of_any_scale_are_the_ends_of_the_labels_and_deams_is_the_default() -> None:
    for scale in ((0, 1), (0, 100), (-5, 5), (1, 7)):
        assert [label_of(rating, scale) for rating in (scale[0], sum(scale) / 2, scale[1])] == [-1, 0, 1]
    for rating in (1.1, 3.14, 8.7):
        assert label_of(rating, (1.0, 9.0)) == label_of(rating) == (rating - 5) / 4
    assert label_sd_of(10, (0, 100)) == 0.2


def test_the_scale_of_a_published_model_is_what_it_always_was_for_deam() -> None:
    assert json.dumps(scale_json((1.0, 9.0))) == '{"from": [1, 9], "to": [-1, 1], "formula": "(x - 5) / 4"}'
    assert scale_json((0.0, 1.0)) == {"from": [0, 1], "to": [-1, 1], "formula": "(x - 0.5) / 0.5"}


def test_a_standard_deviation_is_scaled_and_not_shifted() -> None:
    assert label_sd_of(2) == 0.5
