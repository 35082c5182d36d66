"""The folder of a sweep: who may submit its tasks."""

import json
import subprocess
import sys

import pytest

from emotion.errors import SpecError, StorageError
from slurm.sweep_folder import submitting
from tests.slurm.conftest import LoginNode


def test_only_one_process_submits_tasks_of_a_sweep_at_a_time(login: LoginNode) -> None:
    folder = login.folder(login.sweep(0))
    with submitting(folder.path), pytest.raises(SpecError, match="somebody is submitting"), submitting(folder.path):
        pass
    # Released after a failure, too.
    with pytest.raises(StorageError), submitting(folder.path):
        raise StorageError
    with submitting(folder.path):
        pass


@pytest.mark.parametrize("command", ["submit", "resubmit"])
def test_a_second_submission_at_the_same_time_is_refused(login: LoginNode, command: str) -> None:
    sweep = login.sweep(0)
    folder = login.folder(sweep)
    record = json.loads((folder.path / "sweep.json").read_text(encoding="utf-8"))
    cluster_file = login.home / "cluster.yaml"
    cluster_file.write_text(json.dumps(record["cluster"]), encoding="utf-8")
    rest = ["submit", str(login.home / "sweep.yaml"), "--cluster", str(cluster_file)]
    argv = [sys.executable, "-m", "slurm", *(rest if command == "submit" else ["resubmit", str(folder.path)])]
    with submitting(folder.path):
        found = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (found.returncode, "somebody is submitting" in found.stderr) == (64, True), found.stderr
    assert not (login.state / "count").exists()
