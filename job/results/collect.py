"""Many published runs → one table: folds pooled song by song, seeds averaged, every number with its interval.
Runs whose specs differ only in name, seed, fold and runtime keys are of one *setting*, and are measured together."""

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emotion.config import Section, is_runtime
from emotion.data.song_ids import SongId, in_order, song_id_of
from emotion.errors import DataError, SpecError, StorageError, system_reason
from emotion.evaluation.metrics import DIMENSIONS, paired_difference, scores
from emotion.files import digest_of, make_folder, read_json, write_json, write_text
from job.config import StorageConfig
from job.results.coverage import Bounds, Pair, bounds_of, coverage_over_folds
from job.results.manifest import MANIFEST, dotted, read_manifest
from job.results.tables import METRICS, as_csv, as_markdown, scale_of_labels
from job.spec.load import load_spec
from job.spec.location import Local, parse_location
from job.spec.model import JobSpec
from job.storage.local_folder import LocalFolder
from job.storage.open import open_storage
from job.storage.stage import SCALE_FILE
from job.storage.transfer import refuse_names

TABLES = ("predictions.csv", "baselines.csv")  # files of a published run that `collect` reads, besides the manifest
SWEEP = "sweep.json"  # in the folder of a sweep: the list of its tasks
MODEL, STACK = "model", "stack"  # names of the ViT and of the stack among the predictors; the others are baselines


@dataclass(frozen=True)
class PublishedRun:
    """What is needed of a published run. folds: their number with `kfold`, else None; setting: dotted key → value; versions: of
    code and libraries; actual: song id → labels; predicted: predictor ("stack", "model" or a baseline) → song id → prediction;
    bounds: of the stack's intervals."""

    folder: Path
    name: str
    seed: int
    fold: int
    folds: int | None
    bootstrap_samples: int
    setting: dict[str, Any]
    versions: dict[str, Any]
    is_on_deams_scale: bool
    actual: dict[SongId, Pair]
    predicted: dict[str, dict[SongId, Pair]]
    bounds: dict[SongId, Bounds]


