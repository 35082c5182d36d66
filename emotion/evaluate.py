"""The one look at the test songs: predictions, metrics with intervals, baselines, and the raters' ceiling."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emotion.baselines import fit_baselines, pooled_statistics
from emotion.config import EvaluateConfig
from emotion.device import Device
from emotion.errors import Interrupted
from emotion.features import Features
from emotion.files import write_csv, write_json
from emotion.metrics import ceiling, scores
from emotion.vit.network import load_model, predict_song

log = logging.getLogger(__name__)
Numbers = npt.NDArray[np.float64]

LAST_EXCERPT_ID = 2000
"""DEAM's ids above are full songs, rated by fewer people."""


def evaluate(
    features: Features,
    training: Sequence[int],
    validation: Sequence[int],
    test: Sequence[int],
    units: Sequence[str],
    fold: int,
    model: Path,
    config: EvaluateConfig,
    seed: int,
    device: Device,
    out: Path,
    should_stop: Callable[[], bool],
) -> None:
    """Write `predictions.csv`, `baselines.csv` and `metrics.json`, on real test songs only, labels on -1..1.

    `units` [songs] names what the baselines' cross-validation must not divide: groups, or single songs.
    Baselines are fitted on training and validation songs, which is what the model had for training and for stopping.
    Raises Interrupted when asked to stop; entering again begins anew, as this takes seconds.
    """
    network, preprocessing = load_model(model, device)
    actual = features.labels[list(test)].astype(np.float64)
    rows = []
    for done, index in enumerate(test):
        if should_stop():
            raise Interrupted(f"evaluate: stopped after {done} of {len(test)} songs")
        rows.append(predict_song(network, preprocessing, device, features.song(index)))
    predicted = np.array(rows, np.float64)
    ids = [features.songs[index].song_id for index in test]
    write_predictions(out / "predictions.csv", ids, fold, actual, predicted)

    seen = [*training, *validation]
    baselines = fit_baselines(
        np.array([pooled_statistics(features.song(index)) for index in seen]),
        features.labels[seen].astype(np.float64),
        [units[index] for index in seen],
        np.array([pooled_statistics(features.song(index)) for index in test]),
        seed,
    )
    write_baselines(out / "baselines.csv", ids, baselines)

    songs = features.songs
    rater_sd = np.array([(songs[index].valence_sd, songs[index].arousal_sd) for index in test])
    raters = np.array(
        [config.raters_per_excerpt if id_ <= LAST_EXCERPT_ID else config.raters_per_full_song for id_ in ids]
    )
    model_scores = scores(predicted, actual, config.bootstrap_samples, seed)
    write_json(
        out / "metrics.json",
        {
            "scale": "labels on -1..1, (x - 5) / 4 of DEAM's 1..9; intervals: 95 %, bootstrap over test songs",
            "model": model_scores,
            "baselines": {
                name: scores(values, actual, config.bootstrap_samples, seed) for name, values in baselines.items()
            },
            "ceiling": _ceiling(actual, rater_sd, raters),
            "songs": {"train": len(training), "validation": len(validation), "test": len(test)},
        },
    )
    log.info(
        "phase=evaluate test_songs=%d ccc_valence=%s ccc_arousal=%s",
        len(test),
        _shown(model_scores["valence"]["ccc"]),
        _shown(model_scores["arousal"]["ccc"]),
    )


def _ceiling(actual: Numbers, rater_sd: Numbers, raters: npt.NDArray[np.int64]) -> dict[str, dict[str, float]] | None:
    """None where the test labels do not vary, so that nothing can be said about their noise."""
    if len(actual) < 2 or not np.ptp(actual, axis=0).all():
        return None
    # DEAM divides by the number of raters, not by one less, so this gives the unbiased variance of a mean label.
    return ceiling(actual, rater_sd, raters - 1)


def write_predictions(path: Path, ids: Sequence[int], fold: int, actual: Numbers, predicted: Numbers) -> None:
    """song_id, fold, valence_true, valence_pred, arousal_true, arousal_pred; numbers as their shortest exact spelling."""
    write_csv(
        path,
        ["song_id", "fold", "valence_true", "valence_pred", "arousal_true", "arousal_pred"],
        [
            [song, fold, *(float(value) for value in (a[0], p[0], a[1], p[1]))]
            for song, a, p in zip(ids, actual, predicted, strict=True)
        ],
    )


def write_baselines(path: Path, ids: Sequence[int], baselines: dict[str, Numbers]) -> None:
    """baseline, song_id, valence_pred, arousal_pred: so that folds can be pooled for the baselines, too."""
    write_csv(
        path,
        ["baseline", "song_id", "valence_pred", "arousal_pred"],
        [
            [name, song, float(row[0]), float(row[1])]
            for name, values in sorted(baselines.items())
            for song, row in zip(ids, values, strict=True)
        ],
    )


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "undefined"
