"""Measures validation's share of a ViT's training time, and what it would be song by song, with all crops and twice the probe.

    python tests/bench/validation.py [--model NAME] [--epochs N]

A small ViT is trained with the settings of `job/specs/deam.yaml` on noise: 384 training songs and 68 validation songs of 45 s, a
third of DEAM's. After each epoch both validations run, one after the other. Each share is computed for a training with that
validation alone, without the first epoch, in which memory is measured. Takes a few minutes on two cores. Goal: under 15 %.
"""

from job.environment import limit_spinning

limit_spinning()  # before torch is imported

import argparse
import logging
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

# For importing tests.emotion.trainings when this file is run as a program.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from emotion.audio.clips import spread_starts
from emotion.audio.feature_store import Features, FeatureWriter
from emotion.config import CheckpointConfig, DeviceConfig, MelConfig
from emotion.data.leaks import write_seen
from emotion.data.songs import SongLabels
from emotion.training.context import TrainingContext
from emotion.training.device import Device, resolve_device
from emotion.vit import train
from emotion.vit.network import Preprocessing, network_input
from job.environment import available_threads
from job.spec.load import load_spec
from tests.bench.rows import record
from tests.emotion.trainings import clips_of, partition, run_vit

SPEC = Path(__file__).parents[2] / "job/specs/deam.yaml"
TRAINING, VALIDATION = 384, 68
DIFFERENT = 8
"""Number of different songs in a file; each set of songs consists of copies of them."""


def write_songs(out: Path, mel: MelConfig, seconds: float, name: str) -> Features:
    rng = np.random.default_rng(0)
    out.mkdir()
    with FeatureWriter(out, mel) as writer:
        for song in range(DIFFERENT):
            valence, arousal = rng.uniform(-1, 1, 2)
            log_mel = (-30 + 5 * rng.standard_normal((mel.frames(seconds), mel.mels))).astype(np.float32)
            digests = {"file_sha256": f"file {name} {song}", "sound_sha256": f"sound {name} {song}"} if name else {}
            writer.append(SongLabels(song, valence, arousal, 0.3, 0.3, f"{name} {song}"), log_mel, **digests)
    return Features(out)


def copies(songs: Features, count: int) -> Features:
    return songs.only([number % DIFFERENT for number in range(count)])


@torch.no_grad()
def validate_song_by_song(network: nn.Module, preprocessing: Preprocessing, device: Device, songs: Features) -> None:
    for index, song in enumerate(songs.songs):
        starts = spread_starts(song.frames, preprocessing.frames, preprocessing.max_crops)
        clips = clips_of(songs, [index] * len(starts), starts, preprocessing.frames, preprocessing.normalisation)
        with device.autocast():
            network(network_input(device.send(clips), preprocessing)).float().mean(dim=0).clamp(-1, 1).cpu().numpy()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="vit_tiny_patch16_224")
    arguments.add_argument("--epochs", type=int, default=3)
    given = arguments.parse_args()
    logging.disable()
    spec = load_spec(SPEC)
    changes = {"model": given.model, "weights": "random", "epochs": float(given.epochs), "frozen_epochs": 0.0}
    config = spec.vit.model_copy(update={**changes, "unfreeze_epochs": 0.0})
    device = resolve_device(DeviceConfig(threads=available_threads()), "auto")
    times: list[tuple[float, float, float]] = []
    validate = train.validate

    def both(network: nn.Module, preprocessing: Preprocessing, *songs: Features, **more: Any) -> dict[str, float]:
        started = time.perf_counter()
        scores = validate(network, preprocessing, *songs, **more)
        between = time.perf_counter()
        for _ in range(2):
            validate_song_by_song(network, preprocessing, device, songs[0])
        times.append((started, between, time.perf_counter()))
        return scores

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        training = copies(write_songs(root / "training", spec.mel, 45, "training"), TRAINING)
        validation = copies(write_songs(root / "validation", spec.mel, 45, "validation"), VALIDATION)
        synthetic = write_songs(root / "synthetic", spec.mel, config.clip_seconds, "")
        write_seen(synthetic.folder, {"file training 0"})
        context = TrainingContext(0, device, CheckpointConfig(every_seconds=3600), root / "out", lambda: False)
        context.out.mkdir()
        train.validate = both
        run_vit(partition(training, validation), synthetic, config, context)
    steps = statistics.median(later[0] - earlier[2] for earlier, later in pairwise(times))
    print(f"{given.model}, {device.device.type}, {device.precision}, {device.threads} threads; steps of an epoch {steps:.1f} s\n")
    print("| validation | seconds | share of the training |")
    print("|---|---|---|")
    for how, first in (("in batches", 0), ("song by song", 1)):
        taken = statistics.median(found[first + 1] - found[first] for found in times)
        print(f"| {how} | {taken:.1f} | {100 * taken / (steps + taken):.0f} % |")
        record(f"validation {how} / the whole training", taken / (steps + taken), most=0.15 if first == 0 else None)


if __name__ == "__main__":
    main()
