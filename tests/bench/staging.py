"""Staging from object storage: speed and CPU time compared with other clients, and the start of a second task.

    python tests/bench/staging.py

The server is Ceph's radosgw on loopback with 600 objects of 1 MiB (tests/stores/servers.py; its disk is memory). All clients run
in turn, in several rounds, each into an empty folder. Client and server share the CPUs of this machine, so a rate measures the
CPU time of both per MiB and not a network: compare the ratios. "ours" is the phase stage with a dataset manifest. It lists the
objects, verifies the SHA-256 of each song, which no other client does, and makes it durable before it gets its final name.
download_file uses eight threads and one client. `s5cmd cp` copies unconditionally; the syncs of s5cmd and aws look for missing
files, as ours does. Python's imports are not counted; other programs are measured as a whole. Goals: at least 1.5 times the rate
of download_file, at most 0.7 of its CPU time, not slower than s5cmd sync; and a second task that shares the staged copy finishes
this phase less than a second after its process started. Run it on an idle machine.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from emotion.config import DataConfig
from job.config import StorageConfig
from job.storage.stage import stage
from tests.bench.rows import record
from tests.stores.servers import S3Server, radosgw_server

MIB = 2**20
THREADS_OF_DOWNLOAD_FILE = 8
OURS, BOTO3 = "ours, with SHA-256", "boto3 download_file"
S5CMD, S5CMD_CP, AWS = "s5cmd sync", "s5cmd cp", "aws s3 sync"
LEAST_RATE, MOST_CPU, MOST_SECONDS = 1.5, 0.7, 1.0
SPEC = Path(__file__).parents[1] / "tiny.yaml"


def fill(server: S3Server, songs: int) -> str:
    """Upload a dataset and its manifest to deam/ of a new bucket. Returns the bucket."""
    client, bucket = server.client(), server.new_bucket()
    header = "song_id, valence_mean, valence_std, arousal_mean, arousal_std\n"
    files = {f"MEMD_audio/{number}.mp3": random.Random(number).randbytes(MIB) for number in range(2, 2 + songs)}
    rows = "".join(f"{number}, 5, 1, 4, 1\n" for number in range(2, 2 + songs))
    files["annotations/static_annotations_averaged_songs_1_2000.csv"] = (header + rows).encode()
    manifest = {name: {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()} for name, body in files.items()}
    files["dataset.json"] = json.dumps({"files": manifest}).encode()
    for name, body in files.items():
        client.put_object(Bucket=bucket, Key=f"deam/{name}", Body=body)
    return bucket


# Clients in Python, each in a process of its own


def ours(bucket: str, keys: list[str], out: Path) -> None:
    out.mkdir()
    stage(DataConfig(source=f"s3://{bucket}/deam"), StorageConfig(), out.parent / "manifests", out, lambda: False)


def download_file(bucket: str, keys: list[str], out: Path) -> None:
    import boto3
    from botocore.config import Config

    out.mkdir()
    client = boto3.client("s3", config=Config(max_pool_connections=10 * THREADS_OF_DOWNLOAD_FILE))
    with ThreadPoolExecutor(THREADS_OF_DOWNLOAD_FILE) as pool:
        for one in [pool.submit(client.download_file, bucket, key, str(out / Path(key).name)) for key in keys]:
            one.result()


PYTHON: dict[str, Callable[[str, list[str], Path], None]] = {OURS: ours, BOTO3: download_file}


def measure_here(client: str, bucket: str, songs: int, out: Path) -> tuple[float, float]:
    """(wall-clock seconds, CPU seconds) of a Python client."""
    if client == OURS:
        import job.storage.s3  # noqa: F401  boto3's import takes as long as a hundred songs
    else:
        import boto3  # noqa: F401
    keys = [f"deam/MEMD_audio/{number}.mp3" for number in range(2, 2 + songs)]
    started, cpu = time.monotonic(), processor_seconds(resource.RUSAGE_SELF)
    PYTHON[client](bucket, keys, out)
    return time.monotonic() - started, processor_seconds(resource.RUSAGE_SELF) - cpu


def processor_seconds(whose: int) -> float:
    usage = resource.getrusage(whose)
    return usage.ru_utime + usage.ru_stime


# All clients


def command(client: str, bucket: str, out: Path) -> list[str]:
    beside = Path(sys.executable).parent
    if client != AWS:
        return [str(beside / "s5cmd"), "--log", "error", client.split()[1], f"s3://{bucket}/deam/*", f"{out}/"]
    return [str(beside / "aws"), "s3", "sync", "--only-show-errors", f"s3://{bucket}/deam", str(out)]


def measured(client: str, server: S3Server, bucket: str, songs: int) -> tuple[float, float]:
    environment = {**os.environ, **server.environment(), "S3_ENDPOINT_URL": server.endpoint_url}
    environment.pop("AWS_SESSION_TOKEN")
    with tempfile.TemporaryDirectory(prefix="staging-") as folder:
        out = Path(folder) / "out"
        if client in PYTHON:
            arguments = ["--client", client, "--bucket", bucket, "--songs", str(songs), "--out", str(out)]
            output = run([sys.executable, __file__, *arguments], environment)
            seconds, cpu = json.loads(output.splitlines()[-1])
        else:
            started, before = time.monotonic(), processor_seconds(resource.RUSAGE_CHILDREN)
            run(command(client, bucket, out), environment)
            seconds = time.monotonic() - started
            cpu = processor_seconds(resource.RUSAGE_CHILDREN) - before
        complete = [path for path in out.rglob("*.mp3") if path.stat().st_size == MIB]
        assert len(complete) == songs, f"{client} fetched {len(complete)} of {songs} songs"
    return seconds, cpu


def run(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def second_task_seconds(server: S3Server, bucket: str, tasks: int) -> float:
    """Seconds of the fastest of several task processes that run after another task has staged into the same scratch."""
    with tempfile.TemporaryDirectory(prefix="staging-") as folder:

        def task(number: int) -> float:
            words = ["--work", f"{folder}/{number}", "--scratch", f"{folder}/scratch", "--until", "stage"]
            words += ["--set", f"data.source=s3://{bucket}/deam"]
            started = time.monotonic()
            run([sys.executable, "-m", "job", "run", str(SPEC), *words], {**os.environ, **server.environment()})
            return time.monotonic() - started

        first = task(0)
        least = min(task(number) for number in range(1, 1 + tasks))
    print(f"\nA task that stages takes {first:.1f} s from start to end, one after it that shares the copy {least:.2f} s.")
    return least


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--songs", type=int, default=600)
    options.add_argument("--rounds", type=int, default=5)
    for name in ("--client", "--bucket", "--out"):
        options.add_argument(name)
    given = options.parse_args()
    if given.client:
        print(json.dumps(measure_here(given.client, given.bucket, given.songs, Path(given.out))))
        return
    results: dict[str, list[tuple[float, float]]] = {client: [] for client in (OURS, BOTO3, S5CMD, S5CMD_CP, AWS)}
    with radosgw_server() as server:
        bucket = fill(server, given.songs)
        for _ in range(given.rounds):
            for client, found in results.items():
                found.append(measured(client, server, bucket, given.songs))
        rates = {client: given.songs / min(seconds for seconds, _ in found) for client, found in results.items()}
        costs = {client: 1000 * min(cpu for _, cpu in found) / given.songs for client, found in results.items()}
        print(f"{given.songs} x 1 MiB from radosgw on loopback, best of {given.rounds}\n")
        print("| client | MiB/s | client CPU, ms/MiB | rate / download_file | CPU / download_file |")
        print("|---|---|---|---|---|")
        for client in results:
            ratios = f"{rates[client] / rates[BOTO3]:.2f} | {costs[client] / costs[BOTO3]:.2f}"
            print(f"| {client} | {rates[client]:.0f} | {costs[client]:.2f} | {ratios} |", flush=True)
        second = second_task_seconds(server, bucket, given.rounds)
    raw = {f"{client}, seconds": [seconds for seconds, _ in results[client]] for client in (OURS, BOTO3, S5CMD)}
    record("rate of staging, verified / download_file", rates[OURS] / rates[BOTO3], least=LEAST_RATE, raw=raw)
    record("rate of staging, verified / s5cmd sync", rates[OURS] / rates[S5CMD], least=1, raw=raw)
    record("CPU time of staging, verified / download_file", costs[OURS] / costs[BOTO3], most=MOST_CPU)
    record("seconds of a second task that shares the staged copy", second, most=MOST_SECONDS)
    goals = {
        f"at least {LEAST_RATE} times the rate of download_file": rates[OURS] >= LEAST_RATE * rates[BOTO3],
        f"at most {MOST_CPU} of its processor time": costs[OURS] <= MOST_CPU * costs[BOTO3],
        "no slower than s5cmd sync": rates[OURS] >= rates[S5CMD],
        f"a second task in less than {MOST_SECONDS:.0f} s": second < MOST_SECONDS,
    }
    missed = [goal for goal, met in goals.items() if not met]
    if missed:
        sys.exit(f"missed: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
