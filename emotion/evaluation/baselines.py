"""Baselines for the model: a constant, and ridge regression, a support vector machine and boosted trees on pooled log-mels.

scikit-learn is imported inside the functions, as its import takes seconds.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from emotion.audio.feature_store import FRAMES_PER_BLOCK, Features
from emotion.errors import DataError
from emotion.threads import in_threads

Array = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.floating[Any]]
Positions = npt.NDArray[np.int64]
Folds = list[tuple[Positions, Positions]]
CheckStop = Callable[[], None]

MOST_SVR_SONGS = 2000  # a kernel has a number for each pair of songs
GAMMAS, PENALTIES = (0.1, 0.3, 1.0), (0.1, 0.3, 1.0, 3.0)


def pooled_songs(features: Features, threads: int, check_stop: CheckStop) -> Array:
    """`pooled_statistics` of every song, [songs, 3 x mels]. check_stop: see `in_threads`."""
    rows = in_threads(lambda index: pooled_statistics(features.song(index)), range(len(features.songs)), threads, check_stop)
    return np.array(list(rows)).reshape(len(features.songs), 3 * features.mel.mels)


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
    frames, mels = log_mel.shape
    shift = log_mel[0].astype(np.float64)  # sums of squares of what lies near 0 lose no digits
    total, squares, squared_changes = np.zeros((3, mels))
    for first in range(0, frames, FRAMES_PER_BLOCK):
        wide = log_mel[first : first + FRAMES_PER_BLOCK + 1].astype(np.float64)  # a change belongs to the frame before it
        wide -= shift
        change = wide[1:] - wide[:-1]
        squared_changes += np.einsum("fm,fm->m", change, change)
        wide = wide[:FRAMES_PER_BLOCK]
        total += wide.sum(axis=0)
        squares += np.einsum("fm,fm->m", wide, wide)
    mean, mean_change = total / frames, (log_mel[-1] - shift) / (frames - 1)
    variances = squares / frames - mean**2, squared_changes / (frames - 1) - mean_change**2
    return np.concatenate([shift + mean, *(np.sqrt(variance.clip(0)) for variance in variances)])


def fit_baselines(
    train_x: Numbers, train_y: Numbers, *, groups: Sequence[str], test_x: Numbers, seed: int, threads: int, check_stop: CheckStop
) -> dict[str, Array]:
    """Predictions [m, 2] = (valence, arousal) for the test songs by "constant", "ridge", "svr" and "boosting".

    train_x: [n, k] features of the training songs; train_y: [n, 2] their labels; groups: [n] their groups (artists);
    test_x: [m, k]. The constant is the mean training label. Ridge and SVR choose their settings by grouped cross-validation
    on the training songs; those of boosting are fixed. Valence and arousal are fitted separately. seed: shuffles groups between
    folds, draws the features for a split of a tree, and the songs for SVR where there are many. threads: change no byte.
    check_stop: called before each baseline and while it is fitted (see `in_threads`); its exceptions pass through.
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
    some = _some_songs(len(train_x), seed)
    found["svr"] = support_vector_regression(
        train_x[some], train_y[some], _folds_of(some, folds), test_x, threads=threads, check_stop=check_stop
    )
    check_stop()
    found["boosting"] = gradient_boosting(train_x, train_y, test_x, seed, threads=threads, check_stop=check_stop)
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

    folds: every song is held out once. For each dimension the penalty is the one of a logarithmic grid with the smallest squared
    error over the folds. The products of features and labels are computed once, for the songs that each fold holds out.
    """
    train_x, test_x = _standardised(train_x, test_x)
    penalties = np.logspace(-1, 5, 13)
    errors = np.zeros((len(penalties), 2))
    held_out_products = [_products(train_x[held_out], train_y[held_out]) for _, held_out in folds]
    products = np.sum(held_out_products, axis=0)
    for (_, held_out), of_held_out in zip(folds, held_out_products, strict=True):
        candidates = _ridge_path(products - of_held_out, train_x[held_out], penalties)
        errors += ((candidates - train_y[held_out]) ** 2).sum(axis=1)
    candidates = _ridge_path(products, test_x, penalties)
    best = errors.argmin(axis=0)
    return np.column_stack([candidates[best[0], :, 0], candidates[best[1], :, 1]])


def _products(x: Array, y: Array) -> Array:
    """[k + 3, k + 3] sums of the products of any two columns of x [n, k], y [n, 2] and a column of ones."""
    joined = np.column_stack([x, y, np.ones(len(x))])
    return joined.T @ joined


def _ridge_path(products: Array, test_x: Array, penalties: Array) -> Array:
    """Predictions [penalties, m, 2] of ridge regression with an intercept, all from one eigendecomposition.

    products: of the training songs, see `_products`. Standardised features have means near 0, so that nothing cancels.
    """
    songs = products[-1, -1]
    means = products[-1, :-1] / songs
    centred = products[:-1, :-1] - songs * np.outer(means, means)
    values, vectors = np.linalg.eigh(centred[:-2, :-2])
    projected = vectors.T @ centred[:-2, -2:]
    rotated = (test_x - means[:-2]) @ vectors
    weights = projected / (values.clip(0) + penalties[:, None])[:, :, None]
    return np.asarray(rotated @ weights + means[-2:])


def _some_songs(songs: int, seed: int) -> Positions:
    """Positions of all songs, or of MOST_SVR_SONGS of them, in order."""
    drawn = np.random.Generator(np.random.PCG64(seed)).permutation(songs)[:MOST_SVR_SONGS]
    return np.sort(drawn)


def _folds_of(some: Positions, folds: Folds) -> Folds:
    """The folds of these songs alone, as positions among them; without those that hold out none of them."""
    found = [tuple(np.flatnonzero(np.isin(some, side)) for side in fold) for fold in folds]
    return [(fitting, held_out) for fitting, held_out in found if len(held_out)]


def support_vector_regression(
    train_x: Array, train_y: Array, folds: Folds, test_x: Array, *, threads: int, check_stop: CheckStop
) -> Array:
    """Predictions [m, 2] of a support vector machine with the kernel exp(-gamma |x - y|²) on standardised features.

    Shapes as in `fit_baselines`. For each dimension C and gamma are those of a small grid with the smallest squared error, the
    mean over the folds; epsilon is a third of the labels' deviation. Memory for several numbers for each pair of songs. Kernels
    are computed once for all fits of a gamma, and the fits run in threads: libsvm releases Python's lock.
    """
    from sklearn.metrics.pairwise import euclidean_distances
    from sklearn.svm import SVR

    train_x, test_x = _standardised(train_x, test_x)
    within = euclidean_distances(train_x, squared=True)
    epsilons = train_y.std(axis=0) / 3

    def machine(penalty: float, column: int) -> Any:
        return SVR(kernel="precomputed", C=penalty, epsilon=epsilons[column])

    def cases() -> Iterator[tuple[Array, tuple[Positions, Positions], int, float]]:
        for gamma in GAMMAS:
            kernel = np.exp(-gamma / train_x.shape[1] * within)
            for fold, column, penalty in product(folds, range(2), PENALTIES):
                yield kernel, fold, column, penalty

    def squared_error(case: tuple[Array, tuple[Positions, Positions], int, float]) -> float:
        kernel, (fitting, held_out), column, penalty = case
        fitted = machine(penalty, column).fit(kernel[np.ix_(fitting, fitting)], train_y[fitting, column])
        predicted = fitted.predict(kernel[np.ix_(held_out, fitting)])
        return float(((predicted - train_y[held_out, column]) ** 2).mean())

    errors = np.array(list(in_threads(squared_error, cases(), threads, check_stop)))
    means = errors.reshape(len(GAMMAS), len(folds), 2, len(PENALTIES)).mean(axis=1)
    across = euclidean_distances(test_x, train_x, squared=True)
    predicted = np.empty((len(test_x), 2))
    for column in range(2):
        best_gamma, best_penalty = np.unravel_index(means[:, column].argmin(), (len(GAMMAS), len(PENALTIES)))
        gamma = GAMMAS[best_gamma] / train_x.shape[1]
        fitted = machine(PENALTIES[best_penalty], column).fit(np.exp(-gamma * within), train_y[:, column])
        predicted[:, column] = fitted.predict(np.exp(-gamma * across))
    return predicted


def gradient_boosting(train_x: Array, train_y: Array, test_x: Array, seed: int, *, threads: int, check_stop: CheckStop) -> Array:
    """Predictions [m, 2] of 300 small regression trees, each fitted to the residuals of those before it.

    Shapes as in `fit_baselines`. A split chooses from a fifth of the features, as neighbouring mel bands are much alike. The
    settings are fixed: early stopping by grouped folds took six times as long and gave a lower concordance on DEAM. With fewer
    than ten songs the prediction is the mean label. Valence and arousal have a thread each: scikit-learn's own threads, which
    meet at every node of a tree, take longer than one for so few songs.

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


def _standardised(train_x: Array, test_x: Array) -> tuple[Array, Array]:
    """Both standardised by the training songs, then clipped to -3..3: one loud or silent song would tilt the whole plane."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train_x)
    train_x, test_x = scaler.transform(train_x), scaler.transform(test_x)
    return np.clip(train_x, -3, 3, out=train_x), np.clip(test_x, -3, 3, out=test_x)
