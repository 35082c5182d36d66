"""The phase evaluate: predictions for the test songs, metrics with intervals, baselines, and scores of human listeners."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emotion.audio.feature_store import Features
from emotion.audio.partition import Partition
from emotion.config import EvaluateConfig
from emotion.data.dynamic import read_dynamic
from emotion.data.label_scale import scale_text
from emotion.data.leaks import identities, read_seen, refuse_leak
from emotion.data.song_ids import SongId, is_full_song
from emotion.errors import Interrupted
from emotion.evaluation.conformal import LEVEL, coverage_of, read_intervals
from emotion.evaluation.dynamic import dynamic_scores
from emotion.evaluation.listeners import listener_scores
from emotion.evaluation.metrics import DIMENSIONS, ceiling, scores
from emotion.evaluation.stack import Embed, labels_of, read_stack, stack_vectors
from emotion.files import write_csv, write_json

log = logging.getLogger(__name__)
Array = npt.NDArray[np.float64]


PREDICTIONS = (
    *("valence_true", "valence_pred", "arousal_true", "arousal_pred", "valence_stack", "arousal_stack"),
    *("valence_lower", "valence_upper", "arousal_lower", "arousal_upper"),
)  # columns of predictions.csv behind song_id and fold
INTERVALS = "intervals: 95 %, bootstrap over the groups of the split"
NO_DEVIATIONS = "none: not all test songs have standard deviations over raters"  # shown in the place of a ceiling


@dataclass(frozen=True)
class TrainedModel:
    """folder, stack: each names the songs that it was made from.

    predict: songs, [frames, mels] in dB each, and what is called before each forward pass → [songs, 2] valence and arousal.
    curve: one song, and the same → seconds [points] and values [points, 2]; for songs with dynamic annotations.
    embed: the pretrained ViT, if there is one, for the stack. threads: for the vectors of songs; their number changes no byte.
    training: what the training says of itself, for metrics.json: `synthetic_clips`, what it has decided about them, and
    `stopped_by_budget`, each where there is any.
    """

    folder: Path
    stack: Path
    predict: Callable[[Sequence[npt.NDArray[np.float16]], Callable[[], None]], npt.NDArray[np.floating[Any]]]
    curve: Callable[[npt.NDArray[np.float16], Callable[[], None]], tuple[Array, npt.NDArray[np.floating[Any]]]]
    embed: Embed | None = None
    threads: int = 1
    training: Mapping[str, Any] = field(default_factory=dict)


def evaluate(
    partition: Partition,
    *,
    model: TrainedModel,
    fold: int,
    config: EvaluateConfig,
    seed: int,
    out: Path,
    should_stop: Callable[[], bool],
) -> None:
    """Write `predictions.csv`, `baselines.csv` and `metrics.json` for the test songs; labels on -1..1.

    The baselines are the mean label and the members of the stack. All are fitted on training and validation songs: the model has
    used both, for training and for stopping. Raises ModelError if the model or the stack has seen a test song, Interrupted when
    asked to stop.
    """

    def check_stop() -> None:
        if should_stop():
            raise Interrupted("evaluate: stopped")

    training, validation, test = partition.training, partition.validation, partition.test
    refuse_leak("the model", read_seen(model.folder), test.songs)
    refuse_leak("the baselines", identities([*training.songs, *validation.songs]), test.songs)
    refuse_leak("the stack", read_seen(model.stack), test.songs)
    actual = test.labels.astype(np.float64)
    predicted = model.predict([test.stored(index) for index in range(len(test.songs))], check_stop).astype(np.float64)
    stack, vectors = read_stack(model.stack), stack_vectors(test, model.embed, threads=model.threads, check_stop=check_stop)
    stacked = stack.predict(vectors, predicted)
    ids = [song.song_id for song in test.songs]
    widths = read_intervals(model.stack)
    columns = {"true": actual, "pred": predicted, "stack": stacked}
    columns["lower"], columns["upper"] = widths["stack"].around(stacked)
    write_predictions(out / "predictions.csv", ids, [fold] * len(ids), columns)

    baselines = {"constant": mean_label(labels_of(training, validation), len(ids)), **stack.baselines(vectors)}
    write_baselines(out / "baselines.csv", ids, baselines)

    found = {"stack": stacked, "model": predicted, **baselines}
    metrics = metrics_of(test, found, groups=partition.test_groups, config=config, seed=seed)
    covered = {name: coverage_of(widths[name], values, actual) for name, values in (("stack", stacked), ("model", predicted))}
    dynamic = dynamic_scores(
        read_dynamic(test.folder),
        test,
        lambda song: model.curve(song, check_stop),
        predicted,
        groups=partition.test_groups,
        samples=config.bootstrap_samples,
        seed=seed,
    )
    write_json(
        out / "metrics.json",
        {
            **metrics,
            "intervals": {"level": LEVEL, **covered},
            **({} if dynamic is None else {"dynamic": dynamic}),
            "songs": {"train": len(training.songs), "validation": len(validation.songs), "test": len(test.songs)},
            **said_by(model.training),
        },
    )
    valence, arousal = (metrics["stack"][dimension]["ccc"] for dimension in DIMENSIONS)
    log.info("phase=evaluate test_songs=%d ccc_valence=%s ccc_arousal=%s", len(ids), _shown(valence), _shown(arousal))


def said_by(training: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the training summary that metrics.json repeats."""
    return {name: training[name] for name in ("synthetic_clips", "stopped_by_budget") if name in training}


