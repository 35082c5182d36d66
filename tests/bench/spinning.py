"""Measures a training step of a small ViT for each way in which OpenMP's threads wait, alone and beside a busy process.

    python tests/bench/spinning.py

"limited" is what a job sets (`job.environment.limit_spinning`), "asleep" and "spinning" are the alternatives: no spinning, and
libgomp's default. Each is measured in processes of its own, in turn. Goal: alone, limited spinning takes at most 0.75 of the time
of none; beside a busy process, at most the time of spinning without limit. Takes two minutes.
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

# For importing tests.bench when this file is run as a program.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.rows import record

WAYS = {"limited": {}, "asleep": {"OMP_WAIT_POLICY": "PASSIVE"}, "spinning": {"GOMP_SPINCOUNT": "300000"}}
"""Environment variables, in place of a user's."""
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
ROUNDS = 3
STEPS = 15
SHAPE = (1, 64, 256)  # as in job/specs/small.yaml: its model, batch and clips of 6 s


def measure() -> None:
    """Print the milliseconds of a step in this process, whose environment a job would have."""
    from job.environment import prepare_environment

    prepare_environment(2)
    import torch

    from tests.bench.bare_step import bare_vit_step

    found = [bare_vit_step(torch.device("cpu"), "test_vit", 8, SHAPE, graph=False) for _ in range(STEPS)]
    print(1000 * statistics.median(found))


def milliseconds(way: str) -> float:
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, __file__, "--here"]
    found = subprocess.run(command, env=clean | WAYS[way], stdout=subprocess.PIPE, text=True, check=True)
    return float(found.stdout)


def compare() -> dict[str, list[float]]:
    """Milliseconds of a step of each way."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, values in found.items():
            values.append(milliseconds(way))
    return found


def main() -> None:
    alone = compare()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            beside = compare()
        finally:
            other.kill()
    print("| threads that wait | step alone, ms | beside a busy process, ms |\n|---|---|---|")
    for way in WAYS:
        print(f"| {way} | {statistics.median(alone[way]):.0f} | {statistics.median(beside[way]):.0f} |")

    def ratio(found: dict[str, list[float]], other: str) -> float:
        return statistics.median(found["limited"]) / statistics.median(found[other])

    record("step, limited spinning / none, alone", ratio(alone, "asleep"), most=0.75, raw=alone)
    record("step, limited spinning / without limit, beside another", ratio(beside, "spinning"), most=1, raw=beside)


if __name__ == "__main__":
    if sys.argv[1:] == ["--here"]:
        measure()
    else:
        main()
