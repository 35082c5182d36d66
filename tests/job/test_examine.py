"""`check` and `plan` look at the songs with the eyes of the job, before it runs."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from emotion.compat import timm
from emotion.errors import DataError, SpecError
from emotion.vit.model_names import names_in_sources
from emotion.vit.network import architecture_of
from job.pipeline.named_inputs import not_checked, require_named_inputs
from job.spec.load import load_spec
from tests.conftest import TINY

Command = Callable[..., subprocess.CompletedProcess[str]]

HEADER = "song_id,valence_mean,valence_std,arousal_mean,arousal_std\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twenty songs. Their audio is one byte, as nothing here decodes it."""
    root = tmp_path / "songs"
    (root / "audio").mkdir(parents=True)
    (root / "static_annotations_averaged.csv").write_text(HEADER + "".join(f"{i},3,1,4,1\n" for i in range(1, 21)))
    (root / "metadata.csv").write_text("song_id,artist\n1,Ann\n")
    for song_id in range(1, 21):
        (root / f"audio/{song_id}.mp3").write_bytes(b"x")
    return root


def test_check_and_plan_count_the_songs_and_name_what_is_not_used(emotion_job: Command, source: Path, tmp_path: Path) -> None:
    (source / "audio/song_21.mp3").write_bytes(b"x")
    (source / "audio/22.wma").write_bytes(b"x")
    for command in (["check", TINY], ["plan", TINY, "--work", tmp_path / "work"]):
        found = emotion_job(*command, "--set", f"data.source={source}")
        assert (found.returncode, found.stderr) == (0, "")
        assert "data: 20 of 20 songs can be used" in found.stdout
        assert "not used: audio files whose names are no song ids; rename them" in found.stdout
        assert "(1: audio/song_21.mp3)" in found.stdout
        assert "not used: audio files in unsupported formats; convert them to flac or wav (1: audio/22.wma)" in found.stdout
    assert not (tmp_path / "work").exists()


def test_check_refuses_what_the_job_would_refuse(emotion_job: Command, source: Path) -> None:
    (source / "audio/3.mp3").unlink()
    (source / "audio/4.mp3").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    found = emotion_job("check", TINY, "--set", f"data.source={source}")
    assert found.returncode == 65
    assert "valid" not in found.stdout
    assert "data: 2 of 20 songs cannot be used as they are; 2 faults, before any audio is decoded" in found.stderr
    assert "label without audio: song 3, static_annotations_averaged.csv, line 4: expected 3.mp3" in found.stderr
    assert "undecodable audio: song 4, audio/4.mp3: expected audio, found a git-lfs pointer" in found.stderr
    dropped = ["--set", "data.faults=drop", "--set", "data.drop_at_most=0.1"]
    found = emotion_job("check", TINY, "--set", f"data.source={source}", *dropped)
    assert found.returncode == 0
    assert "data: 18 of 20 songs can be used" in found.stdout
    assert "left out: label without audio: song 3" in found.stdout


def test_check_says_where_it_could_not_look(emotion_job: Command) -> None:
    found = emotion_job("check", TINY, "--set", "data.source=s3://bucket/songs", "--set", "vit.weights=s3://bucket/w.pth")
    assert found.returncode == 0
    assert "data: s3://bucket/songs was not looked at; `emotion-job plan` lists it" in found.stdout
    assert "\nnot checked: vit.weights (s3://bucket/w.pth)\n" in found.stdout
    of_the_hub = emotion_job("check", TINY, "--set", "vit.weights=pretrained")
    assert of_the_hub.stdout.endswith("\nnot checked: vit.weights (pretrained, from the hub)\n")
    assert "not checked" not in emotion_job("check", TINY).stdout, "random weights"


def test_check_names_all_files_that_are_not_here(emotion_job: Command, tmp_path: Path) -> None:
    """With the exit code of `run`, and without the word valid."""
    keys = ("data.source", "data.manifest", "vit.weights", "vit.teacher", "split.out_of_fold")
    absent = {key: tmp_path / f"absent-{key}" for key in keys}
    overrides = [f"--set={key}={path}" for key, path in absent.items()]
    found = emotion_job("check", TINY, *overrides, "--set", "split.protocol=all")
    assert (found.returncode, found.stdout) == (65, "")
    lines = found.stderr.splitlines()
    assert len(lines) == len(keys)
    for key, path in absent.items():
        assert any(f"{key}: there is no " in line and str(path) in line for line in lines), key
    for overrides, code, said in [
        ([f"--set=init_from={{run: {tmp_path}, vit: false}}"], 65, f"init_from.run: there is no file {tmp_path}/manifest.json"),
        ([f"--set=checkpoint.mirror={tmp_path / 'absent'}"], 69, "checkpoint.mirror: "),
    ]:
        found = emotion_job("check", TINY, *overrides)
        assert (found.returncode, found.stdout) == (code, "")
        assert said in found.stderr


