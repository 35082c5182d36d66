"""Stack and scores of a final model: from the predictions of its folds, as no song is left to validate or test it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from emotion.audio.partition import Partition, TrainingSongs
from emotion.config import EvaluateConfig
from emotion.data.leaks import identities, write_seen
from emotion.data.out_of_fold import OutOfFold
from emotion.errors import Interrupted
from emotion.evaluation.boosting import fit_boosting
from emotion.evaluation.conformal import half_widths, write_intervals
from emotion.evaluation.evaluate import metrics_of, said_by, write_baselines, write_predictions
from emotion.evaluation.regressors import Array, fit_ridge, fit_svr, grouped_folds
from emotion.evaluation.stack import Embed, Stack, fit_blend, labels_of, stack_vectors, write_stack
from emotion.files import write_json

SCORED_BY = (
    "the folds: each song is predicted by a run that was trained with the same settings on songs of the other folds; this model "
    "itself was trained on all songs"
)


def fit_final_stack(
    partition: Partition,
    *,
    found: OutOfFold,
    embed: Embed | None,
    seed: int,
    threads: int,
    out: Path,
    should_stop: Callable[[], bool],
) -> None:
    """Write `stack/` into `out`, as `fit_stack` does: ridge, SVR and trees fitted to all songs, and their blend.

    The blend is fitted by the same rule to the folds' predictions for all songs. In a fold, the share of the ViT rests on its few
    validation songs; here it rests on every song, none of which its ViT has seen. The scores are those of the folds with the
    folds' own blends, so that no score profits from this one.
    """

    def check_stop() -> None:
        if should_stop():
            raise Interrupted("stack: stopped")

    training, groups = partition.training, partition.training_groups
    labels, vectors = labels_of(training), stack_vectors(training, embed, threads=threads, check_stop=check_stop)
    folds = grouped_folds(groups, seed)
    check_stop()
    ridge, _ = fit_ridge(vectors, labels, folds)
    check_stop()
    svr, _ = fit_svr(vectors, labels, folds, seed=seed, threads=threads, check_stop=check_stop)
    # The folds choose settings of ridge and SVR. Trees have none to choose, and what they predict for held-out songs is known.
    boosting, _ = fit_boosting(vectors, labels, [], seed=seed, threads=threads, check_stop=check_stop)

    predicted = predictions_for(training, found)
    every = np.ones(len(labels), bool)
    blend = fit_blend(predicted, labels, songs=every, songs_of_model=every, groups=groups)
    write_stack(Stack(ridge, svr, boosting, blend), out / "stack")
    write_intervals({name: half_widths(predicted[name], labels) for name in ("stack", "model")}, out / "stack")
    write_seen(out / "stack", identities(training.songs))


def evaluate_by_folds(
    partition: Partition,
    *,
    found: OutOfFold,
    config: EvaluateConfig,
    seed: int,
    out: Path,
    summary: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write `predictions.csv`, `baselines.csv` and `metrics.json` as `evaluate` does, of the folds' predictions for all songs.

    The column fold names the fold whose run has predicted a song. metrics.json says what was scored. Its coverage of intervals is
    missing: their widths are quantiles of the errors for the same songs, which so many lie within by construction. summary:
    of the ViT's training, see `said_by`.
    """
    training, predicted = partition.training, predictions_for(partition.training, found)
    ids, folds = [song.song_id for song in training.songs], {song.song_id: song.fold for song in found.songs}
    columns = {"true": labels_of(training), "pred": predicted["model"], "stack": predicted["stack"]}
    columns["lower"], columns["upper"] = half_widths(columns["stack"], columns["true"]).around(columns["stack"])
    write_predictions(out / "predictions.csv", ids, [folds[song_id] for song_id in ids], columns)
    write_baselines(
        out / "baselines.csv", ids, {name: values for name, values in predicted.items() if name not in ("stack", "model")}
    )
    metrics = metrics_of(training, predicted, groups=partition.training_groups, config=config, seed=seed)
    write_json(
        out / "metrics.json",
        {
            **metrics,
            **said_by(summary),
            "songs": {"train": len(ids), "validation": 0, "test": 0},
            "out_of_fold": {
                "scores_are_of": SCORED_BY,
                "runs": [run.run for run in found.runs],
                "stop_epoch": found.stop_epoch,
                **({} if found.keeps_synthetic is None else {"keeps_synthetic": found.keeps_synthetic}),
                "over_seeds": found.over_seeds,
            },
        },
    )


def predictions_for(songs: TrainingSongs, found: OutOfFold) -> dict[str, Array]:
    """Predictor → [songs, 2] in the order of these songs, which are those of `found`."""
    by_song = {song.song_id: song.predicted for song in found.songs}
    ids = [song.song_id for song in songs.songs]
    return {name: np.array([by_song[song_id][name] for song_id in ids]) for name in found.predictors}
