"""The stack: a blend of ridge, SVR, boosted trees and ViT, fitted to out-of-fold predictions.

Ridge, SVR and trees see a song as one vector, of its log-mel's statistics, its tonality and, where the ViT began with pretrained
weights, its embedding by these weights; the ViT sees its crops. The three are blended by predictions for the training and
validation songs, each held out in turn; their blend with the ViT by predictions for the validation songs. So the stack is as good
as the best of them, as far as these songs can tell. No test song enters.

The mean of several predictors varies less than each of them, where their errors differ: if each is calibrated, the mean is not,
but underconfident, which costs CCC. So the blend of the three is stretched about its mean.

Sources: stacking, Wolpert 1992, Neural Networks 5:241-259; shares that sum to 1, Breiman 1996, Machine Learning 24:49-64; means
of calibrated predictors, Ranjan and Gneiting 2010, Journal of the Royal Statistical Society B 72:71-91.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from itertools import compress
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
    """value: of a share or slope unless songs show another; confidence: with which they have to show it."""

    value: float
    confidence: float = 0.95


ONE_OF_TWO, ONE_OF_THREE = Prior(1 / 2), Prior(1 / 3)  # no peer is known to be better
# The ViT's share rests on few songs, which have also chosen its epoch. So a larger confidence is required.
NONE = Prior(0.0, confidence=0.99)
NAMES_IN_JSON = {  # field of Blend → its name in stack.json
    "svr_share": "svr_beside_ridge",
    "boosting_share": "boosting_beside_both",
    "centre": "centre",
    "slope": "slope",
    "model_share": "model_beside_all",
}


@dataclass(frozen=True)
class Blend:
    """How the four predictions become one. All [2], per dimension.

    svr_share, boosting_share, model_share: from 0 to 1, of the SVR beside ridge, of the trees beside both, of the ViT beside all
    three. slope: factor of the deviation of the blend of the three from `centre`, the mean of that blend over songs.
    """

    svr_share: Array
    boosting_share: Array
    centre: Array
    slope: Array
    model_share: Array

    def classical(self, found: Mapping[str, Array]) -> Array:
        """[songs, 2], the blend of the three. found: "ridge", "svr" and "boosting" → [songs, 2]."""
        both = blended(found["ridge"], found["svr"], self.svr_share)
        return blended(self.centre, blended(both, found["boosting"], self.boosting_share), self.slope)


@dataclass(frozen=True)
class Stack:
    """The fitted members but the ViT, and their blend."""

    ridge: LinearRegressor
    svr: KernelRegressor
    boosting: BoostedTrees
    blend: Blend

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
        return blended(self.blend.classical(self.baselines(vectors)), model, self.blend.model_share).clip(-1, 1)


def blended(first: Array, second: Array, share: Array | float) -> Array:
    """[songs, 2]. first: [songs, 2] or [2]; second: [songs, 2]; share: [2], of the second. Or all of one dimension."""
    return first + share * (second - first)


def fit_factor(first: Array, second: Array, actual: Array, *, groups: Sequence[str], prior: Prior) -> float:
    """The factor f for which first + f (second - first) has the smallest squared error. All three: [songs], of one dimension.

    It is shrunk towards `prior` by how uncertain it is: of its distance d from the prior, 1 - (t e / d)² remains, and
    nothing where the prior is in the confidence interval: e is the standard error, by a jackknife over groups, and t the quantile
    of Student's distribution with one degree of freedom fewer than groups (at 95 % 4.3 for three groups, 2.3 for ten, 2.0 for
    many). With fewer than three groups, or predictors that agree everywhere, it is the prior.
    """
    names, members = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    difference = second - first
    products = np.bincount(members, difference * (actual - first), len(names))
    squares = np.bincount(members, difference**2, len(names))
    without_products, without_squares = products.sum() - products, squares.sum() - squares
    if len(names) < 3 or not (without_squares > 0).all():
        return prior.value
    factor = products.sum() / squares.sum()
    without = without_products / without_squares
    distance = factor - prior.value
    t = stdtrit(len(names) - 1, (1 + prior.confidence) / 2)
    kept = max(0.0, 1 - t**2 * jackknife_variance(without) / distance**2) if distance else 0.0
    return float(prior.value + kept * distance)


def fit_share(first: Array, second: Array, actual: Array, *, groups: Sequence[str], prior: Prior) -> float:
    """The share of `second`, from 0 to 1, in a blend of both: see `fit_factor`."""
    return min(max(fit_factor(first, second, actual, groups=groups, prior=prior), 0.0), 1.0)


def fit_slope(members: Array, shares: Array, actual: Array, *, groups: Sequence[str]) -> float:
    """The slope, 0 or more, of `actual` on the blend of calibrated predictors. members: [3, songs]; shares: [3], of sum 1.

    The labels have the same covariance with a calibrated predictor as the variance of that predictor. So their slope on the blend
    is the mean variance of the members over the variance of the blend, which needs no labels. That is the prior, unless with it
    the blend varied more than the labels. The labels change it where they contradict, as with members that have learned nothing.
    """
    blend = shares @ members
    if np.ptp(blend) == 0:
        return 1.0
    calibrated = shares @ members.var(axis=1) / blend.var()
    prior = Prior(min(calibrated, max(1.0, actual.std() / blend.std())))
    return max(fit_factor(np.full_like(blend, blend.mean()), blend, actual, groups=groups, prior=prior), 0.0)


def fit_blend(
    held_out: Mapping[str, Array],
    labels: Array,
    *,
    songs: npt.NDArray[np.bool_],
    songs_of_model: npt.NDArray[np.bool_],
    groups: Sequence[str],
) -> Blend:
    """Fit all numbers of a blend, of one dimension after the other.

    held_out: "ridge", "svr", "boosting" and "model" → [n, 2], predictions that were not fitted to the song; labels: [n, 2];
    groups: [n]. songs, songs_of_model: [n], of which the three, and the ViT with them, have such predictions.
    """
    of_songs = list(compress(groups, songs))
    columns = []
    for column in range(2):
        ridge, svr, boosting = (held_out[name][songs, column] for name in ("ridge", "svr", "boosting"))
        fit_to_songs = partial(fit_share, actual=labels[songs, column], groups=of_songs)
        svr_share = fit_to_songs(ridge, svr, prior=ONE_OF_TWO)
        both = blended(ridge, svr, svr_share)
        boosting_share = fit_to_songs(both, boosting, prior=ONE_OF_THREE)
        shares = np.array([(1 - svr_share) * (1 - boosting_share), svr_share * (1 - boosting_share), boosting_share])
        members = np.stack([ridge, svr, boosting])
        slope = fit_slope(members, shares, labels[songs, column], groups=of_songs)
        columns.append([svr_share, boosting_share, (shares @ members).mean(), slope, 0.0])
    blend = Blend(*np.array(columns).T)
    of_model = list(compress(groups, songs_of_model))
    classical, model, actual = (values[songs_of_model].T for values in (blend.classical(held_out), held_out["model"], labels))
    model_share = [fit_share(*arrays, groups=of_model, prior=NONE) for arrays in zip(classical, model, actual, strict=True)]
    return replace(blend, model_share=np.array(model_share))


def held_out_blends(
    held_out: Mapping[str, Array],
    labels: Array,
    *,
    songs: npt.NDArray[np.bool_],
    songs_of_model: npt.NDArray[np.bool_],
    groups: Sequence[str],
    folds: Folds,
) -> tuple[Array, Array]:
    """[n, 2] each: for every song the blend without and with the ViT, by a `fit_blend` to the songs of other folds."""
    classical, stacked = np.empty_like(labels), np.empty_like(labels)
    for _, fold in folds:
        others = np.ones(len(labels), bool)
        others[fold] = False
        blend = fit_blend(held_out, labels, songs=songs & others, songs_of_model=songs_of_model & others, groups=groups)
        classical[fold] = blend.classical({name: values[fold] for name, values in held_out.items()})
        stacked[fold] = blended(classical[fold], held_out["model"][fold], blend.model_share)
    return classical, stacked


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
    """Write `stack/` into `out`: the fitted regressors, their blend, the widths of intervals, and the songs seen.

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
    of_model = known & of_validation
    blend = fit_blend(held_out, labels, songs=known, songs_of_model=of_model, groups=groups)
    write_stack(Stack(ridge, svr, boosting, blend), out / "stack")

    # For the intervals each song is predicted by regressors and shares that were fitted without its fold. But their scaling,
    # ridge's penalties, the SVR's C, gamma and epsilon, and whether the ViT has a share come from all songs. The ViT was not
    # fitted to validation songs, which have chosen its epoch. Where it has no share, the errors of training songs count, too.
    classical, stacked = held_out_blends(held_out, labels, songs=known, songs_of_model=of_model, groups=groups, folds=folds)
    stacked = np.where(blend.model_share > 0, stacked, classical).clip(-1, 1)
    write_intervals({"stack": half_widths(stacked, labels), "model": half_widths(model, labels)}, out / "stack")
    write_seen(out / "stack", identities([*training.songs, *validation.songs]))


