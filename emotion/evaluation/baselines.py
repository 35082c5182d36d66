"""Baselines for the model: a constant, and ridge regression, a support vector machine and boosted trees on pooled log-mels.

scikit-learn is imported inside the functions, as its import takes seconds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from emotion.errors import DataError

Array = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.floating[Any]]
Folds = list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]


def pooled_statistics(log_mel: Numbers) -> Array:
    """A song as one vector [3 x mels]: mean and standard deviation over time, and that of the change from frame to frame.

    log_mel: [frames, mels], at least 2 frames, in any unit; computed in float64 (a float16 sum over a song overflows).
    Raises DataError for another shape, NaN or infinity.
    """
    if log_mel.ndim != 2 or len(log_mel) < 2 or not np.isfinite(log_mel).all():
        raise DataError(
            "baselines: expected a finite log-mel [frames, mels] of at least 2 frames, found "
            f"{list(log_mel.shape)}, smallest {log_mel.min(initial=0):g}, largest {log_mel.max(initial=0):g}"
        )
    wide = log_mel.astype(np.float64)
    return np.concatenate([wide.mean(axis=0), wide.std(axis=0), np.diff(wide, axis=0).std(axis=0)])


def fit_baselines(
    train_x: Numbers, train_y: Numbers, *, groups: Sequence[str], test_x: Numbers, seed: int, check_stop: Callable[[], None]
) -> dict[str, Array]:
    """Predictions [m, 2] = (valence, arousal) for the test songs by "constant", "ridge", "svr" and "boosting".

    train_x: [n, k] features of the training songs; train_y: [n, 2] their labels; groups: [n] their groups (artists);
    test_x: [m, k]. The constant is the mean training label. Ridge and SVR choose their settings by grouped cross-validation
    on the training songs; those of boosting are fixed. Valence and arousal are fitted separately. seed: shuffles groups between
    folds and draws the features for a split of a tree. check_stop: called before each baseline; its exceptions pass through.
    Raises DataError for shapes that do not match, NaN or infinity, or a single group.
    """
    train_x, train_y, test_x = (np.asarray(array, np.float64) for array in (train_x, train_y, test_x))
    songs, features = train_x.shape if train_x.ndim == 2 else (0, 0)
    if train_y.shape != (songs, 2) or len(groups) != songs or test_x.shape[1:] != (features,) or not len(test_x) or not songs:
        raise DataError(
            "baselines: expected features [n, k], labels [n, 2], n groups and test features [m, k]; found "
            f"{list(train_x.shape)}, {list(train_y.shape)}, {len(groups)} and {list(test_x.shape)}"
        )
    if not all(np.isfinite(array).all() for array in (train_x, train_y, test_x)):
        raise DataError("baselines: features and labels must be finite; found NaN or infinity. Extract the features again")
    check_stop()
    folds = grouped_folds(groups, seed)
    found = {"constant": np.tile(train_y.mean(axis=0), (len(test_x), 1))}
    check_stop()
    found["ridge"] = ridge(train_x, train_y, folds, test_x)
    check_stop()
    found["svr"] = support_vector_regression(train_x, train_y, folds, test_x)
    check_stop()
    found["boosting"] = gradient_boosting(train_x, train_y, test_x, seed)
    return found


def grouped_folds(groups: Sequence[str], seed: int) -> Folds:
    """(fitting, held-out) indices of five folds of about equal size, or one per group if there are fewer than five.

    groups: [songs]. No group is on both sides; the seed orders groups of equal size. Raises DataError for fewer than two.
    """
    from sklearn.model_selection import GroupKFold

    names, members = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    if len(names) < 2:
        raise DataError(
            f"baselines: choosing settings by cross-validation needs at least 2 groups among the training songs, found "
            f"{len(names)} in {len(groups)} songs. Use more groups, or split.grouped: false to split single songs."
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(names))
    splitter = GroupKFold(min(5, len(names)))
    return list(splitter.split(np.zeros(len(members)), groups=order[members]))


def ridge(train_x: Array, train_y: Array, folds: Folds, test_x: Array) -> Array:
    """Predictions [m, 2] of ridge regression on standardised features; shapes as in `fit_baselines`.

    For each dimension the penalty is the one of a logarithmic grid with the smallest squared error over the folds.
    """
    train_x, test_x = _standardised(train_x, test_x)
    penalties = np.logspace(-1, 5, 13)
    errors = np.zeros((len(penalties), 2))
    for fitting, held_out in folds:
        candidates = _ridge_path(train_x[fitting], train_y[fitting], train_x[held_out], penalties)
        errors += ((candidates - train_y[held_out]) ** 2).sum(axis=1)
    candidates = _ridge_path(train_x, train_y, test_x, penalties)
    best = errors.argmin(axis=0)
    return np.column_stack([candidates[best[0], :, 0], candidates[best[1], :, 1]])


def support_vector_regression(train_x: Array, train_y: Array, folds: Folds, test_x: Array) -> Array:
    """Predictions [m, 2] of a support vector machine with the kernel exp(-gamma |x - y|²) on standardised features.

    Shapes as in `fit_baselines`. For each dimension C and gamma are those of a small grid with the smallest squared error over
    the folds; epsilon is a third of the labels' deviation. Kernels are computed once for all fits: a quarter of SVR's own time.
    """
    from sklearn.metrics.pairwise import euclidean_distances
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVR

    train_x, test_x = _standardised(train_x, test_x)
    within = euclidean_distances(train_x, squared=True)
    across = euclidean_distances(test_x, train_x, squared=True)
    predicted = np.empty((len(test_x), 2))
    for column in range(2):
        labels = train_y[:, column]
        machine = SVR(kernel="precomputed", epsilon=labels.std() / 3)
        least_error = np.inf
        for factor in (0.1, 0.3, 1.0):
            gamma = factor / train_x.shape[1]
            grid = {"C": [0.1, 0.3, 1.0, 3.0]}
            search = GridSearchCV(machine, grid, scoring="neg_mean_squared_error", cv=folds, error_score="raise")
            search.fit(np.exp(-gamma * within), labels)
            if -search.best_score_ < least_error:
                least_error = -search.best_score_
                predicted[:, column] = search.predict(np.exp(-gamma * across))
    return predicted


def gradient_boosting(train_x: Array, train_y: Array, test_x: Array, seed: int) -> Array:
    """Predictions [m, 2] of 300 small regression trees, each fitted to the residuals of those before it.

    Shapes as in `fit_baselines`. A split chooses from a fifth of the features, as neighbouring mel bands are much alike. The
    settings are fixed: early stopping by grouped folds took six times as long and gave a lower concordance on DEAM. With fewer
    than ten songs the prediction is the mean label. The number of threads does not change any byte.

    Source: Friedman 2001, Annals of Statistics 29:1189-1232, on histograms of the features.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    predicted = np.empty((len(test_x), 2))
    for column in range(2):
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
        predicted[:, column] = trees.fit(train_x, train_y[:, column]).predict(test_x)
    return predicted


def _ridge_path(train_x: Array, train_y: Array, test_x: Array, penalties: Array) -> Array:
    """Predictions [penalties, m, 2] of ridge regression with an intercept, all from one eigendecomposition."""
    mean_x, mean_y = train_x.mean(axis=0), train_y.mean(axis=0)
    centred = train_x - mean_x
    values, vectors = np.linalg.eigh(centred.T @ centred)
    projected = vectors.T @ (centred.T @ (train_y - mean_y))
    rotated = (test_x - mean_x) @ vectors
    return np.array([rotated @ (projected / (values.clip(0) + p)[:, None]) + mean_y for p in penalties])


def _standardised(train_x: Array, test_x: Array) -> tuple[Array, Array]:
    """Both standardised by the training songs, then clipped to -3..3: one loud or silent song would tilt the whole plane."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train_x)
    return scaler.transform(train_x).clip(-3, 3), scaler.transform(test_x).clip(-3, 3)
