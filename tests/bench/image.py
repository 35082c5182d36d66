"""Measures the size of the image and its largest folders, and a container's time to its first log line and training step.

    python tests/bench/image.py IMAGE [SIF]      # needs Docker

The job is the demo, on a read-only root without a network. "again" is a second container, for which songs and features exist.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DOCKER = os.environ.get("DOCKER", "docker")
FOLDERS = """
cd /opt/emotion/lib/python3.11/site-packages
du --block-size=1M --summarize torch/lib * | grep -v 'torch$'
du --block-size=1M --summarize --exclude=lib torch
du --block-size=1M --summarize --one-file-system --total /usr /var /etc | tail -1
"""


def output(*command: str) -> str:
    return subprocess.run([DOCKER, *command], capture_output=True, text=True, check=True).stdout


def first_moments(image: str, work: str) -> tuple[float, float]:
    """Seconds from `docker run` to the first log line, and to the end of the first GAN step, after which the job is stopped."""
    command = ["run", "--rm", "--network=none", "--read-only", f"--user={os.getuid()}", f"--volume={work}:/w", image]
    started = time.time()
    with subprocess.Popen(
        [DOCKER, *command, "run", "/specs/demo.yaml", "--work", "/w"], stderr=subprocess.PIPE, text=True
    ) as job:
        assert job.stderr is not None
        first_line = None
        for line in job.stderr:
            first_line = first_line or time.time()
            if "phase=gan step=" in line:
                job.terminate()
                break
        job.stderr.read()
    assert first_line is not None
    (metrics,) = Path(work).glob("demo-*/gan-*/metrics.jsonl")
    first_step = json.loads(metrics.read_text().splitlines()[0])["time"]
    return first_line - started, first_step - started


def main(image: str, *sifs: str) -> None:
    print(f"{image}: {int(output('image', 'inspect', '--format={{.Size}}', image)) / 1e6:,.0f} MB")
    for sif in sifs:
        print(f"{sif}: {Path(sif).stat().st_size / 1e6:,.0f} MB")
    listing = output("run", "--rm", "--network=none", "--user=0", "--entrypoint=sh", image, "-c", FOLDERS)
    sizes = [(int(line.split()[0]), line.split()[1]) for line in listing.splitlines()]
    for size, name in sorted(sizes, reverse=True)[:10]:
        print(f"{size:6,} MiB  {'base image' if name == 'total' else name}")
    with tempfile.TemporaryDirectory() as work:
        for start in ("first", "again"):
            line, step = first_moments(image, work)
            print(f"{start}: first line after {line:.1f} s, first step after {step:.1f} s")
            for folder in Path(work).glob("demo-*/gan-*"):
                subprocess.run(["rm", "-r", str(folder)], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
