"""The phase quality: quality metrics of the synthetic clips, each with a reference value for real music.

Distances are computed between principal components of pooled log-mel statistics, fitted on training songs. They are measured to
the validation songs, which the GAN never saw; the reference value is the distance from training to validation songs. Every
metric with an interval uses one clip per song, as clips of one song are not independent.

If all songs are training songs, one of five folds of them (of fewer if there are fewer than five groups) replaces the validation
songs, and quality.json says so.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

from emotion.audio.clips import Normalisation, normalisation_of
from emotion.audio.feature_store import Features
from emotion.audio.partition import Partition, TrainingSongs, ValidationSongs
from emotion.audio.song_vectors import pooled_statistics
from emotion.config import QualityConfig
from emotion.data.leaks import identities, read_seen, refuse_leak
from emotion.errors import Interrupted
from emotion.evaluation.metrics import scores
from emotion.evaluation.plots import labels_on_the_plane, real_above_synthetic, save_figure
from emotion.evaluation.regressors import fit_ridge, grouped_folds
from emotion.files import make_folder, write_json
from emotion.gan.distances import (
    Gaussian,
    distance_of_gaussians,
    gaussian_of,
    grouped_squared_mmd,
    groups_of,
    jackknife,
    kept_groups,
    wilson_interval,
    without_each_group,
)
from emotion.gan.notebook_score import Profile, notebook_score, profile_of, sums_of
from emotion.threads import in_threads
from emotion.training import health
from emotion.training.progress import Progress
from emotion.training.seeding import generator

MOST_CLIPS = 2000  # of the training songs, and of the validation songs; each is compared with all training crops
MOST_SYNTHETIC_CLIPS = 1000
MOST_CROPS_PER_SONG = 16
BOOTSTRAP_SAMPLES = 500
FEWEST_CLIPS = 4  # of each kind; with fewer nothing is compared
SMALLEST_DEVIATION_DB = 0.1  # smallest divisor of a statistic, so that noise of an almost constant one is not amplified
COPY_COMPONENTS = 48
COPY_FACTOR = 0.75
DISTANCES_PER_BLOCK = 500_000
CLIPS_IN_PICTURE = 4
NOT_HELD_OUT = (
    "a part of the training songs, in whole groups: all songs are for training, so the generator has learnt from these, too, "
    "and copies of them are not looked for"
)

Array = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]
Each = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]
"""Type of `in_threads` with the threads and the stop check of the phase."""


def measure_quality(
    partition: Partition,
    *,
    synthetic: Features,
    config: QualityConfig,
    seed: int,
    out: Path,
    threads: int,
    should_stop: Callable[[], bool],
) -> None:
    """Write `quality.json`. A metric that needs more songs is null there, and `not_measured` gives the reason. Takes seconds.

    The result does not depend on the number of threads. Raises ModelError if a validation song was seen by the GAN or is a
    training song, Interrupted when asked to stop.
    """
    held_out = bool(partition.validation.songs)
    seen = identities(partition.training.songs) | read_seen(synthetic.folder)
    refuse_leak("what is measured", seen, partition.validation.songs)
    if not held_out:
        partition = _with_fold_as_validation(partition, seed)
    training, validation = partition.training, partition.validation

    def check_stop() -> None:
        if should_stop():
            raise Interrupted("quality: stopped")

    def each(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        return in_threads(work, items, threads, check_stop)

    frames = synthetic.songs[0].frames
    synthetic = synthetic.only(range(min(len(synthetic.songs), MOST_SYNTHETIC_CLIPS)))
    crops, crop_songs = _crops(training, frames, each)
    train_x, _ = _clip_of_each(training, frames, seed, each)
    validation_x, validation_songs = _clip_of_each(validation, frames, seed, each)
    synthetic_x, synthetic_songs = _clip_of_each(synthetic, frames, seed, each)
    deviation_db = np.maximum(crops.std(axis=0), SMALLEST_DEVIATION_DB)
    for statistics in (crops, train_x, validation_x, synthetic_x):
        statistics /= deviation_db
    # Equally many clips of both kinds, as the Fréchet distance falls with their number.
    equal = min(len(train_x), len(synthetic_x))
    project = _principal_components(crops, config.components)
    projected = [project(synthetic_x)[:equal], project(train_x)[:equal], project(validation_x)]

    frechet = kernel = diversity = copy_rate = notebook = None
    if equal >= FEWEST_CLIPS:
        diversity = _diversity(synthetic_x[:equal], train_x[:equal], each)
        clips = {"synthetic": synthetic_x, "validation": validation_x, "training": train_x}
        copy_rate = _copy_rate(clips, crops, crop_songs, each)
    if min(equal, len(validation_x)) >= FEWEST_CLIPS:
        check_stop()
        frechet = _frechet(projected)
        kernel = _kernel(projected)
        normalisation = normalisation_of(training, threads, check_stop)
        notebook = {
            "against": "validation songs; its Fréchet distance in the space above, as on pixels it cannot be computed",
            **notebook_score(
                real=_profile(validation, normalisation, each),
                synthetic=_profile(synthetic, normalisation, each),
                frechet=frechet["synthetic_to_validation"]["value"],
            ),
        }

    check_stop()
    folds = grouped_folds([partition.training_groups[song] for song in crop_songs], seed)
    crop_labels = training.labels[crop_songs].astype(np.float64)
    regressor, _ = fit_ridge(crops, crop_labels, folds)
    read_back = regressor.predict(np.concatenate([synthetic_x, validation_x]))
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
            **({} if held_out else {"validation_songs_are": NOT_HELD_OUT}),
            "not_measured": {name: reason for name, value in measures.items() if value is None},
        },
    )
    with Progress(out, "quality", 0, 1) as progress:
        progress.advance(1)
        for name, text in health.generator_warnings(measures).items():
            progress.warn_once(name, text)


def _with_fold_as_validation(partition: Partition, seed: int) -> Partition:
    """Use the first fold of `grouped_folds` of the training songs as validation songs. No group is on both sides."""
    training, groups = partition.training, partition.training_groups
    others, fold = grouped_folds(groups, seed)[0]
    return Partition(
        training=TrainingSongs(training.only(others.tolist())),
        validation=ValidationSongs(training.only(fold.tolist())),
        test=partition.test,
        training_groups=[groups[index] for index in others],
        validation_groups=[groups[index] for index in fold],
        test_groups=partition.test_groups,
    )


def write_pictures(training: Features, synthetic: Features, out: Path) -> None:
    """Write `pictures/`: a scatter plot of real and synthetic labels, and spectrograms of some songs and clips."""
    frames = synthetic.songs[0].frames
    shown = min(CLIPS_IN_PICTURE, len(training.songs), len(synthetic.songs))
    pictures = out / "pictures"
    make_folder(pictures)
    save_figure(pictures / "labels.png", labels_on_the_plane(training.labels, synthetic.labels))
    clips = [[songs.clip(index, 0, frames) for index in range(shown)] for songs in (training, synthetic)]
    save_figure(pictures / "clips.png", real_above_synthetic(*clips))


def _crops(features: Features, frames: int, each: Each) -> tuple[Array, Positions]:
    """Pooled statistics [crops, k] of up to MOST_CROPS_PER_SONG crops that overlap by half, and the song of each crop."""

    def of_song(index: int) -> Array:
        last_start = max(features.songs[index].frames - frames, 0)
        crops = min(1 - (-2 * last_start // frames), MOST_CROPS_PER_SONG)
        starts = np.linspace(0, last_start, crops).astype(int).tolist()
        return np.array([pooled_statistics(features.clip(index, start, frames)) for start in starts])

    rows = list(each(of_song, range(len(features.songs))))
    return np.concatenate(rows), np.repeat(np.arange(len(rows)), [len(of_song) for of_song in rows])


def _clip_of_each(features: Features, frames: int, seed: int, each: Each) -> tuple[Array, Positions]:
    """Pooled statistics [songs, k] of one clip per song with a random first frame, in random order, and the song of each clip.

    At most MOST_CLIPS songs, which bounds the costs that grow with the square of their number.
    """
    drawn = []
    for index, song in enumerate(features.songs):
        random = generator(seed, "quality", song.song_id)
        drawn.append((random.random(), int(random.integers(max(song.frames - frames, 0) + 1)), index))
    clips = [(index, start) for _, start, index in sorted(drawn)[:MOST_CLIPS]]
    rows = each(lambda clip: pooled_statistics(features.clip(clip[0], clip[1], frames)), clips)
    return np.array(list(rows)), np.array([index for index, _ in clips])


def _principal_components(fitted_on: Array, components: int) -> Callable[[Array], Array]:
    """A projection [n, k] → [n, at most components]; each component has unit population variance on `fitted_on`.

    scikit-learn's whitened PCA keeps components without variance and takes five times as long.
    """
    mean = fitted_on.mean(axis=0)
    centred = fitted_on - mean
    variances, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    kept = min(components, int((variances > 1e-12 * variances[-1]).sum()), max(1, len(fitted_on) // 4))
    scaled_axes = axes[:, -kept:] / np.sqrt(variances[-kept:])
    return lambda values: (values - mean) @ scaled_axes


def _frechet(clips: list[Array]) -> dict[str, Any]:
    """Fréchet distances. clips: of synthetic, training and validation songs, in this order."""

    def measured(synthetic: Gaussian, training: Gaussian, validation: Gaussian) -> Array:
        return _compared(distance_of_gaussians(synthetic, validation), distance_of_gaussians(training, validation))

    return _distances(measured, [without_each_group(gaussian_of, sample) for sample in clips])


def _kernel(clips: list[Array]) -> dict[str, Any]:
    """Squared maximum mean discrepancies. clips: as for `_frechet`."""
    *others, reference = clips
    of_synthetic, of_training = (grouped_squared_mmd(sample, reference) for sample in others)

    def measured(synthetic: Array, training: Array, validation: Array) -> Array:
        return _compared(of_synthetic(synthetic, validation), of_training(training, validation))

    return _distances(measured, [kept_groups(len(sample)) for sample in clips])


def _compared(found: float, anchor: float) -> Array:
    return np.array([found, anchor, found - anchor])


def _distances(measured: Callable[..., Array], samples: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Distances from synthetic clips and training songs to validation songs, and their difference, as JSON. See `jackknife`."""
    names = ("synthetic_to_validation", "training_to_validation", "difference")
    estimates = zip(names, *jackknife(measured, samples), strict=True)
    return {
        "against": "validation songs; above 0, the difference says that synthetic clips are farther from them than other "
        "real music is",
        **{name: _estimate(value, half) for name, value, half in estimates},
    }


