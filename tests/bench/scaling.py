"""Measures how the cost of trainings and other computations of a job grows with the dataset, and how two threads help.

    python tests/bench/scaling.py [--parts gan vit quality baselines sounds] [--songs N N N] [--rounds N] [--synthetic N]

Parts: an epoch of a small GAN and of a small ViT with batches of eight, so that steps grow with the songs; the whole phase
quality; ridge, SVR and boosting as in stack and evaluate, with a fifth of the songs as test; and the sounds of six clips of 30 s.
The feature store is made here: songs of 45 s and clips of 10 s, 128 mels, sums of a few spectra and noise. Each measurement runs
in a process of its own, alternating over the sizes and numbers of threads; results are medians. Memory: the highest resident
memory, which includes the pages of the mapped file. Needs 1.3 GB of disk, 2 GB of memory, a quarter of an hour. Goals: seconds
grow no faster than the songs (baselines: at most 1.5 times as fast; trainings: each further song costs at most 1.2 times the one
before); memory grows at most 1.5 times as fast as the mapped file; two threads are at least 1.6 times as fast as one (quality:
done within 10 s).
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# For importing tests.bench.rows when this file is run as a program.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.rows import record

if TYPE_CHECKING:
    from emotion.audio.feature_store import Features
    from emotion.audio.partition import Partition

SONGS = (450, 900, 1800)
SYNTHETIC = 3200
THREADS = (1, 2)
SONG_FRAMES, CLIP_FRAMES, SOUND_FRAMES, SOUNDS = 1938, 431, 1292, 6
PARTS = ("gan", "vit", "quality", "baselines", "sounds")
TRAININGS = PARTS[:2]
BYTES_PER_FRAME = 2 * 128
MOST_SECONDS = {"quality": 1.0, "baselines": 1.5}  # SVR compares every pair of songs, for at most 2,000 songs
MOST_QUALITY_SECONDS, MOST_STEP = 10.0, 1.2
MOST_MEMORY, LEAST_SPEED = 1.5, 1.6


def write_store(out: Path, songs: int, frames: int, seed: int) -> None:
    """Write clips whose loudness and tilt follow their labels, each with its own spectrum and beat. With a seed other than 0 they
    have no digests, like synthetic clips."""
    import numpy as np

    from emotion.audio.feature_store import FeatureWriter
    from emotion.config import MelConfig
    from emotion.data.leaks import write_seen
    from emotion.data.songs import SongLabels

    mel, rng = MelConfig(), np.random.default_rng(seed)
    noise = rng.standard_normal((frames + 997, mel.mels), np.float32)
    spectra = rng.standard_normal((16, mel.mels)).cumsum(axis=1).astype(np.float32)
    tilt, time_s = np.linspace(-1, 1, mel.mels, dtype=np.float32), np.arange(frames, dtype=np.float32)
    with FeatureWriter(out, mel) as writer:
        for song in range(songs):
            valence, arousal = rng.uniform(-1, 1, 2).astype(np.float32)
            spectrum = -35 + rng.standard_normal(16, np.float32) @ spectra / 8 + 8 * arousal + 5 * valence * tilt
            beat = 3 * np.sin(time_s * (0.05 + 0.1 * rng.random()))
            first = int(rng.integers(997))
            log_mel = spectrum + beat[:, None].astype(np.float32) + 5 * noise[first : first + frames]
            digests = {} if seed else {"file_sha256": f"file {song}", "sound_sha256": f"sound {song}"}
            labels = SongLabels(song, float(valence), float(arousal), 0.3, 0.3, f"artist {song // 2}")
            writer.append(labels, log_mel, **digests)
    write_seen(out, {"file 0"})


def partition(features: "Features", songs: int) -> "Partition":
    """Split the first `songs` songs: seven tenths for training, a tenth for validation, a fifth for the test."""
    from emotion.audio.partition import Partition, TestSongs, TrainingSongs, ValidationSongs

    ends = (0, 7 * songs // 10, 8 * songs // 10, songs)
    training, validation, test = (features.only(range(*pair)) for pair in itertools.pairwise(ends))
    groups = ([song.group for song in part.songs] for part in (training, validation, test))
    return Partition(TrainingSongs(training), ValidationSongs(validation), TestSongs(test), *groups)


def measure(part: str, store: Path, songs: int, threads: int) -> dict[str, float]:
    """Called in a process of its own: seconds of a part, and the highest memory in bytes. Imports are not counted, except those
    of a training."""
    from job.environment import prepare_environment

    prepare_environment(threads)
    import numpy as np
    import sklearn.covariance
    import sklearn.ensemble
    import sklearn.svm  # noqa: F401

    from emotion.audio.feature_store import Features
    from emotion.audio.griffin_lim import synthesize_sound
    from emotion.audio.song_vectors import song_vectors
    from emotion.config import QualityConfig
    from emotion.evaluation.boosting import fit_boosting
    from emotion.evaluation.regressors import fit_ridge, fit_svr, grouped_folds
    from emotion.gan.quality import measure_quality, write_pictures
    from emotion.proc import memory_bytes
    from emotion.threads import in_threads

    def no_stop() -> None:
        return

    real, synthetic = Features(store / "real"), Features(store / "synthetic")
    split = partition(real, songs)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        out = Path(folder)
        if part in TRAININGS:
            train_one_epoch(part, split, synthetic, out, threads)
        elif part == "quality":
            write_pictures(split.training, synthetic, out)
            never = lambda: False  # noqa: E731
            measure_quality(
                split, synthetic=synthetic, config=QualityConfig(), seed=0, out=out, threads=threads, should_stop=never
            )
        elif part == "baselines":
            x = [song_vectors(songs, threads, no_stop) for songs in (split.training, split.validation, split.test)]
            labels = np.concatenate([split.training.labels, split.validation.labels]).astype(np.float64)
            folds = grouped_folds([*split.training_groups, *split.validation_groups], seed=0)
            known, unknown = np.concatenate(x[:2]), x[2]
            fit_ridge(known, labels, folds)[0].predict(unknown)
            fit_svr(known, labels, folds, seed=0, threads=threads, check_stop=no_stop)[0].predict(unknown)
            fit_boosting(known, labels, folds, seed=0, threads=threads, check_stop=no_stop)[0].predict(unknown)
        else:

            def sound(index: int) -> "np.ndarray":
                return synthesize_sound(real.clip(index, 0, SOUND_FRAMES), real.mel, 32, np.random.default_rng(0))

            list(in_threads(sound, range(SOUNDS), threads, no_stop))
    return {"seconds": time.monotonic() - started, "bytes": memory_bytes("VmHWM") or 0}


def train_one_epoch(part: str, split: "Partition", synthetic: "Features", out: Path, threads: int) -> None:
    from emotion.config import DeviceConfig, GanConfig, VitConfig
    from emotion.training.device import resolve_device
    from tests.emotion.trainings import context, run_gan, run_vit

    about = context(out, device=resolve_device(DeviceConfig(kind="cpu", threads=threads), "auto"))
    if part == "gan":
        run_gan(split, GanConfig(epochs=1, batch_size=8, clip_seconds=3, latent=8, width=4), about)
    else:
        model = {"model": "test_vit", "weights": "random", "max_crops": 1}
        run_vit(split, synthetic, VitConfig(epochs=1, batch_size=8, clip_seconds=3, **model), about)


def more_threads(part: str) -> tuple[int, ...]:
    return () if part in TRAININGS else THREADS[1:]


def cases(parts: list[str], sizes: list[int]) -> Iterator[tuple[str, int, int]]:
    """(part, songs, threads): every size with one thread, and the largest also with more threads, except for trainings."""
    for part in parts:
        of_part = sizes if part != "sounds" else sizes[-1:]
        yield from ((part, songs, THREADS[0]) for songs in of_part)
        yield from ((part, sizes[-1], threads) for threads in more_threads(part))


def measured(store: Path, part: str, songs: int, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", part, str(store), str(songs), str(threads)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(json.loads(found.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--songs", type=int, nargs="+", default=SONGS, help="sizes of the dataset, ascending")
    parser.add_argument("--synthetic", type=int, default=SYNTHETIC)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", nargs=4, metavar=("PART", "STORE", "SONGS", "THREADS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        part, store, songs, threads = given.case
        print(json.dumps(measure(part, Path(store), int(songs), int(threads))))
        return
    parts, sizes = list(given.parts), list(given.songs)
    found: dict[tuple[str, int, int], list[dict[str, float]]] = {case: [] for case in cases(parts, sizes)}
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        store = Path(folder)
        write_store(store / "real", sizes[-1], SONG_FRAMES, 0)
        write_store(store / "synthetic", given.synthetic, CLIP_FRAMES, 1)
        for _ in range(given.rounds):
            for (part, songs, threads), results in found.items():
                results.append(measured(store, part, songs, threads))
    seconds = {case: statistics.median(result["seconds"] for result in results) for case, results in found.items()}
    memory = {case: statistics.median(result["bytes"] for result in results) for case, results in found.items()}
    print(f"{given.synthetic} synthetic clips, medians of {given.rounds}, {len(os.sched_getaffinity(0))} cores\n")
    print("| part | songs | threads | s | memory, MiB |\n|---|---|---|---|---|")
    for part, songs, threads in found:
        case = (part, songs, threads)
        print(f"| {part} | {songs} | {threads} | {seconds[case]:.2f} | {memory[case] / 2**20:.0f} |")
    print()
    grown = sizes[-1] / sizes[0]
    mapped = (sizes[-1] - sizes[0]) * SONG_FRAMES * BYTES_PER_FRAME
    for part in parts:
        smallest, largest = (part, sizes[0], THREADS[0]), (part, sizes[-1], THREADS[0])
        if part in TRAININGS and len(sizes) > 2:  # differences leave out what a training does once
            times = [seconds[part, songs, 1] for songs in sizes]
            early, late = ((times[at + 1] - times[at]) / (sizes[at + 1] - sizes[at]) for at in (0, len(sizes) - 2))
            show(f"{part}: seconds for a song more, of the largest two / of the smallest two", late / early, most=MOST_STEP)
        elif part in MOST_SECONDS and grown > 1:
            growth = seconds[largest] / seconds[smallest] / grown
            show(f"{part}: seconds for {grown:g} times the songs / {grown:g} times the seconds", growth, most=MOST_SECONDS[part])
        if part != "sounds" and grown > 1:
            memory_growth = (memory[largest] - memory[smallest]) / mapped
            show(f"{part}: growth of memory / growth of the mapped file", memory_growth, most=MOST_MEMORY)
        for threads in more_threads(part):
            speed = seconds[largest] / seconds[part, sizes[-1], threads]
            least = LEAST_SPEED if part != "quality" else None
            show(f"{part}: speed with {threads} threads / with one", speed, least=least)
        if part == "quality":
            show(f"quality: seconds, {sizes[-1]} songs, 2 threads", seconds["quality", sizes[-1], 2], most=MOST_QUALITY_SECONDS)


def show(what: str, value: float, *, least: float | None = None, most: float | None = None) -> None:
    goal = "".join(f", goal {name} {limit}" for name, limit in (("at least", least), ("at most", most)) if limit is not None)
    print(f"{what}: {value:.2f}{goal}")
    record(what, value, least=least, most=most)


if __name__ == "__main__":
    main()
