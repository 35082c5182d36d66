"""The stack: a blend of ridge, SVR, boosted trees and ViT, by shares earned on songs which none of them was fitted to.

Ridge, SVR and trees see a song as one vector, of its log-mel's statistics, its tonality and, where the ViT began with pretrained
weights, its embedding by these weights; the ViT sees its crops. The three are blended by predictions for the training and
validation songs, each held out in turn; their blend with the ViT by predictions for the validation songs. So the stack is as good
as the best of them, as far as these songs can tell. No test song enters.

Sources: stacking, Wolpert 1992, Neural Networks 5:241-259; shares that sum to 1, Breiman 1996, Machine Learning 24:49-64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from emotion.audio.feature_store import Features
from emotion.audio.partition import Partition
from emotion.audio.song_vectors import song_vectors
from emotion.data.leaks import identities, write_seen
from emotion.errors import DataError, Interrupted
from emotion.evaluation.boosting import BoostedTrees, fit_boosting
from emotion.evaluation.conformal import half_widths, write_intervals
from emotion.evaluation.metrics import DIMENSIONS, jackknife_variance
from emotion.evaluation.regressors import (
    Array,
    CheckStop,
    Folds,
    KernelRegressor,
    LinearRegressor,
    fit_ridge,
    fit_svr,
    grouped_folds,
)
from emotion.files import make_folder, read_json, write_json

Embed = Callable[[Sequence[npt.NDArray[np.float16]], CheckStop], npt.NDArray[np.floating[Any]]]
"""Songs, [frames, mels] in dB each, and what is called before each forward pass → [songs, numbers]: emotion/vit/embedder.py."""


@dataclass(frozen=True)
class Prior:
    """share: of a predictor, from 0 to 1, unless songs show another; confidence: with which they have to show it."""

    share: float
    confidence: float = 0.95


ONE_OF_TWO, ONE_OF_THREE = Prior(1 / 2), Prior(1 / 3)  # no peer is known to be better
# The ViT is tried in each dimension of each fold, by few songs, which have chosen its epoch, too.
NONE = Prior(0.0, confidence=0.99)


@dataclass(frozen=True)
class Stack:
    """Shares: [2], per dimension, from 0 to 1: of the SVR beside ridge, of the trees beside both, of the ViT beside all three."""

    ridge: LinearRegressor
    svr: KernelRegressor
    boosting: BoostedTrees
    svr_share: Array
    boosting_share: Array
    model_share: Array

    def baselines(self, vectors: Array) -> dict[str, Array]:
        """Predictions [songs, 2] of "ridge", "svr" and "boosting". vectors: [songs, numbers], see `stack_vectors`. Raises
        DataError as `require_numbers`."""
        self.require_numbers(vectors.shape[1])
        return {
            "ridge": self.ridge.predict(vectors),
            "svr": self.svr.predict(vectors),
            "boosting": self.boosting.predict(vectors),
        }

    def require_numbers(self, found: int) -> None:
        """Raise DataError unless the stack was fitted to vectors of so many numbers."""
        expected = len(self.ridge.scaling.mean)
        if found != expected:
            raise DataError(
                f"stack: it was fitted to {expected} numbers for a song, found {found}. The model beside it is that of another "
                "run, or lacks embedder.safetensors. Copy the published run again."
            )

    def predict(self, vectors: Array, model: Array) -> Array:
        """[songs, 2] valence and arousal in [-1, 1]. model: [songs, 2], the predictions of the ViT."""
        found = self.baselines(vectors)
        classical = blended(blended(found["ridge"], found["svr"], self.svr_share), found["boosting"], self.boosting_share)
        return blended(classical, model, self.model_share).clip(-1, 1)


def blended(first: Array, second: Array, share: Array) -> Array:
    """first, second: [songs, 2]; share: [2], of the second."""
    return first + share * (second - first)


def fit_share(first: Array, second: Array, actual: Array, *, groups: Sequence[str], prior: Prior) -> float:
    """The share of `second`, from 0 to 1, in a blend with the smallest squared error. All three: [songs], of one dimension.

    The share is shrunk towards `prior` by how uncertain it is: of its distance d from the prior, 1 - (t e / d)² remains, and
    nothing where the prior is in the confidence interval: e is the standard error, by a jackknife over groups, and t the quantile
    of Student's distribution with one degree of freedom fewer than groups (at 95 % 4.3 for three groups, 2.3 for ten, 2.0 for
    many). With fewer than three groups, or predictors that agree everywhere, the share is the prior.
    """
    names, members = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    difference = second - first
    products = np.bincount(members, difference * (actual - first), len(names))
    squares = np.bincount(members, difference**2, len(names))
    without_products, without_squares = products.sum() - products, squares.sum() - squares
    if len(names) < 3 or not (without_squares > 0).all():
        return prior.share
    share = products.sum() / squares.sum()
    without = without_products / without_squares
    distance = share - prior.share
    t = stdtrit(len(names) - 1, (1 + prior.confidence) / 2)
    kept = max(0.0, 1 - t**2 * jackknife_variance(without) / distance**2) if distance else 0.0
    return float(min(max(prior.share + kept * distance, 0.0), 1.0))


def fit_shares(
    first: Array, second: Array, actual: Array, *, songs: npt.NDArray[np.bool_], groups: Sequence[str], prior: Prior
) -> Array:
    """`fit_share` of both dimensions, [2], by the chosen songs. songs: [n], which of them; the others: [n, 2], groups: [n]."""
    chosen = [group for group, is_chosen in zip(groups, songs, strict=True) if is_chosen]
    columns = [[array[songs, column] for array in (first, second, actual)] for column in range(2)]
    return np.array([fit_share(*arrays, groups=chosen, prior=prior) for arrays in columns])


def fit_all_shares(
    held_out: Mapping[str, Array],
    labels: Array,
    *,
    songs: npt.NDArray[np.bool_],
    songs_of_model: npt.NDArray[np.bool_],
    groups: Sequence[str],
) -> tuple[Array, Array, Array]:
    """The three shares of a Stack, in its order, [2] each.

    held_out: "ridge", "svr", "boosting" and "model" → [n, 2], predictions that were not fitted to the song; labels: [n, 2];
    groups: [n]. songs, songs_of_model: [n], of which the three, and the ViT with them, have such predictions.
    """
    svr = fit_shares(held_out["ridge"], held_out["svr"], labels, songs=songs, groups=groups, prior=ONE_OF_TWO)
    both = blended(held_out["ridge"], held_out["svr"], svr)
    boosting = fit_shares(both, held_out["boosting"], labels, songs=songs, groups=groups, prior=ONE_OF_THREE)
    classical = blended(both, held_out["boosting"], boosting)
    model = fit_shares(classical, held_out["model"], labels, songs=songs_of_model, groups=groups, prior=NONE)
    return svr, boosting, model


def held_out_blend(
    first: Array, second: Array, *, labels: Array, songs: npt.NDArray[np.bool_], groups: Sequence[str], folds: Folds, prior: Prior
) -> Array:
    """[n, 2]: `blended` for every song, by shares that were fitted without its fold; else as `fit_shares`."""
    found = np.empty_like(first)
    for _, held_out in folds:
        others = songs.copy()
        others[held_out] = False
        share = fit_shares(first, second, labels, songs=others, groups=groups, prior=prior)
        found[held_out] = blended(first[held_out], second[held_out], share)
    return found


def stack_vectors(songs: Features, embed: Embed | None, *, threads: int, check_stop: CheckStop) -> Array:
    """[songs, numbers]: `song_vector` of each song and, with `embed`, its embedding. threads: change no byte."""
    vectors = song_vectors(songs, threads, check_stop)
    if embed is None:
        return vectors
    return np.concatenate([vectors, embed([songs.stored(index) for index in range(len(songs.songs))], check_stop)], axis=1)


def fit_stack(
    partition: Partition,
    *,
    predict: Callable[[Sequence[npt.NDArray[np.float16]], CheckStop], npt.NDArray[np.floating[Any]]],
    embed: Embed | None,
    seed: int,
    threads: int,
    out: Path,
    should_stop: Callable[[], bool],
) -> None:
    """Write `stack/` into `out`: the fitted regressors, the shares, the widths of intervals, and the songs seen.

    predict: the trained ViT; songs, [frames, mels] in dB each, and what is called before each forward pass → [songs, 2].
    embed: the pretrained one, if there is one.
    seed: orders the folds, and draws the songs for the SVR where there are many. threads: change no byte.
    Raises DataError for NaN, infinity, or a single group of songs, Interrupted when asked to stop.
    """

    def check_stop() -> None:
        if should_stop():
            raise Interrupted("stack: stopped")

    training, validation = partition.training, partition.validation
    groups = [*partition.training_groups, *partition.validation_groups]
    labels = labels_of(training, validation)
    found = [stack_vectors(songs, embed, threads=threads, check_stop=check_stop) for songs in (training, validation)]
    vectors = np.concatenate(found)
    folds = grouped_folds(groups, seed)
    check_stop()
    ridge, ridge_held_out = fit_ridge(vectors, labels, folds)
    check_stop()
    svr, svr_held_out = fit_svr(vectors, labels, folds, seed=seed, threads=threads, check_stop=check_stop)
    boosting, boosting_held_out = fit_boosting(vectors, labels, folds, seed=seed, threads=threads, check_stop=check_stop)
    known, of_validation = np.isfinite(svr_held_out[:, 0]), np.arange(len(labels)) >= len(training.songs)
    model = np.full(labels.shape, np.nan)
    model[of_validation] = predict([validation.stored(index) for index in range(len(validation.songs))], check_stop)

    held_out = {"ridge": ridge_held_out, "svr": svr_held_out, "boosting": boosting_held_out, "model": model}
    shares = fit_all_shares(held_out, labels, songs=known, songs_of_model=known & of_validation, groups=groups)
    stack = Stack(ridge, svr, boosting, *shares)
    write_stack(stack, out / "stack")

    # For the intervals each song is predicted by regressors and shares that were fitted without its fold. The ViT predicts only
    # validation songs so; where it has no share, the training songs count, too.
    blend = partial(held_out_blend, labels=labels, groups=groups, folds=folds)
    both = blend(ridge_held_out, svr_held_out, songs=known, prior=ONE_OF_TWO)
    classical = blend(both, boosting_held_out, songs=known, prior=ONE_OF_THREE)
    stacked = blend(classical, model, songs=known & of_validation, prior=NONE)
    stacked = np.where(stack.model_share > 0, stacked, classical).clip(-1, 1)
    write_intervals({"stack": half_widths(stacked, labels), "model": half_widths(model, labels)}, out / "stack")
    write_seen(out / "stack", identities([*training.songs, *validation.songs]))


def labels_of(*features: Features) -> Array:
    """[songs, 2] in float64, of all features one after the other."""
    return np.concatenate([songs.labels for songs in features]).astype(np.float64)


def write_stack(stack: Stack, folder: Path) -> None:
    """Write `stack.safetensors`, the arrays of the fitted regressors, and `stack.json`, the shares."""
    from safetensors.numpy import save_file

    make_folder(folder)
    arrays = {**_arrays("ridge", stack.ridge), **_arrays("svr", stack.svr), **_arrays("boosting", stack.boosting)}
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "stack.safetensors")
    shares = np.column_stack([stack.svr_share, stack.boosting_share, stack.model_share]).tolist()
    names = ("svr_beside_ridge", "boosting_beside_both", "model_beside_all")
    write_json(
        folder / "stack.json",
        {dimension: dict(zip(names, row, strict=True)) for dimension, row in zip(DIMENSIONS, shares, strict=True)},
    )


def _arrays(name: str, regressor: Any) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a dataclass and of those in it, by the names of the fields with dots between."""
    if not is_dataclass(regressor):
        return {name: np.asarray(regressor)}
    found: dict[str, npt.NDArray[Any]] = {}
    for field in fields(regressor):
        found.update(_arrays(f"{name}.{field.name}", getattr(regressor, field.name)))
    return found


def read_stack(folder: Path) -> Stack:
    """The stack in `folder`, as `write_stack` writes it. Raises DataError where it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(folder / "stack.safetensors")
        shares = read_json(folder / "stack.json")

        def share(name: str) -> Array:
            return np.array([float(shares[dimension][name]) for dimension in DIMENSIONS])

        return Stack(
            _from_arrays(LinearRegressor, "ridge", arrays),
            _from_arrays(KernelRegressor, "svr", arrays),
            _from_arrays(BoostedTrees, "boosting", arrays),
            share("svr_beside_ridge"),
            share("boosting_beside_both"),
            share("model_beside_all"),
        )
    except (SafetensorError, FileNotFoundError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder}: expected a stack ({type(error).__name__}: {error}). Copy the published run again.") from error


def _from_arrays(kind: Any, name: str, arrays: dict[str, npt.NDArray[Any]]) -> Any:
    """The dataclass of which `_arrays` made `arrays`. Raises KeyError if one is missing."""
    if not is_dataclass(kind):
        return arrays[name]
    assert isinstance(kind, type)
    return kind(**{field.name: _from_arrays(field.type, f"{name}.{field.name}", arrays) for field in fields(kind)})
