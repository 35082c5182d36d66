"""The SIF, as an ordinary user without a home folder. Each test has a control that shows that it can fail."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.container.engines import NOBODY, Apptainer, Docker, docker_registry, interrupted
from tests.container.fixtures import BUILD_SECONDS, DEMO, SHUT, Component, Runs

pytestmark = [pytest.mark.full, pytest.mark.timeout(BUILD_SECONDS)]


def test_a_stopped_job_exits_with_75_and_then_resumes(job_in_sif: Runs) -> None:
    assert job_in_sif[0] == [75, 0]


def test_a_signal_that_does_not_reach_the_job_is_noticed(
    apptainer: Apptainer, sif: Path, new_work: Callable[[int], Path], tiny_spec: Path
) -> None:
    """The control: behind a shell the same request is lost."""
    work = new_work(NOBODY)
    shell = ["exec", *SHUT, "--bind", work, "--bind", tiny_spec, sif, "sh", "-c", 'emotion-job "$@"; exit $?', "sh"]
    code, _ = interrupted(apptainer.command(*shell, "run", tiny_spec, "--work", work), "phase=stage begins")
    assert code != 75


def test_the_built_in_test_of_the_sif_passes(apptainer: Apptainer, sif: Path) -> None:
    assert "/specs/demo.yaml: valid" in apptainer("test", sif)


def test_help_and_labels_identify_the_sif(apptainer: Apptainer, sif: Path) -> None:
    assert "apptainer run --nv --cleanenv" in apptainer("run-help", sif)
    labels = apptainer("inspect", "--labels", sif)
    assert "org.opencontainers.image.title: emotion-job" in labels
    assert "org.opencontainers.image.revision: " in labels


def test_pythonpath_of_the_host_does_not_reach_the_job(apptainer: Apptainer, sif: Path, open_folder: Path) -> None:
    """Without --cleanenv Apptainer passes the host's PYTHONPATH on; the job ignores it."""
    foreign = open_folder / "foreign-to-sif"
    foreign.mkdir()
    (foreign / "click.py").write_text("raise SystemExit('a foreign click')")
    assert "valid" in apptainer("run", "--bind", foreign, sif, "check", DEMO, PYTHONPATH=str(foreign))
    python = ["exec", "--bind", foreign, sif, "/opt/emotion/bin/python", "-c", "import click"]
    assert "a foreign click" in apptainer(*python, check=False, PYTHONPATH=str(foreign)), "the control"


def test_only_bound_folders_can_be_written_to(apptainer: Apptainer, sif: Path, new_work: Callable[[int], Path]) -> None:
    work = new_work(NOBODY)
    look = ["exec", *SHUT, "--bind", work, sif, "sh", "-c"]
    assert "Read-only file system" in apptainer(*look, "touch /opt/x", check=False)
    apptainer(*look, f"touch {work}/x")
    assert (work / "x").stat().st_uid == NOBODY


def test_a_job_that_requires_a_missing_gpu_ends_before_it_stages_data(
    apptainer: Apptainer, sif: Path, new_work: Callable[[int], Path], tiny_spec: Path
) -> None:
    """Apptainer accepts --nv without a driver, so the job itself has to notice."""
    work = new_work(NOBODY)
    binds = ["--bind", work, "--bind", tiny_spec]
    command = ["run", *SHUT, *binds, sif, "run", tiny_spec, "--work", work, "--set", "device.kind=cuda"]
    found = subprocess.run(apptainer.command(*command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert found.returncode == 70, found.stdout
    assert "is built for CPUs only" in found.stdout
    assert not list(work.glob("scratch/stage-*"))


def test_a_site_without_docker_pulls_the_image_by_its_digest(
    docker: Docker, image: str, apptainer: Apptainer, component: Component, open_folder: Path, new_work: Callable[[int], Path]
) -> None:
    """As container/README.md says, from a registry without TLS. A job in it is stopped as in the SIF that `make sif` builds."""
    folder, work = new_work(NOBODY), new_work(NOBODY)
    sif = folder / "emotion-job.sif"
    with docker_registry(new_work(0), component) as registry:
        docker("tag", image, f"{registry}/emotion-job:test")
        docker("push", "--quiet", f"{registry}/emotion-job:test")
        (reference,) = docker("image", "inspect", "--format", '{{join .RepoDigests "\\n"}}', image).split()
        assert reference.startswith(f"{registry}/emotion-job@sha256:")

        def pull(what: str, **more: str) -> str:
            caches = {"APPTAINER_CACHEDIR": str(folder / "cache"), "APPTAINER_TMPDIR": str(folder)}
            return apptainer("pull", "--no-https", "--disable-cache", sif, f"docker://{what}", check=False, **caches, **more)

        assert "manifest unknown" in pull(reference[:-4] + "0000"), "the control: an image of another digest is not taken"
        assert not sif.exists()
        output = pull(reference)
        assert sif.exists(), output

    labels = apptainer("inspect", "--labels", sif)
    assert f"org.label-schema.usage.singularity.deffile.from: {reference}" in labels
    assert "org.opencontainers.image.title: emotion-job" in labels
    assert "/specs/demo.yaml: valid" in apptainer("run", *SHUT, sif, "check", DEMO)
    command = ["run", *SHUT, "--bind", work, sif, "run", DEMO, "--work", work]
    assert interrupted(apptainer.command(*command), "phase=stage begins")[0] == 75
