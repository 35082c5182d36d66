import contextlib
import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emotion.config import CheckpointConfig
from emotion.errors import ModelError, StorageError
from emotion.training import checkpoint_files
from emotion.training.checkpoint import Checkpoint

LARGE = 3_000_000


class Box:
    """Anything with a state."""

    def __init__(self, value: float, numbers: int = 1000) -> None:
        self.state: dict[str, Any] = {"value": torch.full((numbers,), value), "count": 3}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def checkpoint_of(folder: Path, box: Box, keep: int = 2) -> Checkpoint:
    return Checkpoint(folder, CheckpointConfig(every_seconds=1e9, keep=keep), box=box)


def saved(folder: Path, *steps: int, keep: int = 2) -> None:
    for step in steps:
        with checkpoint_of(folder, Box(float(step)), keep) as checkpoint:
            checkpoint.save(step)


def test_without_checkpoints_a_training_starts_at_step_0(tmp_path: Path) -> None:
    assert checkpoint_of(tmp_path / "none", Box(1.0)).restore() == 0


def test_restores_the_newest_by_number_not_by_name(tmp_path: Path) -> None:
    saved(tmp_path, 9, 10)
    box = Box(0.0)
    assert checkpoint_of(tmp_path, box).restore() == 10
    assert box.state["value"][0] == 10


def test_keeps_the_newest_and_no_orphans(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "step-2.ckpt",
        "step-2.json",
        "step-3.ckpt",
        "step-3.json",
    ]


def damaged(content: bytes, where: str) -> bytes:
    """The content of a file after one kind of damage."""
    middle = len(content) // 2
    flips = {"first": 0, "early": min(100, middle), "middle": middle, "late": -9, "last": -1}
    if where in flips:
        position = flips[where] % len(content)
        return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
    return {
        "empty": b"",
        "one byte": content[:1],
        "half": content[:middle],
        "one short": content[:-1],
        "zero tail": content[:middle] + bytes(len(content) - middle),
        "all zero": bytes(len(content)),
        "longer": content + b"\0",
        "twice": content * 2,
    }[where]


FLIPS = ("first", "early", "middle", "late", "last")
OTHERS = ("empty", "one byte", "half", "one short", "zero tail", "all zero", "longer", "twice")


@pytest.mark.parametrize("name", ["step-2.ckpt", "step-2.json"])
@pytest.mark.parametrize("where", [*FLIPS, *OTHERS])
def test_damage_anywhere_is_found_and_the_previous_checkpoint_is_used(tmp_path: Path, name: str, where: str) -> None:
    saved(tmp_path, 1, 2)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(damaged(content, where))
    box = Box(0.0)
    restored = checkpoint_of(tmp_path, box).restore()
    if restored == 2:
        # One blank more or less at the end of the JSON, or another spelling of the same number.
        assert name == "step-2.json"
        assert json.loads((tmp_path / name).read_text()) == json.loads(content)
        return
    assert restored == 1
    assert box.state["value"][0] == 1
    assert (tmp_path / "damaged" / name).exists()


@pytest.mark.parametrize("record", ["", "{}", "[]", '{"step": 2, "size": 1, "sha256": "0", "finite": true}'])
def test_a_damaged_record_counts_as_damage(tmp_path: Path, record: str) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step-2.json").write_text(record)
    assert checkpoint_of(tmp_path, Box(0.0)).restore() == 1


# A list that does not show what is there


def hidden(folder: Path, *names: str) -> Path:
    """The files of a checkpoint folder that an outdated list does not show: moved away, as their names cannot be hidden."""
    away = folder.parent / "away"
    away.mkdir()
    for name in names or [path.name for path in folder.glob("step-*")]:
        (folder / name).replace(away / name)
    return away


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(checkpoint_files.known_steps, "__defaults__", ((0.01, 0.02),))
    return tmp_path / "gan" / "checkpoints"


@pytest.mark.parametrize("names", [(), ("step-2.ckpt", "step-2.json")])
def test_a_list_without_the_step_that_latest_names_is_an_error_and_no_restart(folder: Path, names: tuple[str, ...]) -> None:
    saved(folder, 1, 2)
    hidden(folder, *names)
    with pytest.raises(StorageError, match=r"/latest names step 2, but .* a training never restarts by itself"):
        checkpoint_of(folder, Box(0.0)).restore()


@pytest.mark.parametrize("listed", [[], ["step-1.ckpt", "step-1.json"]])
def test_a_checkpoint_that_latest_names_is_used_where_the_list_does_not_show_it(
    folder: Path, listed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(folder, 1, 2)
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed if path == folder else listdir(path))
    box = Box(0.0)
    assert checkpoint_of(folder, box).restore() == 2
    assert box.state["value"][0] == 2


