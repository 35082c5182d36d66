"""A published run is reproduced: its bytes are equal, or the message says what differs and why."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from emotion.compat import timm
from emotion.data.toy_dataset import generate_dataset
from emotion.errors import DataError, SpecError
from job.pipeline.phases import BY_NAME
from job.pipeline.reproduce import (
    UNEXPLAINED,
    changed_conditions,
    changed_files,
    changed_settings,
    folder_for,
    manifest_to_reproduce,
    refuse_changed_inputs,
    spec_to_reproduce,
)
from job.preemption import StopRequest
from job.results.manifest import Manifest
from job.spec.load import load_spec
from tests.conftest import TINY, TinyRun, terminated_in_gan
from tests.job.soak import promised_bytes
from tests.manifests import manifest_with, write_manifest

Command = Callable[..., subprocess.CompletedProcess[str]]


def manifest_of(*overrides: str, **comparable: Any) -> Manifest:
    """A manifest of the tiny job under conditions such as gan_threads=2."""
    return manifest_with(
        spec=load_spec(TINY, overrides).model_dump(mode="json"),
        comparable={name.replace("_", ".", 1): value for name, value in comparable.items()},
    )


# Manifests


def test_a_manifest_is_found_by_its_own_path_or_its_folder_which_is_verified(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_bytes(b"abc")
    write_manifest(tmp_path, spec=manifest_of().spec)
    manifest = manifest_to_reproduce(str(tmp_path), StopRequest())
    assert manifest_to_reproduce(str(tmp_path / "manifest.json"), StopRequest()) == manifest
    # A manifest alone may be anywhere; a folder is a run, and has to be complete.
    (tmp_path / "metrics.json").write_bytes(b"abd")
    assert manifest_to_reproduce(str(tmp_path / "manifest.json"), StopRequest()) == manifest
    with pytest.raises(DataError, match=r": metrics\.json differs from manifest\.json\. Copy"):
        manifest_to_reproduce(str(tmp_path), StopRequest())
    (tmp_path / "metrics.json").unlink()
    with pytest.raises(DataError, match=r": metrics\.json is missing\. Copy"):
        manifest_to_reproduce(str(tmp_path), StopRequest())


def test_the_folder_that_a_run_was_published_in_is_refused_as_work_folder(tiny_run: TinyRun) -> None:
    with pytest.raises(SpecError, match="made or published"):
        folder_for(manifest_to_reproduce(str(tiny_run.published), StopRequest()), tiny_run.published.parent)


def test_a_spec_that_this_version_cannot_read_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, spec={"name": "a"})
    with pytest.raises(DataError, match=r"cannot read the spec in .*data.* Use the emotion-job that published it, 0\.1\.0"):
        manifest_to_reproduce(str(tmp_path), StopRequest())


def test_a_missing_manifest_ends_in_one_line_with_65(emotion_job: Command, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.json"):
        found = emotion_job("reproduce", path, "--work", tmp_path / "work")
        assert found.returncode == 65
        assert found.stderr.count("\n") == 1
        assert "Expected a published run" in found.stderr
    assert not (tmp_path / "work").exists()


# What is run


def test_neither_torch_nor_numpy_is_imported_before_the_environment_is_prepared() -> None:
    script = "import sys, job.pipeline.reproduce; print([name for name in ('numpy', 'torch', 'scipy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_spec_has_the_recorded_device_and_no_destination_or_time_limit_of_the_run(tmp_path: Path) -> None:
    old = [
        "device={}",
        "gan.micro_batch=null",
        "precision=auto",
        "artifacts.destination=/old",
        "preemption.time_limit_minutes=9",
        "preemption.spot=aws",
    ]
    resolved = {"threads": 3, "kind": "cpu", "deterministic": True, "precision": "fp32"}
    conditions = {f"{phase}_{name}": value for phase in ("gan", "synth", "vit") for name, value in resolved.items()}
    manifest = manifest_of(*old, **conditions, gan_micro_batch=6, vit_micro_batch=5)
    before = manifest.model_copy(deep=True)
    spec = spec_to_reproduce(manifest, tmp_path, ("data.source=/new",))
    assert (spec.device.threads, spec.device.kind, spec.device.deterministic) == (3, "cpu", True)
    assert (spec.precision, spec.gan.micro_batch, spec.vit.micro_batch) == ("fp32", 6, 5)
    assert (spec.artifacts.destination, spec.preemption.time_limit_minutes, spec.preemption.spot) == (None, None, None)
    assert spec.data.source == "/new"
    assert spec.seed == manifest.spec["seed"]
    assert manifest == before


def test_settings_with_different_recorded_values_stay_as_in_the_spec(tmp_path: Path) -> None:
    mixed = {"gan_threads": 3, "synth_threads": 3, "vit_threads": 4, "gan_micro_batch": [6, 3]}
    mixed |= {f"{phase}_precision": ["bf16", "fp32"] for phase in ("gan", "synth", "vit")}
    spec = spec_to_reproduce(manifest_of("device.threads=2", **mixed), tmp_path, ())
    assert (spec.device.threads, spec.precision, spec.gan.micro_batch) == (2, "auto", 4)


def test_the_work_folder_of_the_run_itself_is_refused(tiny_run: TinyRun, emotion_job: Command) -> None:
    found = emotion_job("reproduce", tiny_run.published, "--work", tiny_run.work)
    assert found.returncode == 64
    assert f"--work: {tiny_run.run_folder} is where this run was made" in found.stderr


def test_each_run_is_reproduced_in_a_work_folder_of_its_own(tmp_path: Path) -> None:
    folders = {folder_for(manifest_of(f"split.fold={fold}"), tmp_path) for fold in range(2)}
    assert len(folders) == 2
    assert {folder.parent for folder in folders} == {tmp_path}


def test_a_wrong_override_is_refused_as_for_a_run(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"--set gan\.epocs=1: gan\.epocs: unknown key"):
        spec_to_reproduce(manifest_of(), tmp_path, ("gan.epocs=1",))


# What differs


def test_each_condition_that_differs_or_prevents_equal_bytes_has_a_line() -> None:
    there = {
        "libraries.torch": "1.0",
        "machine": "x86_64",
        "gan.threads": [1, 2],
        "vit.deterministic": False,
        "gan.gpu": "T4",
        "source_sha256": "0" * 64,
    }
    here = {
        "libraries.torch": "2.0",
        "machine": "x86_64",
        "gan.threads": 2,
        "vit.deterministic": False,
        "source_sha256": "1" * 64,
    }
    assert changed_conditions(there, here) == [
        "gan.gpu was T4 and is (none) here",
        "gan.threads was 1, 2: it changed while the run was made, so equal bytes are not to be expected",
        "libraries.torch was 1.0 and is 2.0 here",
        "source_sha256 was 000000000000 and is 111111111111 here",
        "vit.deterministic was false: equal bytes are not to be expected",
    ]


def test_a_changed_setting_has_a_line_and_a_changed_location_has_none() -> None:
    spec = load_spec(TINY, ["data.source=/elsewhere", "device.threads=2", "precision=fp32", "gan.epochs=1"])
    assert changed_settings(manifest_of(), spec) == ["gan.epochs was 2.0 and is 1.0 here"]


def test_each_file_that_differs_is_missing_or_is_new_has_a_line() -> None:
    expected = {"same": "a" * 64, "other": "b" * 64, "gone": "c" * 64}
    found = {"same": "a" * 64, "other": "d" * 64, "more": "e" * 64}
    assert changed_files(expected, found) == [
        "gone is missing, expected cccccccccccc",
        "more is new, found eeeeeeeeeeee",
        "other differs, expected bbbbbbbbbbbb, found dddddddddddd",
    ]


def test_files_staged_from_changed_inputs_are_not_reused(tmp_path: Path) -> None:
    for name in ("receipt.json", "2.mp3", "3.mp3"):
        (tmp_path / name).write_text("")
    expected = {"data.source/2.mp3": "a", "data.source/3.mp3": "b"}
    refuse_changed_inputs(expected, tmp_path, dict(expected), tmp_path / "datasets")
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(DataError, match="1 of 2 input files"):
        refuse_changed_inputs(expected, tmp_path, expected | {"data.source/3.mp3": "c"}, tmp_path / "datasets")
    assert [path.name for path in tmp_path.iterdir()] == ["2.mp3"]


def test_of_many_changed_files_the_first_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    inputs = {f"data.source/{number}": "a" for number in range(1802)}
    with pytest.raises(DataError) as raised:
        refuse_changed_inputs(inputs, tmp_path, {}, tmp_path / "datasets")
    lines = str(raised.value).splitlines()
    assert len(lines) == 1 + 20 + 1 + 1
    assert lines[0] == "reproduce: 1802 of 1802 input files differ from the manifest:"
    assert lines[21].strip() == "and 1782 more"


# The whole job, on generated songs in a folder


@dataclass(frozen=True)
class Reproduction:
    """source: a folder of songs; published: the tiny run on it; work: where that was reproduced."""

    source: Path
    published: Path
    work: Path
    output: str


@pytest.fixture(scope="module")
def reproduction(tmp_path_factory: pytest.TempPathFactory, emotion_job: Command) -> Reproduction:
    root = tmp_path_factory.mktemp("reproduction")
    generate_dataset(root / "songs", 24, 0, lambda: False)
    found = emotion_job("run", TINY, "--work", root / "work", "--set", f"data.source={root / 'songs'}")
    assert found.returncode == 0, found.stderr
    (published,) = (root / "work" / "published").iterdir()
    found = emotion_job("reproduce", published, "--work", root / "reproduced")
    assert found.returncode == 0, found.stderr
    return Reproduction(root / "songs", published, root / "reproduced", found.stdout + found.stderr)


@pytest.mark.full
def test_a_reproduction_runs_every_phase_and_has_the_same_bytes(reproduction: Reproduction) -> None:
    (again,) = reproduction.work.glob("*/published/*")
    expected = promised_bytes(reproduction.published)
    assert promised_bytes(again) == expected
    assert f"reproduced: {len(expected)} files are equal to those of {reproduction.published.name}" in reproduction.output
    assert "WARNING reproduce" not in reproduction.output
    for phase in BY_NAME:
        assert f"phase={phase} begins" in reproduction.output


@pytest.mark.full
def test_an_input_with_one_changed_byte_is_named_before_anything_is_trained(
    reproduction: Reproduction, emotion_job: Command, tmp_path: Path
) -> None:
    song = max(reproduction.source.rglob("*.mp3"))
    whole, times = song.read_bytes(), song.stat()
    song.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(song, ns=(times.st_atime_ns, times.st_mtime_ns))
    try:
        found = emotion_job("reproduce", reproduction.published, "--work", tmp_path)
    finally:
        song.write_bytes(whole)
    assert found.returncode == 65
    *_, heading, line, advice = found.stderr.splitlines()
    assert heading.endswith("reproduce: 1 of 26 input files differ from the manifest:")
    assert f"data.source/audio/{song.name} differs, expected " in line
    assert "Nothing was trained" in advice
    assert "phase=features begins" not in found.stderr

    # The right file with the size and time of the wrong one.
    os.utime(song, ns=(times.st_atime_ns, times.st_mtime_ns))
    found = emotion_job("reproduce", reproduction.published, "--work", tmp_path)
    assert found.returncode == 0, found.stderr


@pytest.mark.full
def test_a_manifest_with_other_digests_is_not_reproduced(
    reproduction: Reproduction, emotion_job: Command, tmp_path: Path
) -> None:
    manifest = json.loads((reproduction.published / "manifest.json").read_text())
    manifest["artifacts"]["predictions.csv"]["sha256"] = "0" * 64
    manifest["artifacts"]["logs/job.log"]["sha256"] = "0" * 64  # which promises nothing
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    found = emotion_job("reproduce", tmp_path / "manifest.json", "--work", reproduction.work)
    assert found.returncode == 70
    *_, heading, line, explanation = found.stderr.splitlines()
    assert "reproduce: 1 of " in heading
    assert line.startswith("  predictions.csv differs, expected 000000000000, found ")
    assert explanation == UNEXPLAINED


@pytest.mark.full
def test_conditions_that_differ_are_logged_first_and_explain_different_bytes(
    reproduction: Reproduction, emotion_job: Command, tmp_path: Path
) -> None:
    manifest = json.loads((reproduction.published / "manifest.json").read_text())
    manifest["comparable"]["libraries.torch"] = "1.0"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    found = emotion_job("reproduce", tmp_path / "manifest.json", "--work", reproduction.work)
    assert found.returncode == 0, found.stderr
    assert "WARNING reproduce: libraries.torch was 1.0 and is " in found.stderr

    found = emotion_job("reproduce", reproduction.published, "--work", tmp_path, "--set", "seed=1", "--set", "device.threads=2")
    assert found.returncode == 70
    assert found.stderr.index("WARNING reproduce: gan.threads was 1 and is 2 here") < found.stderr.index("phase=stage")
    assert "Differences that may be the cause:\n  seed was 0 and is 1 here\n" in found.stderr


@pytest.mark.full
def test_a_stopped_reproduction_resumes_and_warns_of_changed_conditions(
    reproduction: Reproduction, emotion_job: Command, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "job", "reproduce", str(reproduction.published), "--work", str(tmp_path)]
    code, output = terminated_in_gan(command)
    assert code == 75, output
    (gan,) = tmp_path.glob("*/*/gan-*")
    assert not (gan / "receipt.json").exists()
    found = emotion_job("reproduce", reproduction.published, "--work", tmp_path, "--set", "device.threads=2")
    assert "WARNING reproduce: an earlier attempt made some of" in found.stderr
    (again,) = tmp_path.glob("*/published/*")
    manifest = json.loads((again / "manifest.json").read_text())
    assert manifest["comparable"]["gan.threads"] == [1, 2]
    assert manifest["comparable"]["vit.threads"] == 2
    assert [(one["reason"], one["exit_code"]) for one in manifest["attempts"]] == [
        ("done", 0),
        ("Interrupted", 75),
        ("done", 0),
        ("publishing", None),
    ]


@pytest.mark.full
def test_different_weights_from_the_hub_are_changed_inputs(emotion_job: Command, tmp_path: Path) -> None:
    tag = "test_vit.r160_in1k"
    network = timm.create_model("test_vit")
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("head.")}
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} torch.float32 {tuple(state[name].shape)}\n".encode() + state[name].numpy().tobytes())
    # What huggingface_hub keeps of a repository, enough for being offline.
    repository = tmp_path / "hub" / "hub" / f"models--timm--{tag}"
    for folder in ("refs", "snapshots/0"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("0")
    weights = repository / "snapshots" / "0" / "model.safetensors"
    save_file(network.state_dict(), weights)
    hub = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    found = emotion_job("run", TINY, "--work", tmp_path / "work", "--set", "vit.weights=pretrained", **hub)
    assert found.returncode == 0, found.stderr
    (published,) = (tmp_path / "work" / "published").iterdir()
    assert json.loads((published / "manifest.json").read_text())["inputs"]["vit.weights"] == digest.hexdigest()

    with torch.no_grad():
        network.get_parameter("pos_embed").mul_(2)
    save_file(network.state_dict(), weights)
    found = emotion_job("reproduce", published, "--work", tmp_path / "again", **hub)
    assert found.returncode == 65
    assert f"vit.weights differs, expected {digest.hexdigest()[:12]}" in found.stderr
    assert "phase=features begins" not in found.stderr
