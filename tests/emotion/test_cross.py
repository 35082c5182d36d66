"""A run on other songs: which are scored, and by what."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from emotion.audio.feature_store import Features
from emotion.audio.song_vectors import song_vectors
from emotion.data.leaks import write_seen
from emotion.errors import DataError
from emotion.evaluation.boosting import BoostedTrees
from emotion.evaluation.cross import scores_on
from emotion.evaluation.evaluate import TrainedModel
from emotion.evaluation.metrics import concordance
from emotion.evaluation.regressors import KernelRegressor, LinearRegressor, Scaling
from emotion.evaluation.stack import Stack, write_stack
from tests.emotion.trainings import SMALL_MEL, plain_blend, write_songs


def loudness(songs: Any, check_stop: Any) -> npt.NDArray[np.float64]:
    """Arousal as the songs were made with (see write_songs), valence 0."""
    check_stop()
    return np.array([[0.0, (float(song.mean()) + 30) / 10] for song in songs])


def no_curve(_song: Any, _check_stop: Any) -> Any:
    raise AssertionError("songs are scored as wholes")


def nothing() -> None:
    pass


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Features:
    return write_songs(tmp_path_factory.mktemp("songs"), SMALL_MEL, 8)


def run(folder: Path, numbers: int, seen: tuple[set[str], set[str]]) -> TrainedModel:
    """A run whose ridge predicts (0.5, 0.25) and whose stack is half of ridge and half of the ViT."""
    (folder / "model").mkdir()
    scaling = Scaling(np.zeros(numbers), np.ones(numbers))
    ridge = LinearRegressor(scaling, np.zeros((numbers, 2)), np.array([0.5, 0.25]))
    svr = KernelRegressor(scaling, np.zeros((1, numbers)), np.zeros((1, 2)), np.array([-0.5, 0.0]), np.ones(2))
    nodes, leaf = np.zeros((2, 1, 1), np.int32), np.zeros((2, 1, 1))
    trees = BoostedTrees(np.zeros(2), nodes, leaf, nodes, nodes, leaf)
    write_stack(Stack(ridge, svr, trees, plain_blend(model_share=0.5)), folder / "stack")
    for name, digests in zip(("model", "stack"), seen, strict=True):
        write_seen(folder / name, digests)
    return TrainedModel(folder / "model", folder / "stack", loudness, no_curve)


def test_songs_that_vit_or_stack_have_seen_are_left_out_and_the_others_scored(songs: Features, tmp_path: Path) -> None:
    numbers = song_vectors(songs, 1, nothing).shape[1]
    model = run(tmp_path, numbers, ({"file 2", "other"}, {"sound 5"}))
    found = scores_on(songs, model, bootstrap_samples=100, seed=0, check_stop=nothing)
    assert found["seen_by_the_run"] == [2, 5]
    assert found["songs"] == 6
    others = songs.only([0, 1, 3, 4, 6, 7])
    heard = loudness([others.stored(index) for index in range(6)], nothing)[:, 1]
    assert found["model"]["arousal"]["ccc"] == pytest.approx(concordance(heard, others.labels[:, 1]))
    assert found["model"]["arousal"]["ccc"] > 0.9
    assert found["stack"]["arousal"]["ccc"] == pytest.approx(concordance((heard + 0.25) / 2, others.labels[:, 1]))
    assert found["baselines"]["ridge"]["valence"]["mae"] == pytest.approx(np.abs(0.5 - others.labels[:, 0]).mean())
    assert set(found["baselines"]) == {"ridge", "svr", "boosting"}


def test_a_set_of_which_the_run_has_seen_every_song_is_refused(songs: Features, tmp_path: Path) -> None:
    model = run(tmp_path, 3, ({f"file {song}" for song in range(8)}, {"nobody"}))
    with pytest.raises(DataError, match="the run has seen all of these 8 songs"):
        scores_on(songs, model, bootstrap_samples=100, seed=0, check_stop=nothing)