def _diversity(synthetic: Array, training: Array, each: Each) -> dict[str, Any]:
    """Mean distance of a synthetic clip from its nearest neighbour, divided by that of as many training songs.

    Not in principal components: along these the songs that they were fitted on lie farther apart (by a sixth with 25 songs).
    """

    def measured(synthetic_distance: float, training_distance: float) -> Array:
        return np.array([synthetic_distance / training_distance, synthetic_distance, training_distance])

    (value, *nearest), (half, *_) = jackknife(measured, [_nearest_distances(clips, each) for clips in (synthetic, training)])
    return {
        "by": "mean distance of a synthetic clip from the nearest other one, divided by that of as many training songs",
        "against": "1, as diverse as real music; 0 is one clip over and over",
        **_estimate(value, half),
        "synthetic_distance": float(nearest[0]),
        "training_distance": float(nearest[1]),
    }


def _nearest_distances(clips: Array, each: Each) -> list[float]:
    """Mean distance of a clip from its nearest neighbour: for all clips, then without each jackknife group in turn."""
    groups = groups_of(len(clips))

    def nearest_in_groups(block: Positions) -> Array:
        distances = cdist(clips[block], clips)
        distances[np.arange(len(block)), block] = np.inf
        return np.minimum.reduceat(distances, [group[0] for group in groups], axis=1)

    nearest = np.concatenate(list(each(nearest_in_groups, _blocks(len(clips), len(clips)))))
    means = [nearest.min(axis=1).mean()]
    for left_out, group in enumerate(groups):
        of_the_others = np.delete(np.delete(nearest, left_out, axis=1), group, axis=0)
        means.append(of_the_others.min(axis=1).mean())
    return means


