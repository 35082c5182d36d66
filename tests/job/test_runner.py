import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import time
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from emotion.errors import DataError, Interrupted, SpecError
from job.pipeline import runner
from job.pipeline.context import PhaseContext
from job.pipeline.fetch_inputs import FetchedInputs, fetch_inputs
from job.pipeline.folders import JobFolders, job_folders
from job.pipeline.phases import BY_NAME, PHASES, PROGRESS_FILES, Phase
from job.pipeline.runner import Run, own_folder, plan_job, run_job
from job.preemption import StopRequest
from job.results.manifest import published_at
from job.run_folder.lease import leased
from job.run_folder.progress import read_progress
from job.run_folder.receipts import FileRecord, Receipt, read_receipt, write_receipt
from job.spec.load import load_spec
from job.spec.location import Local
from job.spec.model import JobSpec, run_name
from job.storage.local_folder import LocalFolder
from tests.conftest import TINY, StopWhen
from tests.manifests import write_manifest

LONG_SECONDS = 60


def published_folder(spec: JobSpec, folders: JobFolders) -> Path:
    location = published_at(spec, folders.run_folder(spec))
    assert isinstance(location, Local)
    return location.path


def fetched(spec: JobSpec) -> FetchedInputs:
    return fetch_inputs(spec, Path(), StopRequest())


def phase_key(phase: Phase, spec: JobSpec, receipts: dict[str, Receipt]) -> str:
    return runner.phase_key(phase, spec, fetched(spec), receipts, StopRequest())


def find_finished(phase: Phase, key: str, spec: JobSpec, folders: JobFolders) -> Receipt | None:
    return runner.find_finished(phase, key, Run(spec, fetched(spec), folders, False, StopRequest(), None))


def tiny(*overrides: str) -> JobSpec:
    return load_spec(TINY, overrides)


def receipts_of(phase: Phase, content: str = "as it was") -> dict[str, Receipt]:
    """What the phases before have left, as far as a key asks: names and digests."""
    return {
        name: Receipt(Path("/nowhere") / name, f"key of {name}", {"output": FileRecord(1, content)}, {})
        for name in phase.dependencies
    }


@pytest.fixture
def folders(tmp_path: Path) -> JobFolders:
    return JobFolders(tmp_path / "work", tmp_path / "scratch")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A dataset that stages in no time; nothing decodes it here."""
    root = tmp_path / "source"
    root.mkdir()
    header = "song_id,valence_mean,valence_std,arousal_mean,arousal_std\n"
    rows = "".join(f"{song},5,1,5,1\n" for song in range(2, 14))
    (root / "static_annotations_averaged_songs_1_2000.csv").write_text(header + rows)
    for song in range(2, 14):
        (root / f"{song}.mp3").write_bytes(b"sound %d" % song)
    return root


# The phases on their page


def test_each_phase_comes_once_and_after_its_dependencies() -> None:
    done: list[str] = []
    for phase in PHASES:
        assert set(phase.dependencies) <= set(done), phase.name
        assert phase.name not in done
        done.append(phase.name)
    assert done[0] == "stage"
    assert done[-1] == "publish"


def test_a_new_phase_needs_only_its_entry_in_the_table(
    folders: JobFolders, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_count(context: PhaseContext) -> None:
        songs = len(list((context.inputs["stage"] / "audio").iterdir()))
        (context.out / "count.txt").write_text(str(songs))

    count = Phase("count", 1, run_count, needs=("stage",), sections=("seed",))
    monkeypatch.setattr(runner, "PHASES", (BY_NAME["stage"], count))
    monkeypatch.setitem(BY_NAME, "count", count)
    monkeypatch.setitem(PROGRESS_FILES, "count", count.progress_files)
    spec = tiny(f"data.source={source}")
    folder = run_job(spec, folders, "count", False, StopRequest())
    assert (folder / "count.txt").read_text() == "12"
    assert folder.parent == folders.run_folder(spec)
    reported = read_progress(folder.parent)
    assert reported is not None
    assert (reported.phase, reported.state) == ("count", "done")
    before = (folder / "receipt.json").stat().st_mtime_ns
    assert run_job(spec, folders, "count", False, StopRequest()) == folder
    assert (folder / "receipt.json").stat().st_mtime_ns == before


def test_the_memory_of_a_phase_counts_the_processes_that_decode_its_songs(
    folders: JobFolders, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that would be as large as no machine."""
    monkeypatch.setattr("emotion.audio.song_workers._WorkerProcess.own_bytes", lambda _: 2**50)
    monkeypatch.setattr("emotion.audio.song_workers.SONGS_PER_WORKER", 1)
    for song in source.glob("*.mp3"):
        soundfile.write(song, np.random.default_rng(int(song.stem)).uniform(-0.3, 0.3, 1600), 8000, format="WAV")
    spec = tiny(f"data.source={source}", "data.shortest_seconds=0", "device.threads=2")
    folder = run_job(spec, folders, "features", False, StopRequest())
    measured = json.loads((folder / "receipt.json").read_text())["measured"]
    assert 2**51 < measured["peak_process_bytes"] < 2**51 + 2**40


