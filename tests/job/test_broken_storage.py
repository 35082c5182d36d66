"""The job on disks that are full, read-only, forbidden or gone, and with closed output: exit code, one line, nothing lost."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from emotion.errors import AccessError, SpecError, StorageError
from job.pipeline.fetch_inputs import FetchedInputs
from job.pipeline.phase_functions import check_destination
from job.spec.load import load_spec
from tests.conftest import TINY, TinyRun, terminated_in_gan
from tests.job.soak import promised_bytes

Command = Callable[..., subprocess.CompletedProcess[str]]
NOBODY = 65534


def one_line(stderr: str) -> str:
    """The last line, which says why. There is no traceback."""
    assert "Traceback" not in stderr, stderr
    return stderr.strip().splitlines()[-1]


@pytest.mark.full
def test_a_full_disk_is_exit_69_and_with_more_room_the_job_resumes_to_the_same_bytes(
    tiny_run: TinyRun, emotion_job: Command, tmp_path: Path, mounted: Callable[..., None]
) -> None:
    arguments = ("run", TINY, "--work", tmp_path)
    seen = set()
    # Enough for some songs, for some features, for a network, for everything.
    for megabytes in (1, 2, 4, 5, 6, 7, 8, 50):
        options = f"size={megabytes}m" + (",remount" if seen else "")
        mounted(tmp_path, "-t", "tmpfs", "-o", options, "none")
        found = emotion_job(*arguments)
        if found.returncode == 0:
            break
        assert found.returncode == 69, found.stderr
        assert re.search(rf"{tmp_path}/\S+: No space left on device", one_line(found.stderr))
        seen.add(len(list(tmp_path.glob("**/receipt.json"))))
    assert found.returncode == 0
    assert len(seen) >= 3, "it should have failed in several phases"
    (published,) = (tmp_path / "published").iterdir()
    assert promised_bytes(published) == promised_bytes(tiny_run.published)


@pytest.mark.full
def test_a_disk_without_inodes_says_so_and_names_the_file(
    emotion_job: Command, tmp_path: Path, mounted: Callable[..., None]
) -> None:
    mounted(tmp_path, "-t", "tmpfs", "-o", "size=50m,nr_inodes=25", "none")
    found = emotion_job("run", TINY, "--work", tmp_path)
    assert found.returncode == 69, found.stderr
    said = one_line(found.stderr)
    assert re.search(rf"{tmp_path}/\S+: No space left on device: there are bytes left, but no inodes; remove files", said)


@pytest.mark.full
def test_a_read_only_disk_is_an_error_before_any_work(emotion_job: Command, tmp_path: Path, mounted: Callable[..., None]) -> None:
    mounted(tmp_path, "-t", "tmpfs", "-o", "ro", "none")
    found = emotion_job("run", TINY, "--work", tmp_path / "work")
    assert found.returncode == 69
    assert one_line(found.stderr) == (
        f"emotion-job: {tmp_path / 'work'}: cannot make this folder (Read-only file system); see --work, --scratch."
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which needs root")
def test_permission_denied_is_exit_77_for_an_ordinary_user(tmp_path: Path) -> None:
    # The installation may lie where only root can read it, so everything is imported before.
    as_nobody = f"import os, job.pipeline.runner, job.pipeline.phases; from job.__main__ import main; os.setuid({NOBODY}); main()"
    command = [sys.executable, "-c", as_nobody, "run", TINY, "--work", tmp_path / "work"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 77
    assert "cannot make this folder (Permission denied); see --work, --scratch." in one_line(found.stderr)


def said_of_destination(folder: Path, user: int | None = None) -> tuple[type[Exception], str] | None:
    """The error of a destination, looked at in a child process that becomes this user; None for one that can be used."""
    spec = load_spec(TINY, [f"artifacts.destination={folder}"])
    kinds = {kind.__name__: kind for kind in (AccessError, SpecError, StorageError)}
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if user is not None:
                os.setuid(user)
            check_destination(spec, FetchedInputs(None, None), lambda: False)
        except tuple(kinds.values()) as error:
            os.write(writer, f"{type(error).__name__} {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        name, _, text = answer.read().partition(" ")
    os.waitpid(child, 0)
    return (kinds[name], text) if name else None


def test_a_destination_that_may_not_be_written_to_is_a_matter_of_access() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own is below one that other users may not enter
        folder = Path(name)
        folder.chmod(0o755)
        assert said_of_destination(folder / "published") is None
        folder.chmod(0o555)
        user = NOBODY if os.geteuid() == 0 else None
        expected = f"artifacts.destination: {folder} may not be written to. Name another folder."
        assert said_of_destination(folder / "published", user) == (AccessError, expected)
        folder.chmod(0o755)
        assert list(folder.iterdir()) == []


@pytest.mark.full
def test_a_destination_on_a_read_only_file_system_is_unavailable(tmp_path: Path, mounted: Callable[..., None]) -> None:
    mounted(tmp_path, "-t", "tmpfs", "-o", "ro", "none")
    expected = f"artifacts.destination: {tmp_path} is on a read-only file system. Name another folder."
    assert said_of_destination(tmp_path / "published") == (StorageError, expected)
    mounted(tmp_path, "-t", "tmpfs", "-o", "rw,remount", "none")
    assert said_of_destination(tmp_path / "published") is None


def limited(bytes_at_most: int, *arguments: str | Path) -> list[str]:
    """A command whose files cannot grow larger, as with a quota."""
    return ["prlimit", f"--fsize={bytes_at_most}", sys.executable, "-m", "job", *map(str, arguments)]


@pytest.fixture
def too_small_for_a_checkpoint(tiny_run: TinyRun) -> int:
    """Bytes: more than any output of the phases behind features, less than the networks with their optimizers."""
    outputs = [path.stat().st_size for path in tiny_run.run_folder.rglob("*") if path.is_file()]
    return max(outputs) + 10_000


@pytest.mark.full
def test_without_room_for_checkpoints_the_job_finishes_with_a_warning(
    tiny_run: TinyRun, tmp_path: Path, component: Callable[[str], str], too_small_for_a_checkpoint: int
) -> None:
    component("prlimit")
    scratch = tiny_run.work / "scratch"
    arguments = ("run", TINY, "--work", tmp_path, "--scratch", scratch, "--set", "checkpoint.every_seconds=0")
    found = subprocess.run(limited(too_small_for_a_checkpoint, *arguments), capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert re.search(r"the state could not be saved: \S+/step-\d+\.ckpt: File too large: .* ulimit -f", found.stderr)
    (published,) = (tmp_path / "published").iterdir()
    assert promised_bytes(published) == promised_bytes(tiny_run.published)
    warnings = json.loads((published / "manifest.json").read_text())["warnings"]
    assert {"checkpoint"} <= {record["warning"] for record in warnings}


@pytest.mark.full
def test_a_stop_without_a_saved_checkpoint_is_exit_69_and_not_75(
    tiny_run: TinyRun, tmp_path: Path, component: Callable[[str], str], too_small_for_a_checkpoint: int
) -> None:
    component("prlimit")
    command = limited(too_small_for_a_checkpoint, "run", TINY, "--work", tmp_path, "--scratch", tiny_run.work / "scratch")
    code, rest = terminated_in_gan(command)
    assert code == 69, rest
    assert "there is none before it. Make room or name another --work, and run again." in one_line(rest)


@pytest.mark.full
def test_a_lost_scratch_folder_costs_time_and_changes_no_result(tiny_run: TinyRun, emotion_job: Command, tmp_path: Path) -> None:
    shutil.copytree(tiny_run.work, tmp_path / "work", ignore=shutil.ignore_patterns("scratch", "published", "publish-*"))
    for folder in (tmp_path / "work").glob("*/evaluate-*"):
        shutil.rmtree(folder)
    found = emotion_job("run", TINY, "--work", tmp_path / "work")
    assert found.returncode == 0, found.stderr
    begun = [line.split("phase=")[1].split()[0] for line in found.stderr.splitlines() if " begins " in line]
    assert begun == ["stage", "features", "evaluate", "publish"]
    (published,) = (tmp_path / "work" / "published").iterdir()
    assert promised_bytes(published) == promised_bytes(tiny_run.published)


@pytest.mark.full
def test_closed_output_pipes_do_not_end_a_job(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "job", "run", TINY, "--work", tmp_path, "--until", "features"]
    found = subprocess.run(command, stdout=writing, stderr=writing, check=False)
    os.close(writing)
    assert found.returncode == 0
    assert list(tmp_path.glob("scratch/features-*/receipt.json"))
    assert "phase=features ends" in next(tmp_path.glob("tiny-*/job.log")).read_text()
