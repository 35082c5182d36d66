"""Small trainings, as the phases call them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from emotion.audio.clips import Normalisation
from emotion.audio.feature_store import Features, FeatureWriter
from emotion.audio.partition import Partition, TestSongs, TrainingSongs, ValidationSongs
from emotion.compat import timm
from emotion.config import CheckpointConfig, GanConfig, MelConfig, VitConfig
from emotion.data.songs import SongLabels
from emotion.evaluation.stack import Blend
from emotion.gan.memory import gan_backoff
from emotion.gan.train import train_gan
from emotion.training.clip_source import ClipSource, Stream
from emotion.training.context import COLD_START, TrainingContext, WarmStart
from emotion.training.device import Device
from emotion.vit.gate import FoundByFolds
from emotion.vit.memory import vit_backoff
from emotion.vit.train import train_vit


class RoomyDevice(Device):
    """Says how much memory is free, as a GPU does."""

    def free_bytes(self) -> int:
        return 1 << 40


CPU = Device(torch.device("cpu"), "fp32", threads=1, deterministic=True)
ROOMY_CPU = RoomyDevice(torch.device("cpu"), "fp32", threads=1, deterministic=True)


def never() -> bool:
    return False


def stop_at_question(number: int) -> Callable[[], bool]:
    """A should_stop that answers True from this question on, counted from 1."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked >= number

    return should_stop


def pretrained_vit(folder: Path) -> VitConfig:
    """SMALL_VIT, for two epochs on real clips, with weights in a file: those of a network that has not been trained."""
    torch.manual_seed(7)
    path = folder / "weights.pt"
    torch.save(timm.create_model(SMALL_VIT.model, pretrained=False, in_chans=1).state_dict(), path)
    changes = {"weights": str(path), "weights_mel": "other", "epochs": 2, "synthetic_share": 0.0}
    return SMALL_VIT.model_copy(update=changes)


def write_songs(
    out: Path, mel: MelConfig, songs: int, *, frames: int = 80, seed: int = 0, synthetic: bool = False, first: int = 0
) -> Features:
    """Noise that is as loud as its label is arousing. Song 3 has the digests "file 3" and "sound 3", unless synthetic. first: id
    of the first song."""
    rng = np.random.default_rng(seed)
    with FeatureWriter(out, mel) as writer:
        for song in range(first, first + songs):
            valence, arousal = rng.uniform(-1, 1, 2)
            log_mel = (-30 + 10 * arousal + 3 * rng.standard_normal((frames, mel.mels))).astype(np.float32)
            digests = {} if synthetic else {"file_sha256": f"file {song}", "sound_sha256": f"sound {song}"}
            writer.append(SongLabels(song, valence, arousal, 0.3, 0.3, f"artist {song}"), log_mel, **digests)
    return Features(out)


def clips_of(
    features: Features, songs: Sequence[int], starts: Sequence[int], frames: int, normalisation: Normalisation
) -> torch.Tensor:
    """As a training gets them: [clips, 1, mels, frames]."""
    source = ClipSource([Stream("any", features, len(songs))], frames, normalisation, CPU, on_device=False)
    record = {name: torch.from_numpy(array) for name, array in source.numbers([np.array(songs)], [np.array(starts)]).items()}
    return source.clips(record)


def partition(training: Features, validation: Features | None = None, test: Features | None = None) -> Partition:
    """Without validation or test songs where none are given."""
    none = training.only([])
    validation, test = none if validation is None else validation, none if test is None else test
    return Partition(
        training=TrainingSongs(training),
        validation=ValidationSongs(validation),
        test=TestSongs(test),
        training_groups=[song.group for song in training.songs],
        validation_groups=[song.group for song in validation.songs],
        test_groups=[song.group for song in test.songs],
    )


def context(
    out: Path,
    should_stop: Callable[[], bool] = never,
    checkpoints: CheckpointConfig | None = None,
    seed: int = 0,
    device: Device = CPU,
) -> TrainingContext:
    out.mkdir(exist_ok=True)
    return TrainingContext(seed, device, checkpoints or CheckpointConfig(), out, should_stop)


def run_gan(songs: Partition, config: GanConfig, context: TrainingContext, warm_start: WarmStart = COLD_START) -> dict[str, Any]:
    backoff = gan_backoff(songs, config, context.device)
    return backoff.run(lambda: train_gan(songs, config=config, context=context, backoff=backoff, warm_start=warm_start))


def run_vit(
    songs: Partition,
    synthetic: Features,
    config: VitConfig,
    context: TrainingContext,
    warm_start: WarmStart = COLD_START,
    stop_epoch: int | None = None,
) -> dict[str, Any]:
    backoff = vit_backoff(songs, synthetic, config, context.device)
    return backoff.run(
        lambda: train_vit(
            songs,
            synthetic=synthetic,
            config=config,
            context=context,
            backoff=backoff,
            warm_start=warm_start,
            folds=None if stop_epoch is None else FoundByFolds(stop_epoch),
        )
    )


SMALL_MEL = MelConfig(sample_rate_hz=8000, window_samples=512, hop_samples=256, mels=32, fmax_hz=4000)
SMALL_GAN = GanConfig(epochs=2, batch_size=6, clip_seconds=1.1, latent=3, width=4, penalty_every_steps=2, matching_weight=0.5)
SMALL_VIT = VitConfig(
    model="test_vit", weights="random", clip_seconds=1.1, epochs=2, batch_size=6, learning_rate=1e-3, max_crops=2
)
Train = Callable[..., dict[str, Any]]
"""The type of the fixture `train` (tests/emotion/conftest.py)."""


def differences(one: Path, other: Path) -> torch.Tensor:
    """Of each weight, over all networks that two trainings have left."""

    def weights(out: Path) -> torch.Tensor:
        stored = [load_file(path) for path in sorted(out.rglob("*.safetensors"))]
        return torch.cat([values[name].flatten() for values in stored for name in sorted(values)])

    return weights(one) - weights(other)


def largest_difference(one: Path, other: Path) -> float:
    return differences(one, other).abs().max().item()


def rms_difference(one: Path, other: Path) -> float:
    """For trainings that round differently: where a gradient is nearly 0, Adam turns its rounding into a step of full length."""
    return differences(one, other).square().mean().sqrt().item()


def plain_blend(model_share: float) -> Blend:
    """Of ridge and the ViT alone, not stretched."""
    zeros, ones = np.zeros(2), np.ones(2)
    return Blend(zeros, zeros, centre=zeros, slope=ones, model_share=model_share * ones)
