"""The processes that decode songs do not get the stop signals of the job, however these are sent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.conftest import TINY

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP)

# Handles every stop signal and continues, so its workers must live on, too.
PROGRAM = """
import sys
from pathlib import Path
from emotion.audio import song_workers
from emotion.audio.extract import extract_features
from emotion.config import DataConfig, MelConfig
from emotion.data.songs import Dataset, Song
from job.entry import stop_signals_held
from job.preemption import StopRequest

song_workers.SONGS_PER_WORKER = 1
folder, questions = Path(sys.argv[1]), 0
songs = [Song(number, 0.0, 0.0, 0.1, 0.1, "", f"{number}.wav") for number in range(8)]
mel = MelConfig(sample_rate_hz=8000, window_samples=256, hop_samples=128, mels=16, fmax_hz=4000.0)

def should_stop():
    global questions
    questions += 1
    if questions == 3:
        print("ready", flush=True)
        sys.stdin.readline()
        assert request(), "no signal arrived"
    return False

with StopRequest() as request:
    extract_features(
        Dataset(folder, songs, []), DataConfig(source="made", shortest_seconds=0.0), mel, out=folder / "out",
        faults_table=folder / "faults.csv", workers=song_workers.Workers(2, stop_signals_held), should_stop=should_stop,
    )
print("all songs")
"""


def test_signals_to_the_whole_process_group_end_no_worker(tmp_path: Path) -> None:
    for number in range(8):
        soundfile.write(tmp_path / f"{number}.wav", np.random.default_rng(number).uniform(-0.3, 0.3, 1600), 8000)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for number in NUMBERS:
            os.killpg(process.pid, number)
        printed, said = process.communicate("\n")
    assert (process.returncode, printed) == (0, "all songs\n"), said


@pytest.mark.full
def test_a_job_whose_processes_all_get_sigterm_ends_with_75_and_resumes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "job", "run", str(TINY), "--work", str(tmp_path), "--until", "features"]
    command += ["--set", "data.source=generated:100", "--set", "device.threads=2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "phase=features begins" in line:
                break
        while process.poll() is None and not workers_of(process.pid):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGTERM)
        rest = process.stderr.read()
    assert process.returncode == 75, rest
    assert "the process that decoded" not in rest
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr


def workers_of(process: int) -> list[str]:
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [number for task in tasks for number in task.read_text().split()]
