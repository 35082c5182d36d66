"""Regression on features of whole songs: ridge and a support vector machine, fitted by numpy and scikit-learn, kept as arrays.

A fitted regressor is numbers and a formula, so that it can be published without pickle and used without scikit-learn. The
prediction for a song does not depend on the other songs: the order of summation in a matrix product depends on its shape, so
`predict` sums song by song.

Each fit also returns predictions [n, 2] for its own songs. Each is made by a model that was not fitted to the song's fold. All
folds share one scaling and one choice of settings, which come from all songs.

scikit-learn is imported inside the functions, as its import takes seconds.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from emotion.errors import DataError
from emotion.threads import in_threads

Array = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]
Folds = list[tuple[Positions, Positions]]
CheckStop = Callable[[], None]

CLIP = 3.0  # standard deviations: one loud or silent song would tilt the whole plane
MOST_SVR_ROWS = 2000  # songs, or crops of them; a kernel has a number for each pair
GAMMAS, PENALTIES = (0.1, 0.3, 1.0), (0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Scaling:
    """mean, sd: [features] of the songs it was fitted to; sd is 1 where a feature is constant."""

    mean: Array
    sd: Array

    def apply(self, x: Array) -> Array:
        """x [songs, features] standardised, then clipped to -CLIP..CLIP."""
        return np.clip((x - self.mean) / self.sd, -CLIP, CLIP)


@dataclass(frozen=True)
class LinearRegressor:
    """weights: [features, 2] for standardised features; intercept: [2]."""

    scaling: Scaling
    weights: Array
    intercept: Array

    def predict(self, x: Array) -> Array:
        """x: [songs, features]. Returns [songs, 2] = (valence, arousal)."""
        return np.array([(row[:, None] * self.weights).sum(axis=0) + self.intercept for row in self.scaling.apply(x)])


@dataclass(frozen=True)
class KernelRegressor:
    """support: [n, features], standardised; weights: [n, 2]; intercept, gamma: [2], of the kernel exp(-gamma |x - y|²)."""

    scaling: Scaling
    support: Array
    weights: Array
    intercept: Array
    gamma: Array

    def predict(self, x: Array) -> Array:
        """x: [songs, features]. Returns [songs, 2] = (valence, arousal)."""
        predicted = []
        for row in self.scaling.apply(x):
            distances = ((self.support - row) ** 2).sum(axis=1)[:, None]
            predicted.append((np.exp(-self.gamma * distances) * self.weights).sum(axis=0) + self.intercept)
        return np.array(predicted)


def grouped_folds(groups: Sequence[str], seed: int) -> Folds:
    """(fitting, held-out) indices of five folds of about equal size, or one per group if there are fewer than five.

    groups: [songs]. No group is on both sides; the seed orders groups of equal size. Raises DataError for fewer than two.
    """
    from sklearn.model_selection import GroupKFold

    names, members = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    if len(names) < 2:
        raise DataError(
            f"cross-validation: choosing settings of a regression needs at least 2 groups among the training songs, found "
            f"{len(names)} in {len(groups)} songs. Use more groups, or split.grouped: false to split single songs."
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(names))
    splitter = GroupKFold(min(5, len(names)))
    return list(splitter.split(np.zeros(len(members)), groups=order[members]))


def squared_distances(a: Array, b: Array) -> Array:
    """[m, n] of the rows of a [m, k] and b [n, k]."""
    return np.asarray((a**2).sum(axis=1)[:, None] - 2 * a @ b.T + (b**2).sum(axis=1)).clip(0)


def fit_ridge(x: Array, y: Array, folds: Folds) -> tuple[LinearRegressor, Array]:
    """Ridge regression with an intercept on standardised features. x: [n, k] features; y: [n, 2] labels.

    folds: every song is held out once. For each dimension the penalty is the one of a logarithmic grid with the smallest squared
    error over the folds. The products of features and labels are computed once, for the songs that each fold holds out.
    """
    scaling = _scaling(x)
    x = scaling.apply(x)
    penalties = np.logspace(-1, 5, 13)
    held_out_products = [_products(x[held_out], y[held_out]) for _, held_out in folds]
    products = np.sum(held_out_products, axis=0)
    predicted = np.empty((len(penalties), len(x), 2))
    for (_, held_out), of_held_out in zip(folds, held_out_products, strict=True):
        weights, intercept = _ridge_path(products - of_held_out, penalties)
        predicted[:, held_out] = x[held_out] @ weights + intercept[:, None]
    best = ((predicted - y) ** 2).sum(axis=1).argmin(axis=0)
    weights, intercept = _ridge_path(products, penalties)

    def chosen(path: Array) -> Array:
        return np.stack([path[best[column], ..., column] for column in range(2)], axis=-1)

    return LinearRegressor(scaling, chosen(weights), chosen(intercept)), chosen(predicted)


def _products(x: Array, y: Array) -> Array:
    """[k + 3, k + 3] sums of the products of any two columns of x [n, k], y [n, 2] and a column of ones."""
    joined = np.column_stack([x, y, np.ones(len(x))])
    return joined.T @ joined


def _ridge_path(products: Array, penalties: Array) -> tuple[Array, Array]:
    """Weights [penalties, k, 2] and intercepts [penalties, 2], all from one eigendecomposition.

    products: of the songs, see `_products`. Standardised features have means near 0, so that nothing cancels.
    """
    songs = products[-1, -1]
    means = products[-1, :-1] / songs
    centred = products[:-1, :-1] - songs * np.outer(means, means)
    values, vectors = np.linalg.eigh(centred[:-2, :-2])
    projected = vectors.T @ centred[:-2, -2:]
    weights = vectors @ (projected / (values.clip(0) + penalties[:, None])[:, :, None])
    return weights, means[-2:] - means[:-2] @ weights


def fit_svr(x: Array, y: Array, folds: Folds, *, seed: int, threads: int, check_stop: CheckStop) -> tuple[KernelRegressor, Array]:
    """A support vector machine with the kernel exp(-gamma |x - y|²) on standardised features. x: [n, k]; y: [n, 2] labels.

    For each dimension C and gamma are those of a small grid with the smallest squared error over the folds; epsilon is a third
    of the labels' deviation. Memory for several numbers for each pair of rows; of more than MOST_SVR_ROWS so many are drawn, and
    the others have NaN as predictions.
    Kernels are computed once for all fits of a gamma, and the fits run in threads: libsvm releases the GIL.
    """
    drawn = np.random.Generator(np.random.PCG64(seed)).permutation(len(x))[:MOST_SVR_ROWS]
    some = np.sort(drawn)
    held_out = np.full(y.shape, np.nan)
    regressor, held_out[some] = _fit_svr(x[some], y[some], _folds_of(some, folds), threads=threads, check_stop=check_stop)
    return regressor, held_out


def _folds_of(some: Positions, folds: Folds) -> Folds:
    """The folds of these songs alone, as positions among them; without those that hold out none of them."""
    found = [tuple(np.flatnonzero(np.isin(some, side)) for side in fold) for fold in folds]
    return [(fitting, held_out) for fitting, held_out in found if len(held_out)]


def _fit_svr(x: Array, y: Array, folds: Folds, *, threads: int, check_stop: CheckStop) -> tuple[KernelRegressor, Array]:
    from sklearn.svm import SVR

    scaling = _scaling(x)
    x = scaling.apply(x)
    within = squared_distances(x, x)
    epsilons = y.std(axis=0) / 3
    predicted = np.empty((len(GAMMAS), len(PENALTIES), *y.shape))

    def machine(penalty: int, column: int) -> Any:
        return SVR(kernel="precomputed", C=PENALTIES[penalty], epsilon=epsilons[column])

    def cases() -> Iterator[tuple[int, Array, tuple[Positions, Positions], int, int]]:
        for number, gamma in enumerate(GAMMAS):
            kernel = np.exp(-gamma / x.shape[1] * within)
            for fold, column, penalty in product(folds, range(2), range(len(PENALTIES))):
                yield number, kernel, fold, column, penalty

    def predict(case: tuple[int, Array, tuple[Positions, Positions], int, int]) -> None:
        number, kernel, (fitting, held_out), column, penalty = case
        fitted = machine(penalty, column).fit(kernel[np.ix_(fitting, fitting)], y[fitting, column])
        predicted[number, penalty, held_out, column] = fitted.predict(kernel[np.ix_(held_out, fitting)])

    for _ in in_threads(predict, cases(), threads, check_stop):
        pass
    errors = ((predicted - y) ** 2).sum(axis=2)
    weights, intercept, gammas, chosen = np.zeros(y.shape), np.empty(2), np.empty(2), np.empty(y.shape)
    for column in range(2):
        number, penalty = np.unravel_index(errors[..., column].argmin(), errors.shape[:2])
        gammas[column] = GAMMAS[number] / x.shape[1]
        fitted = machine(int(penalty), column).fit(np.exp(-gammas[column] * within), y[:, column])
        weights[fitted.support_, column] = fitted.dual_coef_[0]
        intercept[column] = fitted.intercept_[0]
        chosen[:, column] = predicted[number, penalty, :, column]
    used = weights.any(axis=1)
    return KernelRegressor(scaling, x[used], weights[used], intercept, gammas), chosen


def _scaling(x: Array) -> Scaling:
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    return Scaling(np.asarray(scaler.mean_), np.asarray(scaler.scale_))