def fetch_tables(runs: Sequence[str], folder: Path, should_stop: Callable[[], bool]) -> list[Path]:
    """Local paths of the runs: published runs, folders with such runs one level below, or sweeps.
    Manifests and tables of runs in object storage are fetched into `folder`, also those of the tasks of a local sweep. Object
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
            parent, _, name = entry.name.rpartition("/")
            if name in (MANIFEST, *TABLES) and "/" not in parent:
                refuse_names([entry.name], run)
                make_folder((copy / entry.name).parent)
                storage.get(entry.name, copy / entry.name, None, entry)
    return paths


def _fetched_sweep(path: Path, copy: Path, should_stop: Callable[[], bool]) -> Path:
    """`path`, or a copy of the sweep in `path` with the tables of its tasks, where those are published to object storage."""
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
            for name in (MANIFEST, *TABLES):
                storage.get(name, Path(task["published"]) / name)
    write_json(copy / SWEEP, {"tasks": tasks})
    return copy


def collect_runs(runs: Sequence[Path], out: Path) -> str:
    """Write `collected.json`, `collected.csv` and `collected.md` into `out`; return the Markdown.
    runs: published runs, folders with published runs one level below or in their `published/`, or folders of sweeps, whose
    unpublished tasks are listed as missing. A run found twice counts once. Per setting and seed the test songs of all folds are
    measured as one set, for stack, model and each baseline, beside mean and SD of the folds' own CCC. Over seeds: mean and SD of
    the pooled values. SD has the divisor n - 1. Missing folds of `kfold` are listed. All pairs of settings are compared song by
    song, by the model. Raises DataError for a path without a published run, a damaged run, and a song predicted twice for one
    setting and seed; StorageError for what cannot be read or written."""
    groups: dict[str, list[PublishedRun]] = {}
    try:
        found = [_published(path) for path in runs]
        folders = {folder.resolve() for published, _ in found for folder in published}
        missing = [task for _, tasks in found for task in tasks]
        for run in map(_read_run, sorted(folders)):
            groups.setdefault(digest_of(run.setting), []).append(run)
        labelled = _labelled([*groups.values()])
        collected = [{"label": label, "spec": group[0].setting, **_measured(group)} for label, group in labelled]
        differences = _differences(labelled)
        versions = _versions([run for group in groups.values() for run in group])
        scale = scale_of_labels(all(run.is_on_deams_scale for group in groups.values() for run in group))
        text = as_markdown(collected, differences, missing, len(versions), scale)
        make_folder(out)
        record = {"scale": scale, "settings": collected, "differences": differences, "missing_tasks": missing}
        write_json(out / "collected.json", {**record, "versions": versions})
        write_text(out / "collected.csv", as_csv(collected))
        write_text(out / "collected.md", text)
    except OSError as error:
        raise StorageError.of(
            error,
            f"collect: cannot use {error.filename} ({system_reason(error)}). Check its owner and mode, or name another with "
            f"--out.",
        ) from error
    return text


def _published(path: Path) -> tuple[list[Path], list[dict[str, str]]]:
    """(published runs, unpublished tasks of a sweep) that `path` stands for."""
    if (path / MANIFEST).is_file():
        return [path], []
    if (path / SWEEP).is_file():
        try:
            tasks = [(str(task["label"]), Path(task["published"])) for task in read_json(path / SWEEP)["tasks"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"collect: {path / SWEEP} does not list the tasks of a sweep ({type(error).__name__}: {error}). Name the "
                f"published runs instead."
            ) from error
        found = [folder for _, folder in tasks if (folder / MANIFEST).is_file()]
        return found, [{"task": label, "run": folder.name} for label, folder in tasks if folder not in found]
    found = [manifest.parent for pattern in ("*", "published/*") for manifest in path.glob(f"{pattern}/{MANIFEST}")]
    if not found:
        raise DataError(
            f"collect: expected a published run or a folder of published runs, but there is no manifest.json in {path}, one "
            f"level below it or in {path / 'published'}. Name the folder that the job published to; the manifest is written "
            f"last, so a job that has not finished has none."
        )
    return found, []


def _read_run(folder: Path) -> PublishedRun:
    """A published run, its tables verified against its manifest before they are read."""
    manifest = read_manifest(folder / MANIFEST, "collect")
    if changed := manifest.changed(LocalFolder(folder), TABLES):
        raise DataError(
            f"collect: {folder / changed[0]} is missing or differs from the manifest. Copy the run again, or leave it out."
        )
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
            seed=spec["seed"],
            fold=spec["split.fold"],
            folds=spec["split.folds"] if spec["split.protocol"] == "kfold" else None,
            bootstrap_samples=spec["evaluate.bootstrap_samples"],
            setting={key: spec[key] for key in sorted(spec.keys() - {"name", "seed", "split.fold"} - _runtime_keys())},
            versions={
                # Not the revision: another one with the same sources computes the same.
                "code": manifest.code.model_dump(include={"version", "source_sha256"}),
                "libraries": manifest.libraries,
                "python": manifest.python,
            },
            is_on_deams_scale=f"data.source/{SCALE_FILE}" not in manifest.inputs,
            actual=actual,
            predicted=predicted,
            bounds=bounds,
        )
    except KeyError as error:
        raise DataError(
            f"collect: the spec in {folder / MANIFEST} has no {error.args[0]}. Copy the run again, or leave it out."
        ) from error


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _runtime_keys() -> set[str]:
    """Dotted keys of the spec that change no result, such as device.kind and gan.micro_batch."""
    return {
        f"{name}.{field.alias or key}"
        for name, section in JobSpec.model_fields.items()
        if isinstance(section.annotation, type) and issubclass(section.annotation, Section)
        for key, field in section.annotation.model_fields.items()
        if is_runtime(field)
    }


def _labelled(groups: Sequence[list[PublishedRun]]) -> list[tuple[str, list[PublishedRun]]]:
    """[(label, runs)] of each setting. The label names the keys in which settings differ; that of a single one is its name."""
    if len(groups) == 1:
        return [(", ".join(sorted({run.name for run in groups[0]})), groups[0])]
    settings = [group[0].setting for group in groups]
    keys = sorted({key for setting in settings for key in setting})
    differing = [key for key in keys if len({_text_of(setting, key) for setting in settings}) > 1]
    ordered = sorted(groups, key=lambda group: [_sort_key(group[0].setting, key) for key in differing])
    return [(", ".join(f"{key}={_text_of(group[0].setting, key)}" for key in differing), group) for group in ordered]


def _text_of(setting: dict[str, Any], key: str) -> str:
    if key not in setting:
        return "(none)"
    value = setting[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _sort_key(setting: dict[str, Any], key: str) -> tuple[float, str]:
    """Numbers by size, before everything else."""
    value = setting.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value, ""
    return float("inf"), _text_of(setting, key)


def _measured(group: list[PublishedRun]) -> dict[str, Any]:
    """The metrics of one setting, per seed and over seeds."""
    seeds = []
    for seed in sorted({run.seed for run in group}):
        runs = sorted((run for run in group if run.seed == seed), key=lambda run: run.fold)
        _refuse_repeated_songs(runs)
        folds = runs[0].folds
        seeds.append(
            {
                "seed": seed,
                "runs": [{"folder": str(run.folder), "fold": run.fold, "songs": len(run.actual)} for run in runs],
                "folds": folds,
                "missing_folds": sorted(set(range(folds or 0)) - {run.fold for run in runs}),
                "songs": sum(len(run.actual) for run in runs),
                "predictors": {name: _pooled(runs, name) for name in _predictors(runs)},
                "coverage": coverage_over_folds([(run.actual, run.bounds) for run in runs]),
            }
        )
    return {"seeds": seeds, "over_seeds": {name: _over_seeds(seeds, name) for name in _predictors(group)}}


def _predictors(runs: list[PublishedRun]) -> list[str]:
    """The stack and the model first."""
    found = {name for run in runs for name in run.predicted}
    return [*(name for name in (STACK, MODEL) if name in found), *sorted(found - {STACK, MODEL})]


def _refuse_repeated_songs(runs: list[PublishedRun]) -> None:
    owner: dict[SongId, PublishedRun] = {}
    for run in runs:
        for song in run.actual:
            if song in owner:
                raise DataError(
                    f"collect: song {song} is a test song of both {owner[song].folder} and {run.folder}, which are runs of "
                    f"one setting with seed {run.seed}; pooled, it would count twice. Leave one of them out."
                )
            owner[song] = run


def _pooled(runs: list[PublishedRun], predictor: str) -> dict[str, dict[str, Any]]:
    """Per dimension the metrics over the songs of all folds as one set, and the CCC of each fold."""
    runs = [run for run in runs if predictor in run.predicted]
    samples, seed = runs[0].bootstrap_samples, runs[0].seed
    # Sorted by id, so that the intervals do not depend on the fold of a song.
    found = {song: labels for run in runs for song, labels in run.actual.items()}
    actual = {song: found[song] for song in in_order(found)}
    predicted = {song: pair for run in runs for song, pair in run.predicted[predictor].items()}
    table = scores(
        np.array([predicted[song] for song in actual]), np.array([*actual.values()]), bootstrap_samples=samples, seed=seed
    )
    by_fold = []
    for run in runs:
        own = np.array([run.predicted[predictor][song] for song in run.actual])
        by_fold.append(scores(own, np.array([*run.actual.values()]), bootstrap_samples=0, seed=seed))
    result: dict[str, dict[str, Any]] = {}
    for dimension in DIMENSIONS:
        own_ccc = [fold[dimension]["ccc"] for fold in by_fold]
        result[dimension] = {
            **table[dimension],
            "songs": len(actual),
            "folds": len(runs),
            "ccc_by_fold": own_ccc,
            "ccc_over_folds": _mean_and_sd(own_ccc),
        }
    return result


def _over_seeds(seeds: list[dict[str, Any]], predictor: str) -> dict[str, dict[str, Any]]:
    tables = [seed["predictors"][predictor] for seed in seeds if predictor in seed["predictors"]]
    return {
        dimension: {metric: _mean_and_sd([table[dimension][metric] for table in tables]) for metric in METRICS}
        for dimension in DIMENSIONS
    }


def _differences(labelled: Sequence[tuple[str, list[PublishedRun]]]) -> list[dict[str, Any]]:
    """The model's CCC of each setting minus that of each setting before it, per seed, on the songs that both have predicted."""
    found = []
    for (label_b, group_b), (label_a, group_a) in itertools.combinations(labelled, 2):
        seeds: list[dict[str, Any]] = []
        for seed in sorted({run.seed for run in group_a} & {run.seed for run in group_b}):
            actual_a, predicted_a = _pooled_model(group_a, seed)
            actual_b, predicted_b = _pooled_model(group_b, seed)
            # In another dataset the same id may be another song.
            songs = in_order(song for song in actual_a if actual_b.get(song) == actual_a[song])
            if songs:
                table = paired_difference(
                    np.array([predicted_a[song] for song in songs]),
                    np.array([predicted_b[song] for song in songs]),
                    np.array([actual_a[song] for song in songs]),
                    bootstrap_samples=group_a[0].bootstrap_samples,
                    seed=seed,
                )
                seeds.append({"seed": seed, "songs": len(songs), **table})
        over_seeds = {
            dimension: _mean_and_sd([seed[dimension]["ccc_difference"] for seed in seeds]) if seeds else None
            for dimension in DIMENSIONS
        }
        found.append({"setting": label_a, "minus": label_b, "seeds": seeds, "over_seeds": over_seeds})
    return found


def _pooled_model(group: list[PublishedRun], seed: int) -> tuple[dict[SongId, Pair], dict[SongId, Pair]]:
    """(labels, predictions of the model) of all folds of a seed."""
    actual: dict[SongId, Pair] = {}
    predicted: dict[SongId, Pair] = {}
    for run in group:
        if run.seed == seed:
            actual |= run.actual
            predicted |= run.predicted[MODEL]
    return actual, predicted


def _mean_and_sd(values: Sequence[Any]) -> dict[str, float | None]:
    """None where a value is None; no SD of a single value."""
    if None in values:
        return {"mean": None, "sd": None}
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": sd}


def _versions(runs: list[PublishedRun]) -> list[dict[str, Any]]:
    """Versions of code, libraries and Python, each with its runs."""
    found: dict[str, dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: run.folder):
        entry = found.setdefault(digest_of(run.versions), {**run.versions, "runs": []})
        entry["runs"].append(str(run.folder))
    return list(found.values())
