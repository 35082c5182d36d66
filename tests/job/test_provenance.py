"""The manifest's records of where a run comes from, each compared with an answer that is known without our code."""

import hashlib
import importlib.machinery
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emotion.proc import nvidia_driver
from job.environment import ALLOCATOR_VARIABLES, allocator_setting
from job.pipeline.context import PhaseContext
from job.pipeline.phase_functions import note_conditions
from job.results.provenance import (
    attempt_records,
    code_record,
    container_details,
    git_state,
    input_digests,
    seeds_of,
    software_conditions,
    source_sha256,
    torch_details,
)
from job.run_folder.conditions import comparable_conditions, read_conditions, record_conditions
from job.spec.load import load_spec
from tests.conftest import TINY, TinyRun
from tests.emotion.tape import Tapes

# Code


@pytest.fixture
def checkout(tmp_path: Path, component: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout with both packages and one commit."""
    component("git")
    monkeypatch.delenv("EMOTION_REVISION", raising=False)
    root = tmp_path / "checkout"
    for package in ("emotion", "job"):
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").write_text("")
    (root / "README.md").write_text("as it was\n")
    (root / ".gitignore").write_text("*.log\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "-c", "user.name=n", "-c", "user.email=e@x", "commit", "--quiet", "--message", "all")
    return root


def git(root: Path, *arguments: str) -> str:
    found = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def test_a_clean_checkout_has_a_revision_and_nothing_uncommitted(checkout: Path) -> None:
    assert git_state(checkout) == (git(checkout, "rev-parse", "HEAD"), None)


def test_uncommitted_changes_have_a_digest_of_names_and_contents(checkout: Path) -> None:
    (checkout / "README.md").write_text("changed\n")
    (checkout / "job" / "new.py").write_text("x = 1\n")
    (checkout / "emotion" / "__init__.py").unlink()
    contents = {"README.md": b"changed\n", "job/new.py": b"x = 1\n"}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    text = json.dumps({**digests, "emotion/__init__.py": None}, sort_keys=True, separators=(",", ":"))
    found = code_record(checkout)
    assert found.revision == git(checkout, "rev-parse", "HEAD")
    assert found.uncommitted_sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_ignored_files_and_new_files_outside_the_packages_do_not_count_as_uncommitted(checkout: Path) -> None:
    (checkout / "job" / "job.log").write_text("ignored")
    (checkout / "notes.txt").write_text("not ours")
    assert code_record(checkout).uncommitted_sha256 is None


def test_a_staged_change_counts_until_it_is_reset(checkout: Path) -> None:
    (checkout / "job" / "__init__.py").write_text("x = 1\n")
    git(checkout, "add", ".")
    staged = code_record(checkout).uncommitted_sha256
    assert staged is not None
    git(checkout, "reset", "--quiet", "--hard")
    assert code_record(checkout).uncommitted_sha256 is None


def test_diff_settings_of_the_user_do_not_change_the_digest(checkout: Path) -> None:
    (checkout / "README.md").write_text("changed\n")
    before = code_record(checkout)
    for setting in ("diff.noprefix", "color.ui", "diff.renames"):
        git(checkout, "config", setting, "always" if setting == "color.ui" else "true")
    assert code_record(checkout) == before


def test_packages_installed_inside_the_checkout_of_another_project_have_no_revision(checkout: Path) -> None:
    installed = checkout / "venv"
    for package in ("emotion", "job"):
        (installed / package).mkdir(parents=True)
        (installed / package / "__init__.py").write_text("")
    assert git_state(installed) is None
    assert code_record(installed).revision is None


def test_only_the_folder_with_the_packages_counts_in_a_larger_checkout(checkout: Path) -> None:
    inner = checkout / "inner"
    for package in ("emotion", "job"):
        (inner / package).mkdir(parents=True)
        (inner / package / "__init__.py").write_text("")
    git(checkout, "add", ".")
    git(checkout, "-c", "user.name=n", "-c", "user.email=e@x", "commit", "--quiet", "--message", "inner")
    (checkout / "README.md").write_text("changed\n")
    assert git_state(inner) == (git(checkout, "rev-parse", "HEAD"), None)


def test_without_git_there_is_no_revision(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(checkout) is None
    assert code_record(checkout).revision is None


def test_a_git_that_hangs_times_out(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("job.results.provenance.GIT_SECONDS", 0.1)
    assert git_state(checkout) is None


def test_a_damaged_checkout_has_no_revision(checkout: Path) -> None:
    (checkout / ".git" / "HEAD").write_text("nonsense")
    assert git_state(checkout) is None


def test_git_variables_of_a_hook_in_another_repository_are_ignored(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = git(checkout, "rev-parse", "HEAD")
    git(tmp_path, "init", "--quiet", "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert git_state(checkout) == (revision, None)


def test_an_image_may_set_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMOTION_REVISION", "abc123")
    assert code_record(tmp_path).revision == "abc123"


def test_a_checkout_that_is_not_installed_says_so_instead_of_a_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_record(tmp_path).version == importlib.metadata.version("emotion-job")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [importlib.machinery.PathFinder])
    assert code_record(tmp_path).version == "not installed"


def test_the_digest_of_the_sources_covers_python_and_templates_only(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "a.py").write_text("1")
    (tmp_path / "job" / "b.jinja").write_text("2")
    (tmp_path / "job" / "c.pyc").write_text("3")
    one, two = hashlib.sha256(b"1").hexdigest(), hashlib.sha256(b"2").hexdigest()
    expected = hashlib.sha256(f"job/a.py\0{one}\njob/b.jinja\0{two}\n".encode()).hexdigest()
    assert source_sha256(tmp_path) == expected


# Machine and container


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build\n", "570.124.06"),
        ("something else\n", None),
    ],
)
def test_the_driver_version_is_read_from_both_formats(tmp_path: Path, text: str, expected: str | None) -> None:
    (tmp_path / "version").write_text(text)
    assert nvidia_driver(tmp_path / "version") == expected
    assert nvidia_driver(tmp_path / "absent") is None


@pytest.fixture
def no_container(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{engine}_{key}" for engine in ("APPTAINER", "SINGULARITY") for key in ("NAME", "CONTAINER")]
    for name in (*names, "KUBERNETES_SERVICE_HOST", "EMOTION_IMAGE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_container")
def test_each_kind_of_container_is_recognised_by_its_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert container_details(tmp_path) is None
    (tmp_path / ".dockerenv").write_text("")
    docker = container_details(tmp_path)
    assert docker is not None
    assert (docker["kind"], docker["image"]) == ("docker", None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".containerenv").write_text('engine="podman-5"\nname="quiet_bell"\nimageid="0123abcd"\n')
    assert container_details(tmp_path) == {"kind": "podman", "name": "quiet_bell", "image": "0123abcd"}
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("EMOTION_IMAGE", "registry/emotion@sha256:12")
    kubernetes = container_details(tmp_path)
    assert kubernetes is not None
    assert (kubernetes["kind"], kubernetes["image"]) == ("kubernetes", "registry/emotion@sha256:12")


@pytest.mark.usefixtures("no_container")
def test_apptainer_gives_the_file_of_the_image_unless_the_image_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".singularity.d").mkdir()
    assert container_details(tmp_path) == {"kind": "apptainer", "name": None, "image": None}
    monkeypatch.setenv("APPTAINER_NAME", "emotion.sif")
    monkeypatch.setenv("APPTAINER_CONTAINER", "/images/emotion.sif")
    assert container_details(tmp_path) == {"kind": "apptainer", "name": "emotion.sif", "image": "/images/emotion.sif"}
    monkeypatch.setenv("EMOTION_IMAGE", "registry/emotion@sha256:12")
    assert container_details(tmp_path) == {"kind": "apptainer", "name": "emotion.sif", "image": "registry/emotion@sha256:12"}


def test_the_build_of_torch_is_recorded_without_compiler_flags() -> None:
    import torch

    found = torch_details()
    assert found["git_version"] == torch.version.git_version
    assert any("OpenMP" in line for line in found["build"])
    assert "CXX_FLAGS" not in json.dumps(found)


# Inputs, seeds, attempts


def test_every_input_has_the_key_of_the_spec_in_its_name(tmp_path: Path) -> None:
    outputs = {"songs.csv": {"sha256": "1"}, "audio/2.mp3": {"sha256": "2"}}
    (tmp_path / "receipt.json").write_text(json.dumps({"outputs": outputs}))
    assert input_digests(tmp_path, {"split.lists/train.txt": "3"}, "4") == {
        "data.source/songs.csv": "1",
        "data.source/audio/2.mp3": "2",
        "split.lists/train.txt": "3",
        "vit.weights": "4",
    }
    assert "vit.weights" not in input_digests(tmp_path, {}, None)


def test_the_seed_of_generated_songs_is_recorded_only_where_songs_are_generated(tmp_path: Path) -> None:
    spec = load_spec(TINY, ["seed=7", "split.seed=3"])
    assert seeds_of(spec) == {"seed": 7, "split.seed": 3, "generated": 0}
    assert seeds_of(load_spec(TINY, [f"data.source={tmp_path}"])) == {"seed": 0, "split.seed": 0}


def test_each_attempt_is_one_record_and_one_without_an_end_was_killed() -> None:
    def start(attempt: int, time: float, host: str) -> dict[str, Any]:
        monotonic = time + 5000
        return {"event": "start", "attempt": attempt, "time": time, "host": host, "pid": 10, "left": "x", "monotonic": monotonic}

    # The clock was set back by a day meanwhile.
    ended = {"time": 160.5 - 86400, "seconds": 60.5}
    end = {"event": "end", "attempt": 1, **ended, "reason": "Interrupted", "exit_code": 75, "message": "stopped"}
    records = attempt_records([start(1, 0.0, "a"), start(1, 100.0, "b"), end, start(2, 200.0, "b")], now=5230.0)
    assert [record.model_dump(exclude_unset=True) for record in records] == [
        {
            "attempt": 1,
            "host": "a",
            "pid": 10,
            "began": "1970-01-01T00:00:00+00:00",
            "duration_seconds": None,
            "reason": "killed",
            "exit_code": None,
        },
        {
            "attempt": 1,
            "host": "b",
            "pid": 10,
            "began": "1970-01-01T00:01:40+00:00",
            "duration_seconds": 60.5,
            "reason": "Interrupted",
            "exit_code": 75,
            "message": "stopped",
        },
        {
            "attempt": 2,
            "host": "b",
            "pid": 10,
            "began": "1970-01-01T00:03:20+00:00",
            "duration_seconds": 30.0,
            "reason": "publishing",
            "exit_code": None,
        },
    ]


# What makes bytes comparable


def test_different_conditions_of_several_attempts_are_kept_in_order(tmp_path: Path) -> None:
    record_conditions(tmp_path, {"threads": 1, "precision": "fp32"})
    record_conditions(tmp_path, {"threads": 2, "precision": "fp32"})
    record_conditions(tmp_path, {"threads": 1, "cpu": "AVX2"})
    assert read_conditions(tmp_path) == {"threads": [1, 2], "precision": ["fp32"], "cpu": ["AVX2"]}


def test_a_condition_that_changed_has_all_its_values() -> None:
    noted = {
        "gan": {"libraries.torch": ["1"], "threads": [1, 2]},
        "vit": {"libraries.torch": ["1", "2"], "threads": [2], "micro_batch": [5]},
    }
    assert comparable_conditions(noted) == {
        "libraries.torch": ["1", "2"],
        "gan.threads": [1, 2],
        "vit.threads": 2,
        "vit.micro_batch": 5,
    }


def test_whether_steps_were_cuda_graphs_is_a_condition_of_a_training_on_a_gpu(tmp_path: Path) -> None:
    """A resumed training may have failed to make graphs that it had before."""

    def train(folder: str, graphs: Tapes | None) -> dict[str, list[Any]]:
        out = tmp_path / folder
        out.mkdir(exist_ok=True)
        context = PhaseContext(None, None, {}, out, tmp_path, lambda: False, memory={"micro_batches": [4]})
        context.graphs = graphs
        note_conditions(context)
        return read_conditions(out)

    graphs = Tapes()
    assert train("gpu", graphs) == {"micro_batch": [4], "cuda_graphs": [True]}
    graphs.failure = "operation not permitted when stream is capturing"
    assert train("gpu", graphs) == {"micro_batch": [4], "cuda_graphs": [True, False]}
    assert train("cpu", None) == {"micro_batch": [4]}
    assert comparable_conditions({"gan": read_conditions(tmp_path / "gpu")})["gan.cuda_graphs"] == [True, False]


@pytest.mark.parametrize("content", ["", "[]", "null", '{"threads": 1}', "[" * 100_000])
def test_damaged_conditions_are_lost_with_a_warning(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".conditions.json").write_text(content)
    record_conditions(tmp_path, {"threads": 2})
    assert read_conditions(tmp_path) == {"threads": [2]}
    assert "conditions.json is damaged" in caplog.text


def test_the_micro_batch_of_a_training_without_steps_is_a_condition(tmp_path: Path) -> None:
    memory = {"micro_batch": 3, "micro_batches": []}  # a linear probe, whose forward passes have this size
    context = PhaseContext(None, None, {}, tmp_path, tmp_path, lambda: False, memory=memory)
    context.graphs = None
    note_conditions(context)
    assert read_conditions(tmp_path) == {"micro_batch": [3]}


def test_the_manifest_records_the_conditions_of_each_phase(tiny_run: TinyRun) -> None:
    manifest = json.loads((tiny_run.published / "manifest.json").read_text())
    found = manifest["comparable"]
    assert found.items() >= software_conditions().items()
    assert {name: found[name] for name in ("gan.threads", "gan.micro_batch", "vit.micro_batch", "gan.kind")} == {
        "gan.threads": 1,
        "gan.micro_batch": 4,
        "vit.micro_batch": 5,
        "gan.kind": "cpu",
    }
    assert found["evaluate.precision"] == "fp32"


def test_the_manifest_has_the_digest_of_every_staged_file(tiny_run: TinyRun) -> None:
    manifest = json.loads((tiny_run.published / "manifest.json").read_text())
    staged = tiny_run.phase("stage")
    files = [path for path in staged.rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert manifest["inputs"] == {
        f"data.source/{path.relative_to(staged).as_posix()}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "receipt.json"
    }


@pytest.mark.usefixtures("no_container")
def test_variables_that_are_not_utf8_are_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read after all the work is done: manifest and report are UTF-8, and would end the run."""
    for name in ("EMOTION_REVISION", "EMOTION_IMAGE", "APPTAINER_NAME", *ALLOCATOR_VARIABLES):
        monkeypatch.setenv(name, os.fsdecode(b"caf\xe9"))
    assert container_details(tmp_path) == {"kind": "apptainer", "name": r"caf\udce9", "image": r"caf\udce9"}
    assert code_record(tmp_path).revision == r"caf\udce9"
    assert allocator_setting() == dict.fromkeys(ALLOCATOR_VARIABLES, r"caf\udce9")
