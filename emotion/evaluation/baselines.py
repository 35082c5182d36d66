"""The baselines that are no part of the stack: the mean label, and boosted trees on the vectors of songs.

scikit-learn is imported inside the functions, as its import takes seconds.
"""

import numpy as np

from emotion.evaluation.regressors import Array, CheckStop
from emotion.threads import in_threads


def mean_label(train_y: Array, songs: int) -> Array:
    """[songs, 2]: the mean of the training labels [n, 2] for every song."""
    return np.tile(train_y.mean(axis=0), (songs, 1))


def gradient_boosting(train_x: Array, train_y: Array, test_x: Array, seed: int, *, threads: int, check_stop: CheckStop) -> Array:
    """Predictions [m, 2] of 300 small regression trees, each fitted to the residuals of those before it.

    train_x: [n, k]; train_y: [n, 2] labels; test_x: [m, k]. A split chooses from a fifth of the features, as neighbouring mel
    bands are much alike. The settings are fixed: early stopping by grouped folds took six times as long and gave a lower
    concordance on DEAM. With fewer than ten songs the prediction is the mean label. seed: draws the features. threads: change no
    byte. Valence and arousal have a thread each: scikit-learn's own threads, which meet at every node of a tree, take longer than
    one for so few songs. check_stop: called before each dimension; its exceptions pass through.

    Source: Friedman 2001, Annals of Statistics 29:1189-1232, on histograms of the features.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    def of_column(column: int) -> Array:
        trees = HistGradientBoostingRegressor(
            max_iter=300,
            learning_rate=0.05,
            max_depth=4,
            min_samples_leaf=5,
            max_features=0.2,
            max_bins=64,
            early_stopping=False,
            random_state=np.random.RandomState(np.random.MT19937(seed)),  # an integer seed must be below 2³²
        )
        with threadpool_limits(1, user_api="openmp"):  # of the calling thread alone
            return np.asarray(trees.fit(train_x, train_y[:, column]).predict(test_x))

    return np.column_stack(list(in_threads(of_column, range(2), threads, check_stop)))