def metrics_of(
    songs: Features, predicted: dict[str, Array], *, groups: Sequence[str], config: EvaluateConfig, seed: int
) -> dict[str, Any]:
    """The content of metrics.json. predicted: predictor, "stack" and "model" among them → [songs, 2]; groups: [songs]."""
    actual = songs.labels.astype(np.float64)
    scored = {
        name: scores(values, actual, groups=groups, bootstrap_samples=config.bootstrap_samples, seed=seed)
        for name, values in predicted.items()
    }
    own = {name: scored.pop(name) for name in ("stack", "model")}
    ratings = _ratings(songs, actual, config)
    return {
        "scale": f"{scale_text(songs.scale)}; {INTERVALS}",
        **own,
        "baselines": scored,
        # DEAM's standard deviations have the divisor raters; `ceiling` asks for raters - 1 then.
        "ceiling": None if ratings is None else ceiling(actual, ratings[0], ratings[1] - 1),
        **({} if ratings is None else {"listeners": listener_scores(actual, *ratings, own)}),
        **({} if has_deviations(songs) else {"no_ceiling": NO_DEVIATIONS}),
    }


def has_deviations(test: Features) -> bool:
    """Whether the labels of all songs have standard deviations over raters. Where all are 0, nobody measured them."""
    found = [(song.valence_sd, song.arousal_sd) for song in test.songs]
    return all(None not in pair for pair in found) and any(any(pair) for pair in found)


def _ratings(test: Features, actual: Array, config: EvaluateConfig) -> tuple[Array, Array] | None:
    """Deviations [songs, 2] over the raters of the test songs, with the divisor raters, and their numbers [songs].

    None if the test labels do not vary, or have no standard deviations.
    """
    if len(actual) < 2 or not np.ptp(actual, axis=0).all() or not has_deviations(test):
        return None
    rater_sd = np.array([(song.valence_sd, song.arousal_sd) for song in test.songs], np.float64)
    usual = [config.raters_per_full_song if is_full_song(song.song_id) else config.raters_per_excerpt for song in test.songs]
    raters = np.array([song.raters or number for song, number in zip(test.songs, usual, strict=True)], np.float64)
    return rater_sd, raters


def mean_label(labels: Array, songs: int) -> Array:
    """[songs, 2]: the mean of labels [n, 2] for every song."""
    return np.tile(labels.mean(axis=0), (songs, 1))


def write_predictions(path: Path, ids: Sequence[SongId], folds: Sequence[int], columns: dict[str, Array]) -> None:
    """A row per song. folds: whose test songs they are. columns: "true" (labels), "pred" (by the ViT), "stack" (by the stack),
    "lower" and "upper" (the ends of the stack's intervals) → [songs, 2] = (valence, arousal).

    Floats are written so that they read back exactly.
    """
    wanted = [name.split("_") for name in PREDICTIONS]
    table = np.column_stack([columns[name][:, DIMENSIONS.index(dimension)] for dimension, name in wanted]).tolist()
    rows = [[song, fold, *row] for song, fold, row in zip(ids, folds, table, strict=True)]
    write_csv(path, ["song_id", "fold", *PREDICTIONS], rows)


def write_baselines(path: Path, ids: Sequence[SongId], baselines: dict[str, Array]) -> None:
    """A row per baseline and song, so that the baselines of several folds can be pooled like the model's predictions."""
    tables = sorted((name, values.tolist()) for name, values in baselines.items())
    rows = [[name, song, *row] for name, table in tables for song, row in zip(ids, table, strict=True)]
    write_csv(path, ["baseline", "song_id", "valence_pred", "arousal_pred"], rows)


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "undefined"
