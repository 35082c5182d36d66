"""What several tests share, and how what cannot run here is counted.

`pytest` runs what needs nothing but Python; `pytest --all` runs the tests marked `full` as well. Those may need a component of
the machine, which they ask for with the fixture `component`: where it is missing they are skipped, which the summary counts,
or fail where REQUIRE_ALL=1.
"""

import os

# As in a job, before numpy is imported: sums of a matrix product depend on the number of threads of its BLAS.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import csv
import functools
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import botocore.session
import pytest
from pydantic.fields import FieldInfo

from emotion.config import Section
from emotion.errors import Interrupted
from job.pipeline.folders import JobFolders
from job.pipeline.phases import BY_NAME, PHASES
from job.pipeline.runner import run_job
from job.preemption import StopRequest
from job.spec.model import JobSpec, run_name
from tests.stores.dataset import fill
from tests.stores.scripted import ScriptedS3
from tests.stores.servers import CEPH_PROGRAMS, S3Server, moto_server, radosgw_server

# Tests and their jobs run beside each other: threads that spin while they wait would take the processor from others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A new client reads a megabyte of JSON that comes with botocore: most of the time of a small test.
botocore.session.create_loader = functools.cache(botocore.session.create_loader)

# Of images and engines: tests of containers and of clusters share them.
pytest_plugins = ["tests.container.fixtures"]

TINY = Path(__file__).parent / "tiny.yaml"
SECRET = "hush-hush"
"""In the environment of the tiny job, and nowhere else."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the tests marked full")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: takes long or needs more than Python; runs with --all")
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and not config.getoption("--all"):
        # Each of several workers keeps to one core, or their threads wait for each other: half of the time.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


USE_TINY_RUN = {
    *(f"tests/job/test_{name}.py" for name in ("command_line", "fetch_inputs", "job", "manifest", "provenance", "publish")),
    *(f"tests/job/test_{name}.py" for name in ("closing", "cross", "estimate", "facts", "model_card", "reproduce", "sounds")),
    *(f"tests/job/test_{name}.py" for name in ("warm_start", "wrong_predictions")),
    "tests/test_notebook_faults.py",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers (`make test` starts two) take whole files, so that module fixtures are made once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            # The images are built once for several files, and in the short run of all tests so is the tiny job.
            if file.startswith("tests/container/") or file == "tests/slurm/test_in_an_image.py":
                return "containers"
            return "tiny job" if file in USE_TINY_RUN and not config.getoption("--all") else file

    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if not item.get_closest_marker("full"):
            continue
        if not config.getoption("--all"):
            item.add_marker(pytest.mark.skip(reason="runs with make test-all"))
        elif not item.get_closest_marker("timeout"):
            # Beside another worker on a slow machine the longest need more than the limit of a quick test.
            item.add_marker(pytest.mark.timeout(1200))


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field of the spec holds, or may hold; None for a plain value."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


@pytest.fixture(scope="session")
def component() -> Callable[[str], str]:
    """component("ffmpeg") is the path of a program, or a skip that says what is missing, or a failure with REQUIRE_ALL=1."""

    def find(program: str) -> str:
        path = shutil.which(program)
        if path is None:
            if os.environ.get("REQUIRE_ALL") == "1":
                pytest.fail(f"{program} is not installed, and REQUIRE_ALL=1")
            pytest.skip(f"{program} is not installed")
        return path

    return find


@pytest.fixture
def mounted(tmp_path: Path, component: Callable[[str], str]) -> Iterator[Callable[..., None]]:
    """mounted(folder, "-t", "tmpfs", …) mounts a file system, which needs root."""
    component("mount")
    if os.geteuid() != 0:
        component("mount as root")
    folders: list[Path] = []

    def mount(folder: Path, *arguments: str) -> None:
        subprocess.run(["mount", *arguments, folder], check=True)
        if folder not in folders:
            folders.append(folder)

    yield mount
    for folder in folders:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    with moto_server() as store:
        yield store


@pytest.fixture(scope="session")
def radosgw(component: Callable[[str], str]) -> Iterator[S3Server]:
    for program in CEPH_PROGRAMS:
        component(program)
    with radosgw_server() as store:
        yield store


@pytest.fixture(autouse=True)
def unshared_connections() -> Iterator[None]:
    """A process shares a connection, with its credentials, per endpoint; a later test's server may get the port of this one's."""
    yield
    retry = sys.modules.get("job.storage.s3_retry")
    if retry is not None:
        retry._shared.cache_clear()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedS3]:
    """A scripted S3 server with a dataset whose songs are random bytes. Clients pause for 10 ms at most between tries."""
    from job.storage import s3_retry

    monkeypatch.setattr(s3_retry, "LONGEST_PAUSE_SECONDS", 0.01)
    with ScriptedS3() as scripted:
        fill(scripted)
        for name, value in scripted.address.environment().items():
            monkeypatch.setenv(name, value)
        yield scripted


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real music and label files that may not enter the repository; a counted skip where it is not given."""
    folder = os.environ.get("EMOTION_TEST_DATA")
    if not folder:
        pytest.skip("EMOTION_TEST_DATA is not set: needs a folder with deam_annotations, odd_mp3 and vgmidi48")
    return Path(folder)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small networks are quicker, and equal everywhere, on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class StopWhen(StopRequest):
    """Asked to stop as soon as `answer` says so."""

    def __init__(self, answer: Callable[[], bool]) -> None:
        super().__init__()
        self.answer = answer

    def __call__(self) -> bool:
        if self.answer():
            self.request("a test asked for it")
        return super().__call__()


