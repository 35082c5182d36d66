"""A complete job from S3 to S3: killed during staging, killed during publishing, resumed on an empty machine."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emotion.data.toy_dataset import generate_dataset
from job.storage.stage import GENERATED_SEED
from tests.conftest import TINY, TinyRun
from tests.job.soak import promised_bytes
from tests.stores.servers import S3Server


def killed_when(happens: Callable[[], bool], command: list[str], store: S3Server) -> None:
    """Run a job and kill it as soon as `happens()`."""
    environment = {**os.environ, **store.environment()}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while not happens():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL


def put_dataset(client: Any, bucket: str, songs: int, folder: Path) -> None:
    """The songs of generated:N."""
    generate_dataset(folder, songs, GENERATED_SEED, lambda: False)
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), bucket, f"deam/{path.relative_to(folder).as_posix()}")


def keys(client: Any, bucket: str, prefix: str) -> list[str]:
    return [found["Key"] for found in client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", ())]


def run_killed_twice(store: S3Server, folder: Path) -> Path:
    """Run the tiny job on two machines: one dies while it uploads, the other has only the mirror. Returns what it published."""
    client, bucket = store.client(), store.new_bucket()
    put_dataset(client, bucket, 24, folder / "generated")
    first, second = folder / "first", folder / "second"

    def command(work: Path) -> list[str]:
        settings = [
            f"data.source=s3://{bucket}/deam",
            f"artifacts.destination=s3://{bucket}/runs",
            f"checkpoint.mirror=s3://{bucket}/mirror",
            "storage.connections=1",
        ]
        sets = [word for setting in settings for word in ("--set", setting)]
        return [sys.executable, "-m", "job", "run", str(TINY), "--work", str(work), *sets]

    killed_when(lambda: len(list(first.glob("scratch/stage-*/audio/*"))) > 2, command(first), store)
    assert not list(first.glob("scratch/stage-*/receipt.json"))
    staged = {path: path.stat().st_ino for path in first.glob("scratch/stage-*/audio/[!.]*")}

    def uploads() -> bool:
        # Asking the server takes much of its time.
        return bool(list(first.glob("tiny-*/publish-*"))) and len(keys(client, bucket, "runs/")) > 2

    killed_when(uploads, command(first), store)
    assert not [key for key in keys(client, bucket, "runs/") if key.endswith("manifest.json")]
    # Songs that were complete before the first kill were not fetched again.
    assert {path: path.stat().st_ino for path in staged} == staged
    shutil.rmtree(first)

    found = subprocess.run(
        command(second), env={**os.environ, **store.environment()}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    begun = [line.split()[2] for line in found.stderr.splitlines() if " begins " in line]
    # The mirror may lack the last phase.
    assert begun[-1] == "phase=publish"
    assert not {"phase=stage", "phase=features", "phase=gan", "phase=synth"} & set(begun)
    (url,) = found.stdout.split()
    assert url.startswith(f"s3://{bucket}/runs/")
    published = folder / "published"
    for key in keys(client, bucket, "runs/"):
        target = published / key.removeprefix(url.removeprefix(f"s3://{bucket}/") + "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(bucket, key, str(target))
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket)
    return published


@pytest.mark.full
@pytest.mark.parametrize("server", ["moto", "radosgw"])
def test_a_job_from_s3_to_s3_killed_twice_publishes_the_same_bytes_as_a_local_one(
    server: str, request: pytest.FixtureRequest, tiny_run: TinyRun, tmp_path: Path
) -> None:
    published = run_killed_twice(request.getfixturevalue(server), tmp_path)
    assert promised_bytes(published) == promised_bytes(tiny_run.published)
