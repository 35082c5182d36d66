"""How good synthetic clips are, each number beside what it is measured against.

Distances are taken in a space of few dimensions: principal components of pooled log-mel statistics, fitted on training songs.
The reference is validation songs, which the GAN never saw; the same distance from training to validation songs is the anchor:
what real music reaches. Test songs take no part.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emotion.baselines import grouped_folds, pooled_statistics, ridge
from emotion.clips import Normalisation, normalisation_of, spread_starts
from emotion.config import QualityConfig
from emotion.errors import Interrupted
from emotion.features import Array, Features
from emotion.files import write_json
from emotion.metrics import frechet_distance, kernel_distance, notebook_score, scores, spectrum_and_roughness

CROPS_PER_SONG = 4
SYNTHETIC_AT_MOST = 1000
BOOTSTRAP_SAMPLES = 500
KERNEL_NEEDS = 4

Numbers = npt.NDArray[np.float64]


def measure_quality(
    real: Features,
    training: Sequence[int],
    validation: Sequence[int],
    units: Sequence[str],
    synthetic: Features,
    config: QualityConfig,
    seed: int,
    out: Path,
    should_stop: Callable[[], bool],
) -> None:
    """Write `quality.json`; `units` [songs] names what cross-validation of the read-back must not divide.

    Raises Interrupted when asked to stop; entering again begins anew, as this takes seconds.
    """
    frames = synthetic.songs[0].frames
    made = list(range(min(len(synthetic.songs), SYNTHETIC_AT_MOST)))
    train_x, train_songs = _statistics(real, training, frames, should_stop)
    held_x, held_songs = _statistics(real, validation, frames, should_stop)
    made_x, made_songs = _statistics(synthetic, made, frames, should_stop)
    project = _principal_components(train_x, config.components)
    train_z, held_z, made_z = project(train_x), project(held_x), project(made_x)

    normalisation = normalisation_of(real, training)
    frechet = frechet_distance(made_z, held_z)
    held_profile = spectrum_and_roughness(_normalised(real, validation, frames, normalisation))
    made_profile = spectrum_and_roughness(_normalised(synthetic, made, frames, normalisation))

    folds = grouped_folds([units[index] for index in train_songs], seed)
    read_back = ridge(train_x, real.labels[train_songs].astype(np.float64), folds, np.concatenate([made_x, held_x]))
    write_json(
        out / "quality.json",
        {
            "space": f"{made_z.shape[1]} principal components of pooled log-mel statistics of the training songs",
            "clips": {"training": len(train_x), "validation": len(held_x), "synthetic": len(made_x)},
            "frechet": {
                "synthetic_to_validation": frechet,
                "training_to_validation": frechet_distance(train_z, held_z),
            },
            "kernel": {
                "synthetic_to_validation": _kernel(made_z, held_z, config, seed),
                "training_to_validation": _kernel(train_z, held_z, config, seed),
            },
            "label_read_back": {
                "by": "ridge on pooled log-mel statistics of the training songs, which never saw a synthetic clip",
                "synthetic": _agreement(read_back[: len(made_x)], synthetic.labels[made_songs], seed),
                "validation": _agreement(read_back[len(made_x) :], real.labels[held_songs], seed),
            },
            "notebook_score": {
                "against": "validation songs; its Fréchet distance in the space above, as on pixels it cannot be computed",
                **notebook_score(held_profile[0], made_profile[0], held_profile[1], made_profile[1], frechet),
            },
        },
    )


def _statistics(
    features: Features, songs: Sequence[int], frames: int, should_stop: Callable[[], bool]
) -> tuple[Numbers, list[int]]:
    """Pooled statistics of a few clips per song, and the song each belongs to."""
    rows: list[Numbers] = []
    owners: list[int] = []
    for index in songs:
        if should_stop():
            raise Interrupted("quality: stopped")
        for start in spread_starts(features.songs[index].frames, frames, CROPS_PER_SONG):
            rows.append(pooled_statistics(features.clip(index, start, frames)))
            owners.append(index)
    return np.array(rows), owners


def _normalised(features: Features, songs: Sequence[int], frames: int, normalisation: Normalisation) -> Iterator[Array]:
    for index in songs:
        for start in spread_starts(features.songs[index].frames, frames, CROPS_PER_SONG):
            yield normalisation.apply(features.clip(index, start, frames))


def _principal_components(fitted_on: Numbers, components: int) -> Callable[[Numbers], Numbers]:
    """Projection of standardised statistics to their first components, each scaled to unit variance on `fitted_on`."""
    mean, sd = fitted_on.mean(axis=0), fitted_on.std(axis=0) + 1e-9
    standard = (fitted_on - mean) / sd
    _, singular, axes = np.linalg.svd(standard, full_matrices=False)
    kept = min(components, int((singular > 1e-6 * singular[0]).sum()), max(1, len(fitted_on) // 4))
    scale = singular[:kept] / len(fitted_on) ** 0.5
    return lambda values: ((values - mean) / sd) @ axes[:kept].T / scale


def _kernel(a: Numbers, b: Numbers, config: QualityConfig, seed: int) -> dict[str, float] | None:
    """None where there are too few clips for an unbiased estimate."""
    if min(len(a), len(b)) < KERNEL_NEEDS:
        return None
    mean, sd = kernel_distance(a, b, config.kernel_subsets, seed)
    return {"mean": mean, "sd": sd}


def _agreement(predicted: Numbers, asked: Array, seed: int) -> dict[str, dict[str, Any]]:
    """CCC and MAE of labels read back from clips against the labels they were made for."""
    table = scores(predicted, asked.astype(np.float64), BOOTSTRAP_SAMPLES, seed)
    return {axis: {name: row[name] for name in ("ccc", "ccc_ci", "mae", "mae_ci")} for axis, row in table.items()}
