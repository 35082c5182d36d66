"""Ends a job at random moments by SIGKILL or SIGTERM, runs it until it is done, and compares it with an unbroken run.

    python tests/job/soak.py [--minutes 30] [--spec SPEC] [--seed 0]

Each round has the next seed, until the time is up. It ends at the first difference or unexpected exit code, and keeps the
folders.
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

from job.results.publish import is_promised

TINY = Path(__file__).parents[1] / "tiny.yaml"
DONE, RESUMABLE = 0, 75
LOOK_SECONDS = 0.02
HANGS_SECONDS = 600
PROGRESS_EVERY = 4
"""Every fourth attempt is not interrupted before it has finished a phase: a job ends after ten without progress."""
MOST = 40
"""Interruptions of a round."""


@dataclass
class Interruptions:
    """Numbers of attempts: killed; stopped after SIGTERM; ended by SIGTERM before their handler was installed."""

    killed: int = 0
    stopped: int = 0
    too_early: int = 0

    @property
    def total(self) -> int:
        return self.killed + self.stopped + self.too_early


def promised_bytes(published: Path) -> dict[str, bytes]:
    """What has to be equal in two runs of one spec: relative path → content."""
    files = {path.relative_to(published).as_posix(): path for path in published.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if is_promised(name)}


def soak(spec: Path, unbroken: Path, folder: Path, seed: int, longest_seconds: float, most: int) -> Interruptions:
    """One round in `folder`, with `most` interruptions at most. Raises AssertionError for a difference or a wrong exit code.

    unbroken: what the same spec has published. longest_seconds: the latest moment of an interruption.
    """
    draw = random.Random(seed)
    interruptions = Interruptions()
    attempt = 0
    while True:
        attempt += 1
        number = draw.choice((signal.SIGKILL, signal.SIGTERM))
        wait_seconds = draw.uniform(0, longest_seconds)
        if interruptions.total == most:
            wait_seconds = HANGS_SECONDS
        with_progress = attempt % PROGRESS_EVERY == 0
        log = folder / f"attempt-{attempt}.log"
        code = _attempt(spec, folder / "work", log, number, wait_seconds, with_progress)
        if code == DONE:
            break
        where = f"seed {seed}, attempt {attempt}, {number.name} after {wait_seconds:.2f} s: exit code {code}, see {log}"
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL, where
            interruptions.killed += 1
        elif code == -signal.SIGTERM:
            assert not log.read_bytes(), where
            interruptions.too_early += 1
        else:
            assert code == RESUMABLE, where
            interruptions.stopped += 1
    (published,) = (folder / "work" / "published").iterdir()
    found, expected = promised_bytes(published), promised_bytes(unbroken)
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    assert not different, f"seed {seed}: {different} differ between {published} and {unbroken}"
    return interruptions


def _attempt(spec: Path, work: Path, log: Path, number: signal.Signals, wait_seconds: float, with_progress: bool) -> int:
    """The exit code of the job, which gets a signal this long after its start or, with_progress, after its first phase."""
    with log.open("wb") as said, start(spec, work, said) as process:
        while with_progress and process.poll() is None and b" ends " not in log.read_bytes():
            time.sleep(LOOK_SECONDS)
        try:
            process.wait(wait_seconds / 4 if with_progress else wait_seconds)
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
    total = Interruptions()
    while time.monotonic() < end:
        round_folder = folder / f"seed-{seed}"
        round_folder.mkdir()
        found = soak(asked.spec, unbroken, round_folder, seed, seconds / 2, MOST)
        print(f"seed {seed}: equal after {found}", flush=True)
        total = Interruptions(total.killed + found.killed, total.stopped + found.stopped, total.too_early + found.too_early)
        shutil.rmtree(round_folder)
        seed += 1
    shutil.rmtree(folder)
    print(f"{seed - asked.seed} rounds, all equal: {total}")


if __name__ == "__main__":
    main()