def test_a_list_without_checkpoints_of_a_training_that_has_reported_steps_is_an_error(folder: Path) -> None:
    """A folder of an earlier version, which has no `latest`."""
    saved(folder, 7)
    hidden(folder)
    (folder / "latest").unlink()
    (folder.parent / "metrics.jsonl").write_text('{"step": 0}\n{"step": 7, "time": 1.5, "phase": "gan"}\n')
    with pytest.raises(StorageError, match=r"metrics\.jsonl has step 7, but no checkpoint can be found"):
        checkpoint_of(folder, Box(0.0)).restore()


def test_a_checkpoint_that_appears_while_it_looks_again_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(folder, 1, 2)
    away = hidden(folder)
    monkeypatch.setattr(checkpoint_files.known_steps, "__defaults__", ((0.01,) * 2000,))

    def come_back() -> None:
        for path in sorted(away.iterdir()):
            path.replace(folder / path.name)

    timer = threading.Timer(0.1, come_back)
    timer.start()
    assert checkpoint_of(folder, Box(0.0)).restore() == 2
    timer.join()


def test_a_training_that_was_killed_before_its_first_checkpoint_starts_at_step_0(folder: Path) -> None:
    assert checkpoint_of(folder, Box(0.0)).restore() == 0
    (folder.parent / "metrics.jsonl").write_text('{"step": 5}\n')
    assert checkpoint_of(folder, Box(0.0)).restore() == 0


def test_a_phase_folder_that_was_deleted_starts_at_step_0(folder: Path) -> None:
    saved(folder, 1, 2)
    shutil.rmtree(folder.parent)
    assert checkpoint_of(folder, Box(0.0)).restore() == 0


def test_checkpoints_of_an_earlier_version_have_no_latest_and_get_one(folder: Path) -> None:
    saved(folder, 1, 2)
    (folder / "latest").unlink()
    assert checkpoint_of(folder, Box(0.0)).restore() == 2
    hidden(folder)
    with pytest.raises(StorageError, match="names step 2"):
        checkpoint_of(folder, Box(0.0)).restore()


def test_a_latest_that_an_earlier_version_left_behind_is_no_missing_checkpoint(folder: Path) -> None:
    """It resumed from step 2, removed that, and does not know of `latest`."""
    saved(folder, 2, 5, 9)
    (folder / "latest").write_text('{"step": 2}')
    assert not (folder / "step-2.json").exists()
    assert checkpoint_of(folder, Box(0.0)).restore() == 9
    assert json.loads((folder / "latest").read_text()) == {"step": 9}


def test_a_message_on_a_lost_checkpoint_says_how_to_resume_from_the_one_before(folder: Path) -> None:
    saved(folder, 1, 2)
    hidden(folder, "step-2.ckpt", "step-2.json")
    with pytest.raises(StorageError, match=rf"To resume from step 1, delete {folder}/latest\."):
        checkpoint_of(folder, Box(0.0)).restore()
    (folder / "latest").unlink()
    assert checkpoint_of(folder, Box(0.0)).restore() == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"step": "2"}', bytes(20)])
def test_a_damaged_latest_is_as_none(folder: Path, content: bytes) -> None:
    saved(folder, 1, 2)
    (folder / "latest").write_bytes(content)
    assert checkpoint_of(folder, Box(0.0)).restore() == 2


def test_a_damaged_checkpoint_that_was_set_aside_is_not_missing(folder: Path) -> None:
    saved(folder, 1, 2)
    (folder / "step-2.ckpt").write_bytes(b"")
    assert [checkpoint_of(folder, Box(0.0)).restore() for _ in range(2)] == [1, 1]


def test_damaged_checkpoints_that_were_set_aside_may_be_deleted(folder: Path) -> None:
    saved(folder, 1, 2)
    (folder / "step-2.ckpt").write_bytes(b"")
    assert checkpoint_of(folder, Box(0.0)).restore() == 1
    shutil.rmtree(folder / "damaged")
    assert checkpoint_of(folder, Box(0.0)).restore() == 1


def test_where_all_were_damaged_the_next_attempt_does_not_restart_either(folder: Path) -> None:
    saved(folder, 1, 2)
    for path in folder.glob("*.ckpt"):
        path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ModelError, match="Delete the folder"):
            checkpoint_of(folder, Box(0.0)).restore()


@pytest.mark.parametrize("removals", range(6))
def test_a_removal_of_all_checkpoints_that_is_killed_at_any_file_leaves_none_missing(
    folder: Path, removals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(folder, 1, 2)
    unlink, scandir, left = os.unlink, os.scandir, [removals]

    @contextlib.contextmanager
    def latest_last(path: Any) -> Iterator[list[os.DirEntry[str]]]:
        with scandir(path) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=True)

    def killed_at_the_last(path: Any, **options: Any) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        unlink(path, **options)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "unlink", killed_at_the_last)
        patch.setattr(os, "scandir", latest_last)
        checkpoint_files.remove_all(folder)
    assert set(checkpoint_files.known_steps(folder)) <= {1, 2}
    checkpoint_files.remove_all(folder)
    assert not folder.exists()


