"""Phase features: CPU time per song compared with librosa and with decoding alone, and scaling with cores and songs.

    python tests/bench/mel_pipeline.py [--files N] [--songs N] [--workers N]

The mp3s are synthetic music of 45 s, 44.1 kHz stereo, like DEAM's. Goals:
- at most 0.70 of librosa's CPU time (load, mel, dB)
- for all that the job does with a song, at most 1.7 times the CPU time of decoding alone
- at least 0.85 of a linear speed-up from one worker to two
- one main process can keep 16 cores busy, computed from its own share of all CPU time
- CPU time per song does not grow with the number of songs
"""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"

import argparse
import logging
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# For importing tests.bench.rows when this file is run as a program.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import librosa
import numpy as np
import soundfile

from emotion.audio.decoding import READ_SAMPLES, _SequentialSound, decode_blocks
from emotion.audio.extract import extract_features
from emotion.audio.mel import LogMel
from emotion.audio.mpeg import _frame
from emotion.audio.song_decoding import decode_song
from emotion.audio.song_workers import Workers
from emotion.config import DataConfig, MelConfig
from emotion.data.songs import Dataset, Song
from emotion.files import sha256_of
from emotion.proc import read_field
from tests.bench.rows import record

ROUNDS = 7
SCALING_ROUNDS = 3
NOISE = 0.1  # relative noise of a single run
SECONDS = 45
RATE_HZ = 44100


