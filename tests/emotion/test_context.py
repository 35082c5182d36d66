import json
from pathlib import Path

import numpy as np
import pytest

from emotion.audio.clips import Normalisation
from emotion.config import InitConfig, MelConfig
from emotion.data.leaks import TRAINED, write_seen
from emotion.errors import ModelError
from emotion.training.context import COLD_START, WarmStart, read_warm_start, refuse_known_songs
from tests.emotion.trainings import partition, write_songs

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


def mean(warm_start: WarmStart) -> float | None:
    return None if warm_start.normalisation is None else float(warm_start.normalisation.mean_db[0])


@pytest.mark.parametrize("normalisation", ["kept", "new"])
def test_weights_come_with_their_songs_and_if_kept_with_their_normalisation(run: Path, normalisation: str) -> None:
    config = InitConfig(run=str(run), normalisation=normalisation)
    gan, vit = read_warm_start("gan", config), read_warm_start("vit", config)
    assert (gan.weights, gan.trained_on, gan.seen) == (run / "gan", {"seen by the GAN"}, {"seen by the GAN"})
    assert (vit.weights, vit.trained_on, vit.seen) == (run / "model", {"trained"}, {"trained", "chosen by"})
    assert (mean(gan), mean(vit)) == ((1, 2) if normalisation == "kept" else (None, None))


def test_a_kept_normalisation_is_for_gan_and_vit_and_comes_with_its_songs(run: Path) -> None:
    gan = read_warm_start("gan", InitConfig(run=str(run), gan=False))
    assert (gan.weights, mean(gan), gan.trained_on, gan.seen) == (None, 2, {"trained"}, {"trained"})
    vit = read_warm_start("vit", InitConfig(run=str(run), vit=False))
    assert (vit.weights, mean(vit), vit.seen) == (None, 1, {"seen by the GAN"})


def test_a_part_that_takes_nothing_over_has_seen_no_songs(run: Path) -> None:
    assert read_warm_start("gan", None) is COLD_START
    assert read_warm_start("gan", InitConfig(run=str(run), gan=False, normalisation="new")) is COLD_START
    assert read_warm_start("vit", InitConfig(run=str(run), vit=False, normalisation="new")) is COLD_START
    assert (COLD_START.weights, COLD_START.normalisation, set(COLD_START.trained_on | COLD_START.seen)) == (None, None, set())


def test_songs_that_validated_the_run_may_validate_again_but_not_test_and_its_training_songs_neither(tmp_path: Path) -> None:
    songs = write_songs(tmp_path, MEL, 4)
    warm_start = WarmStart(trained_on=frozenset({"file 0"}), seen=frozenset({"file 0", "sound 1"}))
    refuse_known_songs(warm_start, partition(songs.only([]), songs.only([1, 2]), songs.only([3])), "old-run")
    for validation, test, problem in [
        (
            [2],
            [1, 3],
            r"the run old-run, .* ids: 1\. They are test songs here\. Keep the split .* into test\.txt and .* split\.lists",
        ),
        ([0, 2], [3], r"ids: 0\. They are validation songs here\. .* validation\.txt"),
        ([2], [0, 3], r"ids: 0\. They are test songs here"),
    ]:
        parts = partition(songs.only([]), songs.only(validation), songs.only(test))
        with pytest.raises(ModelError, match=problem):
            refuse_known_songs(warm_start, parts, "old-run")
