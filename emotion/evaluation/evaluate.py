"""The one look at the test songs: predictions, metrics with intervals, baselines, and the raters' ceiling."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emotion.audio.feature_store import Features
from emotion.config import EvaluateConfig
from emotion.data.deam import LAST_EXCERPT_ID
from emotion.data.label_scale import LABEL_SCALE
from emotion.data.leaks import identities, read_seen, refuse_leak
from emotion.errors import Interrupted
from emotion.evaluation.baselines import fit_baselines, pooled_statistics
from emotion.evaluation.metrics import ceiling, scores
from emotion.files import write_csv, write_json
from emotion.training.device import Device
from emotion.vit.network import load_model, predict_song

log = logging.getLogger(__name__)
Numbers = npt.NDArray[np.float64]


def evaluate(
    training: Features,
    validation: Features,
    test: Features,
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

    units: [training songs, then validation songs] what the baselines' cross-validation must not divide: groups, or single
    songs. Baselines are fitted on training and validation songs, which is what the model had for training and for stopping.
    Raises ModelError where model or baselines have seen a test song; Interrupted when asked to stop; entering again begins
    anew, as this takes seconds.
    """

    def go_on() -> None:
        if should_stop():
            raise Interrupted("evaluate: stopped")

    refuse_leak("the model", read_seen(model), test.songs)
    refuse_leak("the baselines", identities([*training.songs, *validation.songs]), test.songs)
    network, preprocessing = load_model(model, device)
    actual = test.labels.astype(np.float64)
    rows = []
    for index in range(len(test.songs)):
        go_on()
        rows.append(predict_song(network, preprocessing, device, test.song(index)))
    predicted = np.array(rows, np.float64)
    ids = [song.song_id for song in test.songs]
    write_predictions(out / "predictions.csv", ids, fold, actual, predicted)

    baselines = fit_baselines(
        np.concatenate([_pooled(training, go_on), _pooled(validation, go_on)]),
        np.concatenate([training.labels, validation.labels]).astype(np.float64),
        units,
        _pooled(test, go_on),
        seed,
        go_on,
    )
    write_baselines(out / "baselines.csv", ids, baselines)

    rater_sd = np.array([(song.valence_sd, song.arousal_sd) for song in test.songs])
    raters = np.array(
        [config.raters_per_excerpt if id_ <= LAST_EXCERPT_ID else config.raters_per_full_song for id_ in ids]
    )
    model_scores = scores(predicted, actual, config.bootstrap_samples, seed)
    write_json(
        out / "metrics.json",
        {
            "scale": f"{LABEL_SCALE}; intervals: 95 %, bootstrap over test songs",
            "model": model_scores,
            "baselines": {
                name: scores(values, actual, config.bootstrap_samples, seed) for name, values in baselines.items()
            },
            "ceiling": _ceiling(actual, rater_sd, raters),
            "songs": {
                "train": len(training.songs),
                "validation": len(validation.songs),
                "test": len(test.songs),
            },
        },
    )
    log.info(
        "phase=evaluate test_songs=%d ccc_valence=%s ccc_arousal=%s",
        len(test.songs),
        _shown(model_scores["valence"]["ccc"]),
        _shown(model_scores["arousal"]["ccc"]),
    )


def _pooled(songs: Features, go_on: Callable[[], None]) -> Numbers:
    found = []
    for index in range(len(songs.songs)):
        go_on()
        found.append(pooled_statistics(songs.song(index)))
    return np.array(found)


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
