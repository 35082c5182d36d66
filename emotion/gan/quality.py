"""How good synthetic clips are, each number beside what it is measured against.

Distances are taken in a space of few dimensions: principal components of pooled log-mel statistics, fitted on training songs.
The reference is validation songs, which the GAN never saw; the same distance from training to validation songs is the anchor:
what real music reaches. Test songs take no part.

Whatever has an interval is measured on one clip of each song, as clips of one song are not independent.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

from emotion.audio.clips import Normalisation, normalisation_of
from emotion.audio.decoding import Array
from emotion.audio.feature_store import Features
from emotion.config import QualityConfig
from emotion.data.leaks import identities, read_seen, refuse_leak
from emotion.errors import Interrupted
from emotion.evaluation.baselines import grouped_folds, pooled_statistics, ridge
from emotion.evaluation.metrics import scores
from emotion.evaluation.plots import labels_on_the_plane, real_above_synthetic, save_figure
from emotion.files import write_json
from emotion.gan.distances import (
    frechet_distance,
    jackknife,
    notebook_score,
    spectrum_and_roughness,
    squared_mmd,
    wilson_interval,
)
from emotion.training import health
from emotion.training.progress import Progress
from emotion.training.seeding import generator

SYNTHETIC_AT_MOST = 1000
CROPS_AT_MOST = 16
BOOTSTRAP_SAMPLES = 500
FEWEST = 4
"""Clips of each kind without which nothing is compared."""
LEAST_DEVIATION_DB = 0.1
"""A statistic that varies less from clip to clip counts less: noise is not blown up."""
COPY_COMPONENTS = 48
COPY_FACTOR = 0.75
CLIPS_AT_A_TIME = 256
CLIPS_SHOWN = 4

Numbers = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]


def measure_quality(
    training: Features,
    validation: Features,
    units: Sequence[str],
    synthetic: Features,
    config: QualityConfig,
    seed: int,
    out: Path,
    should_stop: Callable[[], bool],
) -> None:
    """Write `quality.json`; `units` [training songs] is what cross-validation of the read-back must not divide.

    What so few songs cannot tell is null there, and `not_measured` says why.
    Raises ModelError where what made the clips, or the training songs, have seen a validation song; Interrupted when asked to
    stop; entering again begins anew, as this takes seconds.
    """
    seen = identities(training.songs) | read_seen(synthetic.folder)
    refuse_leak("what is measured", seen, validation.songs)

    def go_on() -> None:
        if should_stop():
            raise Interrupted("quality: stopped")

    frames = synthetic.songs[0].frames
    synthetic = synthetic.only(range(min(len(synthetic.songs), SYNTHETIC_AT_MOST)))
    crops_x, owners = _crops(training, frames, go_on)
    train_x, _ = _clip_of_each(training, frames, seed, go_on)
    held_x, held_songs = _clip_of_each(validation, frames, seed, go_on)
    made_x, made_songs = _clip_of_each(synthetic, frames, seed, go_on)
    deviation_db = np.maximum(crops_x.std(axis=0), LEAST_DEVIATION_DB)
    crops_x, train_x, held_x, made_x = (x / deviation_db for x in (crops_x, train_x, held_x, made_x))
    equal = min(len(train_x), len(made_x))  # clips of either: the Fréchet distance falls with their number
    to_space = _principal_components(crops_x, config.components)
    train_z, held_z, made_z = to_space(train_x)[:equal], to_space(held_x), to_space(made_x)[:equal]

    frechet = kernel = diversity = copy_rate = notebook = None
    if equal >= FEWEST:
        diversity = _diversity(made_x[:equal], train_x[:equal], go_on)
        copy_rate = _copy_rate(crops_x, owners, {"synthetic": made_x, "validation": held_x, "training": train_x}, go_on)
    if min(equal, len(held_x)) >= FEWEST:
        frechet = _distances(frechet_distance, made_z, train_z, held_z, go_on)
        kernel = _distances(squared_mmd, made_z, train_z, held_z, go_on)
        normalisation = normalisation_of(training)
        held_profile = spectrum_and_roughness(_normalised(validation, normalisation, go_on))
        made_profile = spectrum_and_roughness(_normalised(synthetic, normalisation, go_on))
        distance = frechet["synthetic_to_validation"]["value"]
        notebook = {
            "against": "validation songs; its Fréchet distance in the space above, as on pixels it cannot be computed",
            **notebook_score(held_profile[0], made_profile[0], held_profile[1], made_profile[1], distance),
        }

    go_on()
    folds = grouped_folds([units[index] for index in owners], seed)
    read_back = ridge(crops_x, training.labels[owners].astype(np.float64), folds, np.concatenate([made_x, held_x]))
    measured = {
        "frechet": frechet,
        "kernel": kernel,
        "copy_rate": copy_rate,
        "diversity": diversity,
        "label_read_back": {
            "by": "ridge on pooled log-mel statistics of the training songs, which never saw a synthetic clip",
            "synthetic": _agreement(read_back[: len(made_x)], synthetic.labels[made_songs], seed),
            "validation": _agreement(read_back[len(made_x) :], validation.labels[held_songs], seed),
        },
        "notebook_score": notebook,
    }
    write_json(
        out / "quality.json",
        {
            "space": f"{made_z.shape[1]} principal components of pooled log-mel statistics of the training songs",
            "clips": {
                "training": len(train_x),
                "validation": len(held_x),
                "synthetic": len(made_x),
                "training_and_synthetic_compared": equal,
                "of": "one of each song, from a random frame on, as clips of one song are not independent",
            },
            **measured,
            "not_measured": {
                name: f"needs {FEWEST} clips of every kind, one of each song"
                for name, value in measured.items()
                if value is None
            },
        },
    )
    with Progress(out, "quality", 0, 1) as progress:
        progress.advance(1)
        for name, text in health.generator_warnings(measured).items():
            progress.warn_once(name, text)


def write_pictures(training: Features, synthetic: Features, out: Path) -> None:
    """Write `pictures/`: labels of real songs and synthetic clips, and some of both as spectrograms."""
    frames = synthetic.songs[0].frames
    shown = min(CLIPS_SHOWN, len(training.songs), len(synthetic.songs))
    pictures = out / "pictures"
    pictures.mkdir(exist_ok=True)
    save_figure(pictures / "labels.png", labels_on_the_plane(training.labels, synthetic.labels))
    clips = [[songs.clip(index, 0, frames) for index in range(shown)] for songs in (training, synthetic)]
    save_figure(pictures / "clips.png", real_above_synthetic(*clips))


def _crops(features: Features, frames: int, go_on: Callable[[], None]) -> tuple[Numbers, Positions]:
    """Pooled statistics of crops that overlap by half, as far as CROPS_AT_MOST a song reach, and the song each belongs to."""
    rows: list[Numbers] = []
    owners: list[int] = []
    for index, song in enumerate(features.songs):
        go_on()
        room = max(song.frames - frames, 0)
        crops = min(1 - (-2 * room // frames), CROPS_AT_MOST)
        for start in np.linspace(0, room, crops).astype(int):
            rows.append(pooled_statistics(features.clip(index, int(start), frames)))
            owners.append(index)
    return np.array(rows), np.array(owners)


def _clip_of_each(features: Features, frames: int, seed: int, go_on: Callable[[], None]) -> tuple[Numbers, Positions]:
    """Pooled statistics of one clip of each song, from a random frame on, and the song each belongs to.

    Clips come in a random order that does not depend on the order of the songs: some can stand for all.
    """
    drawn = []
    for index, song in enumerate(features.songs):
        random = generator(seed, "quality", song.song_id)
        drawn.append((random.random(), int(random.integers(max(song.frames - frames, 0) + 1)), index))
    drawn.sort()
    rows = []
    for _, start, index in drawn:
        go_on()
        rows.append(pooled_statistics(features.clip(index, start, frames)))
    return np.array(rows), np.array([index for _, _, index in drawn])


def _principal_components(fitted_on: Numbers, components: int) -> Callable[[Numbers], Numbers]:
    """Projection of statistics to their first components, each scaled to unit variance on `fitted_on`."""
    mean = fitted_on.mean(axis=0)
    centred = fitted_on - mean
    variances, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    kept = min(components, int((variances > 1e-12 * variances[-1]).sum()), max(1, len(fitted_on) // 4))
    scaled_axes = axes[:, -kept:] / np.sqrt(variances[-kept:])
    return lambda values: (values - mean) @ scaled_axes


def _distances(
    distance: Callable[[Numbers, Numbers], float],
    made: Numbers,
    train: Numbers,
    held: Numbers,
    go_on: Callable[[], None],
) -> dict[str, Any]:
    """Of synthetic clips and of training songs to validation songs, and the one minus the other."""

    def measured(made: Numbers, train: Numbers, held: Numbers) -> Numbers:
        go_on()
        synthetic, anchor = distance(made, held), distance(train, held)
        return np.array([synthetic, anchor, synthetic - anchor])

    names = ("synthetic_to_validation", "training_to_validation", "difference")
    estimates = zip(names, *jackknife(measured, [made, train, held]), strict=True)
    return {
        "against": "validation songs; above 0, the difference says that synthetic clips are farther from them than other "
        "real music is",
        **{name: _estimate(value, half) for name, value, half in estimates},
    }


def _diversity(made: Numbers, train: Numbers, go_on: Callable[[], None]) -> dict[str, Any]:
    """How far synthetic clips are from one another, in units of how far training songs are.

    Of the statistics themselves: along principal components the songs that these were fitted to lie farther apart than
    any others, by a sixth with 25 songs.
    """

    between = [cdist(clips, clips) for clips in (made, train)]
    for distances in between:
        np.fill_diagonal(distances, np.inf)

    def measured(*left: Positions) -> Numbers:
        go_on()
        apart = [
            distances[np.ix_(kept, kept)].min(axis=1).mean() for distances, kept in zip(between, left, strict=True)
        ]
        return np.array([apart[0] / apart[1], *apart])

    (value, *apart), (half, *_) = jackknife(measured, [np.arange(len(made)), np.arange(len(train))])
    return {
        "by": "mean distance of a synthetic clip from the nearest other one, divided by that of as many training songs",
        "against": "1, as diverse as real music; 0 is one clip over and over",
        **_estimate(value, half),
        "synthetic_distance": float(apart[0]),
        "training_distance": float(apart[1]),
    }


def _copy_rate(
    crops: Numbers, owners: Positions, clips: dict[str, Numbers], go_on: Callable[[], None]
) -> dict[str, Any]:
    """Share of the clips of each kind that are much nearer to a crop of a training song than the next song is.

    crops, clips: pooled statistics, owners: the song of each crop. Of the statistics those of the change per frame are left
    out: a generator's blur or noise moves them in every clip alike, and a blurred copy is a copy. With these components and this
    factor, on 32 to 700 training songs, 96 to 100 % of other clips of training songs count as copies, and 0 to 5 % of clips of
    unknown songs.

    Source: the idea, with the factor 1, is the authenticity of Alaa et al. 2022, arXiv:2102.08921.
    """
    used = slice(0, 2 * crops.shape[1] // 3)
    to_space = _principal_components(crops[:, used], COPY_COMPONENTS)
    reference = to_space(crops[:, used])
    rates = {}
    for name, rows in clips.items():
        copied = 0
        for first in range(0, len(rows), CLIPS_AT_A_TIME):
            go_on()
            distances = cdist(to_space(rows[first : first + CLIPS_AT_A_TIME, used]), reference)
            nearest = distances.argmin(axis=1)
            to_others = cdist(reference[nearest], reference)
            to_others[owners[nearest][:, None] == owners] = np.inf
            copied += int((distances.min(axis=1) < COPY_FACTOR * to_others.min(axis=1)).sum())
        rates[name] = {"value": copied / len(rows), "ci": wilson_interval(copied / len(rows), len(rows))}
    return {
        "by": f"nearer to a clip of a training song than {COPY_FACTOR:g} times the distance from there to the next song, in "
        f"{reference.shape[1]} principal components of each band's mean and deviation over time",
        "against": "validation: clips of unknown songs, all false alarms; training: other clips of the training songs, all to "
        "be found",
        **rates,
    }


def _estimate(value: float, half: float) -> dict[str, Any]:
    return {"value": float(value), "ci": [float(value - half), float(value + half)]}


def _normalised(features: Features, normalisation: Normalisation, go_on: Callable[[], None]) -> Iterator[Array]:
    for index in range(len(features.songs)):
        go_on()
        yield normalisation.apply(features.song(index))


def _agreement(predicted: Numbers, asked: Array, seed: int) -> dict[str, dict[str, Any]]:
    """CCC and MAE of labels read back from clips against the labels they were made for."""
    table = scores(predicted, asked.astype(np.float64), BOOTSTRAP_SAMPLES, seed)
    return {axis: {name: row[name] for name in ("ccc", "ccc_ci", "mae", "mae_ci")} for axis, row in table.items()}
