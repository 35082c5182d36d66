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
    """Settings of a tiny job that begins with weights of a file."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(timm.create_model("test_vit", pretrained=False, in_chans=1).state_dict(), path)
    return ["--set", f"vit.weights={path}", "--set", "vit.weights_mel=other"]


@pytest.fixture(scope="module")
def published(emotion_job: Command, weights: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    ran = emotion_job("run", TINY, "--work", work, *weights)
    assert ran.returncode == 0, ran.stderr
    return Path(ran.stdout.strip())


def test_predict_gives_the_numbers_of_the_run(emotion_job: Command, published: Path) -> None:
    rows = list(csv.DictReader((published / "predictions.csv").read_text().splitlines()))
    audio = next((published.parent.parent / "scratch").rglob(f"{rows[0]['song_id']}.mp3"))
    found = emotion_job("predict", published, audio, "--json")
    assert found.returncode == 0, found.stderr
    (song,) = [json.loads(line) for line in found.stdout.splitlines()]
    for dimension in ("valence", "arousal"):
        assert song[dimension] == pytest.approx(float(rows[0][f"{dimension}_stack"]), abs=1e-4)


def test_without_the_embedder_the_run_is_refused(emotion_job: Command, published: Path, tmp_path: Path) -> None:
    audio = next((published.parent.parent / "scratch").rglob("*.mp3"))
    for name in ("with manifest", "without"):
        run = shutil.copytree(published, tmp_path / name)
        (run / "model" / "embedder.safetensors").unlink()
        if name == "without":
            (run / "manifest.json").unlink()
        found = emotion_job("predict", run, audio)
        assert found.returncode == 65, found.stderr
        assert "embedder.safetensors" in found.stderr.splitlines()[-1]
        assert "Traceback" not in found.stderr
    assert emotion_job("predict", run, audio, "--plain").returncode == 0


def test_a_warm_start_passes_the_embedder_on(emotion_job: Command, published: Path, tmp_path: Path) -> None:
    warm = ["--set", f"init_from.run={published}", "--set", "name=warm", "--set", "vit.weights=pretrained"]
    ran = emotion_job("run", TINY, "--work", tmp_path, *warm)
    assert ran.returncode == 0, ran.stderr
    artifacts = [read_json(run / "manifest.json")["artifacts"] for run in (published, Path(ran.stdout.strip()))]
    first, second = (listed["model/embedder.safetensors"]["sha256"] for listed in artifacts)
    assert first == second
