"""Levels of the channels of a sound: sines, whose numbers are known."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from emotion.audio.levels import Levels
from emotion.audio.mel import LogMel
from emotion.audio.song_decoding import decode_song
from emotion.config import MelConfig

RATE_HZ = 8000
TIME = np.arange(2 * RATE_HZ) / RATE_HZ
LEFT, RIGHT = np.sin(2 * np.pi * 440 * TIME), np.sin(2 * np.pi * 660 * TIME)  # whole periods: unrelated


def levels_of(*channels: np.ndarray, blocks: int = 1) -> Levels:
    found = Levels()
    for block in np.array_split(np.stack(channels, axis=1).astype(np.float32), blocks):
        found.add(block)
    return found


def test_averaging_equal_channels_loses_nothing_unrelated_ones_3_db_and_opposite_ones_all() -> None:
    assert levels_of(LEFT).lost_db == pytest.approx(0, abs=1e-6)
    assert levels_of(LEFT, LEFT).lost_db == pytest.approx(0, abs=1e-3)
    assert levels_of(LEFT, RIGHT).lost_db == pytest.approx(10 * np.log10(2), abs=1e-2)
    assert levels_of(LEFT, -LEFT).lost_db > 60
    assert levels_of(LEFT, -0.5 * LEFT, blocks=7).lost_db == pytest.approx(10 * np.log10(1.25 / 2 / 0.25**2), abs=1e-2)
    assert levels_of(0 * LEFT, 0 * LEFT).lost_db == 0


def test_a_wave_that_is_cut_off_at_full_scale_is_clipped_and_one_that_reaches_it_is_not() -> None:
    assert levels_of(0.99 * LEFT).clipped_share == 0
    assert levels_of(np.where(np.arange(len(TIME)) % 50 == 0, 1.0, 0.5 * LEFT)).clipped_share == 0, "single samples"
    # Twice too loud, a sine is beyond full scale for two thirds of the time, in two runs for each of 440 periods per second.
    share = levels_of(np.clip(2 * LEFT, -1, 1), blocks=3).clipped_share
    assert share == pytest.approx(2 / 3 - 2 * 2 * 440 / RATE_HZ, abs=0.01)
    assert levels_of(np.clip(2 * LEFT, -1, 1), 0.5 * LEFT).clipped_share == pytest.approx(share / 2, abs=0.01)


@pytest.mark.parametrize("suffix", ["wav", "mp3"])
def test_a_decoded_song_is_watched_once_and_before_its_channels_are_averaged(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"1.{suffix}"
    soundfile.write(path, np.stack([0.5 * LEFT, -0.5 * LEFT], axis=1), RATE_HZ)
    seen: list[tuple[int, ...]] = []
    mel = MelConfig(sample_rate_hz=4000, window_samples=256, hop_samples=128, mels=16, fmax_hz=2000)
    found = decode_song(path, LogMel(mel), 60.0, watch=lambda block: seen.append(block.shape))
    assert {channels for _, channels in seen} == {2}
    assert sum(count for count, _ in seen) == pytest.approx(found.seconds * RATE_HZ, abs=3000 if suffix == "mp3" else 1)
    assert found.rms_db < -60