def _blocks(rows: int, columns: int) -> list[Positions]:
    """Positions of the rows, in blocks of about DISTANCES_PER_BLOCK distances to the columns."""
    return np.array_split(np.arange(rows), -(-rows * columns // DISTANCES_PER_BLOCK))


def _copy_rate(clips: dict[str, Array], crops: Array, crop_songs: Positions, each: Each) -> dict[str, Any]:
    """Share of the clips of each kind that are probably copies: much closer to a training crop than the next other song is.

    clips, crops: pooled statistics; crop_songs: the song of each crop. Statistics of the change per frame are excluded, as blur
    or noise shifts them in all clips. With these components and this factor, on 32 to 700 training songs, 96 to 100 % of other
    clips of training songs count as copies, and 0 to 5 % of clips of unknown songs. Source: with the factor 1 this is the
    authenticity of Alaa et al. 2022, arXiv:2102.08921.
    """
    used = slice(0, 2 * crops.shape[1] // 3)
    project = _principal_components(crops[:, used], COPY_COMPONENTS)
    reference = project(crops[:, used])

    def copies(rows: Array) -> int:
        distances = cdist(project(rows), reference)
        nearest = distances.argmin(axis=1)
        to_others = cdist(reference[nearest], reference)
        to_others[crop_songs[nearest][:, None] == crop_songs] = np.inf
        return int((distances.min(axis=1) < COPY_FACTOR * to_others.min(axis=1)).sum())

    rates = {}
    for name, statistics in clips.items():
        blocks = [statistics[rows, used] for rows in _blocks(len(statistics), len(reference))]
        share = sum(each(copies, blocks)) / len(statistics)
        rates[name] = {"value": share, "ci": wilson_interval(share, len(statistics))}
    return {
        "by": f"nearer to a clip of a training song than {COPY_FACTOR:g} times the distance from there to the next song, in "
        f"{reference.shape[1]} principal components of each band's mean and deviation over time",
        "against": "validation: clips of unknown songs, all false alarms; training: other clips of the training songs, all to "
        "be found",
        **rates,
    }


def _estimate(value: float, half: float) -> dict[str, Any]:
    return {"value": float(value), "ci": [float(value - half), float(value + half)]}


def _profile(features: Features, normalisation: Normalisation, each: Each) -> Profile:
    return profile_of(each(lambda index: sums_of(normalisation.apply(features.song(index))), range(len(features.songs))))


def _agreement(predicted: Array, labels: npt.NDArray[np.float32], seed: int) -> dict[str, dict[str, Any]]:
    """CCC and MAE, with intervals, of the labels predicted from clips against the labels of the clips."""
    table = scores(predicted, labels.astype(np.float64), groups=None, bootstrap_samples=BOOTSTRAP_SAMPLES, seed=seed)
    return {axis: {name: row[name] for name in ("ccc", "ccc_ci", "mae", "mae_ci")} for axis, row in table.items()}
