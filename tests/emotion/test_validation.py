from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from emotion.audio.clips import Normalisation
from emotion.audio.feature_store import Features, FeatureWriter
from emotion.audio.partition import TrainingSongs, ValidationSongs
from emotion.config import MelConfig, VitConfig
from emotion.data.songs import SongLabels
from emotion.data.splits import assign_splits
from emotion.errors import Interrupted
from emotion.training.device import Device, ResolvedPrecision
from emotion.training.memory_account import MemoryRecorder, weights
from emotion.training.schedule import steps_of
from emotion.vit.crops import crops_per_forward, predict_songs
from emotion.vit.memory import predicted_memory
from emotion.vit.network import Preprocessing, create_network, identity_normalisation, preprocessing_for
from emotion.vit.validation import MICRO_BATCHES, probe_of, validate
from job.spec.load import load_spec
from tests.emotion.trainings import context, stop_at_question

pytestmark = pytest.mark.usefixtures("one_thread")

SPECS = Path(__file__).parents[2] / "job/specs"
DEAM_SONGS, SONG_SECONDS = 1802, 45.0


class Listener(nn.Module):
    """In the place of a network: predicts the mean of a clip and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[float] = []

    def forward(self, clips: Tensor) -> Tensor:
        means = clips.mean(dim=(1, 2, 3))
        self.heard += means.tolist()
        return means[:, None].expand(-1, 2)


def write_steps(out: Path, mel: MelConfig, songs: int, parts: int, part_frames: int) -> Features:
    """Song s is in its part p as loud as s + p / 8."""
    with FeatureWriter(out, mel) as writer:
        for song in range(songs):
            loudness = (song + np.arange(parts) / 8).repeat(part_frames)
            labels = SongLabels(song, song / songs, -song / songs, 0.3, 0.3, f"artist {song}")
            writer.append(labels, np.tile(loudness[:, None], mel.mels).astype(np.float32))
    return Features(out)


@pytest.mark.parametrize("name", ["deam", "deam-t4"])
def test_validation_takes_under_15_percent_of_a_training_and_the_probe_under_a_tenth_of_an_epoch(
    name: str, tmp_path: Path
) -> None:
    spec = load_spec(SPECS / f"{name}.yaml")
    vit, mel = spec.vit, spec.mel
    ids = list(range(DEAM_SONGS))
    splits = assign_splits(ids, [f"artist {song}" for song in ids], spec.split)
    training_songs, validation_songs = splits.count("train"), splits.count("validation")
    assert 1220 < training_songs < 1232
    assert 210 < validation_songs < 222

    # The number of mel bands does not matter: 16 are fast. All songs are copies of two.
    few = mel.model_copy(update={"mels": 16})
    two = write_steps(tmp_path / "songs", few, 2, 1, mel.frames(SONG_SECONDS))
    training = TrainingSongs(two.only([song % 2 for song in range(training_songs)]))
    validation = ValidationSongs(two.only([song % 2 for song in range(validation_songs)]))
    probe = probe_of(training, validation, seed=0)
    listener = Listener()
    preprocessing = preprocessing_for(vit, few, identity_normalisation(few))
    micro = vit.micro_batch or vit.batch_size
    validate(listener, preprocessing, validation, probe, context=context(tmp_path / "out"), micro_batch=micro)
    crops = len(listener.heard)
    # With copies in the last pass of a GPU.
    gpu = Device(torch.device("cuda"), "bf16", 1, deterministic=False)
    per_forward = min(crops_per_forward(preprocessing_for(vit, mel, identity_normalisation(mel)), gpu), 4 * micro)
    on_gpu = -(-crops // per_forward) * per_forward

    # A clip in training costs a forward pass and a backward pass, which costs two for each layer that learns.
    clips = vit.batch_size * steps_of(1, training_songs, vit.batch_size - vit.synthetic_per_batch)
    learning = [np.clip((epoch - vit.frozen_epochs) / max(vit.unfreeze_epochs, 1), 0, 1) for epoch in range(round(vit.epochs))]
    trained = clips * np.mean([1 + 2 * share for share in learning])
    assert crops / (crops + trained) < 0.13
    assert on_gpu / (on_gpu + trained) < 0.15
    assert len(probe.songs) / (len(probe.songs) + validation_songs) * on_gpu < 0.1 * trained


def test_every_epoch_is_judged_by_the_same_two_crops_of_every_validation_song(tmp_path: Path) -> None:
    mel = MelConfig(mels=16)
    songs = write_steps(tmp_path / "songs", mel, 12, 5, 32)
    training, validation = TrainingSongs(songs.only(range(7))), ValidationSongs(songs.only([7, 8, 9, 10, 11]))
    # Values 0 to 12 are normalised to 0 to 1.2: nothing is clipped.
    constants = Normalisation(np.zeros(16, np.float32), np.full(16, 10, np.float32))
    preprocessing = Preprocessing(mel, constants, 32, None, channels=1, max_crops=16)
    probe = probe_of(training, validation, seed=3)
    heard, scores = [], []
    for _ in range(2):
        listener = Listener()
        scores.append(validate(listener, preprocessing, validation, probe, context=context(tmp_path / "out"), micro_batch=2))
        heard.append(listener.heard)
    assert heard[0] == heard[1]
    # Of five parts the second and the fourth.
    expected = [(song.song_id + part / 8) / 10 for song in (*validation.songs, *probe.songs) for part in (1, 3)]
    assert heard[0][: len(expected)] == pytest.approx(expected)
    assert scores[0] == scores[1]
    assert scores[0]["validation_ccc_valence"] > 0 > scores[0]["validation_ccc_arousal"]
    assert scores[0]["validation_ccc"] == pytest.approx(
        (scores[0]["validation_ccc_valence"] + scores[0]["validation_ccc_arousal"]) / 2
    )


@pytest.mark.parametrize(("validation", "probed"), [(216, 108), (65, 32), (40, 32), (8, 8), (2, 2)])
def test_the_probe_has_half_as_many_songs_but_not_few(validation: int, probed: int, tmp_path: Path) -> None:
    songs = write_steps(tmp_path, MelConfig(mels=16), 300, 1, 1)
    training, validating = TrainingSongs(songs.only(range(10, 300, 2))), ValidationSongs(songs.only(range(validation)))
    probe = [song.song_id for song in probe_of(training, validating, seed=0).songs]
    assert len(set(probe)) == len(probe) == probed
    assert set(probe) <= {song.song_id for song in training.songs}
    assert [song.song_id for song in probe_of(training, validating, seed=0).songs] == probe
    assert [song.song_id for song in probe_of(training, validating, seed=1).songs] != probe


def test_a_stop_ends_a_validation_before_the_next_forward_pass(tmp_path: Path) -> None:
    mel = MelConfig(mels=16)
    songs = write_steps(tmp_path / "songs", mel, 6, 2, 32)
    training, validation = TrainingSongs(songs.only([0, 1, 2])), ValidationSongs(songs.only([3, 4, 5]))
    preprocessing = Preprocessing(mel, identity_normalisation(mel), 32, None, channels=1, max_crops=16)
    listener = Listener()
    with pytest.raises(Interrupted, match="vit: stopped while songs were predicted"):
        validate(
            listener,
            preprocessing,
            validation,
            probe_of(training, validation, seed=0),
            context=context(tmp_path / "out", stop_at_question(3)),
            micro_batch=1,
        )
    assert len(listener.heard) == 2 * MICRO_BATCHES


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.full)])
@pytest.mark.parametrize("micro", [1, pytest.param(4, marks=pytest.mark.full)])
@pytest.mark.parametrize("model", ["test_vit", pytest.param("vit_tiny_patch16_224", marks=pytest.mark.full)])
def test_a_forward_pass_of_a_validation_needs_less_memory_than_a_step(
    model: str, micro: int, precision: ResolvedPrecision
) -> None:
    device = Device(torch.device("cpu"), precision, 1, deterministic=True)
    mel, config = MelConfig(), VitConfig(model=model, weights="random", clip_seconds=3.0, batch_size=8)
    preprocessing = preprocessing_for(config, mel, identity_normalisation(mel))
    network = create_network(config, preprocessing, None, 0).eval().requires_grad_(False)
    songs = [np.zeros((preprocessing.frames, mel.mels), np.float16)] * (2 * MICRO_BATCHES * micro)
    with MemoryRecorder(torch.device("cpu"), lambda: {"parameters": weights(network)}, []) as recorder:
        predict_songs(network, preprocessing, device, songs, per_forward=MICRO_BATCHES * micro)
    step = predicted_memory(config, mel, device, micro)
    assert recorder.account["activations"] < step["activations"] + step["workspace"]
