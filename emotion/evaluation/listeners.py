"""The scores of people on the scale of the model's: of one listener, and how many listeners' mean is as good as the model.

A rating of a song is t + e: t is the mean of all listeners, with a variance T over the songs; e differs between listeners, with
a variance E. A label is the mean of n ratings, so its variance over the songs is T + E / n. E comes from the standard
deviations that the dataset states for each song. The mean of k other listeners is a predictor of the labels with variance
T + E / k, the right mean and the covariance T with them, so that its CCC is

    ccc(k) = 2 T / (2 T + E / k + E / n)

For k without end it is 2 r / (1 + r), r being the reliability of the labels. That is a little below the ceiling, √r
(`metrics.ceiling`), which the same mean reaches if it is stretched to the variance of the labels.

Sources: the reliability of a mean of k ratings, Spearman 1910 and Brown 1910, British Journal of Psychology 3:271-322, in the
form of the intraclass correlation ICC(1, k) of Shrout and Fleiss 1979, Psychological Bulletin 86:420-428; CCC, Lin 1989.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from emotion.evaluation.metrics import DIMENSIONS, Scores

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RatingVariances:
    """Of one dimension. shared: T; listener: E; label: mean of E / n over the songs; others: mean of E / (n - 1)."""

    shared: float
    listener: float
    label: float
    others: float

    def single_listener_ccc(self) -> float:
        """CCC of one of a song's raters, drawn at random, with the mean of its others: n - 1 in the place of n, and k = 1."""
        return self._ccc(self.listener + self.others)

    def all_listeners_ccc(self) -> float:
        """CCC of the mean of infinitely many other listeners."""
        return self._ccc(self.label)

    def listeners_of(self, ccc: float | None) -> float | None:
        """The k with ccc(k) = `ccc`, 0 for a ccc of 0 or less. None: more than any number; or no ccc."""
        if ccc is None:
            return None
        if ccc <= 0:
            return 0.0
        noise = 2 * self.shared * (1 / ccc - 1) - self.label
        return self.listener / noise if noise > 0 else None

    def _ccc(self, noise: float) -> float:
        return 2 * self.shared / (2 * self.shared + noise) if self.shared > 0 else 0.0


def rating_variances(labels: Array, rater_sd: Array, raters: Array) -> RatingVariances:
    """labels, rater_sd, raters: [songs] of one dimension; deviations with the divisor raters, as datasets state them; raters: at
    least 2."""
    variance = rater_sd**2 * raters / (raters - 1)
    label = float((variance / raters).mean())
    return RatingVariances(
        max(float(labels.var()) - label, 0.0), float(variance.mean()), label, float((variance / (raters - 1)).mean())
    )


def listener_scores(labels: Array, rater_sd: Array, raters: Array, scored: dict[str, dict[str, Scores]]) -> dict[str, Any]:
    """Per dimension {"single_listener_ccc", "all_listeners_ccc", "listener_equivalents": {predictor: {"value", "ci"}}}.

    labels, rater_sd: [songs, 2], see `rating_variances`; raters: [songs]. scored: predictor → `metrics.scores`, of whose CCC and
    its interval the equivalents are. A value or an upper end of None: more listeners than any number.
    """
    found: dict[str, Any] = {}
    for column, dimension in enumerate(DIMENSIONS):
        variances = rating_variances(labels[:, column], rater_sd[:, column], raters)
        equivalents = {}
        for name, scores in scored.items():
            ccc, interval = scores[dimension]["ccc"], scores[dimension]["ccc_ci"]
            assert not isinstance(ccc, list)
            assert not isinstance(interval, float)
            ends = None if interval is None else [variances.listeners_of(end) for end in interval]
            equivalents[name] = {"value": variances.listeners_of(ccc), "ci": ends}
        found[dimension] = {
            "single_listener_ccc": variances.single_listener_ccc(),
            "all_listeners_ccc": variances.all_listeners_ccc(),
            "listener_equivalents": equivalents,
        }
    return found
