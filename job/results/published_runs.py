"""Finds, fetches and verifies the published runs for `collect`, and reads their tables."""

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotion.data.out_of_fold import Pair
from emotion.data.song_ids import SongId, song_id_of
from emotion.errors import DataError, SpecError
from emotion.files import make_folder, read_json, write_json
from job.config import StorageConfig
from job.results.coverage import Bounds, bounds_of
from job.results.manifest import MANIFEST, Manifest, dotted, read_manifest, runs_below, stored_manifest, where_published
from job.results.settings import setting_of
from job.spec.load import load_spec
from job.spec.location import Local, parse_location
from job.storage.local_folder import LocalFolder
from job.storage.open import open_storage
from job.storage.stage import SCALE_FILE
from job.storage.transfer import refuse_names

TABLES = ("predictions.csv", "baselines.csv", "split.csv")  # files of a published run that `collect` reads, besides the manifest
TRAINING = "model/training.json"  # also read, if the run has it
SWEEP = "sweep.json"  # in the folder of a sweep: the list of its tasks
MODEL, STACK = "model", "stack"  # names of the ViT and of the stack among the predictors; the others are baselines


@dataclass(frozen=True)
class PublishedRun:
    """The data of a published run that `collect` needs. folds: number of folds with `kfold`, else None; setting: dotted key →
    value; versions: of code and libraries; actual: song id → labels; groups: song id → group; predicted: predictor ("stack",
    "model" or a baseline) → song id → prediction; bounds: song id → the stack's interval; training: content of TRAINING, None if
    the run does not have it."""

    folder: Path
    name: str
    manifest: Manifest
    seed: int
    split_seed: int
    fold: int
    folds: int | None
    bootstrap_samples: int
    setting: dict[str, Any]
    versions: dict[str, Any]
    is_on_deams_scale: bool
    actual: dict[SongId, Pair]
    groups: dict[SongId, str]
    predicted: dict[str, dict[SongId, Pair]]
    bounds: dict[SongId, Bounds]
    training: dict[str, Any] | None

    @property
    def is_final(self) -> bool:
        """Whether this is a final model: trained on all songs, with the predictions of its folds in its tables."""
        return bool(self.setting.get("split.protocol") == "all")


def fetch_tables(runs: Sequence[str], folder: Path, should_stop: Callable[[], bool]) -> list[Path]:
    """Local paths of the runs: published runs, folders with such runs one level below, or sweeps.
    Manifests and tables of runs in object storage are fetched into `folder`, including those of tasks of a local sweep. Object
    storage is configured by the environment or, for a sweep, by its specs. Raises SpecError, StorageError, Interrupted."""
    paths = []
    for number, run in enumerate(runs):
        try:
            location = parse_location(run)
        except ValueError as error:
            raise SpecError(f"collect: {error}") from None
        copy = folder / str(number)
        if isinstance(location, Local):
            paths.append(_fetched_sweep(Path(run), copy, should_stop))
            continue
        storage = open_storage(location, StorageConfig(), should_stop)
        make_folder(copy)
        paths.append(copy)
        for entry in storage.entries():
            if {entry.name, entry.name.partition("/")[2]} & {MANIFEST, *TABLES, TRAINING}:
                refuse_names([entry.name], run)
                make_folder((copy / entry.name).parent)
                storage.get(entry.name, copy / entry.name, None, entry)
    return paths


def _fetched_sweep(path: Path, copy: Path, should_stop: Callable[[], bool]) -> Path:
    """`path`; for a sweep with tasks in object storage, `copy`, a copy of the sweep with the fetched tables of these tasks."""
    try:
        tasks = read_json(path / SWEEP)["tasks"]
        locations = [(task, parse_location(task["published"])) for task in tasks]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return path  # no sweep, or a damaged one, which collect_runs reports
    if all(isinstance(location, Local) for _, location in locations):
        return path
    for task, location in locations:
        if isinstance(location, Local):
            continue
        spec = load_spec(path / "specs" / f"{task['index']:04}.yaml")
        storage = open_storage(location, spec.storage, should_stop)
        task["published"] = str(copy / "published" / task["run"])
        make_folder(Path(task["published"]))
        if storage.read(MANIFEST) is not None:
            manifest = stored_manifest(storage)
            also = [TRAINING] if manifest and TRAINING in manifest.artifacts else []
            for name in (MANIFEST, *TABLES, *also):
                make_folder((Path(task["published"]) / name).parent)
                storage.get(name, Path(task["published"]) / name)
    write_json(copy / SWEEP, {"tasks": tasks})
    return copy


