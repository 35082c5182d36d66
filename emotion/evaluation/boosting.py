"""Gradient boosting on features of whole songs: regression trees fitted by scikit-learn, kept as arrays.

scikit-learn is imported inside the functions, as its import takes seconds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from emotion.evaluation.regressors import Array, CheckStop, Folds, Positions
from emotion.threads import in_threads

TREES, DEPTH, SMALLEST_LEAF = 300, 4, 5
NODES = 2 ** (DEPTH + 1) - 1  # of a full tree
Nodes = npt.NDArray[np.int32]


@dataclass(frozen=True)
class BoostedTrees:
    """mean: [2], of the labels. Of each node, [2, trees, nodes]: its left child, where x[feature] <= threshold, and its right
    child; a leaf is its own child. `value` of the leaf that a song reaches is the tree's part of the prediction."""

    mean: Array
    feature: Nodes
    threshold: Array
    left: Nodes
    right: Nodes
    value: Array

    def predict(self, x: Array) -> Array:
        """x: [songs, features]. Returns [songs, 2] = (valence, arousal)."""
        dimension, tree = np.ogrid[: self.feature.shape[0], : self.feature.shape[1]]
        predicted = np.empty((len(x), 2))
        for index, row in enumerate(x):
            node = np.zeros(self.feature.shape[:2], dtype=np.int32)
            for _ in range(DEPTH):
                at = dimension, tree, node
                node = np.where(row[self.feature[at]] <= self.threshold[at], self.left[at], self.right[at])
            predicted[index] = self.mean + self.value[dimension, tree, node].sum(axis=1)
        return predicted


def fit_boosting(
    x: Array, y: Array, folds: Folds, *, seed: int, threads: int, check_stop: CheckStop
) -> tuple[BoostedTrees, Array]:
    """300 small regression trees per dimension, each fitted to the residuals of those before it. x: [n, k]; y: [n, 2] labels.

    Returns also the predictions for the n songs, [n, 2], each by trees that were fitted without the song's fold; NaN without
    folds. A split chooses from a fifth of the features, as neighbouring mel bands are much alike. The settings are fixed: early
    stopping by grouped folds took six times as long and gave a lower concordance on DEAM. With fewer than ten songs the
    prediction is the mean label. seed: draws the features. threads: do not change the result. Each fit has one thread:
    scikit-learn's own threads, which meet at every node of a tree, take longer than one for so few songs. check_stop: called
    before each fit; its exceptions pass through.

    Source: Friedman 2001, Annals of Statistics 29:1189-1232, on histograms of the features.
    """
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    everything = np.arange(len(x))
    held_out = np.full(y.shape, np.nan)

    def cases() -> Iterator[tuple[int, Positions, Positions]]:
        for column, (fitting, others) in product(range(2), [*folds, (everything, everything[:0])]):
            yield column, fitting, others

    def fit(case: tuple[int, Positions, Positions]) -> dict[str, npt.NDArray[Any]] | None:
        """The arrays of the trees that are fitted to all songs; of others only the predictions are kept."""
        column, fitting, others = case
        with threadpool_limits(1, user_api="openmp"):  # of the calling thread alone
            trees = _fit_one(x[fitting], y[fitting, column], seed)
            if not len(others):
                return _nodes(trees)
            held_out[others, column] = trees.predict(x[others])
            return None

    parts = [nodes for nodes in in_threads(fit, cases(), threads, check_stop) if nodes is not None]
    return BoostedTrees(**{name: np.stack([part[name] for part in parts]) for name in parts[0]}), held_out


def _fit_one(x: Array, y: Array, seed: int) -> Any:
    """scikit-learn's regressor for one dimension, y [n]."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    trees = HistGradientBoostingRegressor(
        max_iter=TREES if len(x) >= 2 * SMALLEST_LEAF else 1,  # else no tree has a split
        learning_rate=0.05,
        max_depth=DEPTH,
        min_samples_leaf=SMALLEST_LEAF,
        max_features=0.2,
        max_bins=64,
        early_stopping=False,
        random_state=np.random.RandomState(np.random.MT19937(seed)),  # an integer seed must be below 2³²
    )
    return trees.fit(x, y)


def _nodes(trees: Any) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a BoostedTrees for one dimension. scikit-learn has no public name for them; shap reads them, too."""
    found = {
        "mean": np.asarray(trees._baseline_prediction, dtype=np.float64).reshape(()),
        "feature": np.zeros((TREES, NODES), np.int32),
        "threshold": np.zeros((TREES, NODES)),
        "left": np.tile(np.arange(NODES, dtype=np.int32), (TREES, 1)),
        "right": np.tile(np.arange(NODES, dtype=np.int32), (TREES, 1)),
        "value": np.zeros((TREES, NODES)),
    }
    for number, (predictor,) in enumerate(trees._predictors):
        nodes = predictor.nodes
        inner, size = ~nodes["is_leaf"].astype(bool), len(nodes)
        found["value"][number, :size] = nodes["value"]
        for name, stored in (("feature", "feature_idx"), ("threshold", "num_threshold"), ("left", "left"), ("right", "right")):
            found[name][number, :size][inner] = nodes[stored][inner]
    return found
