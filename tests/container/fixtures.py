"""The image and the SIF, each built once, with a private Docker engine.

Needs root and the packages that .ci/run installs. BASE may name a base image; by default one is built from Debian's packages.
"""

import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.container.engines import NOBODY, ROOT, Apptainer, Container, Docker, docker_engine, fetch, interrupted
from tests.job.soak import promised_bytes

BUILD_SECONDS = 1200
GRACE_SECONDS = 30
"""The default time of ECS, AWS Batch and Kubernetes between SIGTERM and SIGKILL."""
DEMO = "/specs/demo.yaml"
LONGER = ("--set", "gan.epochs=25", "--set", "vit.epochs=20", "--set", "device.threads=null")
"""For the tiny job that is stopped: dozens of steps in both trainings, and all threads, as by default."""
SHUT = ("--nv", "--cleanenv", "--containall")
"""The options of Apptainer that isolate a container the most."""
Component = Callable[[str], str]
Runs = tuple[list[int], Path]


@pytest.fixture(scope="session")
def open_folder() -> Iterator[Path]:
    """A folder that the users of containers may enter; those of pytest are closed to other users."""
    folder = Path(tempfile.mkdtemp(prefix="emotion-container-", dir="/var/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def docker(open_folder: Path, component: Component) -> Iterator[Docker]:
    if os.geteuid() != 0:
        reason = "a private Docker engine needs root"
        pytest.fail(reason) if os.environ.get("REQUIRE_ALL") == "1" else pytest.skip(reason)
    folder = open_folder / "docker"
    folder.mkdir()
    with docker_engine(folder, component) as engine:
        yield engine


@pytest.fixture(scope="session")
def make(docker: Docker, open_folder: Path, component: Component) -> Callable[..., None]:
    """make("image") as a user would, with our engine and our base image."""
    base = os.environ.get("BASE")
    if not base:
        component("mmdebstrap")
        tar, base = open_folder / "base.tar", "emotion-base"
        fetch(["container/debian-base.sh", tar], "the base image")
        docker("import", "--change", "ENV PATH=/usr/bin:/bin", tar, base)
        tar.unlink()

    def run(target: str, *variables: str, **environment: str) -> None:
        command = ["make", target, f"DOCKER={docker.client}", f"BASE={base}", *variables]
        found = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **docker.environment, **environment}, capture_output=True, text=True
        )
        assert found.returncode == 0, (found.stdout + found.stderr)[-4000:]

    return run


@pytest.fixture(scope="session")
def image(docker: Docker, make: Callable[..., None]) -> str:
    fetch(["make", "container/wheels/.cpu"], "the wheels")
    make("image", "IMAGE=emotion-job:test")
    return "emotion-job:test"


@pytest.fixture(scope="session")
def apptainer(open_folder: Path, component: Component) -> Apptainer:
    installed = shutil.which("apptainer")
    if installed:
        return Apptainer(Path(installed))
    for program in ("patchelf", "mksquashfs", "squashfuse_ll"):
        component(program)
    folder = open_folder / "apptainer"
    found = subprocess.run(
        [ROOT / "tests/container/apptainer.sh", folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if found.returncode == 3:
        pytest.skip(f"no Apptainer: {found.stdout.strip().splitlines()[-1]}")
    assert found.returncode == 0, found.stdout
    return Apptainer(folder / "usr/bin/apptainer")


@pytest.fixture(scope="session")
def sif(apptainer: Apptainer, image: str, make: Callable[..., None], open_folder: Path) -> Path:
    path, temporary = open_folder / "emotion-job.sif", open_folder / "sif"
    temporary.mkdir()
    quick = "MKSQUASHFS=-comp zstd -Xcompression-level 1"
    # Root may lack this capability, which Apptainer passes on.
    environment = {"APPTAINER_DROP_CAPS": "CAP_SYS_RESOURCE", "APPTAINER_TMPDIR": str(temporary)}
    make("sif", f"IMAGE={image}", f"SIF={path}", f"APPTAINER={apptainer.program}", quick, **environment)
    return path


@pytest.fixture(scope="session")
def tiny_spec(open_folder: Path) -> Path:
    """The spec of the tiny job, in a folder that the user of a container can read."""
    return Path(shutil.copy(TINY, open_folder / "tiny.yaml"))


@pytest.fixture(scope="session")
def new_work(open_folder: Path) -> Callable[[int], Path]:
    """new_work(uid) is an empty folder for --work that belongs to a user."""

    def make_folder(uid: int) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="work-", dir=open_folder))
        os.chown(folder, uid, uid)
        return folder

    return make_folder


