"""A job ended at random moments, by SIGKILL or SIGTERM, and started again until it is done: the same bytes as an unbroken one.

    python tests/job/soak.py [--minutes 30] [--spec SPEC] [--seed 0]

Round after round, each with the next seed, until the time is up. The first difference, or process that ends in another way than
it may, ends it and keeps the folders.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from job.results.publish import PROMISED

TINY = Path(__file__).parents[1] / "tiny.yaml"
DONE, RESUMABLE = 0, 75
LOOK_SECONDS = 0.02
HANGS_SECONDS = 600
FRUITFUL_EVERY = 4
"""Every so many attempts one is left alone until it has finished a phase: after ten that leave nothing new a job gives up."""

MOST = 40
"""Interruptions of a round: then it may end, as it does without this sooner or later."""


@dataclass
class Told:
    """Attempts that were interrupted: killed; left after SIGTERM as they should; ended by it before they could hear it."""

    killed: int = 0
    left: int = 0
    unheard: int = 0

    @property
    def interruptions(self) -> int:
        return self.killed + self.left + self.unheard


def promised_bytes(published: Path) -> dict[str, bytes]:
    """What has to be equal in two runs of one spec: relative path → content."""
    files = {path.relative_to(published).as_posix(): path for path in published.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name.startswith(PROMISED)}


def soak(spec: Path, unbroken: Path, folder: Path, seed: int, longest_seconds: float, most: int) -> Told:
    """One round in `folder`, with `most` interruptions at most. Raises AssertionError for what must not be.

    unbroken: what the same spec has published. longest_seconds: the latest moment of an interruption.
    """
    draw = random.Random(seed)
    told = Told()
    attempt = 0
    while True:
        attempt += 1
        number = draw.choice((signal.SIGKILL, signal.SIGTERM))
        wait_seconds = draw.uniform(0, longest_seconds)
        if told.interruptions == most:
            wait_seconds = HANGS_SECONDS
        fruitful = attempt % FRUITFUL_EVERY == 0
        log = folder / f"attempt-{attempt}.log"
        code = _attempt(spec, folder / "work", log, number, wait_seconds, fruitful)
        if code == DONE:
            break
        where = f"seed {seed}, attempt {attempt}, {number.name} after {wait_seconds:.2f} s: exit code {code}, see {log}"
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL, where
            told.killed += 1
        elif code == -signal.SIGTERM:
            assert not log.read_bytes(), where
            told.unheard += 1
        else:
            assert code == RESUMABLE, where
            told.left += 1
    (published,) = (folder / "work" / "published").iterdir()
    found, expected = promised_bytes(published), promised_bytes(unbroken)
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    assert not different, f"seed {seed}: {different} differ between {published} and {unbroken}"
    return told


def _attempt(spec: Path, work: Path, log: Path, number: signal.Signals, wait_seconds: float, fruitful: bool) -> int:
    """The exit code of the job, which is sent a signal so long after its start; a fruitful one, after its first phase ended."""
    with log.open("wb") as said, start(spec, work, said) as process:
        while fruitful and process.poll() is None and b" ends " not in log.read_bytes():
            time.sleep(LOOK_SECONDS)
        try:
            process.wait(wait_seconds / 4 if fruitful else wait_seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        return process.wait(HANGS_SECONDS)


def start(spec: Path, work: Path, said: IO[bytes]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "job", "run", str(spec), "--work", str(work)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="begin no further round after these")
    parser.add_argument("--spec", type=Path, default=TINY)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    asked = parser.parse_args()
    end = time.monotonic() + 60 * asked.minutes
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    started = time.monotonic()
    with (folder / "unbroken.log").open("wb") as said, start(asked.spec, folder / "unbroken", said) as process:
        assert process.wait() == DONE, f"the unbroken run failed, see {folder / 'unbroken.log'}"
    seconds = time.monotonic() - started
    (unbroken,) = (folder / "unbroken" / "published").iterdir()
    print(f"{asked.spec.name}: {seconds:.0f} s without an interruption; folders in {folder}")
    seed = asked.seed
    total = Told()
    while time.monotonic() < end:
        round_folder = folder / f"seed-{seed}"
        round_folder.mkdir()
        told = soak(asked.spec, unbroken, round_folder, seed, seconds / 2, MOST)
        print(f"seed {seed}: equal after {told}", flush=True)
        total = Told(total.killed + told.killed, total.left + told.left, total.unheard + told.unheard)
        shutil.rmtree(round_folder)
        seed += 1
    shutil.rmtree(folder)
    print(f"{seed - asked.seed} rounds, all equal: {total}")


if __name__ == "__main__":
    main()
