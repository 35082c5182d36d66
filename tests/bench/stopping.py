"""Measures how long a job takes to exit after SIGTERM, and how long a checkpoint keeps the training waiting.

    python tests/bench/stopping.py [--parts tiny vit_b checkpoint]

Part tiny also runs its finished job once more.

All parts use real processes and signals on this machine's CPU, and folders of up to 6 GB in TMPDIR, removed at the end. Goal:
saving keeps the loop waiting at most 0.15 of the time that torch.save, flush and fsync of the same state take. Run it on an idle
machine.
"""

from job.environment import limit_spinning

limit_spinning()  # before torch is imported

import argparse
import itertools
import json
import os
import platform
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# For importing tests.bench.rows when this file is run as a program.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from emotion.compat import timm
from emotion.config import CheckpointConfig
from emotion.training.checkpoint import Checkpoint, Stateful
from job.pipeline.phases import BY_NAME
from tests.bench.rows import record

TINY = Path(__file__).parents[1] / "tiny.yaml"
PHASES = tuple(BY_NAME)
IN_SCRATCH = tuple(phase.name for phase in BY_NAME.values() if phase.kept_in == "scratch")
SHARES = (0.1, 0.5, 0.9)
"""When the signal is sent, as a share of the phase's time."""
STARTUP_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
RESUMABLE = 75
LOOK_SECONDS = 0.01
THREADS = len(os.sched_getaffinity(0))
VIT_B = (
    "vit.model=vit_base_patch16_224",
    "vit.image_size=[224, 224]",
    "vit.batch_size=4",
    "vit.micro_batch=2",
    "vit.max_crops=1",
    "vit.frozen_epochs=0",
    "vit.unfreeze_epochs=0",
    f"device.threads={THREADS}",
    "checkpoint.every_seconds=3600",
)
VIT_B_SHARES = (0.0, 0.25, 0.5, 0.75)
"""When the signal is sent after the end of a step, as a share of a step's time."""
SAVES = 5
GOAL = 0.15
REPEATS = 7
GOAL_REPEATED = 1.5


