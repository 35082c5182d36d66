"""The launcher with the real image, in Apptainer and in Docker."""

import json
import os
from pathlib import Path

import pytest

from tests.slurm.conftest import User
from tests.slurm.private_slurm import PrivateSlurm

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]


def runtime_of(name: str, request: pytest.FixtureRequest) -> tuple[str, dict[str, str]]:
    """The image, and the environment that a job needs to run it."""
    if name == "docker":
        return request.getfixturevalue("image"), request.getfixturevalue("docker").environment
    image, program = request.getfixturevalue("sif"), request.getfixturevalue("apptainer").program
    # Root in a sandbox may lack a capability that Apptainer passes on.
    return str(image), {"PATH": f"{program.parent}:{os.environ['PATH']}", "APPTAINER_DROP_CAPS": "CAP_SYS_RESOURCE"}


@pytest.mark.parametrize("runtime", ["docker", "apptainer"])
def test_a_sweep_in_containers_is_prepared_preempted_and_collected(
    stock: PrivateSlurm, tmp_path: Path, runtime: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, environment = runtime_of(runtime, request)
    for name, value in environment.items():
        monkeypatch.setitem(stock.environment, name, value)
    site = {"runtime": runtime, "image": image, "python": None, "sbatch": ["--nodelist=node1"]}
    user = User(stock, tmp_path, site)
    folder = user.submit(user.sweep("image", "gan.epochs=25", "checkpoint.every_seconds=1", folds=(0, 1)))
    user.wait_for_log(folder, "phase=gan begins")
    user.preempt("node1")
    user.wait_for_log(folder, "checkpoint restored")
    ends = [event for event in user.events(folder) if event["event"] == "end"]
    # SLURM's own requeue comes first where a container takes longer to end than the grace time.
    assert ends[0]["outcome"] in ("preempted", "requeued")
    for task in (0, 1):
        user.wait_for_end(folder, "done", task=task)
    user.wait_until_empty()
    manifest = json.loads((Path(folder.tasks[0].published) / "manifest.json").read_text(encoding="utf-8"))
    assert runtime in json.dumps(manifest["container"])
    collected = json.loads((folder.path / "collected" / "collected.json").read_text(encoding="utf-8"))
    assert collected["missing_tasks"] == []