@pytest.mark.parametrize("key", ["data.manifest", "vit.teacher"])
def test_a_folder_where_a_file_is_needed_is_refused_by_check_and_run(emotion_job: Command, tmp_path: Path, key: str) -> None:
    """Such an input is wrong, and no retry helps."""
    for command in (["check", TINY], ["run", TINY, "--work", tmp_path / "work"]):
        found = emotion_job(*command, "--set", f"{key}={tmp_path}")
        assert found.returncode == 65, found.stderr
        assert f"{key}: {tmp_path} is a folder, expected a file. Name the file." in found.stderr


def test_check_refuses_a_model_that_is_no_vit(emotion_job: Command) -> None:
    found = emotion_job("check", TINY, "--set", "vit.model=resnet18")
    assert (found.returncode, found.stdout) == (64, "")
    assert "vit.model: 'resnet18' is not a vision transformer with patches; try vit_tiny_patch16_224." in found.stderr
    names = names_in_sources()
    for vit in ("vit_tiny_patch16_224", "deit_small_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224", "test_vit"):
        assert names[vit]
        assert architecture_of(vit)


@pytest.mark.full
def test_what_check_takes_for_no_vit_is_none() -> None:
    others = sorted(model for model, may_be_a_vit in names_in_sources().items() if not may_be_a_vit)
    for model in others[::12]:  # all of them would take a minute
        with pytest.raises(SpecError, match="is not a vision transformer"):
            architecture_of(model)


def test_check_knows_the_models_of_timm_without_importing_it(emotion_job: Command) -> None:
    found = emotion_job("check", TINY, "--set", "vit.model=vit_tiny_patch16_223")
    assert (found.returncode, found.stdout) == (64, "")
    assert "knows no model 'vit_tiny_patch16_223'; did you mean vit_tiny_patch16_224" in found.stderr
    found = emotion_job("check", TINY, "--set", "vit.weights=augreg_in21k")
    assert (found.returncode, found.stdout) == (64, "")
    assert "is not a weights tag of vit.model 'test_vit'" in found.stderr
    assert {*names_in_sources()} == {*timm.list_models()}
    spec = load_spec(TINY, ["vit.model=vit_tiny_patch16_223"])
    require_named_inputs(spec, {})
    assert not_checked(spec, ()) == "not checked: vit.model, as timm is not installed here"


def test_an_annex_without_content_is_called_one(emotion_job: Command, source: Path) -> None:
    for song_id in range(1, 21):
        (source / f"audio/{song_id}.mp3").unlink()
        (source / f"audio/{song_id}.mp3").symlink_to(f"../.git/annex/objects/a/{song_id}/MD5E-s9--00.mp3")
    found = emotion_job("check", TINY, "--set", f"data.source={source}")
    assert found.returncode == 65
    assert "links to content that is absent (git-annex or datalad); run `git annex get` there (20: audio/1.mp3" in found.stderr


def test_weights_that_are_absent_are_named(tmp_path: Path) -> None:
    annexed, moved, empty = tmp_path / "w.pth", tmp_path / "moved", tmp_path / "empty"
    annexed.symlink_to(".git/annex/objects/w.pth")
    moved.symlink_to(tmp_path / "gone")
    empty.mkdir()
    for weights, words in [
        (tmp_path / "absent.pth", "there is no file .*/absent.pth"),
        (tmp_path / "absent", "there is no file .*/absent/model.safetensors"),
        (annexed, r"is a link to \.git/annex/objects/w\.pth, which is not here"),
        (moved, "there is no file .*/moved/model.safetensors"),
        (empty, "there is no file .*/empty/model.safetensors"),
    ]:
        with pytest.raises(DataError, match=f"^vit.weights: .*{words}"):
            require_named_inputs(load_spec(TINY, [f"vit.weights={weights}"]), {})
