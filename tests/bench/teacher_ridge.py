"""Measures a teacher by itself: ridge and SVR on its embeddings, in the folds of a job, with pooled out-of-fold predictions.

    python -m tests.bench.teacher_ridge EMBEDDINGS FOLDER [--folds 5] [--seed 0]

FOLDER: the dataset. EMBEDDINGS: a file as for `vit.teacher`. The features of a song are the mean and standard deviation over its
parts, or the embedding itself if there is one part. The folds are those of `split.protocol: kfold` with `split.grouped` on. Each
regression is fitted to the training and validation songs of the job, as the job's own baselines are. The penalty is chosen by
grouped folds of those songs. Intervals: 95 %, bootstrap over groups. The output is a row of Markdown for each of ridge and SVR.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

# For importing emotion when this file is run as a program.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from emotion.config import SplitConfig
from emotion.data.layouts import dataset_files, find_dataset
from emotion.data.splits import make_split
from emotion.data.unused import Unused
from emotion.evaluation.metrics import DIMENSIONS, scores
from emotion.evaluation.regressors import fit_ridge, fit_svr, grouped_folds
from emotion.vit.teacher import SongRows, read_teacher

Array = npt.NDArray[np.float64]


def features_of(song: SongRows) -> Array:
    """The features of a whole song, [numbers]."""
    rows = song.rows.astype(np.float64)
    return np.concatenate([rows.mean(axis=0), rows.std(axis=0)]) if len(rows) > 1 else rows[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("embeddings", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--scale", type=float, nargs=2, help="data.scale, where the folder has a songs.csv")
    given = parser.parse_args()
    dataset = find_dataset(given.folder, dataset_files(given.folder), Unused(), tuple(given.scale) if given.scale else None)
    embeddings = read_teacher(given.embeddings)
    songs = dataset.songs
    x = np.stack([features_of(embeddings[str(song.song_id)]) for song in songs])
    y = np.array([(song.valence, song.arousal) for song in songs])
    predicted = {"ridge": np.full(y.shape, np.nan), "SVR": np.full(y.shape, np.nan)}
    threads = len(os.sched_getaffinity(0))
    for fold in range(given.folds):
        config = SplitConfig(folds=given.folds, fold=fold, seed=given.seed)
        rows = make_split([song.song_id for song in songs], [song.group for song in songs], config, [])
        test = np.array([row.split == "test" for row in rows])
        folds = grouped_folds([row.group for row in rows if row.split != "test"], seed=0)
        ridge, _ = fit_ridge(x[~test], y[~test], folds)
        svr, _ = fit_svr(x[~test], y[~test], folds, seed=0, threads=threads, check_stop=lambda: None)
        predicted["ridge"][test], predicted["SVR"][test] = ridge.predict(x[test]), svr.predict(x[test])
    print(f"{given.embeddings.name}: {len(songs)} songs, {x.shape[1]} features, {given.folds} folds, split.seed {given.seed}\n")
    print("| | valence CCC | MAE | R² | arousal CCC | MAE | R² |\n|---|---|---|---|---|---|---|")
    for name, values in predicted.items():
        found = scores(values, y, groups=[song.group for song in songs], bootstrap_samples=2000, seed=0)
        cells = []
        for dimension in DIMENSIONS:
            score = found[dimension]
            low, high = score["ccc_ci"]
            cells += [f"{score['ccc']:.2f} [{low:.2f}, {high:.2f}]", f"{score['mae']:.3f}", f"{score['r2']:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    print()


if __name__ == "__main__":
    main()
