"""Songs decoded in processes of their own: the same bytes, and what happens when one of the processes dies."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import soundfile

from emotion.audio.mel import LogMel
from emotion.audio.song_workers import MOST_WORKERS, SONGS_PER_WORKER, SongDecoders, Workers
from emotion.data.songs import Song
from emotion.errors import EmotionError, Interrupted, LimitError, ModelError
from emotion.proc import read_field
from tests.emotion.extraction import children, die_at, exit_code_of, extract, files_of, write_songs
from tests.emotion.sounds import SMALL, noise


@pytest.fixture
def in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Songs are decoded in processes of their own, however few there are."""
    monkeypatch.setattr("emotion.audio.song_workers.SONGS_PER_WORKER", 1)


def odd_songs(root: Path) -> list[Song]:
    """Seven songs: number 1 is a web page, 3 a copy of 0, 4 an mp3 that was cut, 5 longer than its header says, 6 is absent."""
    songs = write_songs(root, [0.3, 0.1, 0.2, 0.1, 2.0, 0.5, 0.1])
    audio = root / "audio"
    (audio / "1.wav").write_text("<html>")
    shutil.copy(audio / "0.wav", audio / "3.wav")
    soundfile.write(audio / "4.wav", noise(32000, seed=4), 16000, format="MP3")
    (audio / "4.wav").write_bytes((audio / "4.wav").read_bytes()[:4000])
    soundfile.write(audio / "5.wav", noise(8000, seed=5), 8000, format="FLAC")
    flac = bytearray((audio / "5.wav").read_bytes())
    flac[22:26] = (4000).to_bytes(4, "big")  # of the 36 bits of the length
    (audio / "5.wav").write_bytes(flac)
    (audio / "6.wav").unlink()
    return songs


def test_songs_faults_and_log_are_those_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    songs, before = odd_songs(tmp_path), children()
    started: set[int] = set()
    threads_of_workers: set[str | None] = set()

    def watch() -> bool:
        started.update(children() - before)
        threads_of_workers.update(read_field(Path(f"/proc/{worker}/status"), "Threads") for worker in children() - before)
        return False

    found = []
    for songs_per_worker in (100, 1):
        monkeypatch.setattr("emotion.audio.song_workers.SONGS_PER_WORKER", songs_per_worker)
        with caplog.at_level(logging.INFO):
            faults = extract(songs, tmp_path, should_stop=watch, out=str(songs_per_worker), faults="drop", drop_at_most=0.9)
        assert len(started) == (2 if songs_per_worker == 1 else 0)
        found.append(
            (faults, (tmp_path / "faults.csv").read_bytes(), files_of(tmp_path / str(songs_per_worker)), sorted(caplog.messages))
        )
        caplog.clear()
    assert found[0] == found[1]
    faults, _, files, messages = found[1]
    assert [fault.song_id for fault in faults] == [99, 97, 94]
    assert len(files) == 5
    assert f"{tmp_path}/audio/5.wav: its header announces 4000 samples, but 8000 were decoded" in messages
    assert f"features: songs that may be cut, and are used as they are: {songs[4].song_id}" in messages
    assert threads_of_workers == {"1"}
    assert children() == before


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (signal.SIGKILL, LimitError, "was killed, as the system does where memory runs out"),
        (signal.SIGSEGV, ModelError, "ended with signal 11"),
    ],
)
def test_a_worker_that_dies_is_an_error_that_names_its_song_and_the_next_attempt_goes_on_with_it(
    tmp_path: Path, in_processes: None, number: signal.Signals, kind: type[EmotionError], said: str
) -> None:
    songs, before = write_songs(tmp_path, [0.1] * 4), children()
    extract(songs, tmp_path, threads=1, out="uninterrupted")
    stuck = tmp_path / songs[2].audio
    content = stuck.read_bytes()
    stuck.unlink()
    os.mkfifo(stuck)  # who opens it waits for a writer
    questions = count(1)

    def strike() -> bool:
        if next(questions) == 3:
            for worker in children() - before:
                os.kill(worker, number)
        return False

    with pytest.raises(kind, match=said) as caught:
        extract(songs, tmp_path, should_stop=strike)
    assert f"decoded {stuck} " in str(caught.value)
    assert caught.value.exit_code == 70
    assert children() == before
    stuck.unlink()
    stuck.write_bytes(content)
    with pytest.raises(Interrupted, match="after 2 of 4"):
        extract(songs, tmp_path, should_stop=lambda: True)
    extract(songs, tmp_path)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "uninterrupted")


