"""Words for points of the plane, by hand."""

import pytest

from emotion.data.circumplex import WORDS, fits_one_quadrant, quadrant_of


@pytest.mark.parametrize(
    ("valence", "arousal", "word"),
    [
        (0.5, 0.5, "excited"),
        (-0.5, 0.5, "tense"),
        (-0.5, -0.5, "sad"),
        (0.5, -0.5, "calm"),
        (0.0, 0.2, "excited"),  # 0 counts as positive
        (0.2, 0.0, "excited"),
        (-1e-9, 0.2, "tense"),
        (0.07, 0.07, "neutral"),  # 0.099 from the middle
        (0.08, 0.08, "excited"),  # 0.113
        (0.0, -0.1, "calm"),
    ],
)
def test_a_point_has_the_words_of_its_quadrant(valence: float, arousal: float, word: str) -> None:
    assert WORDS[quadrant_of(valence, arousal)][0] == word


def test_an_interval_that_holds_zero_reaches_into_two_quadrants() -> None:
    assert fits_one_quadrant((0.1, 0.9), (-0.9, -0.1))
    assert not fits_one_quadrant((-0.1, 0.9), (-0.9, -0.1))
    assert not fits_one_quadrant((0.1, 0.9), (-0.9, 0.0))
