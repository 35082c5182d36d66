"""Out-of-fold predictions: each song predicted by the fold run that has not seen it, with the results of these runs.

A final model (split.protocol: all) is trained on every song, so none is left to choose an epoch or to measure it. Both come from
this file, which `collect` writes from a complete set of folds.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from emotion.data.leaks import IdentifiedSong
from emotion.data.song_ids import SongId, in_order
from emotion.errors import DataError, StorageError, first_of, system_reason
from emotion.files import read_json, write_json

OUT_OF_FOLD = "out_of_fold.json"
FORMAT = 1  # raise it when an older file could not be read any more
MEMBERS = ("stack", "model", "ridge", "svr", "boosting")  # predictors that must be there, the baselines of the stack among them
Pair: TypeAlias = tuple[float, float]  # (valence, arousal) on -1..1


@dataclass(frozen=True)
class FoldRun:
    """run: NAME-KEY12; predictions_sha256: of its predictions.csv; training: what its ViT has written in model/training.json."""

    run: str
    seed: int
    split_seed: int
    fold: int
    predictions_sha256: str
    training: dict[str, Any]


@dataclass(frozen=True)
class SongPredictions:
    """fold: whose run made the predictions. predicted: predictor ("stack", "model" or a baseline) → prediction."""

    song_id: SongId
    fold: int
    actual: Pair
    predicted: dict[str, Pair]


@dataclass(frozen=True)
class OutOfFold:
    """setting: dotted key → value of the spec, the same in all runs. inputs: `KEY/FILE` → SHA-256 of what the spec names besides
    the dataset. files: SHA-256 of the dataset's files. runs: of all seeds; songs: of one seed, sorted by id. over_seeds:
    predictor → dimension → metric → mean and SD over the seeds; empty with one seed."""

    setting: dict[str, Any]
    inputs: dict[str, str]
    files: frozenset[str]
    runs: list[FoldRun]
    songs: list[SongPredictions]
    over_seeds: dict[str, Any]

    @property
    def stop_epoch(self) -> int:
        """The median of the best epochs of the runs; a half is rounded up. Of two trainings in a run, one with synthetic clips,
        one without, it is that of the kind which the final model repeats."""
        kind = "best_epoch_with" if self.keeps_synthetic else "best_epoch_without"
        best = [int(run.training.get("synthetic_clips", {}).get(kind, run.training["best_epoch"])) for run in self.runs]
        return math.floor(statistics.median(best) + 0.5)

    @property
    def keeps_synthetic(self) -> bool | None:
        """Whether most of the runs have kept synthetic clips; None where they had no choice."""
        kept = [bool(run.training["synthetic_clips"]["kept"]) for run in self.runs if "synthetic_clips" in run.training]
        return 2 * sum(kept) > len(kept) if kept else None

    @property
    def predictors(self) -> list[str]:
        """Those that have predicted every song."""
        return sorted(set.intersection(*({*song.predicted} for song in self.songs)))


def write_out_of_fold(path: Path, found: OutOfFold) -> None:
    """Equal runs give equal bytes, wherever they lie."""
    record = asdict(found)
    write_json(path, {"format": FORMAT, **record, "files": sorted(found.files), "stop_epoch": found.stop_epoch})


def read_out_of_fold(path: Path) -> OutOfFold:
    """Raises DataError for anything but what `write_out_of_fold` wrote, StorageError for a file that cannot be read."""
    try:
        record = read_json(path)
        if record["format"] != FORMAT:
            raise ValueError(f"its format is {record['format']}, expected {FORMAT}")
        found = OutOfFold(
            setting=dict(record["setting"]),
            inputs=dict(record["inputs"]),
            files=frozenset(record["files"]),
            runs=[FoldRun(**run) for run in record["runs"]],
            songs=[_predictions_of(song) for song in record["songs"]],
            over_seeds=dict(record["over_seeds"]),
        )
        if missing := {*MEMBERS} - {*found.predictors}:
            raise ValueError(f"songs without a prediction by {', '.join(sorted(missing))}")
        if not found.runs or found.stop_epoch != record["stop_epoch"]:
            raise ValueError("the epochs of its runs do not fit its stop_epoch")
    except IsADirectoryError as error:
        raise DataError(f"split.out_of_fold: {path} is a folder; name the file {OUT_OF_FOLD} in it.") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"split.out_of_fold: there is no {path}. `emotion-job collect` writes it, of all folds.") from error
    except OSError as error:
        raise StorageError.of(error, f"split.out_of_fold: {path}: {system_reason(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"split.out_of_fold: {path} is not what `emotion-job collect` writes ({type(error).__name__}: {error}). Collect the "
            f"folds again."
        ) from error
    return found


def _predictions_of(record: dict[str, Any]) -> SongPredictions:
    predicted = {str(name): _pair(values) for name, values in record["predicted"].items()}
    return SongPredictions(record["song_id"], int(record["fold"]), _pair(record["actual"]), predicted)


def _pair(values: Sequence[float]) -> Pair:
    valence, arousal = map(float, values)
    if not (math.isfinite(valence) and math.isfinite(arousal)):
        raise ValueError(f"{values} are no finite numbers")
    return valence, arousal


def refuse_other_songs(found: OutOfFold, songs: Iterable[IdentifiedSong], labels: Sequence[Pair]) -> None:
    """Raise DataError unless the runs of the folds have predicted these songs and no others, with these files and labels."""
    predicted = {song.song_id: song.actual for song in found.songs}
    own = {song.song_id: (song.file_sha256, pair) for song, pair in zip(songs, labels, strict=True)}
    problems = {
        "songs that no fold has predicted": in_order(own.keys() - predicted.keys()),
        "predicted songs that are not here": in_order(predicted.keys() - own.keys()),
        "songs with other labels": in_order(song for song in own if song in predicted and own[song][1] != predicted[song]),
        "songs with other audio": in_order(song for song in own if song in predicted and own[song][0] not in found.files),
    }
    texts = [f"{kind} ({len(wrong)}): {first_of(wrong)}" for kind, wrong in problems.items() if wrong]
    if texts:
        raise DataError(
            f"split.out_of_fold: the folds had another dataset: {'; '.join(texts)}. Name that of the folds in data.source, or "
            f"run and collect the folds of this one."
        )
