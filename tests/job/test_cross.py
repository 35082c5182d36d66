"""`emotion-job evaluate`: a published run on the songs of another dataset."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from emotion.errors import DataError, SpecError
from emotion.files import read_json
from job.preemption import StopRequest
from job.results.cross import as_text, evaluate_run
from tests.conftest import TinyRun

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.full
def test_on_its_own_dataset_a_run_gets_the_scores_of_its_test_songs(tiny_run: TinyRun, tmp_path: Path) -> None:
    found = evaluate_run(str(tiny_run.published), "generated:24", None, tmp_path, StopRequest())
    metrics = read_json(tiny_run.published / "metrics.json")
    # By the audio: it has no split to look at. Training and validation songs are known to the run.
    assert found["songs"] == metrics["songs"]["test"] == 6
    assert len(found["seen_by_the_run"]) == 18
    for name in ("stack", "model"):
        assert found[name] == metrics[name]
    assert found["baselines"] == {name: metrics["baselines"][name] for name in ("ridge", "svr", "boosting")}
    text = as_text(found)
    assert "18 songs that the run has seen: " in text
    assert [line.split()[1] for line in text.splitlines()[-5:]] == ["stack", "ViT", "ridge", "svr", "boosting"]


def test_another_collection_is_scored_on_its_own_scale_without_its_faults(
    tiny_run: TinyRun, tmp_path: Path, emotion_job: Command
) -> None:
    songs = tmp_path / "songs"
    songs.mkdir()
    rows = ["file,valence,arousal"]
    for number in range(20):
        soundfile.write(songs / f"{number}.wav", np.random.default_rng(number).normal(0, 0.01 * (number + 1), 6 * 8000), 8000)
        rows.append(f"{number}.wav,{5 * number},{100 - 5 * number}")
    (songs / "songs.csv").write_text("\n".join([*rows, "absent.wav,50,50"]) + "\n", encoding="utf-8")
    done = emotion_job("evaluate", tiny_run.published, "--data", songs, "--scale", "0", "100", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["songs"], found["seen_by_the_run"]) == (20, [])
    assert found["run"] == tiny_run.published.name
    assert found["scale"].startswith("labels on -1..1, (x - 50) / 50 of 0..100;")
    assert len(found["left_out"]) == 1
    assert "absent.wav" in found["left_out"][0]
    assert "phase=" not in done.stderr
    assert "faults.csv" not in done.stderr
    (tmp_path / "a").mkdir()
    with pytest.raises(SpecError, match=r"^--scale: .* does not say on which scale .* such as --scale 1 9 or --scale -1 1\."):
        evaluate_run(str(tiny_run.published), str(songs), None, tmp_path / "a", StopRequest())


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_many_faults_are_refused_in_one_line_that_asks_for_the_scale(
    tiny_run: TinyRun, tmp_path: Path, emotion_job: Command, as_json: tuple[str, ...]
) -> None:
    """Otherwise the songs that are left would have been selected by their labels."""
    for number in range(30):
        (tmp_path / f"{number}.wav").touch()
    rows = [f"{number}.wav,{3 if number < 5 else 7},{3 if number < 5 else 2}" for number in range(30)]
    (tmp_path / "songs.csv").write_text("\n".join(["file,valence,arousal,group", *(f"{row},x" for row in rows)]) + "\n")
    done = emotion_job("evaluate", tiny_run.published, "--data", tmp_path, "--scale", "1", "5", *as_json)
    assert (done.returncode, done.stdout) == (65, "")
    assert done.stderr == (
        f"emotion-job: evaluate: 25 of 30 songs of {tmp_path} cannot be used, and at most 1 may be left out; the first: label: "
        "song 5.wav, songs.csv, line 7: valence is '7', expected 1..5 (--scale). 25 songs have ratings outside of --scale 1 5. "
        "Is that the scale of the raters?\n"
    )


def test_much_unfit_audio_is_refused_in_one_line(tiny_run: TinyRun, tmp_path: Path) -> None:
    songs, temporary = tmp_path / "songs", tmp_path / "temporary"
    songs.mkdir()
    temporary.mkdir()
    for number in range(4):
        soundfile.write(songs / f"{number}.wav", np.random.default_rng(number).normal(0, 0.1, 6 * 8000 if number else 80), 8000)
    (songs / "songs.csv").write_text("file,valence,arousal\n" + "".join(f"{number}.wav,3,4\n" for number in range(4)))
    with pytest.raises(
        DataError, match=r"^evaluate: 1 of 4 songs .* at most 0 may be left out; the first: .*0\.wav.* Correct them"
    ) as error:
        evaluate_run(str(tiny_run.published), str(songs), (1, 9), temporary, StopRequest())
    assert "\n" not in str(error.value)
    assert str(temporary) not in str(error.value)


def test_a_run_whose_list_of_seen_songs_was_changed_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run.published, tmp_path / "run")
    (run / "model" / "seen_songs.txt").write_text("nobody\n")
    with pytest.raises(DataError, match=r"model/seen_songs\.txt differs from manifest\.json"):
        evaluate_run(str(run), "generated:24", None, tmp_path, StopRequest())


def test_a_source_that_cannot_be_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^--data: expected generated:N with N from 12"):
        evaluate_run(str(tiny_run.published), "generated:5", None, tmp_path, StopRequest())
    with pytest.raises(DataError, match="nowhere: no such folder"):
        evaluate_run(str(tiny_run.published), str(tmp_path / "nowhere"), None, tmp_path, StopRequest())


def test_a_work_folder_is_answered_with_the_published_run(tiny_run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tiny_run.run_folder} is the work folder of a run"):
        evaluate_run(str(tiny_run.run_folder), "generated:24", None, tmp_path, StopRequest())
