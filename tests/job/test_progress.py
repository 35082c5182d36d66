"""progress.json: what the launcher reads about a run."""

import os
import time
from pathlib import Path

import pytest

from emotion.files import write_json
from emotion.training.progress import Progress
from job.run_folder.progress import RunProgress, read_progress, write_progress


def test_a_run_without_a_phase_has_no_progress(tmp_path: Path) -> None:
    assert read_progress(tmp_path) is None
    (tmp_path / "progress.json").write_text("[")
    assert read_progress(tmp_path) is None
    (tmp_path / "progress.json").write_text("[]")
    assert read_progress(tmp_path) is None


def test_steps_are_those_that_the_training_reported(tmp_path: Path) -> None:
    folder = tmp_path / "gan-1234"
    folder.mkdir()
    write_progress(tmp_path, "gan", folder, "running")
    begun = read_progress(tmp_path)
    assert begun is not None
    assert (begun.phase, begun.state, begun.step) == ("gan", "running", None)
    with Progress(folder, "gan", 0, 3) as progress:
        for done in (1, 2, 3):
            progress.advance(done)
    reported = read_progress(tmp_path)
    assert reported is not None
    assert (reported.step, reported.steps) == (3, 3)
    assert reported.steps_per_second is not None
    assert reported.time >= begun.time
    write_progress(tmp_path, "gan", folder, "done")
    done_now = read_progress(tmp_path)
    assert done_now is not None
    assert (done_now.state, done_now.step) == ("done", 3)


def test_a_clock_that_is_set_back_during_a_phase_hides_no_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gan-1234"
    folder.mkdir()
    write_progress(tmp_path, "gan", folder, "running")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 86400)
    with Progress(folder, "gan", 0, 1) as progress:
        progress.advance(1)
    found = read_progress(tmp_path)
    assert found is not None
    assert found.step == 1


def test_what_an_earlier_attempt_reported_does_not_count_as_progress_of_this_one(tmp_path: Path) -> None:
    (tmp_path / "vit-1234").mkdir()
    earlier = {"step": 7, "steps": 9, "steps_per_second": 1.0, "time": time.time() - 60}
    write_json(tmp_path / "vit-1234" / "progress.json", earlier)
    write_progress(tmp_path, "vit", tmp_path / "vit-1234", "running")
    found = read_progress(tmp_path)
    assert found == RunProgress("vit", "running", found.time if found else 0)


def test_a_folder_that_cannot_be_written_to_does_not_end_the_job(tmp_path: Path) -> None:
    write_progress(tmp_path / "missing", "gan", tmp_path / "missing" / "gan-1234", "running")
    assert os.listdir(tmp_path) == []  # noqa: PTH208