def test_only_stage_and_features_are_kept_in_scratch() -> None:
    assert [phase.name for phase in PHASES if phase.kept_in == "scratch"] == ["stage", "features"]


def test_every_section_with_result_fields_is_in_the_key_of_a_phase() -> None:
    in_keys = {section for phase in PHASES for section in phase.sections}
    # data and init_from enter by their content, budget where there is one, the others say where, and the name only names.
    where = {"device", "checkpoint", "preemption", "notify", "track", "storage", "artifacts"}
    assert set(JobSpec.model_fields) - in_keys == {"name", "data", "init_from", "budget", *where}


# Keys


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_a_key_changes_with_version_key_parts_each_section_and_each_dependency(phase: Phase) -> None:
    others = {
        "seed": "seed=7",
        "precision": "precision=fp32",
        "split": "split.fold=1",
        "mel": "mel.fmin_hz=30",
        "gan": "gan.width=5",
        "synth": "synth.songs=11",
        "quality": "quality.components=3",
        "vit": "vit.epochs=4",
        "evaluate": "evaluate.bootstrap_samples=101",
    }
    receipts = receipts_of(phase)
    keys = [
        phase_key(phase, tiny(), receipts),
        phase_key(replace(phase, name="other"), tiny(), receipts),
        phase_key(replace(phase, version=phase.version + 1), tiny(), receipts),
        phase_key(replace(phase, key_parts=lambda *_: {"other": 1}), tiny(), receipts),
    ]
    keys += [phase_key(phase, tiny(others[section]), receipts) for section in phase.sections]
    keys += [phase_key(phase, tiny(), receipts | {name: receipts_of(phase, "other")[name]}) for name in phase.dependencies]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase.name != "publish"], ids=lambda phase: phase.name)
def test_a_key_does_not_change_with_runtime_fields_or_sections_of_other_phases(phase: Phase, tmp_path: Path) -> None:
    where = (
        "device.threads=2",
        "device.kind=auto",
        "device.deterministic=false",
        "device.gpu_memory_gib=2.5",
        "checkpoint.every_seconds=1",
        "checkpoint.keep=9",
        "storage.connections=3",
        "storage.region=eu-west-1",
        "data.copy=always",
        "data.manifest=/known.json",
        "gan.micro_batch=3",
        "gan.clear_cache_every_steps=5",
        "vit.micro_batch=2",
        "name=other",
        "budget.price_per_hour=2",
        "preemption.hang_minutes=7",
        f"artifacts.destination={tmp_path}",
    )
    elsewhere = {"mel": "mel.fmin_hz=30", "gan": "gan.width=5", "quality": "quality.components=3"}
    same = [*where, *(override for section, override in elsewhere.items() if section not in phase.sections)]
    receipts = receipts_of(phase)
    assert phase_key(phase, tiny(*same), receipts) == phase_key(phase, tiny(), receipts)


def test_a_key_depends_on_the_content_of_inputs_not_on_their_folder_or_duration() -> None:
    phase = BY_NAME["gan"]
    moved = {
        name: replace(receipt, folder=Path("/elsewhere"), key="other", measured={"seconds": 9})
        for name, receipt in receipts_of(phase).items()
    }
    assert phase_key(phase, tiny(), moved) == phase_key(phase, tiny(), receipts_of(phase))


