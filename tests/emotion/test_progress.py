import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from emotion.training.progress import Progress


def steps_told(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_line_is_json_with_time_phase_and_step(tmp_path: Path) -> None:
    with Progress(tmp_path, "gan", 0, 3) as progress:
        progress.advance(1, loss=0.5)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["phase"], record["step"], record["loss"]) == ("gan", 1, 0.5)
    assert record["time"] > 1.7e9


def test_going_on_cuts_the_file_back_to_the_restored_step(tmp_path: Path) -> None:
    with Progress(tmp_path, "gan", 0, 9) as progress:
        for step in range(1, 6):
            progress.advance(step, loss=1.0)
    with Progress(tmp_path, "gan", 3, 9) as progress:
        progress.advance(4, loss=2.0)
    assert steps_told(tmp_path) == [1, 2, 3, 4]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    with Progress(tmp_path, "gan", 0, 9) as progress:
        progress.advance(1, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1, "pha')
    with Progress(tmp_path, "gan", 5, 9) as progress:
        progress.advance(6, loss=1.0)
    assert steps_told(tmp_path) == [1, 6]


def test_what_is_no_number_is_never_written(tmp_path: Path) -> None:
    with Progress(tmp_path, "gan", 0, 9) as progress:
        progress.advance(1, loss=float("nan"))
        progress.advance(2, loss=float("inf"), rate=1.0)
    (record,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert record.keys() == {"time", "phase", "step", "rate"}


# In a process of its own: the limit holds for whatever it writes.
ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from emotion.training.progress import Progress
folder = Path(sys.argv[1])
with Progress(folder, "gan", 0, 9) as progress:
    progress.advance(1, loss=1.0)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / "metrics.jsonl").stat().st_size + 10, resource.RLIM_INFINITY))
    progress.advance(2, loss=2.0)
    progress.warn("checkpoint", "there is no room")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    progress.advance(3, loss=3.0)
"""


def test_lines_that_a_full_disk_did_not_take_are_written_when_it_does(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", ON_A_FULL_DISK, tmp_path], check=True)
    assert steps_told(tmp_path) == [1, 2, 2, 3]


def test_numbers_are_fetched_about_two_hundred_times_and_at_the_end(tmp_path: Path) -> None:
    with Progress(tmp_path, "gan", 0, 1001) as progress:
        due = [step for step in range(1, 1002) if progress.due(step)]
    assert len(due) == 201
    assert due[-1] == 1001


def test_off_a_terminal_the_end_is_logged_once_with_its_rate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "emotion"), Progress(tmp_path, "vit", 0, 2) as progress:
        progress.advance(1, loss=0.25)
        progress.advance(2, loss=0.125)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith("phase=vit step=2/2 loss=0.125 steps_per_second=")