def run_stopped_in_each_phase(spec: JobSpec, folders: JobFolders) -> Path:
    """The published folder of a job that is stopped whenever it has started another phase, and run again."""

    def begun() -> set[str]:
        return {path.name for path in folders.run_folder(spec).glob("*/")}

    for _ in (phase for phase in PHASES if phase.kept_in == "work"):
        before = begun()
        with pytest.raises(Interrupted):
            run_job(spec, folders, "publish", False, StopWhen(lambda before=before: len(begun() - before) == 1))  # type: ignore[misc]
    run_job(spec, folders, "publish", False, StopRequest())
    return folders.work / "published" / run_name(spec)


def terminated_in_gan(command: list[str]) -> tuple[int, str]:
    """Exit code of a job that gets SIGTERM when its GAN begins, and what it said from then on."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "phase=gan begins" in line:
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
        return process.wait(), rest


@dataclass(frozen=True)
class TinyRun:
    """The tiny job, run once by its command for all tests that look at its results."""

    work: Path
    run_folder: Path
    published: Path
    output: str
    seconds: float

    def phase(self, name: str) -> Path:
        """The folder of one of its phases."""
        parent = self.work / "scratch" if BY_NAME[name].kept_in == "scratch" else self.run_folder
        (folder,) = parent.glob(f"{name}-*")
        return folder

    @property
    def predictions(self) -> list[dict[str, str]]:
        return list(csv.DictReader((self.published / "predictions.csv").read_text().splitlines()))


@pytest.fixture(scope="session")
def emotion_job() -> Callable[..., subprocess.CompletedProcess[str]]:
    """emotion_job("check", "x.yaml") runs the command line as a user would."""

    def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "job", *map(str, arguments)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, emotion_job: Callable[..., subprocess.CompletedProcess[str]]) -> TinyRun:
    work = tmp_path_factory.mktemp("tiny")
    style = tmp_path_factory.mktemp("style") / "matplotlibrc"
    style.write_text("text.usetex: True\nfigure.facecolor: red\n")
    environment = {
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:64",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # in the shell of every notebook
        "MATPLOTLIBRC": str(style),
    }
    started = time.monotonic()
    found = emotion_job("run", TINY, "--work", work, **environment)
    seconds = time.monotonic() - started
    assert found.returncode == 0, found.stderr
    (run_folder,) = work.glob("tiny-*")
    return TinyRun(work, run_folder, work / "published" / run_folder.name, found.stderr, seconds)
