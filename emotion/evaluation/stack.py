"""The stack: a blend of ridge, SVR and ViT, by shares that have to be earned on songs which none of them was fitted to.

Ridge and SVR see a song as one vector, of its log-mel's statistics and its tonality; the ViT sees its crops. Ridge is blended
with the SVR by predictions for the training and validation songs, each held out in turn; their blend with the ViT by predictions
for the validation songs. So the stack is as good as the better of them, as far as these songs can tell. No test song enters.

Sources: stacking, Wolpert 1992, Neural Networks 5:241-259; shares that sum to 1, Breiman 1996, Machine Learning 24:49-64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emotion.audio.feature_store import Features
from emotion.audio.partition import Partition
from emotion.audio.song_vectors import song_vectors
from emotion.data.leaks import identities, write_seen
from emotion.errors import DataError, Interrupted
from emotion.evaluation.conformal import half_widths, write_intervals
from emotion.evaluation.metrics import DIMENSIONS
from emotion.evaluation.regressors import (
    Array,
    CheckStop,
    Folds,
    KernelRegressor,
    LinearRegressor,
    Scaling,
    fit_ridge,
    fit_svr,
    grouped_folds,
)
from emotion.files import make_folder, read_json, write_json

EQUAL, NONE = 0.5, 0.0  # shares


@dataclass(frozen=True)
class Stack:
    """svr_share: [2], of the SVR beside ridge; model_share: [2], of the ViT beside their blend. Per dimension, from 0 to 1."""

    ridge: LinearRegressor
    svr: KernelRegressor
    svr_share: Array
    model_share: Array

    def baselines(self, vectors: Array) -> dict[str, Array]:
        """Predictions [songs, 2] of "ridge" and "svr". vectors: [songs, numbers], see `song_vector`."""
        return {"ridge": self.ridge.predict(vectors), "svr": self.svr.predict(vectors)}

    def predict(self, vectors: Array, model: Array) -> Array:
        """[songs, 2] valence and arousal in [-1, 1]. model: [songs, 2], the predictions of the ViT."""
        found = self.baselines(vectors)
        return blended(blended(found["ridge"], found["svr"], self.svr_share), model, self.model_share).clip(-1, 1)


def blended(first: Array, second: Array, share: Array) -> Array:
    """first, second: [songs, 2]; share: [2], of the second."""
    return first + share * (second - first)


def fit_share(first: Array, second: Array, actual: Array, *, groups: Sequence[str], prior: float) -> float:
    """The share of `second`, from 0 to 1, in a blend with the smallest squared error. All three: [songs], of one dimension.

    The share is shrunk towards `prior` by how uncertain it is: of its distance d from the prior, 1 - (2 e / d)² remains, and
    nothing within two standard errors e of it, by a jackknife over groups. With few groups a jackknife is too sure, hence two.
    With fewer than three groups, or predictors that agree everywhere, the share is the prior.
    """
    names, members = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    difference = second - first
    products = np.bincount(members, difference * (actual - first), len(names))
    squares = np.bincount(members, difference**2, len(names))
    without_products, without_squares = products.sum() - products, squares.sum() - squares
    if len(names) < 3 or not (without_squares > 0).all():
        return prior
    share = products.sum() / squares.sum()
    without = without_products / without_squares
    variance = (len(names) - 1) / len(names) * ((without - without.mean()) ** 2).sum()
    distance = share - prior
    kept = max(0.0, 1 - 4 * variance / distance**2) if distance else 0.0
    return float(min(max(prior + kept * distance, 0.0), 1.0))


def fit_shares(
    first: Array, second: Array, actual: Array, *, songs: npt.NDArray[np.bool_], groups: Sequence[str], prior: float
) -> Array:
    """`fit_share` of both dimensions, [2], by the chosen songs. songs: [n], which of them; the others: [n, 2], groups: [n]."""
    chosen = [group for group, is_chosen in zip(groups, songs, strict=True) if is_chosen]
    columns = [[array[songs, column] for array in (first, second, actual)] for column in range(2)]
    return np.array([fit_share(*arrays, groups=chosen, prior=prior) for arrays in columns])


def held_out_blend(
    first: Array, second: Array, actual: Array, *, songs: npt.NDArray[np.bool_], groups: Sequence[str], folds: Folds, prior: float
) -> Array:
    """[n, 2]: `blended` for every song, by shares that were fitted without its fold; else as `fit_shares`."""
    found = np.empty_like(first)
    for _, held_out in folds:
        others = songs.copy()
        others[held_out] = False
        share = fit_shares(first, second, actual, songs=others, groups=groups, prior=prior)
        found[held_out] = blended(first[held_out], second[held_out], share)
    return found


def fit_stack(
    partition: Partition,
    *,
    predict: Callable[[Sequence[npt.NDArray[np.float16]], CheckStop], npt.NDArray[np.floating[Any]]],
    seed: int,
    threads: int,
    out: Path,
    should_stop: Callable[[], bool],
) -> None:
    """Write `stack/` into `out`: the fitted regressors, the shares, the widths of intervals, and the songs seen.

    predict: the trained ViT; songs, [frames, mels] in dB each, and what is called before each forward pass → [songs, 2].
    seed: orders the folds, and draws the songs for the SVR where there are many. threads: change no byte.
    Raises DataError for NaN, infinity, or a single group of songs, Interrupted when asked to stop.
    """

    def check_stop() -> None:
        if should_stop():
            raise Interrupted("stack: stopped")

    training, validation = partition.training, partition.validation
    groups = [*partition.training_groups, *partition.validation_groups]
    labels = labels_of(training, validation)
    vectors = np.concatenate([song_vectors(songs, threads, check_stop) for songs in (training, validation)])
    folds = grouped_folds(groups, seed)
    check_stop()
    ridge, ridge_held_out = fit_ridge(vectors, labels, folds)
    check_stop()
    svr, svr_held_out = fit_svr(vectors, labels, folds, seed=seed, threads=threads, check_stop=check_stop)
    known, of_validation = np.isfinite(svr_held_out[:, 0]), np.arange(len(labels)) >= len(training.songs)
    model = np.full(labels.shape, np.nan)
    model[of_validation] = predict([validation.stored(index) for index in range(len(validation.songs))], check_stop)

    # Neither of ridge and SVR is known to be better, so they are peers. The ViT has few songs for this, and was chosen by them.
    svr_share = fit_shares(ridge_held_out, svr_held_out, labels, songs=known, groups=groups, prior=EQUAL)
    classical = blended(ridge_held_out, svr_held_out, svr_share)
    model_share = fit_shares(classical, model, labels, songs=known & of_validation, groups=groups, prior=NONE)
    write_stack(Stack(ridge, svr, svr_share, model_share), out / "stack")

    # For the intervals each song is predicted by regressors and shares that were fitted without its fold. The ViT predicts only
    # validation songs so; where it has no share, the training songs count, too.
    classical = held_out_blend(ridge_held_out, svr_held_out, labels, songs=known, groups=groups, folds=folds, prior=EQUAL)
    chosen = known & of_validation
    both = held_out_blend(classical, model, labels, songs=chosen, groups=groups, folds=folds, prior=NONE)
    stacked = np.where(model_share > 0, both, classical).clip(-1, 1)
    write_intervals({"stack": half_widths(stacked, labels), "model": half_widths(model, labels)}, out / "stack")
    write_seen(out / "stack", identities([*training.songs, *validation.songs]))


def labels_of(*features: Features) -> Array:
    """[songs, 2] in float64, of all features one after the other."""
    return np.concatenate([songs.labels for songs in features]).astype(np.float64)


def write_stack(stack: Stack, folder: Path) -> None:
    """Write `stack.safetensors`, the arrays of the regressors, and `stack.json`, the shares."""
    from safetensors.numpy import save_file

    make_folder(folder)
    arrays = {
        "ridge.mean": stack.ridge.scaling.mean,
        "ridge.sd": stack.ridge.scaling.sd,
        "ridge.weights": stack.ridge.weights,
        "ridge.intercept": stack.ridge.intercept,
        "svr.mean": stack.svr.scaling.mean,
        "svr.sd": stack.svr.scaling.sd,
        "svr.support": stack.svr.support,
        "svr.weights": stack.svr.weights,
        "svr.intercept": stack.svr.intercept,
        "svr.gamma": stack.svr.gamma,
    }
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "stack.safetensors")
    shares = {}
    for column, dimension in enumerate(DIMENSIONS):
        svr, model = float(stack.svr_share[column]), float(stack.model_share[column])
        shares[dimension] = {"svr_beside_ridge": svr, "model_beside_both": model}
    write_json(folder / "stack.json", shares)


def read_stack(folder: Path) -> Stack:
    """The stack in `folder`, as `write_stack` writes it. Raises DataError where it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found = load_file(folder / "stack.safetensors")
        shares = read_json(folder / "stack.json")
        return Stack(
            LinearRegressor(Scaling(found["ridge.mean"], found["ridge.sd"]), found["ridge.weights"], found["ridge.intercept"]),
            KernelRegressor(
                Scaling(found["svr.mean"], found["svr.sd"]),
                found["svr.support"],
                found["svr.weights"],
                found["svr.intercept"],
                found["svr.gamma"],
            ),
            np.array([shares[dimension]["svr_beside_ridge"] for dimension in DIMENSIONS]),
            np.array([shares[dimension]["model_beside_both"] for dimension in DIMENSIONS]),
        )
    except (SafetensorError, FileNotFoundError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder}: expected a stack ({type(error).__name__}: {error}). Copy the published run again.") from error
