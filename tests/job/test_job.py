"""The whole tiny job: what it publishes, and what a second run does."""

import csv
import hashlib
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from emotion.compat import timm
from emotion.errors import AccessError, DataError, EmotionError, ModelError, StorageError, printable
from emotion.files import read_json, write_json
from job.pipeline.folders import JobFolders
from job.pipeline.phases import PHASES
from job.pipeline.runner import plan_job, run_job
from job.preemption import StopRequest
from job.run_folder.lease import leased
from job.spec.load import load_spec
from job.spec.model import JobSpec, run_name
from tests.conftest import TINY, TinyRun
from tests.job.soak import promised_bytes
from tests.stores.scripted import Fault, ScriptedS3, error
from tests.stores.servers import S3Server

Command = Callable[..., subprocess.CompletedProcess[str]]

PUBLISHED = {
    "manifest.json",
    "spec.yaml",
    "model/model.safetensors",
    "model/config.json",
    "model/preprocessing.json",
    "gan/generator.safetensors",
    "gan/config.json",
    "metrics.json",
    "predictions.csv",
    "quality.json",
    "memory.json",
    "report.html",
    "logs/metrics.jsonl",
    "logs/job.log",
}


def predictions(run: TinyRun) -> list[dict[str, str]]:
    return list(csv.DictReader((run.published / "predictions.csv").read_text().splitlines()))


def tiny(*overrides: str) -> JobSpec:
    return load_spec(TINY, overrides)


