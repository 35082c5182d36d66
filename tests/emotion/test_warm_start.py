"""What GAN and ViT take over from a published run, and whose songs they then know."""

import json
from pathlib import Path

import numpy as np
import pytest

from emotion.audio.clips import Normalisation
from emotion.audio.feature_store import Features, FeatureWriter
from emotion.config import InitConfig, MelConfig
from emotion.data.leaks import TRAINED, write_seen
from emotion.data.songs import SongLabels
from emotion.errors import ModelError
from emotion.training.warm_start import NOTHING, Initial, initial_of, refuse_known

MEL = MelConfig(sample_rate_hz=8000, window_samples=512, hop_samples=256, mels=16, fmax_hz=4000)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A published run as far as its constants and lists go: those of gan/ are about 1, those of model/ about 2."""
    for number, folder, constants in ((1, "gan", "config.json"), (2, "model", "preprocessing.json")):
        (tmp_path / folder).mkdir()
        normalisation = Normalisation(np.full(16, number, np.float32), np.ones(16, np.float32))
        (tmp_path / folder / constants).write_text(json.dumps({"normalisation": normalisation.to_json()}))
    write_seen(tmp_path / "gan", {"seen by the GAN"})
    write_seen(tmp_path / "model", {"trained", "chosen by"})
    write_seen(tmp_path / "model", {"trained"}, TRAINED)
    return tmp_path


def mean(initial: Initial) -> float | None:
    return None if initial.normalisation is None else float(initial.normalisation.mean_db[0])


@pytest.mark.parametrize("normalisation", ["kept", "new"])
def test_weights_come_with_their_constants_if_kept_and_with_their_songs(run: Path, normalisation: str) -> None:
    config = InitConfig(run=str(run), normalisation=normalisation)
    gan, vit = initial_of("gan", config), initial_of("vit", config)
    assert (gan.weights, gan.trained_on, gan.seen) == (run / "gan", {"seen by the GAN"}, {"seen by the GAN"})
    assert (vit.weights, vit.trained_on, vit.seen) == (run / "model", {"trained"}, {"trained", "chosen by"})
    assert (mean(gan), mean(vit)) == ((1, 2) if normalisation == "kept" else (None, None))


def test_kept_constants_are_for_both_and_know_the_songs_they_were_made_from(run: Path) -> None:
    gan = initial_of("gan", InitConfig(run=str(run), gan=False))
    assert (gan.weights, mean(gan), gan.trained_on, gan.seen) == (None, 2, {"trained"}, {"trained"})
    vit = initial_of("vit", InitConfig(run=str(run), vit=False))
    assert (vit.weights, mean(vit), vit.seen) == (None, 1, {"seen by the GAN"})


def test_what_takes_nothing_over_knows_no_songs(run: Path) -> None:
    assert initial_of("gan", None) is NOTHING
    assert initial_of("gan", InitConfig(run=str(run), gan=False, normalisation="new")) is NOTHING
    assert initial_of("vit", InitConfig(run=str(run), vit=False, normalisation="new")) is NOTHING
    assert (NOTHING.weights, NOTHING.normalisation, set(NOTHING.trained_on | NOTHING.seen)) == (None, None, set())


def test_songs_that_chose_the_run_may_choose_again_but_not_test_and_those_it_learnt_neither(tmp_path: Path) -> None:
    with FeatureWriter(tmp_path, MEL) as writer:
        for song in range(4):
            labels, log_mel = SongLabels(song, 0, 0, 0.1, 0.1, "a"), np.zeros((20, 16), np.float32)
            writer.append(labels, log_mel, file_sha256=f"file {song}", sound_sha256=f"sound {song}")
    songs = Features(tmp_path)
    initial = Initial(trained_on=frozenset({"file 0"}), seen=frozenset({"file 0", "sound 1"}))
    refuse_known(initial, "old-run", songs.only([1, 2]), songs.only([3]))
    for validation, test, problem in [
        (
            [2],
            [1, 3],
            r"the run old-run, .* ids: 1\. They test here\. Keep the split .* into test\.txt and .* split\.lists",
        ),
        ([0, 2], [3], r"ids: 0\. They validate here\. .* validation\.txt"),
        ([2], [0, 3], r"ids: 0\. They test here"),
    ]:
        with pytest.raises(ModelError, match=problem):
            refuse_known(initial, "old-run", songs.only(validation), songs.only(test))
