"""The intervals of a fitted stack: which songs stand behind them, and that none was fitted to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from emotion.audio.feature_store import Features, FeatureWriter
from emotion.audio.partition import Partition
from emotion.data.songs import SongLabels
from emotion.evaluation.conformal import HalfWidths, read_intervals
from emotion.evaluation.regressors import grouped_folds
from emotion.evaluation.stack import fit_stack, held_out_blends, read_stack
from tests.emotion.trainings import SMALL_MEL, never, partition

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINING, VALIDATION = 36, 18
Array = npt.NDArray[np.float64]


def write_labelled(out: Path, labels: Array, level_db: Array) -> Features:
    """Noise of a level for each song. labels: [songs, 2]."""
    random = np.random.default_rng(0)
    with FeatureWriter(out, SMALL_MEL) as writer:
        for song, (valence, arousal) in enumerate(labels.tolist()):
            log_mel = (level_db[song] + 3 * random.standard_normal((60, SMALL_MEL.mels))).astype(np.float32)
            digests = {"file_sha256": f"file {song}", "sound_sha256": f"sound {song}"}
            writer.append(SongLabels(song, valence, arousal, 0.3, 0.3, f"artist {song // 2}"), log_mel, **digests)
    return Features(out)


def fitted(out: Path, songs: Partition, model: Array) -> dict[str, HalfWidths]:
    """model: [validation songs, 2], the predictions of a ViT."""

    def predict(_: Sequence[Any], __: Any) -> Array:
        return model

    fit_stack(songs, embed=None, predict=predict, seed=0, threads=1, out=out, should_stop=never)
    return read_intervals(out / "stack")


NOISE = {"ridge": 2.0, "svr": 1.0, "boosting": 1.0, "model": 0.3}  # errors of each member, in SDs of the labels


def split(features: Features) -> Partition:
    return partition(features.only(range(TRAINING)), features.only(range(TRAINING, TRAINING + VALIDATION)))


def test_where_the_vit_has_a_share_its_validation_songs_count_and_else_all_songs(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    labels = random.uniform(-0.8, 0.8, (TRAINING + VALIDATION, 2)).round(3)
    features = write_labelled(tmp_path / "songs", labels, np.full(len(labels), -40.0))
    # The sound says nothing. The ViT knows valence, but for errors of known sizes, and nothing of arousal.
    errors = np.linspace(0.01, 0.18, VALIDATION)
    actual = features.labels[TRAINING:].astype(np.float64)
    model = np.column_stack([actual[:, 0] + errors * np.where(np.arange(VALIDATION) % 2, 1, -1), np.full(VALIDATION, 0.1)])
    found = fitted(tmp_path, split(features), model)
    assert read_stack(tmp_path / "stack").blend.model_share.tolist() == [pytest.approx(1, abs=0.15), 0]
    assert found["stack"].songs.tolist() == [VALIDATION, TRAINING + VALIDATION]
    assert found["model"].songs.tolist() == [VALIDATION, VALIDATION]
    # Of 18 songs the rank is 18, of 9.5 / 10 of the labels none is more than 0.8 away from the middle.
    assert found["model"].width == pytest.approx([0.18, np.abs(actual[:, 1] - 0.1).max()])
    assert 0.15 < found["stack"].width[0] < 0.35


def test_the_widths_are_of_songs_that_were_not_fitted_to(tmp_path: Path) -> None:
    # Labels of noise: regressors of as many numbers as songs know those that they were fitted to, and nothing of others.
    random = np.random.default_rng(2)
    labels = random.choice([-0.5, 0.5], (TRAINING + VALIDATION, 2))
    features = write_labelled(tmp_path / "songs", labels, np.full(len(labels), -40.0))
    found = fitted(tmp_path, split(features), np.zeros((VALIDATION, 2)))
    # What knows nothing is wrong by about 0.5.
    assert (found["stack"].width > 0.45).all()


def test_the_blend_for_a_song_does_not_depend_on_the_labels_of_its_fold() -> None:
    random = np.random.default_rng(3)
    groups = [f"artist {song // 2}" for song in range(40)]
    folds = grouped_folds(groups, 0)
    truth = random.normal(size=(40, 2))
    predictions = {name: truth + error * random.normal(size=(40, 2)) for name, error in NOISE.items()}
    settings = {"songs": np.arange(40) < 36, "songs_of_model": np.arange(40) > 12, "groups": groups, "folds": folds}
    before = held_out_blends(predictions, truth, **settings)
    for _, held_out in folds:
        others = truth.copy()
        others[held_out] = predictions["ridge"][held_out]
        for was, found in zip(before, held_out_blends(predictions, others, **settings), strict=True):
            np.testing.assert_array_equal(found[held_out], was[held_out])
            assert not np.array_equal(found, was)


def test_few_songs_have_intervals_over_the_whole_range(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    features = write_labelled(tmp_path / "songs", random.uniform(-0.8, 0.8, (8, 2)), np.full(8, -40.0))
    songs = partition(features.only(range(5)), features.only(range(5, 8)))
    found = fitted(tmp_path, songs, np.zeros((3, 2)))
    for widths, count in ((found["stack"], 8), (found["model"], 3)):
        assert widths.width.tolist() == [float("inf")] * 2
        assert widths.songs.tolist() == [count] * 2
