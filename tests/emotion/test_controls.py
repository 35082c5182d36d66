"""Controls of the whole chain from log-mels to scores: what must be lost when what could be learned is taken away."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from emotion.audio.feature_store import Features, FeatureWriter
from emotion.audio.mel import LogMel
from emotion.audio.partition import Partition, partition_of
from emotion.audio.song_vectors import song_vectors
from emotion.config import EvaluateConfig, SplitConfig
from emotion.data.leaks import write_seen
from emotion.data.songs import SongLabels
from emotion.data.splits import make_split
from emotion.evaluation.evaluate import TrainedModel, evaluate
from emotion.evaluation.metrics import DIMENSIONS, concordance, paired_difference
from emotion.evaluation.stack import fit_stack, read_stack
from emotion.files import read_json
from emotion.vit.predict import SongPredictor
from tests.emotion.trainings import CPU, SMALL_MEL, SMALL_VIT, context, never, run_vit

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[np.float64]
SONGS, FOLDS = 240, 3
VIT = SMALL_VIT.model_copy(update={"epochs": 12, "batch_size": 16, "synthetic_share": 0.0})


def write_features(out: Path, log_mels: Sequence[npt.NDArray[np.floating[Any]]], labels: Array) -> Features:
    with FeatureWriter(out, SMALL_MEL) as writer:
        for song, (log_mel, (valence, arousal)) in enumerate(zip(log_mels, labels.tolist(), strict=True)):
            digests = {"file_sha256": f"file {song}", "sound_sha256": f"sound {song}"}
            row = SongLabels(song, valence, arousal, 0.3, 0.3, f"artist {song // 2}")
            writer.append(row, log_mel.astype(np.float32), **digests)
    write_seen(out, {"nobody"})
    return Features(out)


def fold_of(features: Features, fold: int) -> Partition:
    ids, groups = [song.song_id for song in features.songs], [song.group for song in features.songs]
    return partition_of(features, make_split(ids, groups, SplitConfig(folds=FOLDS, fold=fold), []))


def scores_of(songs: Partition, synthetic: Features, out: Path) -> Any:
    """metrics.json of a fold, after the phases vit, stack and evaluate."""
    run_vit(songs, synthetic, VIT, context(out))
    predict = SongPredictor(out / "model", CPU)
    fit_stack(songs, embed=None, predict=predict, seed=0, threads=1, out=out, should_stop=never)
    evaluate(
        songs,
        model=TrainedModel(out / "model", out / "stack", predict, predict.curve),
        fold=0,
        config=EvaluateConfig(bootstrap_samples=100),
        seed=0,
        out=out,
        should_stop=never,
    )
    return read_json(out / "metrics.json")


@pytest.mark.full
def test_with_shuffled_labels_no_fold_of_vit_and_stack_scores_above_chance(tmp_path: Path) -> None:
    # Level tells arousal, and the balance of low and high bands valence.
    random = np.random.default_rng(0)
    labels = random.uniform(-0.8, 0.8, (SONGS, 2))
    balance = np.linspace(-1, 1, SMALL_MEL.mels)
    noise = 3 * random.standard_normal((SONGS, 60, SMALL_MEL.mels))
    log_mels = -40 + 10 * labels[:, 1, None, None] + 8 * labels[:, 0, None, None] * balance + noise
    true = write_features(tmp_path / "true", log_mels, labels)
    shuffled = write_features(tmp_path / "shuffled", log_mels, random.permutation(labels))
    learned = scores_of(fold_of(true, 0), true.only([]), tmp_path / "learned")
    for fold in range(FOLDS):
        songs = fold_of(shuffled, fold)
        found = scores_of(songs, shuffled.only([]), tmp_path / f"fold {fold}")
        # |CCC| <= |r|, and without a relation r has the standard error 1 / sqrt(n - 1).
        chance = 3.5 / np.sqrt(len(songs.test.songs) - 1)
        for predictor in ("model", "stack"):
            for dimension in DIMENSIONS:
                # What was found can be found: it is the labels that were taken away.
                assert learned[predictor][dimension]["ccc"] > 2 * chance, (predictor, dimension)
                assert abs(found[predictor][dimension]["ccc"]) < chance, (fold, predictor, dimension)


@pytest.mark.full
def test_without_loudness_the_stack_loses_arousal(tmp_path: Path) -> None:
    # Arousal is in the level of noise (6 dB of it for a deviation of 1.5 dB) and, faintly, in its colour.
    random = np.random.default_rng(1)
    labels = random.uniform(-0.8, 0.8, (120, 2))
    log_mel = LogMel(SMALL_MEL)
    levels_db = -20 + 6 * labels[:, 1] + 1.5 * random.standard_normal(120)
    colours = 0.3 * labels[:, 1] + 0.5 * random.standard_normal(120)
    made, levelled = [], []
    for level_db, colour in zip(levels_db, colours, strict=True):
        white = random.standard_normal(12_000)
        sound = white[1:] + np.tanh(colour) * white[:-1]
        sound /= np.sqrt((sound**2).mean())
        made.append(log_mel((10 ** (level_db / 20) * sound).astype(np.float32)))
        levelled.append(log_mel((0.1 * sound).astype(np.float32)))
    predicted, actual = [], np.zeros(0)
    for name, log_mels in (("made", made), ("levelled", levelled)):
        songs = fold_of(write_features(tmp_path / name, log_mels, labels), 0)
        no_vit = np.zeros((len(songs.validation.songs), 2))
        out = tmp_path / f"{name} stack"
        fit_stack(songs, embed=None, predict=lambda *_, given=no_vit: given, seed=0, threads=1, out=out, should_stop=never)
        vectors = song_vectors(songs.test, 1, lambda: None)
        predicted.append(read_stack(out / "stack").predict(vectors, np.zeros((len(vectors), 2))))
        actual = songs.test.labels.astype(np.float64)
    heard, deaf = (concordance(pair[:, 1], actual[:, 1]) for pair in predicted)
    assert heard > 0.8
    assert deaf < heard - 0.3
    difference = paired_difference(*predicted, actual, groups=None, bootstrap_samples=200, seed=0)["arousal"]["ccc_difference_ci"]
    assert isinstance(difference, list)
    assert difference[0] > 0.2
