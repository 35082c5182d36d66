"""Stack and scores of a model that is trained on all songs, from what its folds have predicted."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from emotion.audio.feature_store import Features
from emotion.config import EvaluateConfig
from emotion.data.leaks import identities, read_seen
from emotion.data.out_of_fold import FoldRun, OutOfFold, SongPredictions
from emotion.errors import Interrupted
from emotion.evaluation.final import evaluate_by_folds, fit_final_stack
from emotion.evaluation.metrics import scores
from emotion.evaluation.stack import read_stack
from tests.emotion.trainings import SMALL_MEL, never, partition, stop_at_question, write_songs

SONGS = 24
RUNS = [FoldRun("a-0", 0, 0, 0, "0", {"best_epoch": 3}), FoldRun("a-1", 0, 0, 1, "0", {"best_epoch": 5})]


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Features:
    return write_songs(tmp_path_factory.mktemp("songs"), SMALL_MEL, SONGS)


def folds(songs: Features, noise: dict[str, float]) -> OutOfFold:
    """noise: of the predictions of each member. The songs come in another order than in the features."""
    random = np.random.default_rng(0)
    predictions = []
    for song, labels in reversed([*zip(songs.songs, songs.labels.astype(float), strict=True)]):
        members = {name: labels + amount * random.standard_normal(2) for name, amount in sorted(noise.items())}
        predicted = {name: (float(pair[0]), float(pair[1])) for name, pair in members.items()}
        predictions.append(SongPredictions(song.song_id, int(song.song_id) % 2, (labels[0], labels[1]), predicted))
    return OutOfFold({}, {}, frozenset(), RUNS, predictions, {})


@pytest.mark.parametrize(("model", "share"), [(0.0, 1.0), (3.0, 0.0)])
def test_the_vit_gets_the_share_that_its_predictions_in_the_folds_have_earned(
    songs: Features, tmp_path: Path, model: float, share: float
) -> None:
    found = folds(songs, {"stack": 0.1, "model": model, "ridge": 0.3, "svr": 0.3, "boosting": 0.3})
    fit_final_stack(partition(songs), found=found, embed=None, seed=0, threads=1, out=tmp_path, should_stop=never)
    stack = read_stack(tmp_path / "stack")
    assert stack.blend.model_share == pytest.approx([share, share], abs=0.02)
    assert read_seen(tmp_path / "stack") == identities(songs.songs)


def test_the_better_of_ridge_and_svr_in_the_folds_gets_the_larger_share(songs: Features, tmp_path: Path) -> None:
    found = folds(songs, {"stack": 0.1, "model": 3, "ridge": 2, "svr": 0.01, "boosting": 2})
    fit_final_stack(partition(songs), found=found, embed=None, seed=0, threads=1, out=tmp_path, should_stop=never)
    assert (read_stack(tmp_path / "stack").blend.svr_share > 0.9).all()
    with pytest.raises(Interrupted):
        fit_final_stack(
            partition(songs), found=found, embed=None, seed=0, threads=1, out=tmp_path, should_stop=stop_at_question(1)
        )


def test_the_scores_are_those_of_the_folds_and_the_metrics_say_so(songs: Features, tmp_path: Path) -> None:
    found = folds(songs, {"stack": 0.1, "model": 0.5, "ridge": 0.3, "svr": 0.3, "boosting": 0.3, "constant": 1.0})
    evaluate_by_folds(partition(songs), found=found, config=EvaluateConfig(bootstrap_samples=100), seed=3, out=tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    of_song = {song.song_id: song.predicted for song in found.songs}
    for name in ("stack", "model"):
        predicted = np.array([of_song[song.song_id][name] for song in songs.songs])
        groups = [song.group for song in songs.songs]
        assert metrics[name] == scores(predicted, songs.labels.astype(np.float64), groups=groups, bootstrap_samples=100, seed=3)
    assert set(metrics["baselines"]) == {"ridge", "svr", "boosting", "constant"}
    assert metrics["songs"] == {"train": SONGS, "validation": 0, "test": 0}
    assert metrics["out_of_fold"]["stop_epoch"] == 4
    assert metrics["out_of_fold"]["runs"] == ["a-0", "a-1"]
    assert "test" not in metrics["scale"]
    rows = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert [(int(row["song_id"]), int(row["fold"])) for row in rows] == [(song, song % 2) for song in range(SONGS)]
    assert [float(row["valence_stack"]) for row in rows] == [of_song[song.song_id]["stack"][0] for song in songs.songs]
    assert len((tmp_path / "baselines.csv").read_text().splitlines()) == 1 + 4 * SONGS
