"""CPU time per file from mp3 to log-mel: librosa's, ours, and of decoding alone, alternating in one process.

    python tests/bench/mel_pipeline.py [--files N]

The mp3s are synthetic music of 45 s, 44.1 kHz stereo, like DEAM's. Goals: at most 0.70 of librosa's CPU time and at most 1.7
of that of decoding alone.
"""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# For tests.bench.rows, where this file is run as a program.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import librosa
import numpy as np
import soundfile

from emotion.audio.decoding import decode_blocks
from emotion.audio.mel import LogMel
from emotion.config import MelConfig
from tests.bench.rows import record

ROUNDS = 7
SECONDS = 45
RATE_HZ = 44100


def write_mp3(path: Path, seed: int) -> None:
    """Write chords that change every half second over a little noise, different in both channels."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=4, help="mp3 files of 45 s per round")
    files = parser.parse_args().files
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

    def decoding(path: Path) -> np.ndarray:
        return soundfile.read(path, dtype="float32")[0]

    ways: dict[str, Callable[[Path], np.ndarray]] = {"librosa": by_librosa, "ours": ours, "decoding": decoding}
    timings: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.mp3" for number in range(files)]
        for number, path in enumerate(paths):
            write_mp3(path, number)
        difference = np.abs(by_librosa(paths[0]) - ours(paths[0])).max()  # also warms both up
        for _ in range(ROUNDS):
            for name, way in ways.items():
                started = time.process_time()
                for path in paths:
                    way(path)
                timings[name].append(1000 * (time.process_time() - started) / files)

    print(f"{files} files of {SECONDS} s, {ROUNDS} alternating rounds, CPU ms per file; differ by {difference:.1e} dB at most")
    for name, values in timings.items():
        print(f"{name:9} median {statistics.median(values):6.1f}   all {' '.join(f'{value:.1f}' for value in values)}")
    median = {name: statistics.median(values) for name, values in timings.items()}
    for peer, most in (("librosa", 0.70), ("decoding", 1.70)):
        ratio = median["ours"] / median[peer]
        print(f"ours / {peer:8} {ratio:.2f}   goal {most:.2f} or less")
        record(f"CPU time from mp3 to log-mel / {peer}", ratio, most=most, raw={name: timings[name] for name in ("ours", peer)})


if __name__ == "__main__":
    main()