class NoMemory(TorchDispatchMode):
    """No operator of torch gets any."""

    def __torch_dispatch__(self, *_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_running_out_of_memory_outside_of_a_training_is_one_line(tiny_run: TinyRun, tmp_path: Path) -> None:
    work = shutil.copytree(tiny_run.work, tmp_path / "work")
    with NoMemory(), pytest.raises(ModelError, match=r"^out of memory: CUDA out of memory\. .* vit\.clip_seconds"):
        run_job(tiny("synth.songs=11"), JobFolders(work, work / "scratch"), "synth", False, StopRequest())


# What it publishes


def test_everything_promised_is_published_and_listed_with_its_digest(tiny_run: TinyRun) -> None:
    files = {path.relative_to(tiny_run.published).as_posix() for path in tiny_run.published.rglob("*") if path.is_file()}
    assert files >= PUBLISHED
    manifest = json.loads((tiny_run.published / "manifest.json").read_text())
    assert set(manifest["artifacts"]) == files - {"manifest.json"}
    for name, facts in manifest["artifacts"].items():
        content = (tiny_run.published / name).read_bytes()
        assert facts == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_allocator_setting_is_in_force_inside_the_job_merged_with_the_users_own(tiny_run: TinyRun) -> None:
    manifest = json.loads((tiny_run.published / "manifest.json").read_text())
    expected = "expandable_segments:True,max_split_size_mb:64"
    assert manifest["allocator"] == {"PYTORCH_ALLOC_CONF": expected, "PYTORCH_CUDA_ALLOC_CONF": expected}
    device = manifest["phases"]["gan"]["measured"]["device"]
    assert device["threads"] == 1
    assert device["precision"] in ("bf16", "fp32")


def test_the_memory_of_both_trainings_is_predicted_and_measured_by_component(tiny_run: TinyRun) -> None:
    memory = json.loads((tiny_run.published / "memory.json").read_text())
    manifest = json.loads((tiny_run.published / "manifest.json").read_text())
    for phase, micro in (("gan", 4), ("vit", 5)):
        account = memory[phase]["memory"]
        assert account == manifest["phases"][phase]["measured"]["memory"]
        assert (account["micro_batch"], account["halved"]) == (micro, [])
        assert account["predicted"]["peak"] == pytest.approx(account["measured"]["peak"], rel=0.1)
        assert account["predicted"]["process"] == pytest.approx(memory[phase]["peak_process_bytes"], rel=0.25)
    assert "memory" not in memory["synth"]


def test_metrics_include_baselines_and_ceiling_and_count_real_songs_only(tiny_run: TinyRun) -> None:
    metrics = json.loads((tiny_run.published / "metrics.json").read_text())
    assert set(metrics["baselines"]) == {"constant", "ridge", "svr", "boosting"}
    for predictor in ("stack", "model"):
        assert set(metrics[predictor]["valence"]) >= {"ccc", "ccc_ci", "mae", "rmse", "r2", "pearson"}
    assert metrics["baselines"]["constant"]["arousal"]["ccc"] == 0
    assert sum(metrics["songs"].values()) == 24
    rows = predictions(tiny_run)
    assert len(rows) == metrics["songs"]["test"]
    assert all(-1 <= float(row["valence_pred"]) <= 1 for row in rows)


def test_predictions_have_the_promised_columns(tiny_run: TinyRun) -> None:
    header = (tiny_run.published / "predictions.csv").read_text().splitlines()[0]
    own = "song_id,fold,valence_true,valence_pred,arousal_true,arousal_pred,valence_stack,arousal_stack"
    assert header == f"{own},valence_lower,valence_upper,arousal_lower,arousal_upper"
    for line in (tiny_run.published / "logs" / "metrics.jsonl").read_text().splitlines():
        assert {"time", "phase", "step"} <= set(json.loads(line))


def test_samples_can_be_played(tiny_run: TinyRun) -> None:
    (sound,) = tiny_run.published.glob("samples/*valence+0.50_arousal+0.50.wav")
    with wave.open(str(sound)) as file:
        assert file.getframerate() == 8000
        assert file.getnframes() / 8000 == pytest.approx(1.5, abs=0.05)  # 1.1 s, in whole columns
    assert sound.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_plain_timm_opens_the_published_model(tiny_run: TinyRun) -> None:
    network = timm.create_model(f"local-dir:{tiny_run.published / 'model'}", pretrained=True)
    assert network.num_classes == 2


def test_the_published_spec_is_complete_and_names_the_same_run(tiny_run: TinyRun) -> None:
    assert run_name(load_spec(tiny_run.published / "spec.yaml")) == tiny_run.run_folder.name


def test_predict_gives_the_numbers_of_the_evaluation(tiny_run: TinyRun, emotion_job: Command) -> None:
    row = predictions(tiny_run)[0]
    (audio,) = tiny_run.work.glob(f"scratch/stage-*/**/{row['song_id']}.mp3")
    for options, by in ((["--json"], "stack"), (["--json", "--plain"], "pred")):
        found = emotion_job("predict", tiny_run.published, audio, *options, OMP_NUM_THREADS="1")
        assert found.returncode == 0, found.stderr
        said = json.loads(found.stdout)
        assert said["valence"] == pytest.approx(float(row[f"valence_{by}"]), abs=1e-5)
        assert said["arousal"] == pytest.approx(float(row[f"arousal_{by}"]), abs=1e-5)
        assert said["arousal_1_9"] == pytest.approx(5 + 4 * said["arousal"])
        for axis in ("valence", "arousal"):
            ends = [said[f"{axis}_lower"], said[f"{axis}_upper"]]
            if by == "stack":
                assert ends == pytest.approx([float(row[f"{axis}_lower"]), float(row[f"{axis}_upper"])], abs=1e-5)
            else:  # four or five validation songs
                assert ends == [-1, 1]
                assert f"note: {axis}: " in found.stderr


@pytest.mark.full
def test_predict_writes_curves_beside_its_rows(tiny_run: TinyRun, emotion_job: Command, tmp_path: Path) -> None:
    audio = sorted(tiny_run.work.glob("scratch/stage-*/**/*.mp3"))[:2]
    for path in audio:
        shutil.copy(path, tmp_path)
    found = emotion_job("predict", tiny_run.published, tmp_path, tmp_path / "absent.mp3", "--curve", tmp_path / "c.csv")
    assert found.returncode == 65
    assert len(found.stdout.splitlines()) == 3
    assert "1.0 s of sound around its time" in found.stderr
    rows = list(csv.DictReader((tmp_path / "c.csv").read_text().splitlines()))
    assert found.returncode == 65  # of the absent file; the curves of the others are there
    of_file = {name: [row for row in rows if row["file"] == str(tmp_path / name)] for name in (path.name for path in audio)}
    assert emotion_job("predict", tiny_run.published / "model", tmp_path, "--curve", tmp_path / "c.jsonl").returncode == 0
    lines = {line["file"]: line for line in map(json.loads, (tmp_path / "c.jsonl").read_text().splitlines())}
    assert len(lines) == 2
    for name, points in of_file.items():
        with soundfile.SoundFile(tmp_path / name) as sound:
            seconds = sound.frames / sound.samplerate
        times = [float(point["seconds"]) for point in points]
        assert times == [0.5 * step for step in range(1, len(times) + 1)]
        assert seconds - 1.1 < times[-1] < seconds - 0.5
        line = lines[str(tmp_path / name)]
        assert (line["seconds"], line["step_seconds"], line["window_seconds"]) == (times, 0.5, 1.024)
        for axis in ("valence", "arousal"):
            assert line[axis] == [float(point[axis]) for point in points]


@pytest.mark.full
def test_predict_warns_of_what_is_unfit_and_of_what_a_person_would_hear_differently(tiny_run: TinyRun, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.uniform(-0.3, 0.3, (48000, 1))
    kinds = {
        "1 good.wav": (noise, {}),
        "2 silent.flac": (0 * noise, {"silent": "is silent"}),
        "3 antiphase.wav": (np.hstack([noise, -noise]), {"silent": "channels averaged", "antiphase": "cancel each other"}),
        "4 one.wav": (noise[:1], {"short": "lasts 0.00 s, expected at least 5", "silent": "", "shorter_than_crop": "of 1.0 s"}),
        "5 scaled\t.wav": (32767 * noise, {"peak": "of 9.83e+03, expected at most 4", "clipped": "", "level": "an RMS of 75"}),
        "6 long.ogg": (np.repeat(noise, 26, axis=0), {"long": "lasts 156.00 s, expected at most 150"}),
        "7 clipped.wav": (np.clip(5 * noise, -1, 1), {"clipped": "is clipped: 3.7 %", "level": "an RMS of -"}),
        "8 faint.wav": (0.01 * noise, {"level": "has an RMS of -55.2 dB, where music has -45 to -5"}),
        "9 half.wav": (np.hstack([noise, -0.8 * noise]), {"antiphase": "19 dB are lost"}),
    }
    folder = tmp_path / "sounds"
    folder.mkdir()
    for name, (sound, _) in kinds.items():
        how = {} if name.endswith(("flac", "ogg")) else {"subtype": "FLOAT"}
        soundfile.write(folder / name, sound, 8000, **how)
    # The limits are those of the run's own songs.
    published = shutil.copytree(tiny_run.published, tmp_path / "published")
    manifest = read_json(published / "manifest.json")
    manifest["spec"]["data"]["longest_seconds"] = 150.0
    write_json(published / "manifest.json", manifest)
    command = [sys.executable, "-m", "job", "predict", published, folder, "-", "/dev/zero", "--json"]
    piped = (folder / "1 good.wav").read_bytes()
    found = subprocess.run(command, input=piped, capture_output=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert found.returncode == 65
    rows = [json.loads(line) for line in found.stdout.decode().splitlines()]
    assert [row["file"] for row in rows] == [*(str(folder / name) for name in kinds), "-"]
    assert rows[-1] == rows[0] | {"file": "-"}
    *warned, refused = found.stderr.decode().splitlines()
    assert "/dev/zero is a terminal or another device" in refused
    for row, (name, (_, said)) in zip(rows[:-1], kinds.items(), strict=True):
        assert -1 <= row["valence"] <= 1
        texts = {warning["kind"]: warning["text"] for warning in row["warnings"]}
        assert texts.keys() == said.keys(), name
        about = [line for line in warned if f"{folder}/{printable(name)}: " in line]
        assert len(about) == bool(said)
        for kind, text in said.items():
            assert text in texts[kind]
            assert all(texts[kind] in line and line.startswith("emotion-job: warning: ") for line in about)
    assert not any("data." in line for line in warned), "a user of predict has no spec"


# Keys, receipts, siblings


def test_the_same_command_again_does_nothing(tiny_run: TinyRun, emotion_job: Command) -> None:
    def times() -> dict[Path, int]:
        kept = ("receipt.json", "manifest.json", "model.safetensors", "features.f16")
        return {path: path.stat().st_mtime_ns for path in tiny_run.work.rglob("*") if path.name in kept}

    before = times()
    found = emotion_job("run", TINY, "--work", tiny_run.work)
    assert found.returncode == 0, found.stderr
    assert " begins " not in found.stderr
    assert times() == before


def test_a_finished_run_leaves_no_checkpoints(tiny_run: TinyRun) -> None:
    assert not list(tiny_run.work.rglob("*.ckpt"))


def test_the_vits_learning_rate_keeps_the_finished_gan(tiny_run: TinyRun) -> None:
    plan = dict(plan_job(tiny("vit.learning_rate=1e-5"), JobFolders(tiny_run.work, tiny_run.work / "scratch")))
    names = [phase.name for phase in PHASES]
    assert all(plan[phase].startswith("done") for phase in names[: names.index("vit")])
    assert plan["vit"] == plan["evaluate"] == plan["publish"] == "to do"


@pytest.mark.parametrize(
    ("override", "first_to_do"),
    [
        ("mel.fmin_hz=30", "features"),
        ("split.fold=1", "split"),
        ("seed=1", "gan"),
        ("synth.songs=11", "synth"),
        ("evaluate.bootstrap_samples=101", "evaluate"),
        ("name=other", "publish"),
    ],
)
def test_a_changed_key_repeats_the_phases_that_depend_on_it_and_no_others(
    tiny_run: TinyRun, override: str, first_to_do: str
) -> None:
    plan = plan_job(tiny(override), JobFolders(tiny_run.work, tiny_run.work / "scratch"))
    assert next(name for name, state in plan if state == "to do") == first_to_do


@pytest.mark.parametrize("override", ["checkpoint.every_seconds=1", "gan.micro_batch=2", "device.kind=auto"])
def test_runtime_fields_change_nothing(tiny_run: TinyRun, override: str) -> None:
    plan = plan_job(tiny(override), JobFolders(tiny_run.work, tiny_run.work / "scratch"))
    assert all(state.startswith("done") for _, state in plan)


def test_the_same_songs_at_another_path_keep_their_features_and_others_do_not(tiny_run: TinyRun, tmp_path: Path) -> None:
    (staged,) = tiny_run.work.glob("scratch/stage-*")
    folders = JobFolders(tmp_path / "work", tmp_path / "scratch")
    made = []
    for name in ("one", "two"):
        shutil.copytree(staged, tmp_path / name, ignore=shutil.ignore_patterns("receipt.json", "songs.csv", ".*"))
        made.append(run_job(tiny(f"data.source={tmp_path / name}"), folders, "features", False, StopRequest()))
    assert made[0] == made[1]
    song = next((tmp_path / "two").glob("**/*.mp3"))
    song.write_bytes(song.read_bytes() + b"\0" * 100)
    assert run_job(tiny(f"data.source={tmp_path / 'two'}"), folders, "features", False, StopRequest()) != made[0]


def test_a_song_that_is_read_in_place_and_replaced_after_staging_is_an_error(tiny_run: TinyRun, tmp_path: Path) -> None:
    (staged,) = tiny_run.work.glob("scratch/stage-*")
    shutil.copytree(staged, tmp_path / "songs", ignore=shutil.ignore_patterns("receipt.json", "songs.csv", ".*"))
    spec = tiny(f"data.source={tmp_path / 'songs'}", "data.copy=never")
    folders = JobFolders(tmp_path / "work", tmp_path / "scratch")
    run_job(spec, folders, "stage", False, StopRequest())
    song = sorted((tmp_path / "songs").glob("**/*.mp3"))[1]
    before, content = song.stat(), bytearray(song.read_bytes())
    content[-50] ^= 1
    song.write_bytes(content)
    os.utime(song, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=rf"{song} changed while the job ran: it has the SHA-256 "):
        run_job(spec, folders, "features", False, StopRequest())
    content[-50] ^= 1
    song.write_bytes(content)
    os.utime(song, ns=(before.st_atime_ns, before.st_mtime_ns))
    run_job(spec, folders, "features", False, StopRequest())


@pytest.mark.full
def test_a_deleted_publication_is_published_again_and_a_different_one_is_never_overwritten(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    folders = JobFolders(tiny_run.work, tiny_run.work / "scratch")
    spec = tiny(f"artifacts.destination={tmp_path}")
    run_job(spec, folders, "publish", False, StopRequest())
    published = tmp_path / run_name(spec)
    expected = promised_bytes(published)
    shutil.rmtree(published)
    run_job(spec, folders, "publish", False, StopRequest())
    assert promised_bytes(published) == expected

    manifest = json.loads((published / "manifest.json").read_text())
    other = b"another result\n"
    (published / "predictions.csv").write_bytes(other)
    manifest["artifacts"]["predictions.csv"] = {"size": len(other), "sha256": hashlib.sha256(other).hexdigest()}
    (published / "manifest.json").write_text(json.dumps(manifest))
    for folder in folders.run_folder(spec).glob("publish-*"):
        shutil.rmtree(folder)
    with pytest.raises(ModelError, match=r"predictions\.csv differs"):
        run_job(spec, folders, "publish", False, StopRequest())
    assert (published / "predictions.csv").read_text() == "another result\n"


def change(path: Path, byte: bytes = b"\0") -> None:
    """Other bytes, and the same size and time, as after a fault of a disk."""
    found = path.stat()
    path.write_bytes(byte * found.st_size)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize("name", ["vit-*/model/model.safetensors", "evaluate-*/metrics.json", "split-*/split.csv"])
def test_an_output_that_has_changed_on_the_disk_is_removed_and_not_published(
    tiny_run: TinyRun, tmp_path: Path, name: str
) -> None:
    folders = JobFolders(shutil.copytree(tiny_run.work, tmp_path / "work"), tmp_path / "work" / "scratch")
    run = folders.work / tiny_run.run_folder.name
    for folder in [folders.work / "published", *run.glob("publish-*")]:
        shutil.rmtree(folder)
    (changed,) = run.glob(name)
    change(changed)
    with pytest.raises(StorageError, match=rf"{re.escape(str(changed))} is not what .* publish has failed"):
        run_job(tiny(), folders, "publish", False, StopRequest())
    assert not changed.exists()
    assert not list(folders.work.glob("published/*"))


def test_a_changed_output_of_another_run_is_named_and_stays(tiny_run: TinyRun, tmp_path: Path) -> None:
    folders = JobFolders(shutil.copytree(tiny_run.work, tmp_path / "work"), tmp_path / "work" / "scratch")
    (split,) = (folders.work / tiny_run.run_folder.name).glob("split-*/split.csv")
    change(split)
    with pytest.raises(ModelError, match=rf"{re.escape(str(split))} is not what .* Run again with --verify\."):
        run_job(tiny("evaluate.bootstrap_samples=130"), folders, "evaluate", False, StopRequest())
    assert split.exists()
    run_job(tiny("evaluate.bootstrap_samples=130"), folders, "split", True, StopRequest())


@pytest.mark.full
@pytest.mark.parametrize(("name", "byte"), [("tiny-*/split-*/split.csv", b"\0"), ("scratch/features-*/features.f16", b"\xff")])
def test_what_has_changed_on_the_disk_is_computed_again_by_the_next_attempt(
    tiny_run: TinyRun, tmp_path: Path, name: str, byte: bytes
) -> None:
    folders = JobFolders(shutil.copytree(tiny_run.work, tmp_path / "work"), tmp_path / "work" / "scratch")
    for folder in folders.work.glob("tiny-*/evaluate-*"):
        shutil.rmtree(folder)
    (changed,) = folders.work.glob(name)
    expected = changed.read_bytes()
    change(changed, byte)
    with pytest.raises(StorageError, match="it is computed again"):
        run_job(tiny(), folders, "evaluate", False, StopRequest())
    run_job(tiny(), folders, "evaluate", False, StopRequest())
    assert changed.read_bytes() == expected


def test_a_changed_byte_in_what_is_published_is_found_without_verify_and_never_overwritten(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    folders, spec = JobFolders(tiny_run.work, tiny_run.work / "scratch"), tiny(f"artifacts.destination={tmp_path}")
    run_job(spec, folders, "publish", False, StopRequest())
    model = tmp_path / run_name(spec) / "model" / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[-7] ^= 1
    model.write_bytes(content)
    with pytest.raises(ModelError, match=r"is published, but model/model\.safetensors differs from"):
        run_job(spec, folders, "publish", False, StopRequest())
    assert model.read_bytes() == content


@pytest.mark.full
def test_a_changed_byte_in_what_is_published_in_object_storage_is_found_by_its_etag(
    tiny_run: TinyRun, moto: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in moto.environment().items():
        monkeypatch.setenv(name, value)
    client, bucket = moto.client(), moto.new_bucket()
    folders = JobFolders(tiny_run.work, tiny_run.work / "scratch")
    spec = tiny(f"artifacts.destination=s3://{bucket}/runs", f"storage.endpoint_url={moto.endpoint_url}")
    run_job(spec, folders, "publish", False, StopRequest())
    key = f"runs/{run_name(spec)}/metrics.json"
    content = bytearray(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    content[-7] ^= 1
    client.put_object(Bucket=bucket, Key=key, Body=bytes(content))
    with pytest.raises(ModelError, match=r"is published, but metrics\.json differs from"):
        run_job(spec, folders, "publish", False, StopRequest())


@pytest.mark.full
def test_a_published_run_that_was_copied_elsewhere_and_back_is_done(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Other times, equal digests."""
    folders, spec = JobFolders(tiny_run.work, tiny_run.work / "scratch"), tiny(f"artifacts.destination={tmp_path / 'one'}")
    run_job(spec, folders, "publish", False, StopRequest())
    for path in (tmp_path / "one").rglob("*"):
        os.utime(path, ns=(5, 5))
    run_job(spec, folders, "publish", False, StopRequest())


# Destinations that cannot be used


def one_line_of(found: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in found.stderr, found.stderr
    assert " begins " not in found.stderr, "a phase has run"
    return found.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [("file", 64, "is a file"), ("file/below", 64, "is a file"), ("link", 69, "is a link to"), ("loop", 69, "is a link to")],
)
def test_a_destination_that_cannot_be_a_folder_is_refused_before_any_work(
    name: str, code: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    folders = JobFolders(tmp_path / "work", tmp_path / "scratch")
    with pytest.raises(EmotionError, match=f"{tmp_path / name.partition('/')[0]} {said}") as caught:
        run_job(tiny(f"artifacts.destination={tmp_path / name}"), folders, "publish", False, StopRequest())
    assert caught.value.exit_code == code
    assert not list(tmp_path.glob("scratch/stage-*"))


@pytest.mark.parametrize("option", ["--work", "--scratch"])
def test_a_file_as_work_or_scratch_is_wrong_usage(option: str, emotion_job: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = emotion_job("run", TINY, "--work", tmp_path / "work", option, tmp_path / "file")
    assert found.returncode == 64
    assert f"{option}: {tmp_path / 'file'} cannot be a folder" in one_line_of(found)


@pytest.mark.parametrize("linked", ["", "model"])
def test_links_below_the_destination_that_lead_out_of_it_are_refused_before_any_work(linked: str, tmp_path: Path) -> None:
    spec = tiny(f"artifacts.destination={tmp_path / 'published'}")
    link = tmp_path / "published" / run_name(spec) / linked
    link.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AccessError, match=f"{link} is a link to .*elsewhere"):
        run_job(spec, JobFolders(tmp_path / "work", tmp_path / "scratch"), "publish", False, StopRequest())
    assert not list((tmp_path / "elsewhere").iterdir())
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize(
    ("fault", "kind"), [(error(403, "AccessDenied"), AccessError), (error(404, "NoSuchBucket"), StorageError)]
)
def test_a_bucket_that_nothing_can_be_published_in_is_told_before_any_work(
    store: ScriptedS3, tmp_path: Path, fault: Fault, kind: type[Exception]
) -> None:
    store.on("ListObjectsV2", "*", fault, times=math.inf)
    spec = tiny("artifacts.destination=s3://bucket/runs", "storage.patience_seconds=0.1")
    with pytest.raises(kind, match=r"^artifacts\.destination: .*s3://bucket/runs"):
        run_job(spec, JobFolders(tmp_path / "work", tmp_path / "scratch"), "publish", False, StopRequest())
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.full
def test_a_destination_that_is_a_link_itself_is_followed(tiny_run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    spec = tiny(f"artifacts.destination={tmp_path / 'link'}")
    run_job(spec, JobFolders(tiny_run.work, tiny_run.work / "scratch"), "publish", False, StopRequest())
    assert (tmp_path / "disk" / run_name(spec) / "manifest.json").exists()


def test_a_second_job_on_the_same_run_is_refused_with_the_owners_name(
    tiny_run: TinyRun, emotion_job: Command, tmp_path: Path
) -> None:
    folder = tmp_path / tiny_run.run_folder.name
    folder.mkdir()
    with leased(folder, StopRequest(), beat_seconds=0.1) as attempt:
        found = emotion_job("run", TINY, "--work", tmp_path)
    assert found.returncode == 73
    assert f"process {os.getpid()} on {socket.gethostname()} (attempt {attempt}) is running this spec here" in found.stderr
    assert not (folder / "attempts.jsonl").exists()
