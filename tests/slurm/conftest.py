"""A login node with fake SLURM commands, two real SLURMs, and a user who works on them."""

import contextlib
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
from slurm.slurm_cli import Site
from slurm.submit import make_sweep_folder
from slurm.sweep import Sweep, load_sweep
from slurm.sweep_folder import SweepFolder
from tests.conftest import TINY
from tests.slurm.private_slurm import PrivateSlurm, missing_programs, started, wait_for
from tests.slurm.samples import add_program, cluster_of, sweep_file

ROOT = Path(__file__).parent.parent.parent
LONG = ("gan.epochs=100000", "checkpoint.every_seconds=1")
"""Settings of a task that runs until it is stopped."""
SITE = Site({"MaxArraySize": "1001"}, {"low": {"Default": "YES", "State": "UP"}})
SBATCH = """
count=$(cat "$STATE/count" 2>/dev/null || echo 0)
[ "$count" = "$FAILS_AT" ] && { echo "no such thing" >&2; exit 1; }
echo $((count + 1)) > "$STATE/count"
echo "Submitted batch job $((count + 11))"
"""
SCONTROL = """
case "$*" in
    *config) echo "MaxArraySize = 1001" ;;
    *) echo "PartitionName=low Default=YES State=UP" ;;
esac
"""
SQUEUE = """cat "$STATE/queue" 2>/dev/null || true"""
SCANCEL = """echo "$@" >> "$STATE/cancelled"; exit "${CANCEL_CODE:-0}\""""


class LoginNode:
    """A login node whose SLURM commands are scripts of a few lines. sbatch gives the ids 11, 12, …"""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.state = folder, folder / "state"
        self.state.mkdir()
        self.patch = monkeypatch
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL), ("srun", ""), ("scontrol", SCONTROL)):
            self.program(name, text)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setenv("STATE", str(self.state))
        monkeypatch.setenv("FAILS_AT", "never")

    def program(self, name: str, text: str) -> None:
        add_program(self.home / "bin", name, text)

    def queue(self, *jobs: str) -> None:
        (self.state / "queue").write_text("".join(f"{job}|RUNNING|None|node1\n" for job in jobs), encoding="utf-8")

    def cancelled(self) -> str:
        path = self.state / "cancelled"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def sweep(self, *folds: int) -> Sweep:
        return load_sweep(sweep_file(self.home, folds=folds))

    def folder(self, sweep: Sweep) -> SweepFolder:
        work = str(self.home / "work")
        cluster = cluster_of(work=work, work_is_shared=True, runtime="bare", image=None, python=sys.executable)
        return make_sweep_folder(sweep, self.home / "sweep.yaml", cluster)


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoginNode:
    return LoginNode(tmp_path, monkeypatch)


def require_slurm() -> None:
    missing = missing_programs() + ([] if os.geteuid() == 0 else ["root"])
    if missing:
        text = f"a private SLURM needs {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge, as root"
        if os.environ.get("REQUIRE_ALL") == "1":
            pytest.fail(f"{text}, and REQUIRE_ALL=1")
        pytest.skip(text)


@pytest.fixture(scope="session")
def stock() -> Iterator[PrivateSlurm]:
    """A site with SLURM's defaults: SIGTERM only, no accounting."""
    require_slurm()
    with started() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def signalling() -> Iterator[PrivateSlurm]:
    """A site that sends jobs the signal they requested, with a node on another machine."""
    require_slurm()
    far = "NodeName=far NodeHostname=far NodeAddr=192.0.2.1 CPUs=4 State=DOWN"
    with started(extra=f"SlurmctldParameters=preempt_send_user_signal\n{far}") as cluster:
        yield cluster


@dataclass
class User:
    """A user on the login node of a real SLURM, with a home folder."""

    cluster: PrivateSlurm
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
        """Write a YAML file (as JSON, which is YAML)."""
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value), encoding="utf-8")
        return path

    def sweep(self, name: str, *settings: str, folds: tuple[int, ...] = (0,)) -> Path:
        """A sweep of the tiny job with one setting."""
        return self.written(
            f"{name}.yaml", {"name": name, "spec": str(TINY), "folds": folds, "settings": [{"name": "base", "set": settings}]}
        )

    def submit(self, sweep: Path, *options: str) -> SweepFolder:
        found = self("submit", sweep, "--cluster", self.written("cluster.yaml", self.cluster_file), *options)
        assert found.returncode == 0, found.stderr
        return SweepFolder(Path(found.stdout.strip()))

    def job(self, folder: SweepFolder, task: int = 0) -> str:
        """The newest job of a task."""
        return [job.job for job in folder.submissions()[-1].jobs if (job.kind, job.index) == ("task", task)][-1]

    def events(self, folder: SweepFolder, task: int = 0) -> list[dict[str, Any]]:
        return read_json_lines(folder.attempts_path("task", task))

    def log(self, folder: SweepFolder, task: int = 0) -> str:
        path = folder.log_path(self.job(folder, task))
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    @contextlib.contextmanager
    def explained(self, folder: SweepFolder, task: int) -> Iterator[None]:
        """A wait that fails in here shows the queue and the task's events and log."""
        try:
            yield
        except TimeoutError as error:
            queue = self.cluster.run("scontrol", "-o", "show", "job")
            raise AssertionError(f"{error}\n{queue}\n{self.events(folder, task)}\n{self.log(folder, task)}") from error

    def wait_for_log(self, folder: SweepFolder, text: str, count: int = 1, task: int = 0) -> None:
        with self.explained(folder, task):
            wait_for(f"{count} x {text!r} of task {task}", lambda: self.log(folder, task).count(text) >= count)

    def wait_for_end(self, folder: SweepFolder, outcome: str, count: int = 1, task: int = 0) -> dict[str, Any]:
        """The event of the `count`-th attempt that ended with this outcome."""

        def found() -> list[dict[str, Any]]:
            ends = [event for event in self.events(folder, task) if event.get("outcome") == outcome]
            return ends[count - 1 :]

        with self.explained(folder, task):
            event: dict[str, Any] = wait_for(f"{count} x {outcome} of task {task}", found)[0]
        return event

    def wait_until_empty(self) -> None:
        wait_for("the queue is empty", lambda: not self.cluster.run("squeue", "-h"), 240)

    def preempt(self, node: str) -> None:
        """Run a job of higher priority on the whole node for a moment."""
        self.cluster.run("sbatch", "-p", "high", "-w", node, "--exclusive", "-o", "/dev/null", "--wrap", "true")


@pytest.fixture
def user(stock: PrivateSlurm, tmp_path: Path) -> Iterator[User]:
    user = User(stock, tmp_path)
    yield user
    # A failed test's jobs would run forever.
    stock.run("scancel", "--quiet", "--user=root")
    user.wait_until_empty()