def published_below(path: Path) -> tuple[dict[Path, str], list[dict[str, str]]]:
    """Find the runs that `path` stands for. Returns (published run → name of its setting in a sweep, or "" outside of one;
    unpublished tasks of the sweep)."""
    if (path / MANIFEST).is_file():
        return {path: ""}, []
    if (path / SWEEP).is_file():
        try:
            tasks = [
                (str(task["label"]), Path(task["published"]), str(task.get("setting", "")))
                for task in read_json(path / SWEEP)["tasks"]
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"collect: {path / SWEEP} does not list the tasks of a sweep ({type(error).__name__}: {error}). Name the "
                f"published runs instead."
            ) from error
        found = {folder: setting for _, folder, setting in tasks if (folder / MANIFEST).is_file()}
        return found, [{"task": label, "run": folder.name} for label, folder, _ in tasks if folder not in found]
    found = dict.fromkeys(runs_below(path), "")
    if not found:
        meant = where_published(path) or (
            "Name the folder that the job published to; the manifest is written last, so a job that has not finished has none."
        )
        raise DataError(
            f"collect: expected a published run or a folder of published runs, but there is no manifest.json in {path}, one "
            f"level below it or in {path / 'published'}. {meant}"
        )
    return found, []


def read_run(folder: Path) -> PublishedRun:
    """Read a published run. Its tables are verified against its manifest before they are read."""
    manifest = read_manifest(folder / MANIFEST, "collect")
    also = [TRAINING] if TRAINING in manifest.artifacts else []  # not in runs of earlier versions
    if problem := manifest.problem(LocalFolder(folder), [*TABLES, *also]):
        raise DataError(f"collect: {folder}: {problem}. Copy the run again, or leave it out.")
    actual: dict[SongId, Pair] = {}
    predicted: dict[str, dict[SongId, Pair]] = {MODEL: {}}
    bounds: dict[SongId, Bounds] = {}
    for row in _rows(folder / "predictions.csv"):
        song = song_id_of(row["song_id"])
        actual[song] = (float(row["valence_true"]), float(row["arousal_true"]))
        predicted[MODEL][song] = (float(row["valence_pred"]), float(row["arousal_pred"]))
        if "valence_stack" in row:  # not in runs of earlier versions
            predicted.setdefault(STACK, {})[song] = (float(row["valence_stack"]), float(row["arousal_stack"]))
        if (ends := bounds_of(row)) is not None:
            bounds[song] = ends
    for row in _rows(folder / "baselines.csv"):
        pairs = predicted.setdefault(row["baseline"], {})
        pairs[song_id_of(row["song_id"])] = (float(row["valence_pred"]), float(row["arousal_pred"]))
    spec = dotted(manifest.spec)
    try:
        return PublishedRun(
            folder=folder,
            name=spec["name"],
            manifest=manifest,
            seed=spec["seed"],
            split_seed=spec["split.seed"],
            fold=spec["split.fold"],
            folds=spec["split.folds"] if spec["split.protocol"] == "kfold" else None,
            bootstrap_samples=spec["evaluate.bootstrap_samples"],
            setting=setting_of(manifest.spec),
            versions={
                # Not the revision: another revision with the same sources computes the same.
                "code": manifest.code.model_dump(include={"version", "source_sha256"}),
                "libraries": manifest.libraries,
                "python": manifest.python,
            },
            is_on_deams_scale=f"data.source/{SCALE_FILE}" not in manifest.inputs,
            actual=actual,
            groups={song_id_of(row["song_id"]): row["group"] for row in _rows(folder / "split.csv")},
            predicted=predicted,
            bounds=bounds,
            training=read_json(folder / TRAINING) if also else None,
        )
    except KeyError as error:
        raise DataError(
            f"collect: the spec in {folder / MANIFEST} has no {error.args[0]}. Copy the run again, or leave it out."
        ) from error


def by_seeds(runs: Sequence[PublishedRun]) -> dict[tuple[int, int], list[PublishedRun]]:
    """(seed, split.seed) → its runs, sorted by fold; in ascending order of the seeds."""
    found: dict[tuple[int, int], list[PublishedRun]] = {}
    for run in sorted(runs, key=lambda run: (run.seed, run.split_seed, run.fold)):
        found.setdefault((run.seed, run.split_seed), []).append(run)
    return found


def groups_of(runs: Sequence[PublishedRun]) -> dict[SongId, str]:
    """Song id → group, of the songs of all runs. A run has the groups of all songs of its dataset, not only of its test songs."""
    return {song: group for run in runs for song, group in run.groups.items()}


def compared_by(runs: Sequence[PublishedRun]) -> str:
    """The predictor by which settings are compared: the stack if all runs have one, else the ViT alone."""
    return STACK if all(STACK in run.predicted for run in runs) else MODEL


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)