def labels_of(*features: Features) -> Array:
    """[songs, 2] in float64, of all features one after the other."""
    return np.concatenate([songs.labels for songs in features]).astype(np.float64)


def write_stack(stack: Stack, folder: Path) -> None:
    """Write `stack.safetensors`, the arrays of the fitted regressors, and `stack.json`, the blend."""
    from safetensors.numpy import save_file

    make_folder(folder)
    arrays = {**_arrays("ridge", stack.ridge), **_arrays("svr", stack.svr), **_arrays("boosting", stack.boosting)}
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "stack.safetensors")
    columns = {name: getattr(stack.blend, field) for field, name in NAMES_IN_JSON.items()}
    write_json(
        folder / "stack.json",
        {
            dimension: {name: float(values[column]) for name, values in columns.items()}
            for column, dimension in enumerate(DIMENSIONS)
        },
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
        found = read_json(folder / "stack.json")
        rows = [found[dimension] for dimension in DIMENSIONS]
        if not any("centre" in row or "slope" in row for row in rows):  # of an earlier version
            rows = [{**row, "centre": 0, "slope": 1} for row in rows]
        if not all(math.isfinite(row[name]) for row in rows for name in NAMES_IN_JSON.values()):
            raise ValueError("stack.json: expected finite numbers")
        return Stack(
            _from_arrays(LinearRegressor, "ridge", arrays),
            _from_arrays(KernelRegressor, "svr", arrays),
            _from_arrays(BoostedTrees, "boosting", arrays),
            Blend(**{field: np.array([float(row[name]) for row in rows]) for field, name in NAMES_IN_JSON.items()}),
        )
    except (SafetensorError, FileNotFoundError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{folder}: expected a stack ({type(error).__name__}: {error}). Copy the published run again.") from error


def _from_arrays(kind: Any, name: str, arrays: dict[str, npt.NDArray[Any]]) -> Any:
    """The dataclass of which `_arrays` made `arrays`. Raises KeyError if one is missing."""
    if not is_dataclass(kind):
        return arrays[name]
    assert isinstance(kind, type)
    return kind(**{field.name: _from_arrays(field.type, f"{name}.{field.name}", arrays) for field in fields(kind)})
