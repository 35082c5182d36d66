"""A job that another machine resumes from its mirror. A machine is a folder here."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from emotion.errors import AccessError, Interrupted, ModelError, SpecError, StorageError
from emotion.files import write_json
from emotion.training.checkpoint_files import complete_list, list_steps, read_latest
from job.pipeline.folders import JobFolders, make_folders
from job.pipeline.phases import PHASES, PROGRESS_FILES
from job.pipeline.runner import plan_job, run_job
from job.preemption import StopRequest
from job.run_folder import mirror as mirror_module
from job.run_folder import mirror_fetch
from job.run_folder.attempts import MAX_ATTEMPTS_WITHOUT_PROGRESS, read_attempts, recorded_attempt
from job.run_folder.mirror import Mirror
from job.run_folder.receipts import Receipt, read_receipt, write_receipt
from job.spec.load import load_spec
from job.spec.model import JobSpec, run_name
from tests.conftest import TINY, StopWhen, TinyRun
from tests.job.soak import promised_bytes

NOBODY = 65534


@pytest.fixture(autouse=True)
def logs(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "mirror"
    folder.mkdir()
    return folder


def tiny(root: Path, *overrides: str) -> JobSpec:
    return load_spec(TINY, [f"checkpoint.mirror={root}", *overrides])


def folders_in(folder: Path) -> JobFolders:
    """A machine of its own."""
    return JobFolders(folder / "work", folder / "work" / "scratch")


def run(spec: JobSpec, machine: Path, should_stop: StopRequest | None = None, until: str = "publish") -> Path:
    folders = folders_in(machine)
    run_job(spec, folders, until, False, should_stop or StopRequest())
    return folders.work / "published" / run_name(spec)


def begun(logs: pytest.LogCaptureFixture) -> list[str]:
    """The phases that have started, in order."""
    return [record.args[0] for record in logs.records if record.msg.startswith("phase=%s begins")]  # type: ignore[index]


def stopped_in_gan(root: Path, machine: Path, logs: pytest.LogCaptureFixture, *steps: int) -> None:
    """Attempts that are asked to stop this many steps after they started, or resumed, the GAN."""
    for count in steps:
        logs.clear()
        asked = iter(range(1, count))
        with pytest.raises(Interrupted, match="gan: stopped after step"):
            run(tiny(root), machine, StopWhen(lambda asked=asked: begun(logs)[-1:] == ["gan"] and not next(asked, 0)))  # type: ignore[misc]


# Another machine resumes


@pytest.mark.full
@pytest.mark.parametrize("damaged", [False, True], ids=["all whole", "the newest checkpoint damaged"])
def test_a_job_that_another_machine_resumes_publishes_the_bytes_of_an_unbroken_run(
    damaged: bool, tiny_run: TinyRun, root: Path, tmp_path: Path, logs: pytest.LogCaptureFixture
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    stopped_in_gan(root, first, logs, 2, 1)
    attempts = len(read_attempts(next(first.glob("work/tiny-*"))))
    shutil.rmtree(first)
    (checkpoints,) = root.glob("tiny-*/gan-*/checkpoints")
    *before, newest = list_steps(checkpoints)
    assert before
    if damaged:
        with (checkpoints / f"step-{newest}.ckpt").open("r+b") as file:
            file.seek(2000)
            file.write(b"\xff" * 16)
    logs.clear()

    assert promised_bytes(run(tiny(root), second)) == promised_bytes(tiny_run.published)
    names = [phase.name for phase in PHASES]
    assert begun(logs) == names[names.index("gan") :]
    assert f"checkpoint restored step={before[-1] if damaged else newest}" in logs.text
    if damaged:
        assert f"step-{newest}.ckpt is damaged" in logs.text
    assert len(read_attempts(next(second.glob("work/tiny-*")))) == attempts + 2
    log = (second / "work" / "published" / run_name(tiny(root)) / "manifest.json").read_text()
    assert "gan: stopped after step" in log


@pytest.mark.full
def test_a_gan_resumes_from_the_mirror_after_the_machine_and_its_disk_are_lost(
    root: Path, emotion_job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    # Long enough for the mirror to see a checkpoint.
    longer = ["--until", "gan", "--set", "gan.epochs=60", "--set", "checkpoint.every_seconds=0.2"]

    def arguments(name: str, *more: str) -> list[str]:
        return ["run", str(TINY), "--work", str(tmp_path / name), *longer, *more]

    assert emotion_job(*arguments("unbroken")).returncode == 0
    to_mirror = ("--set", f"checkpoint.mirror={root}")
    command = [sys.executable, "-m", "job", *arguments("first", *to_mirror)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while len(list(root.glob("tiny-*/gan-*/checkpoints/step-*.json"))) < 1:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    shutil.rmtree(tmp_path / "first")
    found = emotion_job(*arguments("second", *to_mirror))
    assert found.returncode == 0, found.stderr
    assert "checkpoint restored step=" in found.stderr
    assert "phase=features begins" not in found.stderr
    one, other = (next((tmp_path / name).glob("tiny-*/gan-*")) for name in ("unbroken", "second"))
    for file in ("generator.safetensors", "config.json"):
        assert (one / file).read_bytes() == (other / file).read_bytes()


@pytest.mark.full
def test_a_finished_job_has_nothing_to_do_on_another_machine(
    tiny_run: TinyRun, root: Path, tmp_path: Path, logs: pytest.LogCaptureFixture
) -> None:
    destination = f"artifacts.destination={tmp_path / 'published'}"
    spec = tiny(root, destination)
    run(spec, tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    logs.clear()
    assert {state for _, state in plan_job(spec, folders_in(tmp_path / "second"))} == {f"done in the mirror {root}"}
    run(spec, tmp_path / "second")
    assert begun(logs) == []
    # Only receipts were looked at.
    assert not list((tmp_path / "second").rglob("*.safetensors"))

    # Without the published run, it is published again from what the mirror has.
    shutil.rmtree(tmp_path / "published")
    run(spec, tmp_path / "third")
    assert begun(logs) == ["publish"]
    assert promised_bytes(tmp_path / "published" / run_name(spec)) == promised_bytes(tiny_run.published)
    # Audio lies at its source anyway.
    assert not list(root.rglob("*.mp3"))
    assert not list((tmp_path / "third").rglob("*.mp3"))


@pytest.mark.full
def test_the_outputs_of_the_phase_in_until_are_fetched(root: Path, tmp_path: Path, logs: pytest.LogCaptureFixture) -> None:
    run(tiny(root), tmp_path / "first", until="features")
    logs.clear()
    run(tiny(root), tmp_path / "second", until="features")
    assert begun(logs) == []
    here, there = (next((tmp_path / name).glob("work/scratch/features-*")) for name in ("first", "second"))
    assert {path.name: path.read_bytes() for path in here.iterdir() if path.is_file() and path.name[0] != "."} == {
        path.name: path.read_bytes() for path in there.iterdir() if path.is_file() and path.name[0] != "."
    }


@pytest.mark.full
def test_a_phase_with_a_damaged_output_in_the_mirror_runs_again_with_its_dependencies(
    root: Path, tmp_path: Path, logs: pytest.LogCaptureFixture
) -> None:
    run(tiny(root), tmp_path / "first", until="features")
    (damaged,) = root.glob("phases/features-*/features.f16")
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    logs.clear()
    run(tiny(root), tmp_path / "second", until="features")
    assert begun(logs) == ["stage", "features"]
    assert "is damaged" in logs.text
    assert damaged.read_bytes() == content


@pytest.mark.full
def test_if_a_phase_runs_again_with_other_outputs_later_phases_are_not_taken_from_the_mirror(
    root: Path, tmp_path: Path, logs: pytest.LogCaptureFixture
) -> None:
    """As on a machine whose last bits differ: the mirror's later phases are not mixed with it."""
    source = tmp_path / "source"
    run(tiny(root), tmp_path / "made", until="stage")
    # Without what the phase has written beside the songs: its own songs.csv would be taken for the labels.
    shutil.copytree(next((tmp_path / "made").glob("work/scratch/stage-*")), source, ignore=shutil.ignore_patterns("songs.csv"))
    from_folder = f"data.source={source}"
    run(tiny(root, from_folder), tmp_path / "first", until="gan")
    song = sorted(source.rglob("*.mp3"))[0]
    facts = song.stat()
    content = bytearray(song.read_bytes())
    content[-20:] = bytes(byte ^ 3 for byte in content[-20:])
    song.write_bytes(content)
    os.utime(song, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    for lost in root.glob("phases/features-*/features.f16"):
        lost.unlink()
    logs.clear()
    run(tiny(root, from_folder), tmp_path / "second", until="synth")
    assert begun(logs) == ["stage", "features", "split", "gan", "synth"]
    assert "stage ran again and its outputs differ from the mirror's receipt" in logs.text


# A mirror that cannot be used


def test_a_missing_mirror_ends_the_job_with_one_line_that_names_the_options(tmp_path: Path) -> None:
    with pytest.raises(
        StorageError, match=r"checkpoint\.mirror: .* --mirror-unreachable wait to wait for it, or anew to start"
    ) as caught:
        run(tiny(tmp_path / "nowhere"), tmp_path)
    assert caught.value.exit_code == 69
    assert not list(tmp_path.rglob("stage-*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which needs root")
def test_a_mirror_without_write_permission_is_access_denied(root: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    os.chown(work, NOBODY, NOBODY)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setuid(NOBODY)
            run(tiny(root), tmp_path)
        except AccessError as error:
            code = error.exit_code
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77


def test_waiting_for_a_mirror_ends_when_it_appears_or_the_job_is_asked_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logs: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror_fetch, "POLL_SECONDS", 0.02)
    root = tmp_path / "mirror"
    spec, folders = tiny(root), folders_in(tmp_path)
    with pytest.raises(Interrupted, match="waiting for the mirror"):
        run_job(spec, folders, "stage", False, StopWhen(lambda: True), "wait")
    waits = threading.Event()

    def mount() -> bool:
        """Asked while it waits."""
        if not root.exists():
            root.mkdir()
            waits.set()
        return False

    run_job(spec, folders, "stage", False, StopWhen(mount), "wait")
    assert waits.is_set()
    assert list(root.glob("tiny-*/stage-*/receipt.json"))


@pytest.mark.full
def test_mirror_unreachable_anew_starts_with_what_is_on_this_machine_and_the_mirror_catches_up(
    tmp_path: Path, logs: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "mirror"
    spec, folders = tiny(root), folders_in(tmp_path)
    run_job(spec, folders, "stage", False, StopRequest(), "anew")
    assert "another machine could not resume from the newest state" in logs.text
    root.mkdir()
    run_job(spec, folders, "stage", False, StopRequest(), "anew")
    assert list(root.glob("tiny-*/stage-*/receipt.json"))


@pytest.mark.parametrize("place", ["work", "work/inside", ""])
def test_a_mirror_in_the_work_folder_or_around_it_is_refused(place: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"checkpoint\.mirror: .*: one is inside the other"):
        make_folders(tiny(tmp_path / place), folders_in(tmp_path))


# The contents of a mirror


@pytest.fixture
def finished(tmp_path: Path) -> Receipt:
    """A phase of a run, finished, with two files and its metrics."""
    folder = tmp_path / "work" / "tiny-0" / "gan-1"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a").write_bytes(b"a" * 5000)
    (folder / "deeper" / "b").write_bytes(b"b")
    (folder / "metrics.jsonl").write_text("{}\n")
    return write_receipt(folder, "gan", "1", {}, {"seconds": 1}, {})


def with_mirror(root: Path, *overrides: str) -> JobSpec:
    return load_spec(TINY, [f"checkpoint.mirror={root}", "checkpoint.keep=1", *overrides])


def mirror_in(root: Path, machine: Path) -> Mirror:
    made = Mirror(with_mirror(root), machine / "work" / "tiny-0", StopRequest())
    made.connect("fail")
    return made


def save(folder: Path, step: int, **facts: Any) -> None:
    """A checkpoint as emotion/training/checkpoint.py leaves it, of bytes that are no state."""
    folder.mkdir(parents=True, exist_ok=True)
    content = b"%d" % step * 3000
    (folder / f"step-{step}.ckpt").write_bytes(content)
    record = {"step": step, "size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "finite": True}
    write_json(folder / f"step-{step}.json", record | facts)


def test_a_list_of_the_mirror_without_the_checkpoint_that_latest_names_is_an_error_and_no_restart(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(complete_list, "__defaults__", ((0.01,),))
    here, there = (folder / "tiny-0" / "gan-1" for folder in (tmp_path / "work", root))
    save(here / "checkpoints", 7)
    mirror = mirror_in(root, tmp_path)
    mirror.watch_checkpoints(here)
    mirror.copy_missing()
    assert mirror.failure is None
    other = tmp_path / "other" / "work" / "tiny-0" / "gan-1"
    (there / "checkpoints" / "step-7.json").rename(tmp_path / "hidden")
    with pytest.raises(StorageError, match=r"checkpoints/latest names step 7, but no checkpoint can be found"):
        mirror_in(root, tmp_path / "other").fetch_checkpoint(other)
    (tmp_path / "hidden").rename(there / "checkpoints" / "step-7.json")
    mirror_in(root, tmp_path / "other").fetch_checkpoint(other)
    assert list_steps(other / "checkpoints") == [7]
    assert read_latest(other / "checkpoints") == 7


def test_a_checkpoint_of_the_mirror_that_latest_names_is_fetched_where_the_list_does_not_show_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "work" / "tiny-0" / "gan-1"
    mirror = mirror_in(root, tmp_path)
    mirror.watch_checkpoints(here)
    for step in (3, 7):
        save(here / "checkpoints", step)
        mirror.copy_missing()
    walk = os.walk

    def outdated(top: Path, **options: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for parent, folders, names in walk(top, **options):
            yield parent, folders, [name for name in names if not name.startswith("step-7.")]

    monkeypatch.setattr(os, "walk", outdated)
    other = tmp_path / "other" / "work" / "tiny-0" / "gan-1"
    mirror_in(root, tmp_path / "other").fetch_checkpoint(other)
    assert list_steps(other / "checkpoints") == [7]


def test_a_copy_that_was_killed_before_it_wrote_latest_writes_it_the_next_time(root: Path, tmp_path: Path) -> None:
    here, latest = tmp_path / "work" / "tiny-0" / "gan-1", root / "tiny-0" / "gan-1" / "checkpoints" / "latest"
    save(here / "checkpoints", 7)
    written = []
    for _ in range(2):
        mirror = mirror_in(root, tmp_path)
        mirror.watch_checkpoints(here)
        mirror.copy_missing()
        written.append(json.loads(latest.read_text()))
        latest.unlink()
    assert written == [{"step": 7}] * 2


def test_a_checkpoint_of_which_the_fetching_failed_in_the_middle_is_fetched_the_next_time(root: Path, tmp_path: Path) -> None:
    here, other = (tmp_path / machine / "tiny-0" / "gan-1" for machine in ("work", "other/work"))
    save(here / "checkpoints", 7)
    (here / "metrics.jsonl").write_text('{"step": 7}\n')
    mirror = mirror_in(root, tmp_path)
    mirror.watch_checkpoints(here)
    mirror.copy_missing()
    in_the_way = other / "checkpoints" / ".step-7.json.part"  # the record is written last
    in_the_way.mkdir(parents=True)
    with pytest.raises(OSError, match=r"step-7\.json"):
        mirror_in(root, tmp_path / "other").fetch_checkpoint(other)
    in_the_way.rmdir()
    assert (other / "metrics.jsonl").exists()
    mirror_in(root, tmp_path / "other").fetch_checkpoint(other)
    assert list_steps(other / "checkpoints") == [7]


def test_a_latest_in_the_mirror_that_an_earlier_version_left_behind_is_no_missing_checkpoint(root: Path, tmp_path: Path) -> None:
    there = root / "tiny-0" / "gan-1" / "checkpoints"
    save(there, 5)
    write_json(there / "latest", {"step": 2})
    other = tmp_path / "other" / "work" / "tiny-0" / "gan-1"
    mirror_in(root, tmp_path / "other").fetch_checkpoint(other)
    assert read_latest(other / "checkpoints") == 5


def test_fetched_outputs_match_the_receipt_by_size_and_time(finished: Receipt, root: Path, tmp_path: Path) -> None:
    with mirror_in(root, tmp_path) as mirror:
        mirror.add_finished(finished, with_outputs=True)
    other = mirror_in(root, tmp_path / "other")
    folder = tmp_path / "other" / "work" / "tiny-0" / "gan-1"
    promised = other.find_receipt(folder, "1")
    assert promised is not None
    assert other.find_receipt(folder, "2") is None
    assert other.fetch_outputs(promised)
    found = read_receipt(folder, "1", verify=False)
    assert found is not None
    assert found.outputs == finished.outputs
    assert (folder / "metrics.jsonl").read_text() == "{}\n"
    assert all((folder / name).stat().st_mtime_ns == record.mtime_ns for name, record in found.outputs.items())


def test_the_mirror_keeps_the_newest_checkpoints_and_none_of_a_finished_phase(
    finished: Receipt, root: Path, tmp_path: Path
) -> None:
    checkpoints = finished.folder / "checkpoints"
    there = root / "tiny-0" / "gan-1" / "checkpoints"
    for step in (1, 2, 3):
        save(checkpoints, step)
        with mirror_in(root, tmp_path) as mirror:
            mirror.watch_checkpoints(finished.folder)
    assert list_steps(there) == [2, 3]
    save(checkpoints, 4, finite=False)
    with mirror_in(root, tmp_path) as mirror:
        mirror.watch_checkpoints(finished.folder)
    assert list_steps(there) == [2, 3]
    with mirror_in(root, tmp_path) as mirror:
        mirror.watch_checkpoints(finished.folder)
        mirror.add_finished(finished, with_outputs=True)
    assert list_steps(there) == []
    assert not list(there.glob("*.ckpt"))


def test_a_local_checkpoint_is_replaced_only_if_it_is_damaged(root: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "work" / "tiny-0" / "gan-1", tmp_path / "other" / "work" / "tiny-0" / "gan-1"
    for step in (5, 6):
        save(first / "checkpoints", step)
        with mirror_in(root, tmp_path) as mirror:
            mirror.watch_checkpoints(first)
    other = mirror_in(root, tmp_path / "other")
    save(second / "checkpoints", 6)
    (second / "checkpoints" / "step-6.ckpt").write_bytes(b"torn")
    other.fetch_checkpoint(second)
    assert (second / "checkpoints" / "step-6.ckpt").read_bytes() == b"6" * 3000
    (second / "metrics.jsonl").write_text("mine")
    (root / "tiny-0" / "gan-1" / "metrics.jsonl").write_text("theirs")
    save(second / "checkpoints", 7)
    other.fetch_checkpoint(second)
    assert list_steps(second / "checkpoints") == [6, 7]
    assert (second / "metrics.jsonl").read_text() == "mine"


def test_a_checkpoint_that_is_deleted_while_it_is_copied_arrives_complete_or_not_at_all(root: Path, tmp_path: Path) -> None:
    """A slow mirror: a named pipe gives its data only after the job has gone on."""
    folder = tmp_path / "work" / "tiny-0" / "gan-1"
    here, there = folder / "checkpoints", root / "tiny-0" / "gan-1" / "checkpoints"
    save(here, 1)
    content = (here / "step-1.ckpt").read_bytes()
    (here / "step-1.ckpt").unlink()
    os.mkfifo(here / "step-1.ckpt")
    mirror = mirror_in(root, tmp_path)
    mirror.watch_checkpoints(folder)
    copying = threading.Thread(target=mirror.copy_missing)
    copying.start()
    with (here / "step-1.ckpt").open("wb") as pipe:
        (here / "step-1.json").unlink()
        (here / "step-1.ckpt").unlink()
        save(here, 2)
        pipe.write(content)
    copying.join()
    assert mirror.failure is None
    assert list_steps(there) == [1]
    assert (there / "step-1.ckpt").read_bytes() == content
    (there / "step-9.ckpt").write_bytes(b"of a copy that was killed before its JSON")
    mirror.copy_missing()
    assert sorted(path.name for path in there.iterdir()) == ["latest", "step-1.ckpt", "step-1.json", "step-2.ckpt", "step-2.json"]


def test_checkpoints_older_than_those_in_the_mirror_are_not_copied(root: Path, tmp_path: Path) -> None:
    first, second = (tmp_path / name / "work" / "tiny-0" / "gan-1" for name in ("first", "second"))
    for step in (8, 9):
        save(first / "checkpoints", step)
        with mirror_in(root, tmp_path / "first") as mirror:
            mirror.watch_checkpoints(first)
    save(second / "checkpoints", 3)
    with mirror_in(root, tmp_path / "second") as mirror:
        mirror.watch_checkpoints(second)
    (there,) = root.glob("tiny-0/gan-1/checkpoints")
    assert list_steps(there) == [8, 9]
    assert not (there / "step-3.ckpt").exists()


def test_if_all_checkpoints_in_the_mirror_are_damaged_the_job_ends_and_the_next_run_restarts_the_phase(
    root: Path, tmp_path: Path
) -> None:
    first = tmp_path / "work" / "tiny-0" / "gan-1"
    save(first / "checkpoints", 5)
    with mirror_in(root, tmp_path) as mirror:
        mirror.watch_checkpoints(first)
    (root / "tiny-0" / "gan-1" / "checkpoints" / "step-5.ckpt").write_bytes(b"torn")
    other = mirror_in(root, tmp_path / "other")
    folder = tmp_path / "other" / "work" / "tiny-0" / "gan-1"
    with pytest.raises(ModelError, match=r"none of the 1 checkpoints in .* can be used"):
        other.fetch_checkpoint(folder)
    assert not list_steps(folder / "checkpoints")
    other.fetch_checkpoint(folder)
    assert (root / "tiny-0" / "gan-1" / "checkpoints" / "damaged" / "step-5.ckpt").exists()


def soon(happens: Callable[[], bool]) -> None:
    """Wait until it does."""
    end = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_mirror_that_fails_for_a_while_is_one_warning_and_catches_up(
    finished: Receipt, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logs: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror_module, "POLL_SECONDS", 0.01)
    away = root.with_name("unmounted")
    with mirror_in(root, tmp_path) as mirror:
        root.rename(away)
        mirror.add_finished(finished, with_outputs=True)
        soon(lambda: mirror.failure is not None)
        # And again, and again.
        time.sleep(0.1)
        away.rename(root)
        soon(lambda: mirror.failure is None)
    assert [record.levelname for record in logs.records] == ["WARNING", "INFO"]
    assert "has caught up" in logs.text
    assert (root / "tiny-0" / "gan-1" / "receipt.json").exists()


def test_a_mirror_that_is_unmounted_after_the_start_does_not_count_as_empty(
    finished: Receipt, root: Path, tmp_path: Path
) -> None:
    save(finished.folder / "checkpoints", 5)
    with mirror_in(root, tmp_path) as mirror:
        mirror.watch_checkpoints(finished.folder)
        mirror.copy_missing()
        mirror.add_finished(finished, with_outputs=True)
    other = mirror_in(root, tmp_path / "other")
    folder = tmp_path / "other" / "work" / "tiny-0" / "gan-1"
    promised = other.find_receipt(folder, "1")
    assert promised is not None
    away = root.with_name("unmounted")
    root.rename(away)
    for ask in (
        lambda: other.find_receipt(folder, "1"),
        lambda: other.fetch_outputs(promised),
        lambda: other.fetch_checkpoint(folder),
    ):
        with pytest.raises(StorageError, match="cannot be read any more"):
            ask()
    assert not root.exists()
    away.rename(root)
    assert other.fetch_outputs(promised)


def test_outputs_that_differ_from_those_in_the_mirror_replace_them_for_this_run(
    finished: Receipt, root: Path, tmp_path: Path
) -> None:
    """As where two processors differ in the last bit."""
    with mirror_in(root, tmp_path) as mirror:
        mirror.add_finished(finished, with_outputs=True)
    elsewhere = tmp_path / "elsewhere" / "work" / "tiny-0" / "gan-1"
    elsewhere.mkdir(parents=True)
    (elsewhere / "a").write_bytes(b"b" * 5000)
    theirs = write_receipt(elsewhere, "gan", "1", {}, {"seconds": 1}, {})
    with mirror_in(root, tmp_path / "elsewhere") as mirror:
        mirror.add_finished(theirs, with_outputs=True)
    third = mirror_in(root, tmp_path / "third")
    promised = third.find_receipt(tmp_path / "third" / "work" / "tiny-0" / "gan-1", "1")
    assert promised is not None
    assert promised.digest == theirs.digest
    assert third.fetch_outputs(promised)
    # The others' are still what other runs made theirs from.
    assert (root / "phases" / f"gan-1-{finished.digest[:12]}" / "a").read_bytes() == b"a" * 5000


@pytest.mark.parametrize("content", [b"", b"\0" * 300, b'{"key": "1", "outputs": [1], "measured": {}}'])
def test_a_damaged_receipt_in_the_mirror_does_not_count_and_is_replaced(
    content: bytes, finished: Receipt, root: Path, tmp_path: Path
) -> None:
    with mirror_in(root, tmp_path) as mirror:
        mirror.add_finished(finished, with_outputs=True)
    receipt = root / "tiny-0" / "gan-1" / "receipt.json"
    whole = receipt.read_bytes()
    receipt.write_bytes(content)
    assert mirror_in(root, tmp_path / "other").find_receipt(tmp_path / "other" / "gan-1", "1") is None
    with mirror_in(root, tmp_path) as mirror:
        mirror.add_finished(finished, with_outputs=True)
    assert receipt.read_bytes() == whole


def test_a_phase_that_cannot_be_copied_does_not_stop_the_copying_of_others(finished: Receipt, root: Path, tmp_path: Path) -> None:
    lost = tmp_path / "work" / "tiny-0" / "features-1"
    lost.mkdir()
    (lost / "features.f16").write_bytes(b"x")
    with mirror_in(root, tmp_path) as mirror:
        mirror.add_finished(write_receipt(lost, "features", "2", {}, {}, {}), with_outputs=True)
        shutil.rmtree(lost)
        mirror.add_finished(finished, with_outputs=True)
    assert mirror.failure is not None
    assert (root / "tiny-0" / "gan-1" / "receipt.json").exists()


def test_a_stopped_job_waits_for_a_mirror_that_hangs_no_longer_than_grace_seconds(
    finished: Receipt, root: Path, tmp_path: Path
) -> None:
    """A named pipe that nobody writes to: reading it never ends."""
    (finished.folder / "a").unlink()
    os.mkfifo(finished.folder / "a")
    asked = StopWhen(lambda: True)
    mirror = Mirror(with_mirror(root, "preemption.grace_seconds=0.3"), finished.folder.parent, asked)
    with mirror:
        mirror.add_finished(finished, with_outputs=True)
    assert mirror.failure is not None
    assert "does not answer" in mirror.failure


def test_killed_machines_that_each_left_a_checkpoint_in_the_mirror_have_made_progress(root: Path, tmp_path: Path) -> None:
    for number in range(MAX_ATTEMPTS_WITHOUT_PROGRESS + 2):
        machine = tmp_path / str(number)
        folder = machine / "work" / "tiny-0" / "gan-1"
        save(folder / "checkpoints", number)
        mirror = mirror_in(root, machine)
        mirror.fetch_history()
        # Killed: its end is not recorded.
        attempt = recorded_attempt(machine / "work" / "tiny-0", 1, machine / "scratch", PROGRESS_FILES, mirror.file_sizes)
        shutil.rmtree(folder)
        attempt.__enter__()
        save(folder / "checkpoints", number)
        mirror.watch_checkpoints(folder)
        with mirror:
            pass
    assert len(read_attempts(root / "tiny-0")) == MAX_ATTEMPTS_WITHOUT_PROGRESS + 2


def test_the_attempts_of_all_machines_are_kept_in_order(root: Path, tmp_path: Path) -> None:
    for name, lines in (("a", ["1"]), ("b", ["2"]), ("a", ["3"]), ("c", [])):
        run_folder = tmp_path / name / "work" / "tiny-0"
        run_folder.mkdir(parents=True, exist_ok=True)
        mirror = mirror_in(root, tmp_path / name)
        mirror.fetch_history()
        with mirror, (run_folder / "attempts.jsonl").open("a") as file:
            file.writelines(line + "\n" for line in lines)
    assert (root / "tiny-0" / "attempts.jsonl").read_text() == "1\n2\n3\n"
    assert (tmp_path / "c" / "work" / "tiny-0" / "attempts.jsonl").read_text() == "1\n2\n3\n"


def test_other_files_among_checkpoints_are_ignored(root: Path, tmp_path: Path) -> None:
    there = root / "tiny-0" / "gan-1" / "checkpoints"
    there.mkdir(parents=True)
    (there / "step-1 (conflicted copy).json").write_text("{}")
    mirror_in(root, tmp_path).fetch_checkpoint(tmp_path / "work" / "tiny-0" / "gan-1")


def test_a_damaged_local_output_is_not_copied_to_the_mirror(finished: Receipt, root: Path, tmp_path: Path) -> None:
    (finished.folder / "a").write_bytes(b"x" * 5000)
    with mirror_in(root, tmp_path) as mirror:
        mirror.add_finished(finished, with_outputs=True)
    assert mirror.failure is not None
    assert "is damaged" in mirror.failure
    assert not (root / "tiny-0" / "gan-1" / "receipt.json").exists()
    assert not list(root.rglob("a"))
