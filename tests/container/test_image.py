"""The image, built for real: what is in it, and jobs that run, stop and go on in it. Each with what shows that it could fail."""

import importlib.metadata
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.container.engines import ROOT, Docker
from tests.container.fixtures import BUILD_SECONDS, DEMO, Runs, Sandbox, published_in

pytestmark = [pytest.mark.full, pytest.mark.timeout(BUILD_SECONDS)]

SITE = "/opt/emotion/lib/python3.11/site-packages"


@pytest.fixture
def sandbox(docker: Docker, image: str, new_work: Callable[[int], Path], tiny_spec: Path) -> Sandbox:
    return Sandbox.of_somebody(docker, image, new_work, tiny_spec)


def test_the_demo_job_leaves_with_75_in_the_grace_and_then_ends(demo_in_docker: Runs) -> None:
    codes, work = demo_in_docker
    assert codes == [75, 0]
    assert "model/model.safetensors" in published_in(work)


def test_wherever_a_job_was_stopped_it_ends_with_the_same_bytes(demo_in_docker: Runs, demo_elsewhere: Path) -> None:
    """In Docker it was stopped in the GAN, in the SIF in the ViT: had either left a trace, the two would differ."""
    one, other = published_in(demo_in_docker[1]), published_in(demo_elsewhere)
    assert [name for name in one if one[name] != other.get(name)] == []
    assert one.keys() == other.keys()
    # The control: one bit.
    model = bytearray(one["model/model.safetensors"])
    model[-1] ^= 1
    assert {**one, "model/model.safetensors": bytes(model)} != other


def test_a_signal_that_does_not_reach_the_job_is_noticed(sandbox: Sandbox) -> None:
    """The control: behind a shell the same stop ends with SIGKILL."""
    wrapper = ["--entrypoint=sh", sandbox.image, "-c", 'emotion-job "$@"; exit $?', "sh"]
    with sandbox.docker.started(*sandbox.arguments(*wrapper, *sandbox.job(sandbox.spec))) as container:
        container.wait_for("phase=stage begins")
        sandbox.docker("stop", "--time=1", container.name)
        assert container.exit_code() == 137


def test_the_demo_job_compiles_nothing(docker: Docker, image: str, demo_in_docker: Runs) -> None:
    """numba takes half a minute in each new container for what librosa has it compile; a job has it compile nothing."""
    compiled = demo_in_docker[1] / "scratch/caches/numba"
    assert compiled.is_dir()
    assert not list(compiled.rglob("*.nb?"))
    # The control: what it does compile is kept there.
    program = "import librosa, numpy; librosa.util.localmax(numpy.arange(9.0))"
    python = [
        "run",
        "--rm",
        "--user=0",
        "--network=none",
        "--read-only",
        f"--volume={compiled}:/numba",
        "--env=NUMBA_CACHE_DIR=/numba",
    ]
    docker(*python, "--entrypoint=/opt/emotion/bin/python", image, "-c", program)
    assert list(compiled.rglob("*.nb?"))


def test_a_job_writes_to_its_work_folder_alone(sandbox: Sandbox) -> None:
    elsewhere = ["run", sandbox.spec, "--work", "/opt/elsewhere"]
    code, said = sandbox.run(*elsewhere)
    assert code == 69, said
    assert "/opt/elsewhere: cannot make this folder" in said
    # The control: as root, on a root that is not read-only, it can be made.
    as_root = ["--network=none", "--user=0", f"--volume={sandbox.spec}:{sandbox.spec}:ro", sandbox.image]
    assert "phase=stage ends" in sandbox.docker("run", "--rm", *as_root, *elsewhere, "--until", "stage")


def test_a_promised_gpu_that_is_not_there_ends_before_any_work(sandbox: Sandbox) -> None:
    code, said = sandbox.run(*sandbox.job(sandbox.spec, "--set", "device.kind=cuda"))
    assert (code, said.count("\n")) == (70, 1), said
    assert "is built for CPUs only" in said
    assert not list(sandbox.work.glob("scratch/stage-*"))


def test_predict_needs_no_folder_but_one_for_temporary_files(sandbox: Sandbox, demo_in_docker: Runs) -> None:
    (published,) = demo_in_docker[1].glob("published/*")
    sound = next(published.glob("samples/*.wav"))
    bind = ["--volume", f"{published}:{published}:ro"]
    said = sandbox.docker("run", "--rm", *sandbox.arguments(*bind, sandbox.image, "predict", published, sound))
    assert said.splitlines()[-1].endswith(str(sound))


