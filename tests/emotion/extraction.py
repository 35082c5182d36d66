"""Small folders of songs for the tests of phase features, and ways to end the process that works on them."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile

from emotion.audio.extract import extract_features
from emotion.audio.song_workers import Workers
from emotion.config import DataConfig
from emotion.data.faults import Fault
from emotion.data.songs import Dataset, Song
from tests.emotion.sounds import SMALL, noise


def song_of(song_id: int, audio: str) -> Song:
    return Song(song_id, song_id / 1e4, -song_id / 1e4, 0.1, 0.2, f"group {song_id % 2}", audio)


def write_songs(root: Path, seconds: list[float]) -> list[Song]:
    songs = []
    for number, length in enumerate(seconds):
        song = song_of(100 - number, f"audio/{number}.wav")
        (root / "audio").mkdir(exist_ok=True)
        soundfile.write(root / song.audio, noise(int(length * 16000), 2, seed=number), 16000)
        songs.append(song)
    return songs


def never() -> bool:
    return False


def extract(
    songs: Sequence[Song],
    root: Path,
    label_faults: Sequence[Fault] = (),
    threads: int = 2,
    should_stop: Callable[[], bool] = never,
    out: str = "out",
    digests: Mapping[str, str] | None = None,
    **data: Any,
) -> list[Fault]:
    config = DataConfig.model_validate({"source": "made", "shortest_seconds": 0.0, **data})
    dataset = Dataset(root, list(songs), list(label_faults), digests or {})
    paths = {"out": root / out, "faults_table": root / "faults.csv"}
    return extract_features(dataset, config, SMALL, **paths, workers=Workers(threads), should_stop=should_stop)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def exit_code_of(attempt: Callable[[], object]) -> int | None:
    """The exit code of a process that makes this attempt."""
    process = multiprocessing.get_context("fork").Process(target=attempt)
    process.start()
    process.join()
    return process.exitcode


def die_at(asked: int, questions: Iterator[int]) -> bool:
    """A should_stop that kills the process when it is asked for the `asked`-th time."""
    if next(questions) == asked:
        os.kill(os.getpid(), signal.SIGKILL)
    return False


def children() -> set[int]:
    """The processes that this one has started and not yet waited for."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(number) for task in tasks for number in task.read_text().split()}
