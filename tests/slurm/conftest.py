"""Two kinds of site, each a real SLURM, and a user who works on them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from emotion.files import read_json_lines
from slurm.sweep_folder import SweepFolder
from tests.conftest import TINY
from tests.slurm.cluster import SlurmCluster, missing_programs, started, wait_for

ROOT = Path(__file__).parent.parent.parent
LONG = ("gan.epochs=100000", "checkpoint.every_seconds=1")
"""Of a task that does not end before it is stopped."""


def require_slurm() -> None:
    lacking = missing_programs() + ([] if os.geteuid() == 0 else ["root"])
    if lacking:
        text = f"a SLURM of one's own needs {', '.join(lacking)}: apt-get install slurmctld slurmd slurm-client munge, as root"
        if os.environ.get("REQUIRE_ALL") == "1":
            pytest.fail(f"{text}, and REQUIRE_ALL=1")
        pytest.skip(text)


@pytest.fixture(scope="session")
def stock() -> Iterator[SlurmCluster]:
    """As SLURM comes: SIGTERM only, no accounting."""
    require_slurm()
    with started() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def signalling() -> Iterator[SlurmCluster]:
    """A site that sends the signal which jobs ask for, with a node on another machine."""
    require_slurm()
    far = "NodeName=far NodeHostname=far NodeAddr=192.0.2.1 CPUs=4 State=DOWN"
    with started(extra=f"SlurmctldParameters=preempt_send_user_signal\n{far}") as cluster:
        yield cluster


@dataclass
class User:
    """Somebody on the login node, in a folder of their own."""

    cluster: SlurmCluster
    home: Path
    cluster_file: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cluster_file = {
            "time_limit_minutes": 20,
            "cpus": 1,
            "memory_gib": 1,
            "gpus": 0,
            "at_most": 3,
            "work": str(self.home / "work"),
            "work_is_shared": True,
            "runtime": "bare",
            "python": sys.executable,
            "save_seconds": 5,
            **self.cluster_file,
        }

    def __call__(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """emotion-slurm ARGUMENTS."""
        return subprocess.run(
            [sys.executable, "-m", "slurm", *map(str, arguments)],
            cwd=ROOT,
            env=self.cluster.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def written(self, name: str, value: Any) -> Path:
        """YAML, of which JSON is a part."""
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value), encoding="utf-8")
        return path

    def sweep(self, name: str, *settings: str, folds: tuple[int, ...] = (0,)) -> Path:
        """A sweep of the tiny job with one setting."""
        return self.written(
            f"{name}.yaml",
            {"name": name, "spec": str(TINY), "folds": folds, "settings": [{"name": "base", "set": settings}]},
        )

    def submit(self, sweep: Path, *options: str) -> SweepFolder:
        found = self("submit", sweep, "--cluster", self.written("cluster.yaml", self.cluster_file), *options)
        assert found.returncode == 0, found.stderr
        return SweepFolder(Path(found.stdout.strip()))

    def job(self, folder: SweepFolder, task: int = 0) -> str:
        """The newest job of a task."""
        return [job.job for job in folder.submissions()[-1].jobs if (job.what, job.index) == ("task", task)][-1]

    def events(self, folder: SweepFolder, task: int = 0) -> list[dict[str, Any]]:
        return read_json_lines(folder.attempts_path("task", task))

    def log(self, folder: SweepFolder, task: int = 0) -> str:
        path = folder.log_path(self.job(folder, task))
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def wait_for_log(self, folder: SweepFolder, text: str, count: int = 1, task: int = 0) -> None:
        wait_for(f"{count} x {text!r} of task {task}", lambda: self.log(folder, task).count(text) >= count)

    def wait_for_end(self, folder: SweepFolder, kind: str, count: int = 1, task: int = 0) -> dict[str, Any]:
        """The event that tells of the `count`-th attempt that ended so."""

        def found() -> list[dict[str, Any]]:
            ends = [event for event in self.events(folder, task) if event.get("kind") == kind]
            return ends[count - 1 :]

        try:
            event: dict[str, Any] = wait_for(f"{count} x {kind} of task {task}", found)[0]
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.events(folder, task)}\n{self.log(folder, task)}") from error
        return event

    def wait_until_empty(self) -> None:
        wait_for("the queue is empty", lambda: not self.cluster.run("squeue", "-h"), 240)

    def push_away(self, node: str) -> None:
        """Somebody more important needs all of a node, for a moment."""
        self.cluster.run("sbatch", "-p", "high", "-w", node, "--exclusive", "-o", "/dev/null", "--wrap", "true")


@pytest.fixture
def user(stock: SlurmCluster, tmp_path: Path) -> Iterator[User]:
    user = User(stock, tmp_path)
    yield user
    # What a failed test has left would run for ever.
    stock.run("scancel", "--quiet", "--user=root")
    user.wait_until_empty()
