"""The published model/ as a repository of the Hugging Face Hub: its card, and how it is opened."""

import contextlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from emotion.config import DataConfig
from emotion.errors import SpecError
from emotion.files import read_json, write_json
from job.results.manifest import MANIFEST, read_manifest
from job.results.model_card import CARD, DIMENSIONS, METRICS, card_header, write_card
from job.results.publish import is_promised
from job.spec.load import spec_of
from tests.conftest import TinyRun


@pytest.fixture(scope="module")
def card(tiny_run: TinyRun) -> ModelCard:
    return ModelCard.load(tiny_run.published / CARD)


def test_the_hub_reads_every_score(tiny_run: TinyRun, card: ModelCard) -> None:
    metrics = read_json(tiny_run.published / "metrics.json")["model"]
    assert card.data.model_name == tiny_run.run_folder.name
    scores = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert len(scores) == len(card.data.eval_results) == len(DIMENSIONS) * len(METRICS)
    for dimension in DIMENSIONS:
        assert metrics[dimension]["ccc_ci"] is None, "the test songs are of two groups"
        assert scores[f"CCC of {dimension}"] == pytest.approx(metrics[dimension]["ccc"], abs=5e-5)
    assert {(result.dataset_name, result.dataset_split) for result in card.data.eval_results} == {("24 generated songs", "test")}
    assert (card.data.license, card.data.library_name, card.data.datasets) == ("unknown", "timm", ["24-generated-songs"])
    assert "Nobody has stated a licence" in card.text


def test_the_card_says_what_the_records_of_the_run_say(tiny_run: TinyRun, card: ModelCard) -> None:
    manifest = read_manifest(tiny_run.published / MANIFEST, "test")
    for phase, record in manifest.phases.items():
        assert f"| {phase} | {record.measured['seconds']} |" in card.text
    seconds = sum(attempt.duration_seconds or 0 for attempt in manifest.attempts)
    assert f"The run took {seconds:.0f} s in 1 attempt. " in card.text
    assert manifest.artifacts[CARD].size == (tiny_run.published / CARD).stat().st_size
    # Two runs of one spec take different times, and are equal all the same.
    assert not is_promised(CARD)
    assert is_promised("model/model.safetensors")


def test_of_a_linear_probe_the_card_says_that_only_the_last_layer_was_trained(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run.published, tmp_path / "run")
    manifest = read_manifest(run / MANIFEST, "test")
    spec = spec_of({"name": "a", "data": {"source": "generated:24"}, "vit": {"weights": "pretrained"}})
    for more, said in (
        ({}, "weights, on\n"),
        ({"is_linear_probe": True}, "weights, as a linear probe (only its last layer), on\n"),
    ):
        write_json(run / "model" / "training.json", {"best_epoch": 0} | more)
        write_card(run, spec, manifest.phases, manifest.attempts, manifest.code)
        assert said in (run / CARD).read_text()


def header_with(metrics: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return card_header(
        spec_of({"name": "a", "data": DataConfig(source="s3://bucket/My Songs!").model_dump(), **sections}), metrics
    )


def test_the_header_has_intervals_and_no_score_that_is_undefined() -> None:
    undefined = {name: None for metric in METRICS for name in (metric, f"{metric}_ci")}
    assert "model-index" not in header_with({"model": dict.fromkeys(DIMENSIONS, undefined)})
    with_interval = {"valence": undefined, "arousal": undefined | {"ccc": 0.5, "ccc_ci": [0.25, 0.75]}}
    ((result,),) = (entry["results"] for entry in header_with({"model": with_interval})["model-index"])
    assert result["metrics"] == [{"type": "ccc", "value": 0.5, "name": "CCC of arousal, 95 % interval 0.250 to 0.750"}]
    one = {"valence": undefined, "arousal": undefined | {"mae": 0.25}}
    header = header_with({"model": one, "out_of_fold": {}}, artifacts={"license": "cc-by-nc-4.0"})
    ((result,),) = (entry["results"] for entry in header["model-index"])
    assert result["metrics"] == [{"type": "mae", "value": 0.25, "name": "MAE of arousal"}]
    assert result["dataset"] == {"type": "my-songs", "name": "My Songs!", "split": "folds"}
    assert header["license"] == "cc-by-nc-4.0"
    with pytest.raises(SpecError, match=r"artifacts\.license.*such as cc-by-nc-4\.0"):
        header_with({"model": one}, artifacts={"license": "CC BY-NC 4.0"})


@pytest.mark.full
def test_the_example_in_the_card_gives_the_numbers_of_the_evaluation(
    tiny_run: TinyRun, card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """librosa and timm alone, without any code of this project."""
    example = card.text.split("```python\n")[1].split("```")[0]
    row = tiny_run.predictions[0]
    (audio,) = tiny_run.work.glob(f"scratch/stage-*/**/{row['song_id']}.mp3")
    monkeypatch.chdir(tiny_run.published / "model")
    found: dict[str, float] = {}
    exec(example.replace("song.mp3", str(audio)), found)
    for dimension in DIMENSIONS:
        assert found[dimension] == pytest.approx(float(row[f"{dimension}_pred"]), abs=1e-3)


@contextlib.contextmanager
def hub_with(folder: Path, repository: str) -> Iterator[str]:
    """The address of a server that answers as the hub does for the files of one repository."""
    revision = "0" * 40

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            begin = f"/{repository}/resolve/main/"
            path = folder / self.path.removeprefix(begin)
            is_here = self.path.startswith(begin) and path.is_file()
            content = path.read_bytes() if is_here else b""
            self.send_response(200 if is_here else 404)
            if not is_here:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", revision)
            self.send_header("ETag", f'"{len(content)}-{path.name}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.full
def test_timm_opens_the_repository_from_a_hub(tiny_run: TinyRun, tmp_path: Path) -> None:
    program = """
import sys, torch
from emotion.compat import timm
from_hub, from_folder = (timm.create_model(name, pretrained=True).state_dict() for name in sys.argv[1:])
assert from_hub.keys() == from_folder.keys()
assert all(torch.equal(from_hub[name], from_folder[name]) for name in from_hub)
"""
    with hub_with(tiny_run.published / "model", "someone/tiny") as address:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        names = ["hf_hub:someone/tiny", f"local-dir:{tiny_run.published / 'model'}"]
        done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