def test_data_without_a_record_does_not_exist(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "step-7.ckpt").write_bytes(b"half a checkp")
    assert checkpoint_of(tmp_path, Box(0.0)).restore() == 1


def test_where_all_are_damaged_it_stops_and_says_what_to_do(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    for path in tmp_path.glob("*.ckpt"):
        path.write_bytes(b"")
    with pytest.raises(ModelError, match="Delete the folder"):
        checkpoint_of(tmp_path, Box(0.0)).restore()


def test_a_state_that_is_not_finite_is_marked_and_not_used(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    checkpoint = checkpoint_of(tmp_path, Box(float("nan")), keep=1)
    checkpoint.save(2)
    with pytest.raises(ModelError, match="NaN or infinity"):
        checkpoint.wait_until_durable()
    assert json.loads((tmp_path / "step-2.json").read_text())["finite"] is False
    box = Box(0.0)
    assert checkpoint_of(tmp_path, box).restore() == 1
    assert box.state["value"][0] == 1


def test_a_checkpoint_of_other_objects_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.raises(ModelError, match="another version"):
        Checkpoint(tmp_path, CheckpointConfig(), other=Box(0.0)).restore()


def test_the_loop_may_change_the_state_as_soon_as_save_returns(tmp_path: Path) -> None:
    box = Box(1.0)
    with checkpoint_of(tmp_path, box) as checkpoint:
        checkpoint.save(1)
        box.state["value"].fill_(2.0)
    restored = Box(0.0)
    assert checkpoint_of(tmp_path, restored).restore() == 1
    assert restored.state["value"].unique().tolist() == [1.0]


def test_a_save_waits_for_the_previous_one_and_reuses_its_memory(tmp_path: Path) -> None:
    box = Box(0.0)
    with checkpoint_of(tmp_path, box, keep=5) as checkpoint:
        for step in range(1, 6):
            box.state["value"].fill_(float(step))
            checkpoint.save(step)
    for step in range(1, 6):
        state = torch.load(tmp_path / f"step-{step}.ckpt", weights_only=True)
        assert state["box"]["value"].unique().tolist() == [float(step)]


@pytest.fixture
def at_most_bytes() -> Iterator[Callable[[int], None]]:
    """at_most_bytes(n): files of this process cannot grow beyond n bytes, as with a quota or on a full disk.

    The limit holds for the output of pytest too, so it must be larger than that.
    """
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_on_a_full_disk_the_training_continues_and_a_safe_stop_raises_the_failure(
    tmp_path: Path, at_most_bytes: Callable[[int], None]
) -> None:
    saved(tmp_path, 1)
    with checkpoint_of(tmp_path, Box(2.0, LARGE)) as checkpoint:
        at_most_bytes(8_000_000)
        checkpoint.save(2)
        with pytest.raises(StorageError, match=r"/step-2\.ckpt: File too large: .* ulimit -f; step 1 is the newest one"):
            checkpoint.wait_until_durable()
        assert checkpoint.failure is not None
        assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1.ckpt", "step-1.json"]
        # There is room again.
        at_most_bytes(-1)
        checkpoint.save(3)
        checkpoint.wait_until_durable()
        assert checkpoint.failure is None
    assert checkpoint_of(tmp_path, Box(0.0)).restore() == 3


def test_older_checkpoints_make_room_but_never_the_newest_good_one(tmp_path: Path, at_most_bytes: Callable[[int], None]) -> None:
    saved(tmp_path, 1, 2, 3, keep=3)
    with checkpoint_of(tmp_path, Box(4.0, LARGE), keep=3) as checkpoint:
        at_most_bytes(8_000_000)
        checkpoint.save(4)
        with pytest.raises(StorageError, match="step 3 is the newest"):
            checkpoint.wait_until_durable()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-3.ckpt", "step-3.json"]


def test_a_state_that_is_not_finite_ends_the_training_and_the_good_one_stays(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    checkpoint = checkpoint_of(tmp_path, Box(np.inf))
    checkpoint.save(2)

    def wait() -> None:
        while not checkpoint.due():
            time.sleep(0.01)

    with pytest.raises(ModelError, match="the last good state"):
        wait()
    assert checkpoint_of(tmp_path, Box(0.0)).restore() == 1


def test_a_step_that_is_saved_already_is_not_written_again(tmp_path: Path) -> None:
    """Its bytes could differ, and a kill between the new data and its record would leave neither."""
    saved(tmp_path, 1)
    before = (tmp_path / "step-1.ckpt").stat()
    with checkpoint_of(tmp_path, Box(0.0)) as checkpoint:
        assert checkpoint.restore() == 1
        checkpoint.save(1)
    assert (tmp_path / "step-1.ckpt").stat() == before


def test_due_follows_the_clock(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path, CheckpointConfig(every_seconds=0), box=Box(0.0)).due()
    assert not checkpoint_of(tmp_path, Box(0.0)).due()