@contextmanager
def job(work: Path, *overrides: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Start the job as a process. Yields the process and its log file."""
    log = work.with_suffix(".log")
    command = [sys.executable, "-m", "job", "run", str(TINY), "--work", str(work)]
    for override in overrides:
        command += ["--set", override]
    with log.open("wb") as log_file, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log_file) as process:
        yield process, log


def wait_for(text: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until the log contains `text`."""
    while text.encode() not in log.read_bytes():
        let_run(process)


def let_run(process: subprocess.Popen[bytes]) -> None:
    assert process.poll() is None, f"the job ended with {process.returncode} before it was stopped"
    time.sleep(LOOK_SECONDS)


def seconds_to_leave(process: subprocess.Popen[bytes]) -> float:
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    seconds = time.monotonic() - started
    # Before the job has its handlers, the signal kills it; after its last phase it exits with 0.
    assert code in (RESUMABLE, -signal.SIGTERM, 0), code
    return seconds


def tiny(folder: Path) -> None:
    """Stop the tiny job in each phase. Each attempt starts from a copy of a finished run without this phase and later ones."""
    finished = folder / "finished"
    with job(finished) as (process, log):
        started = time.monotonic()
        wait_for(" begins ", log, process)
        startup_seconds = time.monotonic() - started
        assert process.wait() == 0, log.read_text()
    ends = re.findall(r"phase=(\w+) ends seconds=([\d.]+)", log.read_text())
    repeated(finished)
    rows = []

    found = []
    for share in STARTUP_SHARES:
        work = folder / "work"
        with job(work) as (process, _):
            time.sleep(share * startup_seconds)
            found.append(seconds_to_leave(process))
        shutil.rmtree(work, ignore_errors=True)
    rows.append(("start-up", startup_seconds, found))

    for phase, seconds in ends:
        found = []
        for share in SHARES:
            work = folder / "work"
            shutil.copytree(finished, work)
            shutil.rmtree(work / "published")
            for later in PHASES[PHASES.index(phase) :]:
                parent = "scratch" if later in IN_SCRATCH else "tiny-*"
                for old in work.glob(f"{parent}/{later}-*"):
                    shutil.rmtree(old)
            with job(work) as (process, log):
                wait_for(f"phase={phase} begins", log, process)
                time.sleep(share * float(seconds))
                found.append(seconds_to_leave(process))
            shutil.rmtree(work)
        rows.append((phase, float(seconds), found))

    print("\n| tiny job, SIGTERM in | lasts s | median s to exit | worst s |\n|---|---|---|---|")
    for name, lasts, values in rows:
        print(f"| {name} | {lasts:.1f} | {statistics.median(values):.2f} | {max(values):.2f} |")
    every = [value for _, _, values in rows for value in values]
    print(f"| all {len(every)} moments | | {statistics.median(every):.2f} | {max(every):.2f} |")
    record("seconds from SIGTERM to the exit, tiny job, median", statistics.median(every), raw={"seconds": every})


def repeated(finished: Path) -> None:
    """Time, in alternation, a rerun of a finished job and the imports that the rerun needs."""
    again = [sys.executable, "-m", "job", "run", str(TINY), "--work", str(finished)]
    imports = [sys.executable, "-c", "import job.__main__, job.pipeline.runner"]
    cpu: dict[str, list[float]] = {"again": [], "imports": []}
    seconds = []
    for _ in range(REPEATS):
        for name, command in (("again", again), ("imports", imports)):
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            subprocess.run(command, cwd=TINY.parents[1], capture_output=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            if name == "again":
                seconds.append(time.monotonic() - started)
    median = {name: statistics.median(values) for name, values in cpu.items()}
    ratio = median["again"] / median["imports"]
    print(f"\nfinished tiny job, run once more: {statistics.median(seconds):.2f} s, CPU {median['again']:.2f} s, {ratio:.2f} of")
    print(f"that of its imports; medians of {REPEATS}. Goals: under 1 s, ratio {GOAL_REPEATED} or less")
    record("a finished job once more, seconds", statistics.median(seconds), most=1.0, raw={"seconds": seconds})
    record("a finished job once more, CPU time / that of its imports", ratio, most=GOAL_REPEATED, raw=cpu)


def vit_b(folder: Path) -> None:
    """Stop ViT-B in training several times; each time it resumes from its checkpoint."""
    work = folder / "vit-b"

    def steps() -> list[dict[str, Any]]:
        lines = [line for path in work.glob("tiny-*/vit-*/metrics.jsonl") for line in path.read_text().splitlines()]
        return [record for record in map(json.loads, lines) if "loss" in record]

    rows = []
    step_seconds = 0.0
    for share in VIT_B_SHARES:
        with job(work, *VIT_B) as (process, _):
            before = len(steps())
            while len(steps()) < before + 2:
                let_run(process)
            if not step_seconds:
                step_seconds = steps()[1]["time"] - steps()[0]["time"]
            time.sleep(share * step_seconds)
            rows.append((share, seconds_to_leave(process)))
    largest = max(path.stat().st_size for path in work.glob("tiny-*/vit-*/checkpoints/step-*.ckpt"))
    threads = f"{THREADS} threads"
    print(f"\nViT-B, {threads}, a step lasts {step_seconds:.1f} s, its checkpoint has {largest / 1e9:.2f} GB")
    print("\n| SIGTERM after a step and | s to exit |\n|---|---|")
    for share, seconds in rows:
        print(f"| {share:g} of the next | {seconds:.1f} |")


def checkpoint(folder: Path) -> None:
    """Measure how long `save` keeps the loop waiting, in alternation with torch.save."""
    print("\n| state | plain save s | save, with pauses s | ratio | back to back s | ratio | first save s |\n|" + "---|" * 7)
    for name in ("vit_xsmall_patch16_clip_224", "vit_base_patch16_224"):
        waits_for_saves(name, folder)
    print(f"\nMedians of {SAVES}. Goal with pauses: ratio {GOAL} or less.")


def waits_for_saves(name: str, folder: Path) -> None:
    """Measure one model and print its row of the table."""
    network = timm.create_model(name, num_classes=2)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    objects: dict[str, Stateful] = {"network": network, "optimizer": optimizer}
    saving = Checkpoint(folder / name, CheckpointConfig(every_seconds=0, keep=1), **objects)
    plain, paused = [], []
    steps = itertools.count()

    def save() -> float:
        started = time.monotonic()
        saving.save(next(steps))
        return time.monotonic() - started

    with saving:
        first_seconds = save()
        saving.wait_until_durable()
        for _ in range(SAVES):
            started = time.monotonic()
            save_plainly(objects, folder / "plain.ckpt")
            plain.append(time.monotonic() - started)
            paused.append(save())
            compute(3 * plain[0])
            saving.wait_until_durable()
        save()
        close = [save() for _ in range(SAVES)]
        saving.wait_until_durable()
    (newest,) = saving.folder.glob("step-*.ckpt")
    size = newest.stat().st_size / 1e6
    plain_seconds, paused_seconds, close_seconds = map(statistics.median, (plain, paused, close))
    print(
        f"| {name} + AdamW, {size:.0f} MB | {plain_seconds:.2f} | {paused_seconds:.3f} | {paused_seconds / plain_seconds:.2f} | "
        f"{close_seconds:.2f} | {close_seconds / plain_seconds:.2f} | {first_seconds:.3f} |",
        flush=True,
    )
    raw = {"plain": plain, "ours": paused}
    record(f"time that a save keeps the loop waiting, {name} / torch.save", paused_seconds / plain_seconds, most=GOAL, raw=raw)
    shutil.rmtree(saving.folder)


def save_plainly(objects: dict[str, Stateful], path: Path) -> None:
    with path.open("wb") as file:
        torch.save({name: thing.state_dict() for name, thing in objects.items()}, file)
        file.flush()
        os.fsync(file.fileno())


def compute(seconds: float) -> None:
    """Keep the CPU busy, as a training does between saves."""
    end = time.monotonic() + seconds
    matrix = torch.randn(1000, 1000)
    while time.monotonic() < end:
        matrix @ matrix


PARTS: dict[str, Callable[[Path], None]] = {"tiny": tiny, "vit_b": vit_b, "checkpoint": checkpoint}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parts = parser.parse_args().parts
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    print(
        f"{processor[1] if processor else platform.machine()}, {THREADS} cores, torch {torch.__version__}, load average "
        f"{os.getloadavg()[0]:.1f} at the start",
        flush=True,
    )
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="stopping-") as folder:
            PARTS[part](Path(folder))


if __name__ == "__main__":
    main()