def write_mp3(path: Path, seed: int) -> None:
    """Write chords that change every half second, with a little noise; the two channels differ."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(RATE_HZ // 2) / RATE_HZ
    chords = []
    for _ in range(2 * SECONDS):
        notes = 110 * 2 ** (rng.integers(0, 36, size=4) / 12)
        tones = sum(np.sin(2 * np.pi * note * time_s) for note in notes)
        chords.append(0.1 * tones * np.exp(-3 * time_s))
    left = np.concatenate(chords)
    sound = np.stack([left, np.roll(left, 200)], axis=1) + 0.01 * rng.normal(size=(len(left), 2))
    soundfile.write(path, sound, RATE_HZ, format="MP3")


def frames_of(mp3: bytes) -> list[bytes]:
    """The frames of an mp3 file that contains only frames."""
    at, frames = mp3.index(b"\xff\xfb"), []
    while frame := _frame(int.from_bytes(mp3[at : at + 4], "big")):
        frames.append(mp3[at : at + frame.length_bytes])
        at += frame.length_bytes
    return frames


def write_songs(paths: list[Path], count: int) -> Dataset:
    """Write `count` songs next to these mp3s. Each has the rotated frames of one mp3; songs of one mp3 differ in the rotation."""
    root = paths[0].parent
    contents = [frames_of(path.read_bytes()) for path in paths]
    songs = []
    for number in range(count):
        header, *frames = contents[number % len(contents)]
        turn = 1 + number // len(contents)
        songs.append(Song(number, 0.0, 0.0, 0.1, 0.1, "", f"song-{number}.mp3"))
        (root / songs[-1].audio).write_bytes(b"".join([header, *frames[turn:], *frames[:turn]]))
    return Dataset(root, songs, [], {song.audio: sha256_of(root / song.audio) for song in songs})


@dataclass(frozen=True)
class Extraction:
    """The cost of a run of the phase. seconds: wall-clock time; main, workers: CPU seconds of the main process and its workers;
    worker_memory: of one worker."""

    seconds: float
    main: float
    workers: float
    worker_memory: tuple[str | None, ...]  # peak memory, and the unshared part of it

    @property
    def cpu(self) -> float:
        return self.main + self.workers


def extraction(dataset: Dataset, songs: int, workers: int) -> Extraction:
    part = Dataset(dataset.root, dataset.songs[:songs], [], dataset.digests)
    out, memory = dataset.root / "features", ()
    asked = 0

    def look() -> bool:
        nonlocal asked, memory
        asked += 1
        if asked == songs // 2:
            tasks = Path("/proc/self/task").glob("*/children")
            found = [Path(f"/proc/{number}/status") for task in tasks for number in task.read_text().split()]
            memory = tuple(read_field(status, name) for status in found[:1] for name in ("VmHWM", "RssAnon"))
        return False

    before = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    started = time.perf_counter()
    data: Any = {"out": out, "faults_table": dataset.root / "faults.csv", "workers": Workers(workers), "should_stop": look}
    faults = extract_features(part, DataConfig(source="made"), MelConfig(), **data)
    seconds = time.perf_counter() - started
    after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    assert not faults, faults
    shutil.rmtree(out)
    cpu = [now.ru_utime + now.ru_stime - then.ru_utime - then.ru_stime for now, then in zip(after, before, strict=True)]
    return Extraction(seconds, cpu[0], cpu[1], memory)


def report_scaling(dataset: Dataset, workers: int) -> None:
    songs = len(dataset.songs)
    one, many = [], []
    for _ in range(SCALING_ROUNDS):
        one.append(extraction(dataset, songs, 1))
        many.append(extraction(dataset, songs, workers))
    print(f"\nphase features, {songs} songs, {SCALING_ROUNDS} alternating rounds, seconds")
    for name, runs in (("1 worker", one), (f"{workers} workers", many)):
        seconds = [run.seconds for run in runs]
        print(f"{name:10} median {statistics.median(seconds):6.1f}   all {' '.join(f'{value:.1f}' for value in seconds)}")
    speedup = statistics.median(run.seconds for run in one) / statistics.median(run.seconds for run in many)
    print(f"speed-up {speedup:.2f}, {speedup / workers:.2f} of linear   goal 0.85 or more")
    raw = {"one": [run.seconds for run in one], "many": [run.seconds for run in many]}
    record(f"phase features: speed-up by {workers} workers / linear", speedup / workers, least=0.85, raw=raw)
    # Busy cores slow each other down if they share a cache, a clock or, as two threads of one core, the arithmetic units.
    slower = statistics.median(two.cpu / alone.cpu for alone, two in zip(one, many, strict=True))
    busy = statistics.median(run.cpu / run.seconds for run in many) / workers
    print(f"CPU time with {workers} workers: {slower:.2f} times that with one; {busy:.2f} of the cores are busy")
    record(f"phase features: CPU time with {workers} workers / with one (of the machine)", slower)
    record(f"phase features: share of {workers} cores that are busy, start included", busy, least=0.85)
    share = statistics.median(run.main / run.cpu for run in many)
    print(
        f"main process: {share:.3f} of all CPU time, {1000 * statistics.median(run.main for run in many) / songs:.1f} ms a song;"
    )
    print(f"so at most {1 / share:.0f} cores can be busy   goal 16 or more")
    record("phase features: cores that one main process can keep busy", 1 / share, least=16)
    print(f"a worker: {' at its peak, unshared '.join(map(str, many[-1].worker_memory))}")
    sizes = (songs // 4, songs // 2, songs)
    cpu = {size: extraction(dataset, size, 1) for size in sizes}
    per_song = [1000 * cpu[size].cpu / size for size in sizes]
    for size, milliseconds in zip(sizes, per_song, strict=True):
        print(f"{size:5} songs, one worker: {milliseconds:.1f} CPU ms a song")
    growth = per_song[-1] / per_song[0]
    record(
        "phase features: CPU time for 4 times the songs / 4 times the CPU time", growth, most=1.0 + NOISE, raw={"ms": per_song}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=4, help="mp3 files of 45 s per round")
    parser.add_argument("--songs", type=int, default=200, help="songs of the runs that show how it scales")
    parser.add_argument("--workers", type=int, default=2, help="beside one")
    asked = parser.parse_args()
    files = asked.files
    logging.disable(logging.WARNING)
    mel = MelConfig()
    log_mel = LogMel(mel)

    def by_librosa(path: Path) -> np.ndarray:
        samples, _ = librosa.load(path, sr=mel.sample_rate_hz)
        power = librosa.feature.melspectrogram(
            y=samples,
            sr=mel.sample_rate_hz,
            n_fft=mel.window_samples,
            hop_length=mel.hop_samples,
            n_mels=mel.mels,
            fmin=mel.fmin_hz,
            fmax=mel.fmax_hz,
        )
        return librosa.power_to_db(power, ref=1.0, amin=1e-10, top_db=None).T

    def ours(path: Path) -> np.ndarray:
        return log_mel.of_blocks(decode_blocks(path, mel.sample_rate_hz))

    block = np.empty((READ_SAMPLES // 2, 2), np.float32)

    def decoding(path: Path) -> None:
        with _SequentialSound(str(path)) as sound:
            while len(sound.read(out=block)):
                pass

    def as_in_the_job(path: Path) -> np.ndarray:
        return decode_song(path, log_mel, 3600.0, digests[path]).log_mel

    ways: dict[str, Callable[[Path], object]] = {"librosa": by_librosa, "ours": ours, "song": as_in_the_job, "decoding": decoding}
    digests: dict[Path, str] = {}
    timings: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.mp3" for number in range(files)]
        for number, path in enumerate(paths):
            write_mp3(path, number)
            digests[path] = sha256_of(path)
        difference = np.abs(by_librosa(paths[0]) - ours(paths[0])).max()  # also warms both up
        for _ in range(ROUNDS):
            for name, way in ways.items():
                started = time.process_time()
                for path in paths:
                    way(path)
                timings[name].append(1000 * (time.process_time() - started) / files)

        print(
            f"{files} files of {SECONDS} s, {ROUNDS} alternating rounds, CPU ms per file; differ by {difference:.1e} dB at most"
        )
        for name, values in timings.items():
            print(f"{name:9} median {statistics.median(values):6.1f}   all {' '.join(f'{value:.1f}' for value in values)}")
        median = {name: statistics.median(values) for name, values in timings.items()}
        for way, peer, most in (("ours", "librosa", 0.7), ("ours", "decoding", None), ("song", "decoding", 1.7)):
            ratio = median[way] / median[peer]
            print(f"{way} / {peer:8} {ratio:.2f}{f'   goal {most} or less' if most else ''}")
            record(f"CPU time of {way} / {peer}", ratio, most=most, raw={name: timings[name] for name in (way, peer)})
        report_scaling(write_songs(paths, asked.songs), asked.workers)


if __name__ == "__main__":
    main()
