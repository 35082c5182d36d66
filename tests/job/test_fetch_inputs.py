"""Weights, earlier runs and runs to collect are used from object storage as from a folder."""

import csv
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from emotion.errors import DataError
from emotion.files import sha256_of, write_json
from job.pipeline.context import PhaseContext
from job.pipeline.fetch_inputs import FetchedInputs, fetch_inputs, named_file_digests
from job.pipeline.phases import BY_NAME
from job.pipeline.reproduce import manifest_to_reproduce
from job.preemption import StopRequest
from job.results.collect import collect_runs
from job.results.manifest import MANIFEST, read_manifest
from job.results.published_runs import fetch_tables
from job.spec.load import load_spec
from job.spec.model import JobSpec, fingerprint, to_yaml
from tests.conftest import TINY, TinyRun
from tests.stores.servers import S3Server

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tiny_run: TinyRun, moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny job as published in a store."""
    for name, value in moto.environment().items():
        monkeypatch.setenv(name, value)
    client, bucket = moto.client(), moto.new_bucket()
    for path in tiny_run.published.rglob("*"):
        if path.is_file():
            key = f"runs/{tiny_run.published.name}/{path.relative_to(tiny_run.published).as_posix()}"
            client.upload_file(str(path), bucket, key)
    return f"s3://{bucket}/runs/{tiny_run.published.name}"


def damage(moto: S3Server, run: str, name: str) -> None:
    bucket, _, prefix = run.removeprefix("s3://").partition("/")
    content = bytearray(moto.client().get_object(Bucket=bucket, Key=f"{prefix}/{name}")["Body"].read())
    content[-1] ^= 1
    moto.client().put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=bytes(content))


def spec_of(moto: S3Server, *overrides: str) -> JobSpec:
    return load_spec(TINY, [f"storage.endpoint_url={moto.endpoint_url}", *overrides])


def test_weights_in_object_storage_are_fetched_once_and_count_by_their_content(
    run: str, tiny_run: TinyRun, moto: S3Server, tmp_path: Path
) -> None:
    model = tiny_run.published / "model" / "model.safetensors"
    for name in ("model", "model/model.safetensors"):
        spec = spec_of(moto, f"vit.weights={run}/{name}")
        fetched = fetch_inputs(spec, tmp_path, StopRequest())
        assert named_file_digests(spec, fetched) == {"vit.weights": sha256_of(model)}
        assert fetched.vit_config(spec).weights == str(fetched.weights)
    (copy,) = tmp_path.rglob("*.safetensors")
    before = copy.stat().st_ino
    assert fetch_inputs(spec, tmp_path, StopRequest()).weights == copy
    assert copy.stat().st_ino == before
    damage(moto, run, "model/model.safetensors")
    assert fetch_inputs(spec, tmp_path, StopRequest()).weights != copy
    with pytest.raises(DataError, match=r"vit\.weights: s3:GetObject .*/absent\.pth: .*There is no such object"):
        fetch_inputs(spec_of(moto, f"vit.weights={run}/absent.pth"), tmp_path, StopRequest())


def teacher_of(path: Path, names: Sequence[str]) -> Path:
    np.savez(path, names=names, embedding=np.random.default_rng(0).standard_normal((len(names), 3)))
    return path


def test_a_teacher_counts_by_its_content_for_the_vit_alone_and_may_be_in_object_storage(
    tiny_run: TinyRun, moto: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in moto.environment().items():
        monkeypatch.setenv(name, value)
    client, bucket = moto.client(), moto.new_bucket()
    file = teacher_of(tmp_path / "t.npz", ["1", "2"])
    client.upload_file(str(file), bucket, "t.npz")
    place = f"s3://{bucket}/t.npz"
    without, here, there = (spec_of(moto, *settings) for settings in ((), (f"vit.teacher={file}",), (f"vit.teacher={place}",)))
    parts = []
    for spec in (here, there):
        fetched = fetch_inputs(spec, tmp_path / "scratch", StopRequest())
        assert named_file_digests(spec, fetched) == {"vit.teacher": sha256_of(file)}
        assert fetched.vit_config(spec).teacher == str(fetched.teacher)
        parts.append(BY_NAME["vit"].key_parts(spec, fetched, StopRequest()))
        assert BY_NAME["gan"].key_parts(spec, fetched, StopRequest()) == {}
    assert parts == [{"teacher": sha256_of(file)}] * 2
    assert BY_NAME["vit"].key_parts(without, fetch_inputs(without, tmp_path, StopRequest()), StopRequest()) == {}
    # The specs of the time before teachers keep their fingerprint and keys, whatever the weight.
    assert without.result_fields() == spec_of(moto, "vit.teacher_weight=3").result_fields()
    assert not {"teacher", "teacher_weight"} & without.result_fields()["vit"].keys()
    assert fingerprint(here) != fingerprint(without)
    with pytest.raises(DataError, match=r"vit\.teacher: s3:GetObject .*/absent\.npz: .*There is no such object"):
        fetch_inputs(spec_of(moto, f"vit.teacher=s3://{bucket}/absent.npz"), tmp_path, StopRequest())


@pytest.mark.parametrize("phase", ["gan", "vit"])
def test_a_training_song_without_an_embedding_ends_the_job_before_its_first_training(
    phase: str, tiny_run: TinyRun, tmp_path: Path
) -> None:
    rows = list(csv.DictReader((tiny_run.published / "split.csv").read_text().splitlines()))
    training = [row["song_id"] for row in rows if row["split"] == "train"]
    spec = load_spec(TINY, [f"vit.teacher={teacher_of(tmp_path / 't.npz', training[1:])}"])
    fetched = fetch_inputs(spec, tmp_path, StopRequest())
    inputs = {name: tiny_run.phase(name) for name in BY_NAME[phase].dependencies}
    context = PhaseContext(spec, fetched, inputs, tmp_path / "out", tmp_path, lambda: False)
    context.out.mkdir()
    with pytest.raises(DataError, match=rf"1 of {len(training)} training songs have no embedding: {training[0]}\."):
        BY_NAME[phase].run(context)
    assert not list(context.out.rglob("*.jsonl"))


def test_a_file_of_a_teacher_that_holds_no_embeddings_ends_the_job_before_its_first_phase(tmp_path: Path) -> None:
    (tmp_path / "t.npz").write_text("song,embedding")
    spec = load_spec(TINY, [f"vit.teacher={tmp_path / 't.npz'}"])
    with pytest.raises(DataError, match=r"not readable as a .* file of embeddings"):
        BY_NAME["vit"].check(spec, fetch_inputs(spec, tmp_path, StopRequest()), StopRequest())


def test_a_warm_start_from_object_storage_equals_one_from_a_folder(
    run: str, tiny_run: TinyRun, moto: S3Server, tmp_path: Path
) -> None:
    settings = ("name=on", "vit.weights=pretrained")
    here = spec_of(moto, *settings, f"init_from.run={tiny_run.published}")
    spec = spec_of(moto, *settings, f"init_from.run={run}")
    fetched = fetch_inputs(spec, tmp_path, StopRequest())
    in_place = FetchedInputs(weights=None, warm_start_run=tiny_run.published)
    assert named_file_digests(spec, fetched) == named_file_digests(here, in_place) != {}
    assert not list(tmp_path.rglob("report.html"))


def test_a_run_in_object_storage_that_is_damaged_or_no_run_is_refused(run: str, moto: S3Server, tmp_path: Path) -> None:
    settings = ("name=on", "vit.weights=pretrained")
    with pytest.raises(DataError, match=r"init_from: there is no s3://.*/manifest\.json\. Expected a published run"):
        fetch_inputs(spec_of(moto, *settings, f"init_from.run={run}/model"), tmp_path, StopRequest())
    damage(moto, run, "gan/generator.safetensors")
    with pytest.raises(DataError, match=r"init_from: s3://.*/gan/generator\.safetensors is damaged: its sha256"):
        fetch_inputs(spec_of(moto, *settings, f"init_from.run={run}"), tmp_path, StopRequest())


@pytest.mark.full
def test_runs_in_object_storage_are_collected_like_those_in_a_folder(
    run: str, tiny_run: TinyRun, emotion_job: Command, tmp_path: Path
) -> None:
    shutil.copytree(tiny_run.published, tmp_path / "runs" / tiny_run.published.name)
    for name, place in (("here", tmp_path / "runs"), ("there", run.rpartition("/")[0]), ("one", f"{run}/")):
        found = emotion_job("collect", place, "--out", tmp_path / name)
        assert found.returncode == 0, found.stderr
    tables = {(tmp_path / name / "collected.md").read_bytes() for name in ("here", "there", "one")}
    assert len(tables) == 1
    found = emotion_job("collect", f"{run}/model", "--out", tmp_path / "none")
    assert found.returncode == 65
    assert "Traceback" not in found.stderr


def test_a_sweep_that_publishes_to_object_storage_is_collected_from_there(
    run: str, tiny_run: TinyRun, moto: S3Server, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    (sweep / "specs").mkdir(parents=True)
    published = [run, f"{run.rpartition('/')[0]}/tiny-of-tomorrow"]
    tasks = []
    for index, place in enumerate(published):
        (sweep / "specs" / f"{index:04}.yaml").write_text(to_yaml(spec_of(moto)), encoding="utf-8")
        tasks.append({"index": index, "label": f"fold={index}", "run": place.rpartition("/")[2], "published": place})
    write_json(sweep / "sweep.json", {"tasks": tasks})
    text = collect_runs(fetch_tables([str(sweep)], tmp_path / "near", lambda: False), tmp_path / "out")
    assert "- fold=1 (tiny-of-tomorrow)" in text
    assert f"{len(tiny_run.predictions)} songs, 1 of 4 folds" in text


def test_a_file_of_the_spec_that_changes_after_its_key_was_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    fetched = FetchedInputs(tmp_path / "model.safetensors", None)
    digest = fetched.digest(tmp_path / "model.safetensors")
    fetched.require_unchanged(fetched.weights)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert fetched.digest(tmp_path / "model.safetensors") == digest
    with pytest.raises(DataError, match=rf"{tmp_path / 'model.safetensors'}: changed while the job ran: .*{digest}"):
        fetched.require_unchanged(fetched.weights)


@pytest.mark.parametrize("phase", ["split", "vit"])
def test_a_phase_refuses_a_file_of_the_spec_that_changed_after_its_key_was_made(
    phase: str, tiny_run: TinyRun, tmp_path: Path
) -> None:
    weights = Path(shutil.copytree(tiny_run.published / "model", tmp_path / "model")) / "model.safetensors"
    rows = list(csv.DictReader((tiny_run.published / "split.csv").read_text().splitlines()))
    for name in ("train", "validation", "test"):
        ids = [row["song_id"] for row in rows if row["split"] == name]
        (tmp_path / f"{name}.txt").write_text("\n".join(ids))
    spec = load_spec(TINY, [f"vit.weights={weights}", f"split={{protocol: lists, lists: {tmp_path}}}"])
    changed = weights if phase == "vit" else tmp_path / "test.txt"
    fetched = fetch_inputs(spec, tmp_path, StopRequest())
    digest = fetched.digest(changed)
    inputs = {name: tiny_run.phase(name) for name in BY_NAME[phase].dependencies}
    context = PhaseContext(spec, fetched, inputs, tmp_path / "out", tmp_path, lambda: False)
    context.out.mkdir()
    before = changed.read_bytes()
    changed.write_bytes(bytes([*before[:-1], before[-1] ^ 1]) if phase == "vit" else b"\n" + before)
    with pytest.raises(DataError, match=rf"{changed}: changed while the job ran: expected the SHA-256 {digest}"):
        BY_NAME[phase].run(context)
    assert not list(context.out.glob("*.csv"))
    assert not list(context.out.rglob("*.safetensors"))


def test_a_run_in_object_storage_is_reproduced_as_one_in_a_folder_is(run: str, tiny_run: TinyRun, moto: S3Server) -> None:
    expected = read_manifest(tiny_run.published / MANIFEST, "test")
    assert manifest_to_reproduce(f"{run}/", StopRequest()) == expected
    damage(moto, run, "metrics.json")
    # A manifest alone may be anywhere; a prefix is a run, and has to be complete.
    assert manifest_to_reproduce(f"{run}/{MANIFEST}", StopRequest()) == expected
    with pytest.raises(DataError, match=rf"^reproduce: {run}: metrics\.json differs from manifest\.json\. Copy"):
        manifest_to_reproduce(run, StopRequest())
    with pytest.raises(DataError, match=rf"^reproduce: there is no {run}/gan/manifest\.json\. Expected a published run"):
        manifest_to_reproduce(f"{run}/gan", StopRequest())
