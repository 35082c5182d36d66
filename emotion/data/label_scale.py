"""The label scale. Labels, predictions and errors here are on -1..1. Raters answer on their dataset's scale, DEAM's on 1..9."""

from typing import Any

Scale = tuple[float, float]  # lowest and highest rating

DEAM_SCALE: Scale = (1, 9)


def label_of(rating: float, scale: Scale = DEAM_SCALE) -> float:
    """A rating on `scale` → a label on -1..1."""
    middle, half = _middle_and_half(scale)
    return (rating - middle) / half


def label_sd_of(rating_sd: float, scale: Scale = DEAM_SCALE) -> float:
    """A standard deviation on `scale` → the same on -1..1: scaled, not shifted."""
    return rating_sd / _middle_and_half(scale)[1]


def rating_of(label: float) -> float:
    """A label on -1..1 → a rating on DEAM's 1..9."""
    return 5 + 4 * label


def scale_text(scale: Scale) -> str:
    """What labels here are, for metrics.json and the tables of `collect`."""
    owner = "DEAM's " if scale == DEAM_SCALE else ""
    return f"labels on -1..1, {_formula(scale)} of {owner}{shown_scale(scale)}"


def scale_json(scale: Scale) -> dict[str, Any]:
    """The same for preprocessing.json."""
    return {"from": [*(DEAM_SCALE if scale == DEAM_SCALE else scale)], "to": [-1, 1], "formula": _formula(scale)}


def shown_scale(scale: Scale) -> str:
    return f"{scale[0]:g}..{scale[1]:g}"


def _middle_and_half(scale: Scale) -> tuple[float, float]:
    low, high = scale
    return (low + high) / 2, (high - low) / 2


def _formula(scale: Scale) -> str:
    middle, half = _middle_and_half(scale)
    if middle == 0:
        return "x" if half == 1 else f"x / {half:g}"
    return f"(x {'-' if middle > 0 else '+'} {abs(middle):g}) / {half:g}"
