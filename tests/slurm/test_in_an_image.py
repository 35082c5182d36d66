"""The launcher with real images. EMOTION_TEST_IMAGES names them: `docker=emotion-job:cpu apptainer=/path/emotion-job.sif`."""

import json
import os
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.conftest import User

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("runtime", ["apptainer", "docker", "podman"])
def test_a_task_in_a_container_is_preempted_and_goes_on(stock: SlurmCluster, tmp_path: Path, runtime: str) -> None:
    images = dict(word.split("=", 1) for word in os.environ.get("EMOTION_TEST_IMAGES", "").split())
    if runtime not in images:
        pytest.skip(f"EMOTION_TEST_IMAGES names no image for {runtime}")
    site = {"runtime": runtime, "image": images[runtime], "python": None, "sbatch": ["--nodelist=node1"]}
    user = User(stock, tmp_path, site)
    folder = user.submit(user.sweep("image", "gan.epochs=25", "checkpoint.every_seconds=1"))
    user.wait_for_log(folder, "phase=gan begins")
    user.push_away("node1")
    user.wait_for_end(folder, "preempted")
    user.wait_for_log(folder, "checkpoint restored")
    user.wait_for_end(folder, "done")
    user.wait_until_empty()
    manifest = json.loads((Path(folder.tasks[0].published) / "manifest.json").read_text(encoding="utf-8"))
    assert runtime in json.dumps(manifest)
    assert (folder.path / "collected" / "collected.md").exists()
