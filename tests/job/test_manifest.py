"""The model of manifest.json: what it accepts, what it writes, how it verifies files."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from emotion.errors import DataError
from emotion.files import read_json
from job.results.manifest import MANIFEST, Manifest, read_manifest, verified_manifest
from job.spec.load import load_spec
from job.spec.model import to_yaml
from job.storage.local_folder import LocalFolder
from tests.conftest import SECRET, TINY, TinyRun
from tests.manifests import MINIMAL, manifest_with, write_manifest

KEYS = {
    "allocator": ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"],
    "artifacts": None,
    "attempts": None,
    "code": ["revision", "source_sha256", "uncommitted_sha256", "version"],
    "comparable": None,
    "container": None,
    "fingerprint": None,
    "init_from": None,
    "inputs": None,
    "left_out": None,
    "libraries": None,
    "manifest_version": None,
    "name": None,
    "phases": ["evaluate", "features", "gan", "quality", "split", "stack", "stage", "synth", "vit"],
    "platform": ["cpu_model", "kernel", "libc", "machine", "nvidia_driver", "system"],
    "python": None,
    "seeds": ["generated", "seed", "split.seed"],
    "spec": None,
    "torch": ["build", "cpu_capability", "cuda", "cudnn", "git_version", "parallel"],
    "warnings": None,
}
"""Of manifest version 1: key → keys of its value."""


def test_a_published_manifest_has_the_keys_of_its_version_in_order(tiny_run: TinyRun) -> None:
    record = read_json(tiny_run.published / MANIFEST)
    assert record["manifest_version"] == 1
    assert list(record) == list(KEYS)
    for key, expected in KEYS.items():
        assert expected is None or list(record[key]) == expected
    assert list(record["artifacts"]["metrics.json"]) == ["sha256", "size"]
    for phase in record["phases"].values():
        assert list(phase) == ["inputs", "key", "measured", "notes", "outputs_sha256"]
    (attempt,) = record["attempts"]
    assert list(attempt) == ["attempt", "began", "duration_seconds", "exit_code", "host", "pid", "reason"]


def test_reading_and_writing_a_manifest_changes_no_byte(tiny_run: TinyRun, tmp_path: Path) -> None:
    read_manifest(tiny_run.published / MANIFEST, "test").write(tmp_path / MANIFEST)
    assert (tmp_path / MANIFEST).read_bytes() == (tiny_run.published / MANIFEST).read_bytes()


def test_unknown_keys_of_a_later_version_are_ignored() -> None:
    later = MINIMAL | {"new": 1, "artifacts": {"a": {"size": 1, "sha256": "0", "mode": 7}}}
    assert Manifest.model_validate_json(json.dumps(later)) == manifest_with(artifacts={"a": {"size": 1, "sha256": "0"}})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "Invalid JSON"),
        (b'{"manifest_version": 1', "Invalid JSON"),
        (b"\xff\xfe", "Invalid JSON"),
        (b"[]", "Input should be an object"),
        (b"{}", "manifest_version: Field required"),
        ({"manifest_version": 2}, "manifest_version: Input should be 1"),
        ({"artifacts": {"metrics.json": "34"}}, r"artifacts\.metrics\.json: "),
        ({"artifacts": {"metrics.json": {"size": 1, "sha256": 34}}}, r"artifacts\.metrics\.json\.sha256: .* string"),
        ({"inputs": {"data.source/songs.csv": 1}}, r"inputs\.data\.source/songs\.csv: .* string"),
        ({"code": {}}, r"code\.version: Field required"),
        ({"spec": []}, "spec: "),
    ],
)
def test_a_damaged_or_foreign_manifest_is_one_line_with_the_place(
    tmp_path: Path, content: bytes | dict[str, Any], problem: str
) -> None:
    path = tmp_path / MANIFEST
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(MINIMAL | content).encode())
    with pytest.raises(DataError, match=rf"^test: {path} is not a manifest .*\({problem}[^\n]*$"):
        read_manifest(path, "test")


def test_a_missing_manifest_is_refused_with_advice(tmp_path: Path) -> None:
    for path in (tmp_path / MANIFEST, tmp_path / "absent" / MANIFEST):
        with pytest.raises(DataError, match=f"^init_from: there is no {path}. Expected a published run"):
            read_manifest(path, "init_from")


@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize("destination", [None, "folder", "s3://bucket/prefix"])
def test_for_a_work_folder_the_published_one_is_named_or_what_publishes_it(
    tmp_path: Path, destination: str | None, is_done: bool
) -> None:
    run = tmp_path / "work" / "tiny-0"
    where = {None: tmp_path / "work" / "published", "folder": tmp_path / "folder"}.get(destination)
    (run / "publish-0").mkdir(parents=True)
    (run / "attempts.jsonl").touch()
    given = [] if destination is None else [f"artifacts.destination={where or destination}"]
    (run / "spec.yaml").write_text(to_yaml(load_spec(TINY, given)))
    if is_done and where is not None:
        (where / "tiny-0").mkdir(parents=True)
        write_manifest(where / "tiny-0")
    elif is_done:
        (run / "publish-0" / "receipt.json").touch()
    expected = (
        f"{run} is the work folder of a run, whose result is in {where or destination}/tiny-0: name that."
        if is_done
        else f"not published yet: `emotion-job run {run}/spec.yaml --work {tmp_path}/work` resumes it, and prints the folder"
    )
    for path in (run, run / "publish-0"):
        with pytest.raises(DataError, match=f"^reproduce: there is no {path}/manifest.json.*{re.escape(expected)}"):
            read_manifest(path / MANIFEST, "reproduce")


def test_artifacts_that_are_missing_or_differ_are_named(tmp_path: Path) -> None:
    for name in ("same", "longer", "altered", "absent"):
        (tmp_path / name).write_text(name)
    manifest, folder = read_manifest(write_manifest(tmp_path) / MANIFEST, "test"), LocalFolder(tmp_path)
    assert manifest.changed(folder) == []
    (tmp_path / "longer").write_text("longer than it was")
    (tmp_path / "altered").write_text("ALTERED")
    (tmp_path / "absent").unlink()
    assert manifest.changed(folder) == ["absent", "altered", "longer"]
    assert manifest.changed(folder, ["same", "altered", "not listed"]) == ["altered", "not listed"]
    assert manifest.problem(folder) == "absent is missing, altered, longer differ from manifest.json"
    assert manifest.problem(folder, ["same"]) == ""


def test_a_model_is_verified_only_against_the_manifest_beside_it(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run.published, tmp_path / "run"))
    (run / "report.html").write_text("changed")
    verified_manifest(run)
    verified_manifest(run / "model")
    (run / "model" / "config.json").write_text("{}")
    for model in (run, run / "model"):
        with pytest.raises(DataError, match=r"model: .*model/config\.json differs from manifest\.json"):
            verified_manifest(model)
    (run / MANIFEST).write_text("{}")
    with pytest.raises(DataError, match=r"model: .* is not a manifest"):
        verified_manifest(run / "model")
    (run / MANIFEST).unlink()
    verified_manifest(run / "model")


def test_a_written_manifest_has_no_password(tmp_path: Path) -> None:
    attempt = {"attempt": 1, "host": "a", "pid": 1, "began": "", "duration_seconds": None, "reason": "killed"}
    message = "https://me:hush@host: denied"
    manifest = manifest_with(
        attempts=[{**attempt, "exit_code": None, "message": message}], spec={"data": {"source": "s3://key:hush@bucket/songs"}}
    )
    manifest.write(tmp_path / MANIFEST)
    assert "hush" not in (tmp_path / MANIFEST).read_text()


def test_no_other_variable_of_the_environment_gets_into_the_manifest(tiny_run: TinyRun) -> None:
    assert SECRET not in (tiny_run.published / MANIFEST).read_text()
