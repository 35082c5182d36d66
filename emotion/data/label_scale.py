"""The label scale. DEAM's raters answer on 1..9; labels, predictions and errors here are on -1..1."""

LOWEST_RATING, HIGHEST_RATING = 1, 9
FORMULA = "(x - 5) / 4"
LABEL_SCALE = f"labels on -1..1, {FORMULA} of DEAM's 1..9"  # for metrics.json and the tables of `collect`
LABEL_SCALE_JSON = {"from": [LOWEST_RATING, HIGHEST_RATING], "to": [-1, 1], "formula": FORMULA}  # for preprocessing.json


def label_of(rating: float) -> float:
    """A rating on 1..9 → a label on -1..1."""
    return (rating - 5) / 4


def label_sd_of(rating_sd: float) -> float:
    """A standard deviation on 1..9 → the same on -1..1: scaled, not shifted."""
    return rating_sd / 4


def rating_of(label: float) -> float:
    """A label on -1..1 → a rating on 1..9."""
    return 5 + 4 * label
