"""A job whose ViT begins with weights of a file: its stack learns from embeddings, is published with them, predicts by them."""

import csv
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from emotion.compat import timm
from emotion.files import read_json
from tests.conftest import TINY

pytestmark = pytest.mark.full
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a tiny job of two folds that begins with weights of a file."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(timm.create_model("test_vit", pretrained=False, in_chans=1).state_dict(), path)
    settings = [f"vit.weights={path}", "vit.weights_mel=other", "split.folds=2"]
    return [word for setting in settings for word in ("--set", setting)]


@pytest.fixture(scope="module")
def folds(emotion_job: Command, weights: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The published runs."""
    work = tmp_path_factory.mktemp("work")
    ran = [emotion_job("run", TINY, "--work", work, *weights, "--set", f"split.fold={fold}") for fold in range(2)]
    assert [fold.returncode for fold in ran] == [0, 0], ran[-1].stderr
    return [Path(fold.stdout.strip()) for fold in ran]


def audio_of(published: Path) -> list[Path]:
    return sorted((published.parent.parent / "scratch").rglob("*.mp3"))


def numbers_of(emotion_job: Command, run: Path, *audio: Path) -> list[dict[str, float]]:
    found = emotion_job("predict", run, *audio, "--json")
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


def test_predict_gives_the_numbers_of_the_run(emotion_job: Command, folds: list[Path]) -> None:
    rows = list(csv.DictReader((folds[0] / "predictions.csv").read_text().splitlines()))
    (audio,) = [path for path in audio_of(folds[0]) if path.stem == rows[0]["song_id"]]
    (song,) = numbers_of(emotion_job, folds[0], audio)
    for dimension in ("valence", "arousal"):
        assert song[dimension] == pytest.approx(float(rows[0][f"{dimension}_stack"]), abs=1e-4)


def test_a_linear_probe_is_published_and_reproduced(emotion_job: Command, weights: list[str], tmp_path: Path) -> None:
    probe = ["--set", "vit.epochs=0", "--set", "vit.synthetic_share=0"]
    ran = emotion_job("run", TINY, "--work", tmp_path / "work", *weights, *probe)
    assert ran.returncode == 0, ran.stderr
    published = Path(ran.stdout.strip())
    assert "as a linear probe" in (published / "model" / "README.md").read_text()
    assert "The ViT is a linear probe" in (published / "report.html").read_text()
    again = emotion_job("reproduce", published, "--work", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert "files are equal" in again.stdout + again.stderr
    assert "micro_batch was" not in again.stderr  # no condition differs


def test_without_the_embedder_the_run_is_refused_at_once(emotion_job: Command, folds: list[Path], tmp_path: Path) -> None:
    audio = audio_of(folds[0])[:2]
    for name in ("with manifest", "without"):
        run = shutil.copytree(folds[0], tmp_path / name)
        (run / "model" / "embedder.safetensors").unlink()
        if name == "without":
            (run / "manifest.json").unlink()
        found = emotion_job("predict", run, *audio)
        assert found.returncode == 65, found.stderr
        assert found.stderr.count("embedder.safetensors") == 1
        assert "Traceback" not in found.stderr
    assert emotion_job("predict", run, *audio, "--plain").returncode == 0


def test_a_warm_start_passes_the_embedder_on(emotion_job: Command, folds: list[Path], tmp_path: Path) -> None:
    settings = [f"init_from.run={folds[0]}", "name=warm", "vit.weights=pretrained", "split.folds=2"]
    ran = emotion_job("run", TINY, "--work", tmp_path, *(word for setting in settings for word in ("--set", setting)))
    assert ran.returncode == 0, ran.stderr
    artifacts = [read_json(run / "manifest.json")["artifacts"] for run in (folds[0], Path(ran.stdout.strip()))]
    first, second = (listed["model/embedder.safetensors"]["sha256"] for listed in artifacts)
    assert first == second


def test_the_final_model_has_embeddings_and_so_has_its_evaluation_on_other_songs(
    emotion_job: Command, folds: list[Path], tmp_path: Path
) -> None:
    assert emotion_job("collect", *folds, "--out", tmp_path / "collected").returncode == 0
    ran = emotion_job("run", tmp_path / "collected" / "final.yaml", "--work", tmp_path)
    assert ran.returncode == 0, ran.stderr
    final = Path(ran.stdout.strip())
    assert "model/embedder.safetensors" in read_json(final / "manifest.json")["artifacts"]
    assert len(numbers_of(emotion_job, final, *audio_of(folds[0])[:2])) == 2
    evaluated = emotion_job("evaluate", final, "--data", "generated:30", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert set(json.loads(evaluated.stdout)["baselines"]) == {"ridge", "svr", "boosting"}
