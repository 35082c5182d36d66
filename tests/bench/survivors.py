"""Tests what survives if saving a checkpoint fails: with plain torch.save, with Lightning, and with this package.

    python tests/bench/survivors.py

Each saves a second state over the first one, once per system call that changes files; tests/injector.py makes that call fail.
Then the state is loaded. Survived: the loaded state is the whole first or the whole second one; if the power cut comes after a
completed save, it must be the second. Error reported: if the second state is missing after an error, an error was raised. Flipped
bit: one bit is flipped at each of 200 evenly spread positions of the newest file. It is noticed if no wrong state is loaded (but
an error, the previous state, or an unchanged state, as no value depends on the bit). Plain and Lightning save to one path, as
their users do; this package keeps the two newest. Lightning writes to the folder for temporary files first and moves the file; a
move between disks works differently, so it is also tested with /dev/shm as the other disk. Needs Linux, gcc and half a minute.
Goals: this package survives, reports and notices everything.
"""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import errno
import logging
import pickle
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (1, 2)]
from injector import ERROR, FULL_DISK, KILLED, POWER_CUTS, TORN, Injury, attempts, preload

import emotion.compat  # noqa: F401 - makes torchvision importable, which Lightning imports
from emotion.config import CheckpointConfig
from emotion.errors import EmotionError
from emotion.training.checkpoint import Checkpoint
from tests.bench.rows import record

try:
    import lightning
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
except ImportError:
    sys.exit("survivors: Lightning is not installed: make bench installs it")

NUMBERS = 5000
FLIPS = 200
DEATHS = (KILLED, TORN, *POWER_CUTS)
ERRORS = (FULL_DISK, ERROR, Injury("no permission", errno.EACCES, lasting=True))
LOADING_ERRORS = (
    EmotionError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


class Saver(Protocol):
    """Saves and loads the state of a step in a folder."""

    name: str

    def save(self, folder: Path, step: int) -> None: ...

    def load(self, folder: Path) -> dict[str, Any]: ...


def state_of(step: int) -> dict[str, Any]:
    weights = torch.full((NUMBERS,), float(step))
    return {"weights": weights, "moments": weights.sqrt(), "step": step}


def step_of(state: dict[str, Any]) -> int | None:
    """The step of a state; None if it is not the state of any step."""
    for step in (1, 2):
        expected = state_of(step)
        if (
            state.keys() == expected.keys()
            and state["step"] == step
            and torch.equal(state["weights"], expected["weights"])
            and torch.equal(state["moments"], expected["moments"])
        ):
            return step
    return None


class Plain:
    name = f"`torch.save` {torch.__version__.split('+')[0]}, in place"

    def save(self, folder: Path, step: int) -> None:
        torch.save(state_of(step), folder / "last.ckpt")

    def load(self, folder: Path) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=True)
        return state


class Lightning:
    """The function behind Trainer.save_checkpoint, on one device. temporaries: folder of temporary files; None: a subfolder."""

    def __init__(self, temporaries: Path | None) -> None:
        self.temporaries = temporaries
        disk = "on another disk" if temporaries else "on this disk"
        self.name = f"Lightning {lightning.__version__}, temporaries {disk}"

    def save(self, folder: Path, step: int) -> None:
        temporaries = self.temporaries or folder / "temporaries"
        if not temporaries.exists():
            temporaries.mkdir()
        tempfile.tempdir = str(temporaries)
        TorchCheckpointIO().save_checkpoint(state_of(step), folder / "last.ckpt")

    def load(self, folder: Path) -> dict[str, Any]:
        return TorchCheckpointIO().load_checkpoint(folder / "last.ckpt", weights_only=True)


class Box:
    """Wraps a state for Checkpoint."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Ours:
    name = "`emotion.training.checkpoint`"

    def save(self, folder: Path, step: int) -> None:
        config = CheckpointConfig(every_seconds=1e9, keep=2)
        with Checkpoint(folder, config, network=Box(state_of(step))) as checkpoint:
            checkpoint.save(step)
            checkpoint.wait_until_durable()

    def load(self, folder: Path) -> dict[str, Any]:
        box = Box({})
        Checkpoint(folder, CheckpointConfig(), network=box).restore()
        return box.state


@dataclass
class Score:
    good: int = 0
    points: int = 0

    def add(self, good: bool) -> None:
        self.good += good
        self.points += 1

    def __str__(self) -> str:
        return f"{self.good} of {self.points}"


def loaded_step(saver: Saver, folder: Path) -> int | None:
    """The step whose whole state was loaded; None if the state is wrong. Raises one of LOADING_ERRORS."""
    return step_of(saver.load(folder))


def survivor(saver: Saver, folder: Path) -> int | None:
    try:
        return loaded_step(saver, folder)
    except LOADING_ERRORS:
        return None


def fresh(saver: Saver, folder: Path, *steps: int) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for step in steps:
        saver.save(folder, step)
    return folder


def survived(saver: Saver, folder: Path, injury: Injury, reported: Score) -> Score:
    def save(folder: Path) -> str | None:
        try:
            saver.save(folder, 2)
        except RuntimeError as error:
            return str(error)
        return None

    score = Score()
    for case, outcome in attempts(save, lambda: fresh(saver, folder, 1), injury):
        step = survivor(saver, case)
        if outcome.struck:
            score.add(step is not None)
        elif injury in POWER_CUTS:
            score.add(step == 2)
        if injury in ERRORS:
            reported.add(step == 2 or outcome.said is not None)
    return score


def noticed(saver: Saver, folder: Path) -> Score:
    fresh(saver, folder, 1, 2)
    newest = max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    content = newest.read_bytes()
    pristine = folder.with_name("pristine")
    shutil.copytree(folder, pristine)
    score = Score()
    for number in range(FLIPS):
        position = number * len(content) // FLIPS
        flipped = content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
        newest.write_bytes(flipped)
        try:
            score.add(loaded_step(saver, folder) is not None)
        except LOADING_ERRORS:
            score.add(True)
        shutil.rmtree(folder)
        shutil.copytree(pristine, folder)
    shutil.rmtree(pristine)
    return score


def main() -> None:
    if len(sys.argv) == 1:
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(subprocess.run([sys.executable, __file__, folder], check=False).returncode)
    home = Path(sys.argv[1])
    preload(home)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    injuries = (*DEATHS, *ERRORS)
    print("| saved by |", " | ".join(injury.name for injury in injuries), "| error reported | flipped bit noticed |")
    print("|---|" + "---|" * (len(injuries) + 2))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        if Path(other).stat().st_dev == home.stat().st_dev:
            sys.exit("survivors: /dev/shm and the folder for temporary files are one file system; set TMPDIR to another")
        for saver in (Plain(), Lightning(None), Lightning(Path(other)), Ours()):
            reported = Score()
            scores = [survived(saver, home / "case", injury, reported) for injury in injuries]
            of_flips = noticed(saver, home / "case")
            print("|", " | ".join(map(str, [saver.name, *scores, reported, of_flips])), "|", flush=True)
            groups = {"faults survived": scores, "errors reported": [reported], "flipped bits noticed": [of_flips]}
            for what, group in groups.items():
                share = sum(score.good for score in group) / sum(score.points for score in group)
                record(f"share of {what}, {saver.name}", share, least=1 if isinstance(saver, Ours) else None)


if __name__ == "__main__":
    main()