def test_without_being_told_it_is_not_root_and_has_no_network(docker: Docker, image: str) -> None:
    routes = ["run", "--rm", "--entrypoint=sh"]
    look = ["-c", "id -u; tail -n +2 /proc/net/route | wc -l"]
    assert docker(*routes, "--network=none", image, *look).split() == ["10001", "0"]
    user, lines = docker(*routes, "--user=0", "--network=host", image, *look).split()
    assert user == "0"
    assert int(lines) > 0, "the control: this machine has no network, so that its absence shows nothing"


def test_another_packages_folder_does_not_get_in(docker: Docker, image: str, open_folder: Path) -> None:
    foreign = open_folder / "foreign"
    foreign.mkdir()
    (foreign / "click.py").write_text("raise SystemExit('a foreign click')")
    bind = ["run", "--rm", "--network=none", f"--volume={foreign}:/foreign:ro", "--env=PYTHONPATH=/foreign"]
    assert "valid" in docker(*bind, image, "check", DEMO)
    python = ["--entrypoint=/opt/emotion/bin/python", image, "-c", "import click"]
    assert "a foreign click" in docker(*bind, *python, check=False), "the control"


LEFTOVERS = f"""
for program in gcc cc make uv git; do command -v $program; done
ls -d /build /wheels /root/.cache /var/cache/apt/*.bin {SITE}/pip 2>/dev/null
find / -xdev -name '*.whl' 2>/dev/null
true
"""


def test_no_tools_and_no_caches_are_left(docker: Docker, image: str) -> None:
    look = ["run", "--rm", "--network=none", "--user=0", "--entrypoint=sh", image, "-c"]
    assert docker(*look, LEFTOVERS).split() == []
    assert docker(*look, f"mkdir /build; touch /opt/a.whl; {LEFTOVERS}").split() == ["/build", "/opt/a.whl"], "the control"


def test_a_change_of_the_code_is_a_small_layer(docker: Docker, image: str) -> None:
    told = docker("history", "--no-trunc", "--human=false", "--format={{.Size}} {{.CreatedBy}}", image)
    sizes = {line.split(" ", 1)[1]: int(line.split(" ", 1)[0]) for line in told.splitlines()}
    (ours,) = (size for command, size in sizes.items() if "/build/ours" in command)
    (libraries,) = (size for command, size in sizes.items() if command.startswith("COPY /opt/emotion"))
    assert ours < 5_000_000
    assert libraries > 500_000_000, "the control: sizes are told"


def test_no_place_and_no_secret_is_in_the_image(docker: Docker, image: str) -> None:
    """Where packages came from is of this machine, and who may fetch them is nobody else's."""
    told = docker("history", "--no-trunc", image) + docker("image", "inspect", image)
    assert "org.opencontainers.image.title" in told, "the control: labels are told"
    places = {word for word in re.split(r"[\s'\"=,]", told) if "://" in word}
    assert places == set()
    assert not re.search(r"(?i)secret|password|token", told)


def test_labels_and_environment_say_what_it_is(docker: Docker, image: str) -> None:
    config = json.loads(docker("image", "inspect", image))[0]["Config"]
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert labels["title"] == "emotion-job"
    assert labels["version"] == f"{importlib.metadata.version('emotion-job')}-cpu"
    assert labels["revision"].removesuffix("-dirty") == revision.strip()
    environment = dict(line.split("=", 1) for line in config["Env"])
    assert environment["EMOTION_REVISION"] == labels["revision"]
    assert environment["EMOTION_IMAGE"] == image
    assert environment["PYTORCH_ALLOC_CONF"] == environment["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert config["Entrypoint"] == ["/opt/emotion/bin/emotion-job"]


def test_the_manifest_names_image_and_revision(demo_in_docker: Runs, image: str) -> None:
    (path,) = demo_in_docker[1].glob("published/*/manifest.json")
    manifest = json.loads(path.read_text())
    assert (manifest["container"]["kind"], manifest["container"]["image"]) == ("docker", image)
    assert len(manifest["code"]["revision"].removesuffix("-dirty")) == 40
