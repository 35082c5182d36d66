"""The phase quality: measures of the synthetic clips, each beside the value that real music reaches.

Distances are taken between principal components of pooled log-mel statistics, fitted on training songs. The reference is the
validation songs, which the GAN never saw; the anchor is the distance from training to validation songs. Every measure with an
interval takes one clip of each song, as clips of one song are not independent.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

from emotion.audio.clips import Normalisation, normalisation_of
from emotion.audio.feature_store import Features
from emotion.audio.partition import Partition
from emotion.config import QualityConfig
from emotion.data.leaks import identities, read_seen, refuse_leak
from emotion.errors import Interrupted
from emotion.evaluation.baselines import grouped_folds, pooled_statistics, ridge
from emotion.evaluation.metrics import scores
from emotion.evaluation.plots import labels_on_the_plane, real_above_synthetic, save_figure
from emotion.files import make_folder, write_json
from emotion.gan.distances import frechet_distance, jackknife, squared_mmd, wilson_interval
from emotion.gan.notebook_score import notebook_score, profile_of
from emotion.training import health
from emotion.training.progress import Progress
from emotion.training.seeding import generator

MOST_SYNTHETIC_CLIPS = 1000
MOST_CROPS_PER_SONG = 16
BOOTSTRAP_SAMPLES = 500
FEWEST_CLIPS = 4  # of each kind; with fewer nothing is compared
SMALLEST_DEVIATION_DB = 0.1  # divisor of a statistic that varies less from clip to clip, so that its noise is not amplified
COPY_COMPONENTS = 48
COPY_FACTOR = 0.75
CLIPS_PER_BLOCK = 256
CLIPS_IN_PICTURE = 4

Array = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]
CheckStop = Callable[[], None]


def measure_quality(
    partition: Partition, *, synthetic: Features, config: QualityConfig, seed: int, out: Path, should_stop: Callable[[], bool]
) -> None:
    """Write `quality.json`. A measure that needs more songs is null there, and `not_measured` says why. Takes seconds.

    Raises ModelError if the GAN or the training songs have seen a validation song, Interrupted when asked to stop.
    """
    training, validation = partition.training, partition.validation
    seen = identities(training.songs) | read_seen(synthetic.folder)
    refuse_leak("what is measured", seen, validation.songs)

    def check_stop() -> None:
        if should_stop():
            raise Interrupted("quality: stopped")

    frames = synthetic.songs[0].frames
    synthetic = synthetic.only(range(min(len(synthetic.songs), MOST_SYNTHETIC_CLIPS)))
    crops, crop_songs = _crops(training, frames, check_stop)
    train_x, _ = _clip_of_each(training, frames, seed, check_stop)
    validation_x, validation_songs = _clip_of_each(validation, frames, seed, check_stop)
    synthetic_x, synthetic_songs = _clip_of_each(synthetic, frames, seed, check_stop)
    deviation_db = np.maximum(crops.std(axis=0), SMALLEST_DEVIATION_DB)
    crops, train_x, validation_x, synthetic_x = (x / deviation_db for x in (crops, train_x, validation_x, synthetic_x))
    # As many clips of either: the Fréchet distance falls with their number.
    equal = min(len(train_x), len(synthetic_x))
    project = _principal_components(crops, config.components)
    projected = [project(synthetic_x)[:equal], project(train_x)[:equal], project(validation_x)]

    frechet = kernel = diversity = copy_rate = notebook = None
    if equal >= FEWEST_CLIPS:
        diversity = _diversity(synthetic_x[:equal], train_x[:equal], check_stop)
        clips = {"synthetic": synthetic_x, "validation": validation_x, "training": train_x}
        copy_rate = _copy_rate(clips, crops, crop_songs, check_stop)
    if min(equal, len(validation_x)) >= FEWEST_CLIPS:
        frechet = _distances(frechet_distance, projected, check_stop)
        kernel = _distances(squared_mmd, projected, check_stop)
        normalisation = normalisation_of(training)
        notebook = {
            "against": "validation songs; its Fréchet distance in the space above, as on pixels it cannot be computed",
            **notebook_score(
                real=profile_of(_normalised(validation, normalisation, check_stop)),
                synthetic=profile_of(_normalised(synthetic, normalisation, check_stop)),
                frechet=frechet["synthetic_to_validation"]["value"],
            ),
        }

    check_stop()
    folds = grouped_folds([partition.training_groups[song] for song in crop_songs], seed)
    crop_labels = training.labels[crop_songs].astype(np.float64)
    read_back = ridge(crops, crop_labels, folds, np.concatenate([synthetic_x, validation_x]))
    measures = {
        "frechet": frechet,
        "kernel": kernel,
        "copy_rate": copy_rate,
        "diversity": diversity,
        "label_read_back": {
            "by": "ridge on pooled log-mel statistics of the training songs, which never saw a synthetic clip",
            "synthetic": _agreement(read_back[: len(synthetic_x)], synthetic.labels[synthetic_songs], seed),
            "validation": _agreement(read_back[len(synthetic_x) :], validation.labels[validation_songs], seed),
        },
        "notebook_score": notebook,
    }
    reason = f"needs {FEWEST_CLIPS} clips of every kind, one of each song"
    write_json(
        out / "quality.json",
        {
            "space": f"{projected[0].shape[1]} principal components of pooled log-mel statistics of the training songs",
            "clips": {
                "training": len(train_x),
                "validation": len(validation_x),
                "synthetic": len(synthetic_x),
                "training_and_synthetic_compared": equal,
                "of": "one of each song, from a random frame on, as clips of one song are not independent",
            },
            **measures,
            "not_measured": {name: reason for name, value in measures.items() if value is None},
        },
    )
    with Progress(out, "quality", 0, 1) as progress:
        progress.advance(1)
        for name, text in health.generator_warnings(measures).items():
            progress.warn_once(name, text)


def write_pictures(training: Features, synthetic: Features, out: Path) -> None:
    """Write `pictures/`: the labels of real songs and synthetic clips, and spectrograms of some of both."""
    frames = synthetic.songs[0].frames
    shown = min(CLIPS_IN_PICTURE, len(training.songs), len(synthetic.songs))
    pictures = out / "pictures"
    make_folder(pictures)
    save_figure(pictures / "labels.png", labels_on_the_plane(training.labels, synthetic.labels))
    clips = [[songs.clip(index, 0, frames) for index in range(shown)] for songs in (training, synthetic)]
    save_figure(pictures / "clips.png", real_above_synthetic(*clips))


def _crops(features: Features, frames: int, check_stop: CheckStop) -> tuple[Array, Positions]:
    """Pooled statistics [crops, k] of up to MOST_CROPS_PER_SONG crops that overlap by half, and the song of each crop."""
    rows: list[Array] = []
    songs: list[int] = []
    for index, song in enumerate(features.songs):
        check_stop()
        last_start = max(song.frames - frames, 0)
        crops = min(1 - (-2 * last_start // frames), MOST_CROPS_PER_SONG)
        for start in np.linspace(0, last_start, crops).astype(int):
            rows.append(pooled_statistics(features.clip(index, int(start), frames)))
            songs.append(index)
    return np.array(rows), np.array(songs)


def _clip_of_each(features: Features, frames: int, seed: int, check_stop: CheckStop) -> tuple[Array, Positions]:
    """Pooled statistics [songs, k] of a clip of each song, from a random frame on and in random order, and its song."""
    drawn = []
    for index, song in enumerate(features.songs):
        random = generator(seed, "quality", song.song_id)
        drawn.append((random.random(), int(random.integers(max(song.frames - frames, 0) + 1)), index))
    drawn.sort()
    rows = []
    for _, start, index in drawn:
        check_stop()
        rows.append(pooled_statistics(features.clip(index, start, frames)))
    return np.array(rows), np.array([index for _, _, index in drawn])


def _principal_components(fitted_on: Array, components: int) -> Callable[[Array], Array]:
    """Projection [n, k] → [n, components at most], each component with unit population variance on `fitted_on`.

    scikit-learn's whitened PCA keeps components of no variance and takes five times as long.
    """
    mean = fitted_on.mean(axis=0)
    centred = fitted_on - mean
    variances, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    kept = min(components, int((variances > 1e-12 * variances[-1]).sum()), max(1, len(fitted_on) // 4))
    scaled_axes = axes[:, -kept:] / np.sqrt(variances[-kept:])
    return lambda values: (values - mean) @ scaled_axes


def _distances(distance: Callable[[Array, Array], float], clips: list[Array], check_stop: CheckStop) -> dict[str, Any]:
    """From synthetic clips and from training songs to validation songs, and the difference. clips: in this order."""

    def measured(synthetic: Array, training: Array, validation: Array) -> Array:
        check_stop()
        found, anchor = distance(synthetic, validation), distance(training, validation)
        return np.array([found, anchor, found - anchor])

    names = ("synthetic_to_validation", "training_to_validation", "difference")
    estimates = zip(names, *jackknife(measured, clips), strict=True)
    return {
        "against": "validation songs; above 0, the difference says that synthetic clips are farther from them than other "
        "real music is",
        **{name: _estimate(value, half) for name, value, half in estimates},
    }


def _diversity(synthetic: Array, training: Array, check_stop: CheckStop) -> dict[str, Any]:
    """Mean distance of a synthetic clip from the nearest other one, divided by the same of as many training songs.

    Not in principal components, along which the songs that they were fitted on lie farther apart (by a sixth with 25 songs).
    """
    between = [cdist(clips, clips) for clips in (synthetic, training)]
    for distances in between:
        np.fill_diagonal(distances, np.inf)

    def measured(*positions: Positions) -> Array:
        check_stop()
        nearest = [distances[np.ix_(kept, kept)].min(axis=1).mean() for distances, kept in zip(between, positions, strict=True)]
        return np.array([nearest[0] / nearest[1], *nearest])

    (value, *nearest), (half, *_) = jackknife(measured, [np.arange(len(synthetic)), np.arange(len(training))])
    return {
        "by": "mean distance of a synthetic clip from the nearest other one, divided by that of as many training songs",
        "against": "1, as diverse as real music; 0 is one clip over and over",
        **_estimate(value, half),
        "synthetic_distance": float(nearest[0]),
        "training_distance": float(nearest[1]),
    }


def _copy_rate(clips: dict[str, Array], crops: Array, crop_songs: Positions, check_stop: CheckStop) -> dict[str, Any]:
    """Share of the clips of each kind that are much closer to a crop of a training song than the next song is.

    clips, crops: pooled statistics; crop_songs: the song of each crop. Statistics of the change per frame are left out, as blur
    or noise shifts them in all clips. With these components and this factor, on 32 to 700 training songs, 96 to 100 % of other
    clips of training songs count as copies, and 0 to 5 % of clips of unknown songs. Source: with the factor 1 this is the
    authenticity of Alaa et al. 2022, arXiv:2102.08921.
    """
    used = slice(0, 2 * crops.shape[1] // 3)
    project = _principal_components(crops[:, used], COPY_COMPONENTS)
    reference = project(crops[:, used])
    rates = {}
    for name, rows in clips.items():
        copied = 0
        for first in range(0, len(rows), CLIPS_PER_BLOCK):
            check_stop()
            distances = cdist(project(rows[first : first + CLIPS_PER_BLOCK, used]), reference)
            nearest = distances.argmin(axis=1)
            to_others = cdist(reference[nearest], reference)
            to_others[crop_songs[nearest][:, None] == crop_songs] = np.inf
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


def _normalised(features: Features, normalisation: Normalisation, check_stop: CheckStop) -> Iterator[npt.NDArray[np.float32]]:
    for index in range(len(features.songs)):
        check_stop()
        yield normalisation.apply(features.song(index))


def _agreement(predicted: Array, labels: npt.NDArray[np.float32], seed: int) -> dict[str, dict[str, Any]]:
    """CCC and MAE of labels read back from clips against the labels that the clips were generated with."""
    table = scores(predicted, labels.astype(np.float64), bootstrap_samples=BOOTSTRAP_SAMPLES, seed=seed)
    return {axis: {name: row[name] for name in ("ccc", "ccc_ci", "mae", "mae_ci")} for axis, row in table.items()}
