"""Fixtures that several test files of `emotion` share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emotion.audio.feature_store import Features
from emotion.config import CheckpointConfig
from emotion.data.leaks import write_seen
from tests.emotion.trainings import (
    SMALL_GAN,
    SMALL_MEL,
    SMALL_VIT,
    Train,
    context,
    never,
    partition,
    run_gan,
    run_vit,
    write_songs,
)

AT_THE_END = CheckpointConfig(every_seconds=3600)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Features:
    """Ten songs."""
    return write_songs(tmp_path_factory.mktemp("real"), SMALL_MEL, 10)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Features:
    """Five clips of a GAN that has seen the first song."""
    out = tmp_path_factory.mktemp("synthetic")
    write_seen(out, {"file 0", "sound 0"})
    return write_songs(out, SMALL_MEL, 5, seed=1, synthetic=True)


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """train("gan", out, …) runs a small training of GAN or ViT and returns its memory account."""
    real = write_songs(tmp_path_factory.mktemp("real"), SMALL_MEL, 10, seed=10)
    synthetic = write_songs(tmp_path_factory.mktemp("synthetic"), SMALL_MEL, 5, seed=5, synthetic=True)
    write_seen(synthetic.folder, {"file 0", "sound 0"})
    songs, gan_songs = partition(real.only(range(7)), real.only([7, 8, 9])), partition(real.only(range(7)))

    def run(
        phase: str,
        out: Path,
        micro: int | None = None,
        checkpoints: CheckpointConfig = AT_THE_END,
        should_stop: Callable[[], bool] = never,
    ) -> dict[str, Any]:
        training_context = context(out, should_stop, checkpoints)
        if phase == "gan":
            return run_gan(gan_songs, SMALL_GAN.model_copy(update={"micro_batch": micro}), training_context)
        return run_vit(songs, synthetic, SMALL_VIT.model_copy(update={"micro_batch": micro}), training_context)

    return run
