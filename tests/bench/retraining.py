"""Measures whether a warm start helps: a model of the first half of a dataset, trained further on the second half (`init_from`),
is compared with a model trained on the second half alone. Both have the same test songs, settings and epochs. A warm start with a
third of the learning rate, and the unchanged model of the first half, are measured, too.

    python tests/bench/retraining.py [--seeds N]

Whole jobs run on this machine's CPU, on generated music. Each seed has a dataset of its own, whose artists are assigned to the
halves and to the test. Goal: the 95 % interval (Student's t over the seeds) of the mean difference of the CCCs is above 0.
"""

from job.environment import limit_spinning

limit_spinning()  # before torch is imported

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# For importing tests.bench.rows when this file is run as a program.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import scipy.stats

from emotion.config import DeviceConfig
from emotion.data.deam import find_dataset
from emotion.data.songs import Song
from emotion.data.toy_dataset import generate_dataset
from emotion.evaluation.metrics import DIMENSIONS, concordance
from emotion.files import read_json, write_csv, write_text
from emotion.training.device import resolve_device
from emotion.vit.predict import AudioPredictor
from job.pipeline.folders import JobFolders
from job.pipeline.runner import run_job
from job.preemption import StopRequest
from job.results.manifest import published_at
from job.spec.location import Local
from job.spec.model import JobSpec
from tests.bench.rows import record

SEEDS = 6
SONGS = 150
SHARES = {"first": 45, "second": 45, "test": 60}
VALIDATION = 12
"""Validation songs of each half."""
FEW_TEST = 3
"""Test songs of the first job, which needs some; their results are not used."""
FIRST_EPOCHS, EPOCHS = 30, 10
SLOWER = {"learning_rate": 3e-4}
SETTINGS: dict[str, Any] = {
    "mel": {"mels": 64},
    "gan": {"epochs": 2, "batch_size": 16, "clip_seconds": 3, "latent": 16, "width": 4},
    "synth": {"songs": 16, "samples": [], "griffin_lim_iterations": 1},
    "evaluate": {"bootstrap_samples": 100},
    "device": {"kind": "cpu"},
}
VIT: dict[str, Any] = {
    "model": "test_vit",
    "clip_seconds": 3,
    "patience_epochs": 40,
    "batch_size": 16,
    "synthetic_share": 0.125,
    "learning_rate": 1e-3,
    "layer_decay": 1,
    "ema_decay": 0.98,
    "max_crops": 4,
}


def assigned(songs: Sequence[Song]) -> dict[str, list[Song]]:
    """Assign whole artists to the halves and the test, each to the part that is relatively the emptiest."""
    artists: dict[str, list[Song]] = {}
    for song in songs:
        artists.setdefault(song.group, []).append(song)
    parts: dict[str, list[Song]] = {name: [] for name in SHARES}
    for artist in sorted(artists):
        part = min(SHARES, key=lambda name: len(parts[name]) / SHARES[name])
        parts[part] += artists[artist]
    return parts


def write_dataset(root: Path, dataset: Path, splits: dict[str, list[Song]]) -> tuple[Path, Path]:
    """Write a dataset of these songs, and the lists of its splits. Returns the folders of the songs and of the lists."""
    (root / "lists").mkdir(parents=True)
    rows = []
    for split, songs in splits.items():
        write_text(root / "lists" / f"{split}.txt", "".join(f"{song.song_id}\n" for song in songs))
        for song in songs:
            audio = root / "songs" / f"{song.song_id}.mp3"
            audio.parent.mkdir(exist_ok=True)
            audio.hardlink_to(dataset / song.audio)
            rated = (song.valence, song.valence_sd, song.arousal, song.arousal_sd)
            rows.append([song.song_id, *(5 * (column % 2 == 0) + 4 * value for column, value in enumerate(rated))])
    header = ["song_id", "valence_mean", "valence_std", "arousal_mean", "arousal_std"]
    write_csv(root / "songs" / "static_annotations_averaged_songs_1_2000.csv", header, rows)
    return root / "songs", root / "lists"


def job(name: str, seed: int, dataset: tuple[Path, Path], vit: dict[str, Any], **sections: Any) -> JobSpec:
    source, lists = dataset
    data, split = {"source": str(source)}, {"protocol": "lists", "lists": str(lists), "grouped": False}
    whole = {"name": name, "seed": seed, "data": data, "split": split, "vit": VIT | vit, **SETTINGS, **sections}
    return JobSpec.model_validate(whole, strict=False)