def published_in(work: Path) -> dict[str, bytes]:
    """The files of a published result that are the same in every run of its spec."""
    (published,) = work.glob("published/*")
    return promised_bytes(published)


@dataclass(frozen=True)
class Sandbox:
    """The least that the image needs to run: an unknown user, a read-only root, no network."""

    docker: Docker
    image: str
    uid: int
    work: Path
    spec: Path

    @classmethod
    def with_unknown_user(cls, docker: Docker, image: str, new_work: Callable[[int], Path], spec: Path) -> "Sandbox":
        uid = random.SystemRandom().randrange(20_000, 60_000)
        return cls(docker, image, uid, new_work(uid), spec)

    def arguments(self, *more: str | Path) -> list[str | Path]:
        binds = ["--volume", f"{self.work}:{self.work}", "--volume", f"{self.spec}:{self.spec}:ro"]
        return ["--network=none", "--read-only", f"--user={self.uid}:{self.uid}", *binds, *more]

    def run(self, *command: str | Path) -> tuple[int, str]:
        """Exit code and output of a command of the image."""
        with self.docker.started(*self.arguments(self.image, *command)) as container:
            output = "".join(container.lines())
            return container.exit_code(), output

    def job(self, spec: str | Path, *more: str | Path) -> list[str | Path]:
        return ["run", spec, "--work", self.work, *more]


def stop(container: Container) -> int:
    """Stop it as platforms do: SIGTERM, the grace time, SIGKILL. Returns the exit code."""
    container.docker("stop", f"--time={GRACE_SECONDS}", container.name)
    return container.exit_code()


@pytest.fixture(scope="session")
def job_in_docker(docker: Docker, image: str, new_work: Callable[[int], Path], tiny_spec: Path) -> Runs:
    """A job that is stopped in the GAN and started again: its exit codes and its work folder."""
    box = Sandbox.with_unknown_user(docker, image, new_work, tiny_spec)
    with docker.started(*box.arguments(image, *box.job(tiny_spec, *LONGER))) as container:
        container.wait_for("phase=gan micro_batch=")
        codes = [stop(container)]
    code, output = box.run(*box.job(tiny_spec, *LONGER))
    assert code == 0, output
    assert "phase=gan begins" in output
    assert output.count("checkpoint restored") == 1
    return [*codes, code], box.work


@pytest.fixture(scope="session")
def job_in_sif(apptainer: Apptainer, sif: Path, new_work: Callable[[int], Path], tiny_spec: Path) -> Runs:
    """The same job, stopped in the ViT and started again: its exit codes and its work folder."""
    work = new_work(NOBODY)
    command = ["run", *SHUT, "--bind", work, "--bind", tiny_spec, sif, "run", tiny_spec, "--work", work, *LONGER]
    code, output = interrupted(apptainer.command(*command), "phase=vit micro_batch=")
    assert code != 0, output
    resumed = apptainer(*command)
    assert "phase=gan is done" in resumed
    assert resumed.count("checkpoint restored") == 1
    return [code, 0], work


@pytest.fixture(scope="session")
def job_elsewhere(
    request: pytest.FixtureRequest, docker: Docker, image: str, new_work: Callable[[int], Path], tiny_spec: Path
) -> Path:
    """Work folder of the job that was stopped in the ViT, in the SIF. Without Apptainer: of one that was not stopped."""
    try:
        work: Path = request.getfixturevalue("job_in_sif")[1]
    except pytest.skip.Exception:
        box = Sandbox.with_unknown_user(docker, image, new_work, tiny_spec)
        code, output = box.run(*box.job(tiny_spec, *LONGER))
        assert code == 0, output
        return box.work
    return work