def test_a_worker_that_cannot_start_is_an_error(tmp_path: Path, in_processes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one whose libraries are gone, or that finds no memory for them."""
    monkeypatch.setattr("emotion.audio.song_workers.PROGRAM", "raise SystemExit(3)")
    songs = write_songs(tmp_path, [0.1] * 4)
    with pytest.raises(ModelError, match=f"decoded {tmp_path / songs[0].audio} ended with exit code 3"):
        extract(songs, tmp_path)


def test_an_unexpected_error_in_a_worker_is_raised_with_its_place(
    tmp_path: Path, in_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    songs = write_songs(tmp_path, [0.1] * 4)
    broken = LogMel(SMALL)
    broken.window = broken.window[:3]
    with SongDecoders(broken, 60.0, Workers(2), songs=4) as decoders, pytest.raises(ValueError, match="broadcast") as caught:
        decoders.start(tmp_path / songs[0].audio, None).result()
    assert "in _frames" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("asked", [1, pytest.param(3, marks=pytest.mark.full)])
def test_workers_end_with_a_process_that_is_killed_and_it_resumes_to_the_same_bytes(
    tmp_path: Path, in_processes: None, monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    songs = write_songs(tmp_path, [0.1] * 6)
    extract(songs, tmp_path, threads=1, out="uninterrupted")
    monkeypatch.setattr("emotion.audio.feature_store.DURABLE_SECONDS", 0.0)
    questions = count(1)

    def die() -> bool:
        (tmp_path / "workers").write_text(" ".join(map(str, children())))
        return die_at(asked, questions)

    assert exit_code_of(partial(extract, songs, tmp_path, should_stop=die)) == -signal.SIGKILL
    workers = (tmp_path / "workers").read_text().split()
    assert len(workers) == 2
    while any(is_running(worker) for worker in workers):
        time.sleep(0.01)
    with pytest.raises(Interrupted, match=f"after {asked - 1} of 6"):
        extract(songs, tmp_path, should_stop=lambda: True)
    extract(songs, tmp_path)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "uninterrupted")


def test_workers_that_wait_for_a_file_end_with_a_process_that_is_killed(tmp_path: Path, in_processes: None) -> None:
    songs = write_songs(tmp_path, [0.1] * 4)
    hung = tmp_path / songs[3].audio
    hung.unlink()
    os.mkfifo(hung)
    writer = os.open(hung, os.O_RDWR)  # with it open, who reads waits for something to be written
    questions = count(1)

    def die() -> bool:
        (tmp_path / "workers").write_text(" ".join(map(str, children())))
        if next(questions) == 3:
            while not any(has_open(worker, hung) for worker in children()):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    assert exit_code_of(partial(extract, songs, tmp_path, should_stop=die)) == -signal.SIGKILL
    workers = (tmp_path / "workers").read_text().split()
    assert len(workers) == 2
    ends = time.monotonic() + 10
    while time.monotonic() < ends and any(is_running(worker) for worker in workers):
        time.sleep(0.01)
    still_there = [worker for worker in workers if is_running(worker)]
    for worker in still_there:
        os.kill(int(worker), signal.SIGKILL)
    os.close(writer)
    assert not still_there


def has_open(process: int, path: Path) -> bool:
    return any(os.path.realpath(file) == str(path.resolve()) for file in Path(f"/proc/{process}/fd").iterdir())


def test_the_memory_of_workers_is_told_at_the_end(tmp_path: Path, in_processes: None) -> None:
    """Between that of an interpreter with numpy, and that of two with all of their libraries."""
    songs, told = write_songs(tmp_path, [0.1] * 4), list[int]()
    workers = Workers(2, add_bytes=told.append)
    with SongDecoders(LogMel(SMALL), 60.0, workers, songs=4) as decoders:
        for decoding in [decoders.start(tmp_path / song.audio, None) for song in songs]:
            decoding.result()
    assert len(told) == 1
    assert 2 * 10 * 2**20 < told[0] < 2 * 100 * 2**20


def is_running(process: str) -> bool:
    """A zombie is not: whoever inherited it may not wait for it."""
    state = read_field(Path(f"/proc/{process}/status"), "State")
    return state is not None and not state.startswith("Z")


def test_asked_to_stop_no_worker_is_waited_for(tmp_path: Path, in_processes: None) -> None:
    songs, before = write_songs(tmp_path, [0.1] * 3), children()
    (tmp_path / songs[2].audio).unlink()
    os.mkfifo(tmp_path / songs[2].audio)
    answers = iter([False, True])
    with pytest.raises(Interrupted, match="after 1 of 3"):
        extract(songs, tmp_path, should_stop=lambda: next(answers))
    assert children() == before


@pytest.mark.parametrize(
    ("cores", "songs", "processes"),
    [(1, 10_000, 0), (16, 2 * SONGS_PER_WORKER - 1, 0), (16, 2 * SONGS_PER_WORKER, 2), (2, 10_000, 2), (99, 10**6, MOST_WORKERS)],
)
def test_there_are_as_many_processes_as_cores_if_there_are_songs_for_them(
    cores: int, songs: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emotion.audio.song_workers.PROGRAM", "")
    before = children()
    with SongDecoders(LogMel(SMALL), 60.0, Workers(cores), songs=songs) as decoders:
        assert len(children() - before) == processes
        assert decoders.count == (processes or cores)
    assert children() == before


def test_a_worker_imports_no_more_than_it_needs() -> None:
    program = """
import sys
import emotion.audio.song_workers
print({"torch", "librosa", "numba", "pydantic", "matplotlib", "pandas", "tqdm", "boto3"} & set(sys.modules))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
