"""The image, built for real: its content, and jobs that run, stop and resume in it. Controls show that a test can fail."""

import importlib.metadata
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from job.results.predictions import COLUMNS
from tests.container.engines import ROOT, Docker
from tests.container.fixtures import BUILD_SECONDS, DEMO, Runs, Sandbox, published_in

pytestmark = [pytest.mark.full, pytest.mark.timeout(BUILD_SECONDS)]

SITE = "/opt/emotion/lib/python3.11/site-packages"


@pytest.fixture
def sandbox(docker: Docker, image: str, new_work: Callable[[int], Path], tiny_spec: Path) -> Sandbox:
    return Sandbox.with_unknown_user(docker, image, new_work, tiny_spec)


def test_a_stopped_job_exits_with_75_within_the_grace_time_and_then_resumes(job_in_docker: Runs) -> None:
    codes, work = job_in_docker
    assert codes == [75, 0]
    assert "model/model.safetensors" in published_in(work)


def test_a_job_publishes_the_same_bytes_wherever_it_was_stopped(job_in_docker: Runs, job_elsewhere: Path) -> None:
    """In Docker it was stopped in the GAN, in the SIF in the ViT. If a stop changed a result, the two would differ."""
    one, other = published_in(job_in_docker[1]), published_in(job_elsewhere)
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


def test_a_job_can_write_only_to_its_work_folder(sandbox: Sandbox) -> None:
    elsewhere = ["run", sandbox.spec, "--work", "/opt/elsewhere"]
    code, output = sandbox.run(*elsewhere)
    assert code == 69, output
    assert "/opt/elsewhere: cannot make this folder" in output
    # The control: as root, on a root that is not read-only, it can be made.
    as_root = ["--network=none", "--user=0", f"--volume={sandbox.spec}:{sandbox.spec}:ro", sandbox.image]
    assert "phase=stage ends" in sandbox.docker("run", "--rm", *as_root, *elsewhere, "--until", "stage")


def test_a_job_that_requires_a_missing_gpu_ends_before_it_stages_data(sandbox: Sandbox) -> None:
    code, output = sandbox.run(*sandbox.job(sandbox.spec, "--set", "device.kind=cuda"))
    announced, error = output.splitlines()
    assert code == 70
    assert " INFO run=" in announced
    assert "is built for CPUs only" in error
    assert not list(sandbox.work.glob("scratch/stage-*"))


def test_predict_needs_no_writable_folder_but_the_one_for_temporary_files(sandbox: Sandbox, job_in_docker: Runs) -> None:
    (published,) = job_in_docker[1].glob("published/*")
    sound = next(published.glob("samples/*.wav"))
    bind = ["--volume", f"{published}:{published}:ro"]
    output = sandbox.docker("run", "--rm", *sandbox.arguments(*bind, sandbox.image, "predict", published, sound))
    rows = [line.split("\t") for line in output.splitlines()]  # and a warning: a sample is shorter than a song
    assert [row[-1] for row in rows if len(row) == len(COLUMNS)] == ["file", str(sound)]


def test_the_default_user_is_not_root_and_a_container_without_network_has_no_route(docker: Docker, image: str) -> None:
    routes = ["run", "--rm", "--entrypoint=sh"]
    look = ["-c", "id -u; tail -n +2 /proc/net/route | wc -l"]
    assert docker(*routes, "--network=none", image, *look).split() == ["10001", "0"]
    user, lines = docker(*routes, "--user=0", "--network=host", image, *look).split()
    assert user == "0"
    assert int(lines) > 0, "the control: this machine has no network, so that its absence shows nothing"


def test_pythonpath_of_the_host_does_not_reach_the_job(docker: Docker, image: str, open_folder: Path) -> None:
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


def test_the_image_contains_no_build_tools_and_no_caches(docker: Docker, image: str) -> None:
    look = ["run", "--rm", "--network=none", "--user=0", "--entrypoint=sh", image, "-c"]
    assert docker(*look, LEFTOVERS).split() == []
    assert docker(*look, f"mkdir /build; touch /opt/a.whl; {LEFTOVERS}").split() == ["/build", "/opt/a.whl"], "the control"


def test_our_code_is_a_small_layer_of_its_own(docker: Docker, image: str) -> None:
    output = docker("history", "--no-trunc", "--human=false", "--format={{.Size}} {{.CreatedBy}}", image)
    sizes = {line.split(" ", 1)[1]: int(line.split(" ", 1)[0]) for line in output.splitlines()}
    (ours,) = (size for command, size in sizes.items() if "/build/ours" in command)
    (libraries,) = (size for command, size in sizes.items() if command.startswith("COPY /opt/emotion"))
    assert ours < 5_000_000
    assert libraries > 500_000_000, "the control: sizes are listed"


def test_the_image_names_no_package_index_and_no_secret(docker: Docker, image: str) -> None:
    """Package indexes and their credentials belong to the machine that built the image."""
    output = docker("history", "--no-trunc", image) + docker("image", "inspect", image)
    assert "org.opencontainers.image.title" in output, "the control: labels are listed"
    urls = {word for word in re.split(r"[\s'\"=,]", output) if "://" in word}
    assert urls == set()
    assert not re.search(r"(?i)secret|password|token", output)


def test_labels_and_environment_identify_the_image(docker: Docker, image: str) -> None:
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
    assert config["Entrypoint"][0] == "/usr/bin/env"
    assert config["Entrypoint"][2:] == ["/opt/emotion/bin/emotion-job"]


def test_the_manifest_names_image_and_revision(job_in_docker: Runs, image: str) -> None:
    (path,) = job_in_docker[1].glob("published/*/manifest.json")
    manifest = json.loads(path.read_text())
    assert (manifest["container"]["kind"], manifest["container"]["image"]) == ("docker", image)
    assert len(manifest["code"]["revision"].removesuffix("-dirty")) == 40
