"""What a training or generating phase is given besides its songs and settings."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from emotion.config import CheckpointConfig
from emotion.training.device import Device


@dataclass(frozen=True)
class TrainingContext:
    """out: folder of results and checkpoints. should_stop: asked at every step; True means save and raise Interrupted."""

    seed: int
    device: Device
    checkpoints: CheckpointConfig
    out: Path
    should_stop: Callable[[], bool]