def compare(seed: int, folder: Path) -> dict[str, list[float]]:
    """Name of a model → CCC of valence and of arousal over the test songs."""
    dataset = folder / "dataset"
    generate_dataset(dataset, SONGS, seed, lambda: False)
    parts = assigned(find_dataset(dataset).songs)
    first, second = (
        {"validation": parts[half][:VALIDATION], "train": parts[half][VALIDATION:]} for half in SHARES if half != "test"
    )
    first["test"], first["train"] = first["train"][:FEW_TEST], first["train"][FEW_TEST:]
    second["test"] = parts["test"]
    datasets = [write_dataset(folder / name, dataset, splits) for name, splits in (("first", first), ("second", second))]
    folders = JobFolders(folder / "work", folder / "scratch")

    earlier = job("first", seed, datasets[0], {"weights": "random", "epochs": FIRST_EPOCHS})
    run_job(earlier, folders, "publish", False, StopRequest())
    published = published_at(earlier, folders.run_folder(earlier))
    assert isinstance(published, Local)
    run = published.path
    # These jobs have another seed, as the README advises for a warm start.
    alone = job("alone", seed + 1000, datasets[1], {"weights": "random", "epochs": EPOCHS})
    warm = job("warm", seed + 1000, datasets[1], {"epochs": EPOCHS}, init_from={"run": str(run)})
    slower = job("slower", seed + 1000, datasets[1], {"epochs": EPOCHS, **SLOWER}, init_from={"run": str(run)})
    found = {}
    for spec in (alone, warm, slower):
        metrics = read_json(run_job(spec, folders, "evaluate", False, StopRequest()) / "metrics.json")
        found[spec.name] = [metrics["model"][dimension]["ccc"] for dimension in DIMENSIONS]
    predictor = AudioPredictor(run, resolve_device(DeviceConfig(kind="cpu"), "fp32"), plain=True)  # the ViT, as above
    predicted = [predictor(dataset / song.audio) for song in parts["test"]]
    pairs = [
        [(one.valence, song.valence), (one.arousal, song.arousal)] for one, song in zip(predicted, parts["test"], strict=True)
    ]
    by_dimension = np.array(pairs).transpose(1, 2, 0)
    found["first"] = [concordance(*one) for one in by_dimension]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    seeds = parser.parse_args().seeds
    logging.disable(logging.WARNING)
    started = time.monotonic()
    sizes = ", ".join(f"{songs} {name}" for name, songs in SHARES.items())
    print(f"about so many songs: {sizes}; CCC on the test songs, valence / arousal")
    columns = {"alone": "second half alone", "warm": "warm start", "slower": "warm start, slower", "first": "first half alone"}
    print(f"\n| seed | {' | '.join(columns.values())} |\n|" + "---|" * (1 + len(columns)))
    means: dict[str, list[float]] = {name: [] for name in columns}
    for seed in range(1, 1 + seeds):
        with tempfile.TemporaryDirectory(prefix="retraining-") as folder:
            found = compare(seed, Path(folder))
        for name in columns:
            means[name].append(statistics.mean(found[name]))
        shown = [f"{valence:.2f} / {arousal:.2f}" for valence, arousal in (found[name] for name in columns)]
        print(f"| {seed} | {' | '.join(shown)} |", flush=True)
    print("\nMean of valence and arousal, paired by seed, 95 % interval:")
    for one, other in (("warm", "alone"), ("slower", "alone"), ("warm", "first"), ("slower", "first")):
        differences = [a - b for a, b in zip(means[one], means[other], strict=True)]
        mean = statistics.mean(differences)
        half = scipy.stats.sem(differences) * scipy.stats.t.ppf(0.975, len(differences) - 1)
        print(f"{columns[one]} minus {columns[other]}: {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]")
        least = 0 if (one, other) == ("warm", "alone") else None
        what = f"CCC, {columns[one]} minus {columns[other]}, lower end of 95 %"
        record(what, mean - half, least=least, raw={"differences": differences})
    print(f"{time.monotonic() - started:.0f} s, {len(os.sched_getaffinity(0))} cores")


if __name__ == "__main__":
    main()