def test_a_file_that_the_spec_names_counts_by_its_content(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.txt").write_text("2\n")
    (tmp_path / "w.safetensors").write_bytes(b"one")
    spec = tiny("split.protocol=lists", f"split.lists={tmp_path}", f"vit.weights={tmp_path}/w.safetensors")
    split, gan, vit = (BY_NAME[name] for name in ("split", "gan", "vit"))

    def keys() -> list[str]:
        return [phase_key(phase, spec, receipts_of(phase)) for phase in (split, gan, vit)]

    first = keys()
    (tmp_path / "w.safetensors").write_bytes(b"two")
    second = keys()
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    (tmp_path / "test.txt").write_text("3\n")
    third = keys()
    assert second[0] != third[0]
    assert second[1:] == third[1:], "the lists enter the keys of later phases by the split that they give"
    (tmp_path / "w.safetensors").unlink()
    with pytest.raises(DataError, match=r"w\.safetensors: No such file"):
        phase_key(vit, spec, receipts_of(vit))


# What is finished


def finish(folder: Path, phase: Phase, key: str, notes: dict[str, Any] | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "output").write_text("result")
    write_receipt(folder, phase.name, key, {}, {}, notes or {})


def published(spec: JobSpec, folders: JobFolders) -> dict[str, Any]:
    """The notes of the phase that has published this."""
    folder = published_folder(spec, folders)
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("<html>")
    write_manifest(folder)
    return {"published": {entry.name: entry.tag for entry in LocalFolder(folder).entries()}}


@pytest.mark.parametrize(
    ("name", "taken"),
    [("gan", True), ("vit", True), ("evaluate", True), ("publish", False), ("stage", False), ("features", False)],
)
def test_finished_phases_of_another_run_in_work_are_reused_but_not_its_publication(
    folders: JobFolders, name: str, taken: bool
) -> None:
    spec, phase = tiny(), BY_NAME[name]
    notes = published(spec, folders)
    key = phase_key(phase, spec, receipts_of(phase))
    sibling = folders.work / "sibling-0123456789ab" / own_folder(phase, key, spec, folders).name
    finish(sibling, phase, key, notes)
    found = find_finished(phase, key, spec, folders)
    assert (found is not None and found.folder == sibling) is taken
    # Its own is always taken, and first.
    own = own_folder(phase, key, spec, folders)
    finish(own, phase, key, notes)
    found = find_finished(phase, key, spec, folders)
    assert found is not None
    assert found.folder == own


def test_damaged_or_unfinished_phases_of_another_run_are_not_reused(folders: JobFolders) -> None:
    spec, phase = tiny(), BY_NAME["gan"]
    key = phase_key(phase, spec, receipts_of(phase))
    name = own_folder(phase, key, spec, folders).name
    for sibling in ("a-torn", "b-begun", "c-whole"):
        finish(folders.work / sibling / name, phase, key)
    (folders.work / "a-torn" / name / "output").write_text("cut")
    (folders.work / "b-begun" / name / "receipt.json").unlink()
    found = find_finished(phase, key, spec, folders)
    assert found is not None
    assert found.folder.parent.name == "c-whole"


@pytest.mark.parametrize("name", ["manifest.json", "report.html"])
def test_a_publication_that_lacks_a_file_is_not_finished(folders: JobFolders, name: str) -> None:
    spec, phase = tiny(), BY_NAME["publish"]
    key = phase_key(phase, spec, receipts_of(phase))
    assert find_finished(phase, key, spec, folders) is None
    finish(own_folder(phase, key, spec, folders), phase, key, published(spec, folders))
    assert find_finished(phase, key, spec, folders) is not None
    (published_folder(spec, folders) / name).unlink()
    assert find_finished(phase, key, spec, folders) is None


def test_a_publication_of_which_a_byte_or_the_manifest_changed_is_not_finished(folders: JobFolders) -> None:
    spec, phase = tiny(), BY_NAME["publish"]
    key = phase_key(phase, spec, receipts_of(phase))
    finish(own_folder(phase, key, spec, folders), phase, key, published(spec, folders))
    folder = published_folder(spec, folders)
    report, before = folder / "report.html", (folder / "report.html").stat()
    report.write_bytes(b"<HTML>")
    os.utime(report, ns=(5, 5))
    assert find_finished(phase, key, spec, folders) is None
    # Another run, which is whole: the phase has to compare it.
    write_manifest(folder)
    os.utime(report, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert find_finished(phase, key, spec, folders) is None


# Plans and folders


def test_a_plan_runs_nothing_and_makes_no_folder(folders: JobFolders, tmp_path: Path) -> None:
    assert plan_job(tiny(), folders) == [(phase.name, "to do") for phase in PHASES]
    assert not list(tmp_path.iterdir())


def test_a_plan_lists_finished_and_started_phases(folders: JobFolders, source: Path) -> None:
    spec = tiny(f"data.source={source}")
    stage, features = BY_NAME["stage"], BY_NAME["features"]
    key = phase_key(stage, spec, {})
    finish(own_folder(stage, key, spec, folders), stage, key)
    receipt = find_finished(stage, key, spec, folders)
    assert receipt is not None
    begun = own_folder(features, phase_key(features, spec, {"stage": receipt}), spec, folders)
    begun.mkdir()
    assert plan_job(spec, folders)[:3] == [
        ("stage", f"done in {receipt.folder}"),
        ("features", f"started in {begun}"),
        ("split", "to do"),
    ]


def test_a_plan_for_a_missing_source_names_it(folders: JobFolders, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        plan_job(tiny(f"data.source={tmp_path / 'absent'}"), folders)


def test_scratch_is_in_work_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert job_folders(Path("work"), None) == JobFolders(tmp_path / "work", tmp_path / "work" / "scratch")
    assert job_folders(Path("work"), Path("/fast")) == JobFolders(tmp_path / "work", Path("/fast"))


# Running


def test_a_dataset_is_staged_once_and_reused_by_later_runs(folders: JobFolders, source: Path) -> None:
    spec = tiny(f"data.source={source}")
    folder = run_job(spec, folders, "stage", False, StopRequest())
    receipt = folder / "receipt.json"
    written = receipt.stat().st_mtime_ns
    other = JobFolders(folders.work.parent / "other work", folders.scratch)
    assert run_job(tiny(f"data.source={source}", "name=other"), other, "stage", False, StopRequest()) == folder
    assert receipt.stat().st_mtime_ns == written
    record = read_receipt(folder, json.loads(receipt.read_text())["key"], verify=True)
    assert record is not None
    assert set(record.outputs) == {"songs.csv", "faults.csv", *(f"audio/{song}.mp3" for song in range(2, 14))}


def test_a_song_read_in_place_that_changes_right_after_it_was_verified_is_noticed(
    folders: JobFolders, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = tiny(f"data.source={source}", "data.copy=never")
    song, log = source / "7.mp3", logging.getLogger("job.storage.stage")
    before = song.stat()

    class Editing(logging.Handler):
        """Changes one byte, but neither size nor time, as soon as the log says that all songs are there."""

        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("phase=stage audio files=12"):
                song.write_bytes(b"sounD 7")
                os.utime(song, ns=(before.st_atime_ns, before.st_mtime_ns))

    editing = Editing()
    log.addHandler(editing)
    try:
        with caplog.at_level(logging.INFO, log.name):
            staged = run_job(spec, folders, "stage", False, StopRequest())
    finally:
        log.removeHandler(editing)
    assert song.read_bytes() == b"sounD 7"
    outputs = json.loads((staged / "receipt.json").read_text())["outputs"]
    assert outputs["audio/7.mp3"]["sha256"] == hashlib.sha256(b"sound 7").hexdigest()
    expected = rf"{song} changed while the job ran: it has the SHA-256 {hashlib.sha256(b'sounD 7').hexdigest()}"
    with pytest.raises(DataError, match=expected):
        run_job(spec, folders, "features", False, StopRequest())


def test_the_seconds_of_a_phase_are_not_those_of_a_clock_that_is_set_meanwhile(
    folders: JobFolders, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(time.time(), -3600.0)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    began = time.monotonic()
    staged = run_job(tiny(f"data.source={source}"), folders, "stage", False, StopRequest())
    seconds = json.loads((staged / "receipt.json").read_text())["measured"]["seconds"]
    assert 0 < seconds <= time.monotonic() - began + 0.001


def test_a_missing_output_is_produced_again_and_the_others_are_kept(folders: JobFolders, source: Path) -> None:
    spec = tiny(f"data.source={source}")
    folder = run_job(spec, folders, "stage", False, StopRequest())
    (folder / "audio" / "2.mp3").unlink()
    kept = {path: path.stat().st_ino for path in (folder / "audio").iterdir()}
    assert run_job(spec, folders, "stage", False, StopRequest()) == folder
    assert (folder / "audio" / "2.mp3").read_bytes() == b"sound 2"
    assert {path: path.stat().st_ino for path in kept} == kept


def run_stage_on_signal(spec: JobSpec, folders: JobFolders, holds: Event, may_go: Event) -> None:
    """In another process: fill the stage, but not before the other one waits for it."""

    def should_stop() -> bool:
        if list(folders.scratch.glob("stage-*/.lease-*")):
            holds.set()
            may_go.wait(LONG_SECONDS)
        return False

    run_job(spec, folders, "stage", False, StopWhen(should_stop))


def test_verify_finds_one_changed_byte_in_scratch_and_fixes_it(folders: JobFolders, source: Path) -> None:
    spec = tiny(f"data.source={source}", "data.copy=always")
    staged = run_job(spec, folders, "stage", False, StopRequest()) / "audio" / "7.mp3"
    times = staged.stat()
    staged.write_bytes(b"sounD 7")
    os.utime(staged, ns=(times.st_atime_ns, times.st_mtime_ns))
    run_job(spec, folders, "stage", False, StopRequest())
    assert staged.read_bytes() == b"sounD 7"
    run_job(spec, folders, "stage", True, StopRequest())
    assert staged.read_bytes() == b"sound 7"


@pytest.mark.parametrize("place", ["work", "scratch"])
def test_a_folder_inside_the_dataset_is_refused(folders: JobFolders, source: Path, place: str) -> None:
    inside = replace(folders, **{place: source / "here"})
    with pytest.raises(SpecError, match=f"--{place}: .* lies inside"):
        run_job(tiny(f"data.source={source}"), inside, "stage", False, StopRequest())


def test_of_two_jobs_with_one_scratch_one_fills_it_and_the_other_waits_for_it(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    spec, scratch = tiny(f"data.source={source}"), tmp_path / "scratch"
    # Forked, so that it need not import everything once more.
    forked = multiprocessing.get_context("fork")
    holds, may_go = forked.Event(), forked.Event()
    first = forked.Process(
        target=run_stage_on_signal, args=(spec, JobFolders(tmp_path / "first", scratch), holds, may_go), daemon=True
    )
    first.start()
    assert holds.wait(LONG_SECONDS)

    def let_the_first_go() -> bool:
        if "waiting for" in caplog.text:
            assert not list(scratch.glob("stage-*/receipt.json")) or may_go.is_set()
            may_go.set()
        return False

    folder = run_job(spec, JobFolders(tmp_path / "second", scratch), "stage", False, StopWhen(let_the_first_go))
    first.join(LONG_SECONDS)
    assert first.exitcode == 0
    assert "waiting for" in caplog.text
    assert f"last owned by process {first.pid} on" in caplog.text
    assert "phase=stage begins" not in caplog.text
    assert len(list((folder / "audio").iterdir())) == 12
    attempts = [path.read_text() for path in tmp_path.glob("*/*/attempts.jsonl")]
    assert [json.loads(text.splitlines()[-1])["reason"] for text in attempts] == ["done", "done"]


def test_a_waiting_job_that_is_asked_to_stop_names_what_it_waited_for(folders: JobFolders, source: Path) -> None:
    spec = tiny(f"data.source={source}")
    stage = BY_NAME["stage"]
    folder = own_folder(stage, phase_key(stage, spec, {}), spec, folders)
    folder.mkdir(parents=True)
    answers = iter([False, True])
    with leased(folder, StopRequest()), pytest.raises(Interrupted, match=r"waiting for .*/stage-\w+ \(a test asked"):
        run_job(spec, folders, "stage", False, StopWhen(lambda: next(answers)))
    assert [path.name for path in folder.iterdir()] == [".lease-1.json"]
    run_job(spec, folders, "stage", False, StopRequest())
    assert (folder / "receipt.json").exists()


def test_a_killed_job_holds_no_lease_and_its_attempt_has_no_end(folders: JobFolders, source: Path) -> None:
    spec = tiny(f"data.source={source}")
    forked = multiprocessing.get_context("fork")
    holds, never_set = forked.Event(), forked.Event()
    killed = forked.Process(target=run_stage_on_signal, args=(spec, folders, holds, never_set), daemon=True)
    killed.start()
    assert holds.wait(LONG_SECONDS)
    killed.kill()
    killed.join(LONG_SECONDS)
    run_job(spec, folders, "stage", False, StopRequest())
    lines = (folders.run_folder(spec) / "attempts.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["start", "start", "end"]
    assert folders.run_folder(spec).name == run_name(spec)
