"""Words for a point of the plane of valence and arousal, by the quadrants of Russell's circumplex.

Valence is the horizontal axis, arousal the vertical one. A quadrant is named by two of Russell's words that lie in it. Whoever is
within NEUTRAL_RADIUS of the middle is in none: a prediction that says nothing gets no word for a mood.

Source: Russell 1980, A circumplex model of affect, Journal of Personality and Social Psychology 39:1161-1178. The thresholds are
ours: 0 on both axes, and the radius.
"""

import math

NEUTRAL_RADIUS = 0.1  # 0.4 on DEAM's 1..9
NEUTRAL = 0
WORDS = {
    1: ("excited", "happy"),  # valence and arousal above 0
    2: ("tense", "angry"),  # arousal alone
    3: ("sad", "gloomy"),  # neither
    4: ("calm", "content"),  # valence alone
    NEUTRAL: ("neutral",),
}
Ends = tuple[float, float]  # lower and upper end of an interval


def quadrant_of(valence: float, arousal: float) -> int:
    """1 to 4, counter-clockwise from the one where both are positive, 0 included; NEUTRAL near the middle. Both on -1..1."""
    if math.hypot(valence, arousal) < NEUTRAL_RADIUS:
        return NEUTRAL
    return _quadrant(valence >= 0, arousal >= 0)


def fits_one_quadrant(valence: Ends, arousal: Ends) -> bool:
    """Whether both intervals lie in one quadrant, so that only its words fit. An interval that holds 0 reaches into two."""
    return all(low * high > 0 for low, high in (valence, arousal))


def _quadrant(is_pleasant: bool, is_active: bool) -> int:
    if is_active:
        return 1 if is_pleasant else 2
    return 4 if is_pleasant else 3
