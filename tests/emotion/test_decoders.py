"""Our decoder against one that shares no code with it."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.emotion.sounds import decode


@pytest.mark.full
def test_ffmpeg_decodes_the_same_samples(component: Callable[[str], str], tmp_path: Path) -> None:
    rate = 44100
    time = np.arange(5 * rate) / rate
    left = 0.3 * np.sin(2 * np.pi * 440 * time) * (1 + np.sin(2 * np.pi * time)) / 2
    right = 0.2 * np.sin(2 * np.pi * 1234 * time)
    path = tmp_path / "sound.mp3"
    soundfile.write(path, np.stack([left, right], axis=1), rate, format="MP3")
    command = [component("ffmpeg"), "-v", "error", "-i", str(path), "-f", "f32le", "-ac", "2", "-"]
    theirs_by_channel = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, "<f4").reshape(-1, 2)
    ours, theirs = decode(path, rate), theirs_by_channel.mean(axis=1)
    assert abs(len(ours) - len(theirs)) < 0.06 * rate
    shared = min(len(ours), len(theirs))
    assert np.abs(ours[:shared] - theirs[:shared]).max() < 1e-3
