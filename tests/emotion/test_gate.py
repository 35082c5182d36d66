"""Synthetic clips are kept where validation songs show that they help, and only there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from emotion.audio.feature_store import Features, FeatureWriter
from emotion.audio.partition import Partition
from emotion.config import CheckpointConfig, MelConfig, VitConfig
from emotion.data.leaks import write_seen
from emotion.data.songs import SongLabels
from emotion.errors import Interrupted
from emotion.training.checkpoint_files import list_steps
from emotion.training.progress import WITH, WITHOUT
from emotion.vit.crops import predict_songs
from emotion.vit.gate import STANDARD_ERRORS, mean_ccc, verdict
from emotion.vit.network import load_model
from tests.emotion.trainings import CPU, context, never, partition, run_vit, stop_at_question

pytestmark = pytest.mark.usefixtures("one_thread")

MEL = MelConfig(sample_rate_hz=8000, window_samples=512, hop_samples=256, mels=32, fmax_hz=4000)
CONFIG = VitConfig(
    model="test_vit",
    weights="random",
    clip_seconds=1.1,
    epochs=20,
    patience_epochs=20,
    batch_size=8,
    synthetic_share=0.5,
    synthetic="auto",
    learning_rate=1e-3,
    layer_decay=1.0,
    ema_decay=0.9,
    mixup_alpha=0,
    time_masks=0,
    mel_masks=0,
    max_crops=2,
)


def write_clips(
    out: Path, count: int, *, seed: int, alike: int = 0, synthetic: bool = False, mislabelled: bool = False
) -> Features:
    """Songs as loud as they are arousing, with as much treble as they are pleasant.

    alike: so many of the first have about the same label. mislabelled: all have labels of others.
    """
    rng = np.random.default_rng(seed)
    heard = rng.uniform(-1, 1, (count, 2))
    heard[:alike] *= 0.1
    told = rng.uniform(-1, 1, (count, 2)) if mislabelled else heard
    treble = np.linspace(-1, 1, MEL.mels)
    with FeatureWriter(out, MEL) as writer:
        for song in range(count):
            valence, arousal = heard[song]
            log_mel = -30 + 10 * arousal + 10 * valence * treble + 3 * rng.standard_normal((60, MEL.mels))
            digests = {} if synthetic else {"file_sha256": f"file {song}", "sound_sha256": f"sound {song}"}
            labels = SongLabels(song, *told[song].tolist(), 0.3, 0.3, f"artist {song}")
            writer.append(labels, log_mel.astype(np.float32), **digests)
    if synthetic:
        write_seen(out, {"file 0", "sound 0"})
    return Features(out)


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Partition:
    """Four songs to train on, so alike that little can be learnt from them, and 24 to validate."""
    real = write_clips(tmp_path_factory.mktemp("real"), 28, seed=1, alike=4)
    return partition(real.only(range(4)), real.only(range(4, 28)))


@pytest.fixture(scope="module")
def truthful(tmp_path_factory: pytest.TempPathFactory) -> Features:
    return write_clips(tmp_path_factory.mktemp("truthful"), 80, seed=2, synthetic=True)


def decided(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())["synthetic_clips"]
    return found


def records_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


# Trainings


@pytest.mark.full
def test_clips_that_carry_what_few_songs_do_not_are_kept(songs: Partition, truthful: Features, tmp_path: Path) -> None:
    run_vit(songs, truthful, CONFIG, context(tmp_path / "auto"))
    found = decided(tmp_path / "auto")
    assert found["kept"], found
    assert found["ccc_with"] > found["ccc_without"] + 0.2
    # What was compared is what is published, and not the weights of the last epoch.
    network, preprocessing = load_model(tmp_path / "auto" / "model", CPU)
    validation = songs.validation
    predicted = predict_songs(network, preprocessing, CPU, [validation.stored(song) for song in range(24)])
    assert found["ccc_with"] == pytest.approx(mean_ccc(predicted, validation.labels), abs=1e-6)
    run_vit(songs, truthful, CONFIG.model_copy(update={"synthetic": "always"}), context(tmp_path / "always"))
    assert all(torch.equal(value, weights_of(tmp_path / "auto")[name]) for name, value in weights_of(tmp_path / "always").items())


def test_clips_with_the_labels_of_others_are_left_out_and_leave_no_trace_in_the_model(songs: Partition, tmp_path: Path) -> None:
    models = []
    for seed in (3, 5):
        clips = write_clips(tmp_path / f"clips {seed}", 80, seed=seed, synthetic=True, mislabelled=True)
        run_vit(songs, clips, CONFIG, context(tmp_path / str(seed)))
        assert not decided(tmp_path / str(seed))["kept"]
        models.append(weights_of(tmp_path / str(seed)))
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_both_trainings_have_as_many_steps_and_validations_of_as_many_clips(
    songs: Partition, truthful: Features, tmp_path: Path
) -> None:
    run_vit(songs, truthful, CONFIG.model_copy(update={"epochs": 3}), context(tmp_path))
    records = records_of(tmp_path)
    for name in ("epoch", "loss"):
        without, with_clips = (
            [record["training_step"] for record in records if record["training"] == training and name in record]
            for training in (WITHOUT, WITH)
        )
        assert without == with_clips
    assert [record["step"] for record in records] == sorted(record["step"] for record in records)
    assert {record["training"] for record in records} == {WITHOUT, WITH}
    losses = [[r["loss"] for r in records if r["training"] == training and "loss" in r] for training in (WITHOUT, WITH)]
    assert losses[0] != losses[1]


@pytest.mark.full
@pytest.mark.parametrize("every_seconds", [3600, 0])
def test_interrupted_in_either_training_or_the_choice_and_resumed_it_ends_with_the_same_bytes(
    songs: Partition, truthful: Features, tmp_path: Path, every_seconds: float
) -> None:
    config = CONFIG.model_copy(update={"epochs": 2, "patience_epochs": 2, "max_crops": 1})
    checkpoints = CheckpointConfig(every_seconds=every_seconds)

    def train(out: Path, should_stop: Callable[[], bool] = never) -> dict[str, Any]:
        run_vit(songs, truthful, config, context(out, should_stop, checkpoints))
        shown = [{name: value for name, value in record.items() if name != "time"} for record in records_of(out)]
        return {"model": (out / "model" / "model.safetensors").read_bytes(), "summary": decided(out), "records": shown}

    asked: list[bool] = []
    whole = train(tmp_path / "whole", lambda: bool(asked.append(False)))
    # In either training and, the last one, in the choice; all others with `make test-all`.
    for stop_at in (*range(3, len(asked) - 1, 6 if every_seconds else 1), len(asked) - 1):
        out = tmp_path / str(stop_at)
        with pytest.raises(Interrupted):
            train(out, stop_at_question(stop_at + 1))
        if stop_at == len(asked) - 1:
            assert list_steps(out / "checkpoints")[-1] == whole["records"][-1]["step"], "what was trained is not lost"
        assert train(out) == whole, stop_at


def test_a_second_training_that_lost_its_checkpoints_resumes_from_one_of_the_first(
    songs: Partition, truthful: Features, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"epochs": 4, "patience_epochs": 4, "max_crops": 1})
    always = CheckpointConfig(every_seconds=0, keep=9)
    run_vit(songs, truthful, config, context(tmp_path / "whole"))
    second = next(record["step"] for record in records_of(tmp_path / "whole") if record["training"] == WITH)
    checkpoints = tmp_path / "struck" / "checkpoints"

    def steps() -> list[int]:
        return sorted(int(path.stem.removeprefix("step-")) for path in checkpoints.glob("step-*.json"))

    with pytest.raises(Interrupted):
        run_vit(songs, truthful, config, context(checkpoints.parent, lambda: max(steps(), default=0) >= second, always))
    assert steps()[0] < second <= steps()[-1]
    for step in steps():
        if step >= second:
            (checkpoints / f"step-{step}.ckpt").write_bytes(b"damaged")
    run_vit(songs, truthful, config, context(checkpoints.parent))
    assert decided(checkpoints.parent) == decided(tmp_path / "whole")
    found = weights_of(checkpoints.parent)
    assert all(torch.equal(value, found[name]) for name, value in weights_of(tmp_path / "whole").items())


# The decision

LABELS = np.random.default_rng(4).uniform(-1, 1, (30, 2))
ARTISTS = [f"artist {song // 3}" for song in range(30)]


def near(labels: np.ndarray[Any, np.dtype[np.float64]], error: float, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return labels + error * np.random.default_rng(seed).standard_normal(labels.shape)


def test_a_clear_gain_is_kept_and_the_same_loss_is_not() -> None:
    good, poor = near(LABELS, 0.1, 1), near(LABELS, 0.8, 2)
    assert verdict(good, poor, LABELS, ARTISTS)["kept"]
    assert not verdict(poor, good, LABELS, ARTISTS)["kept"]
    assert not verdict(good, good, LABELS, ARTISTS)["kept"]


def test_a_gain_within_two_standard_errors_is_left_out() -> None:
    """Such as one of about one and a half."""
    ratios = {}
    for seed in range(40):
        found = verdict(near(LABELS, 0.30, 100 + seed), near(LABELS, 0.36, 200 + seed), LABELS, ARTISTS)
        ratios[seed] = found["difference"] / found["standard_error"]
        assert found["kept"] == (ratios[seed] > STANDARD_ERRORS)
    assert any(1 < ratio < 2 for ratio in ratios.values())
    assert any(ratio > 2 for ratio in ratios.values())


def test_the_standard_error_is_that_of_other_groups_of_songs() -> None:
    """As drawn many times: songs of one group have like labels and errors, so it is more than that of single songs."""
    rng = np.random.default_rng(5)
    labels, errors = np.repeat(rng.uniform(-1, 1, (2, 40, 2)), 3, axis=1)
    first, second = near(labels + 0.6 * errors, 0.1, 7), near(labels, 0.1, 6)
    found = verdict(first, second, labels, [str(song // 3) for song in range(120)])

    def ccc(predicted: Any, actual: Any) -> float:
        # Lin 1989, by the expectation of the squared distance.
        distance = ((predicted - actual) ** 2).mean(axis=0)
        spread = predicted.var(axis=0) + actual.var(axis=0) + (predicted.mean(axis=0) - actual.mean(axis=0)) ** 2
        return float((1 - distance / spread).mean())

    assert found["difference"] == pytest.approx(ccc(first, labels) - ccc(second, labels), abs=1e-12)
    drawn = []
    for _ in range(1000):
        chosen = (3 * rng.integers(0, 40, 40)[:, None] + np.arange(3)).ravel()
        drawn.append(ccc(first[chosen], labels[chosen]) - ccc(second[chosen], labels[chosen]))
    assert found["standard_error"] == pytest.approx(np.std(drawn), rel=0.15)
    single = verdict(first, second, labels, [str(song) for song in range(120)])
    assert found["standard_error"] > 1.5 * single["standard_error"]


def test_of_equal_trainings_few_pass_the_gate() -> None:
    rng, passed = np.random.default_rng(0), np.zeros(2)
    artists = [str(song // 3) for song in range(30)]
    for _ in range(200):
        actual = 0.25 * rng.standard_normal((30, 2))
        shared, of_artists = rng.standard_normal((30, 2)), np.repeat(rng.standard_normal((2, 10, 2)), 3, axis=1)
        one, other = (
            0.6 * actual + 0.15 * (0.7 * shared + 0.5 * of_artists[training] + 0.5 * rng.standard_normal((30, 2)))
            for training in (0, 1)
        )
        found = verdict(one, other, actual, artists)
        passed += [found["kept"], found["difference"] > found["standard_error"]]
    assert passed[0] <= 0.08 * 200 < passed[1]


def test_what_cannot_be_told_is_left_out() -> None:
    good, poor = near(LABELS, 0.1, 1), near(LABELS, 0.8, 2)
    two = ["a"] * 15 + ["b"] * 15
    assert "songs of 2 groups cannot show" in verdict(good, poor, LABELS, two)["why"]
    assert not verdict(good, poor, LABELS, two)["kept"]
    labels = np.concatenate([np.linspace(-1, 1, 20).reshape(10, 2), np.zeros((20, 2))])
    found = verdict(labels, labels / 2, labels, ["a"] * 10 + ["b"] * 10 + ["c"] * 10)
    assert found["difference"] > 0
    assert not found["kept"]
    assert "without one group" in found["why"]


def test_specs_without_the_key_keep_their_keys_and_auto_needs_synthetic_clips() -> None:
    assert "synthetic" not in VitConfig().result_fields()
    assert CONFIG.result_fields()["synthetic"] == "auto"
    with pytest.raises(ValueError, match="puts none into a batch of 8"):
        VitConfig.model_validate(CONFIG.model_dump() | {"synthetic_share": 0.0})
