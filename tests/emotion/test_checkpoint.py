import json
from pathlib import Path
from typing import Any

import pytest
import torch

from emotion.checkpoint import Checkpoint
from emotion.config import CheckpointConfig
from emotion.errors import ModelError


class Box:
    """Anything with a state."""

    def __init__(self, value: float) -> None:
        self.state: dict[str, Any] = {"value": torch.full((1000,), value), "count": 3}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def checkpoint_of(folder: Path, box: Box, keep: int = 2) -> Checkpoint:
    return Checkpoint(folder, CheckpointConfig(every_seconds=1e9, keep=keep), box=box)


def saved(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint_of(folder, Box(float(step))).save(step)


def test_nothing_saved_means_step_0(tmp_path: Path) -> None:
    assert checkpoint_of(tmp_path / "none", Box(1.0)).restore() == 0


def test_restores_the_newest_by_number_not_by_name(tmp_path: Path) -> None:
    saved(tmp_path, 9, 10)
    box = Box(0.0)
    assert checkpoint_of(tmp_path, box).restore() == 10
    assert box.state["value"][0] == 10


def test_keeps_the_newest_and_no_orphans(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-2.ckpt",
        "step-2.json",
        "step-3.ckpt",
        "step-3.json",
    ]


@pytest.mark.parametrize("position", [0, 100, 2500, -1])
def test_one_flipped_bit_is_found_and_the_one_before_is_used(tmp_path: Path, position: int) -> None:
    saved(tmp_path, 1, 2)
    data = bytearray((tmp_path / "step-2.ckpt").read_bytes())
    data[position] ^= 1
    (tmp_path / "step-2.ckpt").write_bytes(data)
    box = Box(0.0)
    assert checkpoint_of(tmp_path, box).restore() == 1
    assert box.state["value"][0] == 1
    assert (tmp_path / "damaged" / "step-2.ckpt").exists()


@pytest.mark.parametrize("record", ["", "{}", "[]", '{"step": 2, "size": 1, "sha256": "0", "finite": true}'])
def test_a_damaged_record_counts_as_damage(tmp_path: Path, record: str) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step-2.json").write_text(record)
    assert checkpoint_of(tmp_path, Box(0.0)).restore() == 1


def test_data_without_a_record_does_not_exist(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "step-7.ckpt").write_bytes(b"half a checkp")
    assert checkpoint_of(tmp_path, Box(0.0)).restore() == 1


def test_all_damaged_stops_and_says_what_to_do(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    for path in tmp_path.glob("*.ckpt"):
        path.write_bytes(b"")
    with pytest.raises(ModelError, match="Delete the folder"):
        checkpoint_of(tmp_path, Box(0.0)).restore()


def test_what_is_not_finite_is_marked_and_not_used(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    checkpoint_of(tmp_path, Box(float("nan")), keep=1).save(2)
    assert json.loads((tmp_path / "step-2.json").read_text())["finite"] is False
    box = Box(0.0)
    assert checkpoint_of(tmp_path, box).restore() == 1
    assert box.state["value"][0] == 1


def test_objects_of_another_version_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.raises(ModelError, match="another version"):
        Checkpoint(tmp_path, CheckpointConfig(), other=Box(0.0)).restore()


def test_due_follows_the_clock(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path, CheckpointConfig(every_seconds=0), box=Box(0.0)).due()
    assert not checkpoint_of(tmp_path, Box(0.0)).due()
