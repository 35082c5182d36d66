"""Many published runs → one table: folds pooled song by song, seeds averaged, every number with its interval.
Runs whose specs differ only in name, seeds, fold and runtime keys belong to one *setting*. They are measured together, per pair
of job seed and split seed (repeated folds have several split seeds)."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emotion.data.out_of_fold import OUT_OF_FOLD, Pair
from emotion.data.song_ids import SongId, in_order
from emotion.errors import DataError, SpecError, StorageError, printable, system_reason
from emotion.evaluation.metrics import DIMENSIONS, paired_difference, scores
from emotion.files import digest_of, make_folder, write_json, write_text
from job.results.coverage import coverage_over_folds
from job.results.final_spec import FINAL, complete_sets, write_final
from job.results.manifest import MANIFEST
from job.results.published_runs import MODEL, STACK, PublishedRun, by_seeds, compared_by, groups_of, published_below, read_run
from job.results.settings import differing_keys, labels_of, text_of
from job.results.sweep_report import REPORT, write_sweep_report
from job.results.tables import METRICS, as_csv, as_markdown, scale_of_labels


def collect_runs(runs: Sequence[Path], out: Path) -> str:
    """Write `collected.json`, `collected.csv`, `collected.md` and `report.html` into `out`; return the Markdown.
    runs: published runs, folders with published runs one level below or in their `published/`, or folders of sweeps, whose
    unpublished tasks are listed as missing. A run found twice counts once. Per setting and seed, the test songs of all folds are
    measured as one set, for the stack, the ViT alone and each baseline; mean and SD of the folds' own CCC are added. Over seeds:
    mean and SD of the pooled values. SD has the divisor n - 1. Missing folds of `kfold` are listed. All pairs of settings are
    compared song by song, by the stack if all runs have one, else by the ViT alone. For a setting with a complete set of folds,
    a spec of the final model is written, too. Final models among the runs are listed with the scores of their folds. Raises
    DataError for a path without a published run, a damaged run, and a song predicted twice for one setting and seed; StorageError
    for a failed read or write; SpecError if `out` is a published run or has an output file that no `collect` wrote."""
    groups: dict[str, list[PublishedRun]] = {}
    try:
        _require_own(out)
        found = [published_below(path) for path in runs]
        # Sorted, so that the name in the sweep counts for a run that is found twice, in a sweep and outside one.
        named = sorted((setting, folder.resolve()) for published, _ in found for folder, setting in published.items())
        in_sweep = {folder: setting for setting, folder in named}
        missing = [task for _, tasks in found for task in tasks]
        read = [*map(read_run, sorted(in_sweep))]
        for run in read:
            if not run.is_final:
                groups.setdefault(digest_of(run.setting), []).append(run)
        labelled = _labelled([*groups.values()], in_sweep)
        collected = [{"label": label, "spec": group[0].setting, **_measured(group)} for label, group in labelled]
        differences = _differences(labelled)
        versions = _versions(read)
        scale = scale_of_labels(all(run.is_on_deams_scale for run in read))
        make_folder(out)
        for folds in out.glob(OUT_OF_FOLD.replace(".", "*.")):  # of an earlier collection; kept, because runs name these files
            mark = folds.stem.removeprefix(Path(OUT_OF_FOLD).stem)
            (out / FINAL.replace(".", f"{mark}.")).unlink(missing_ok=True)
        is_only = sum(bool(complete_sets(group)) for _, group in labelled) == 1
        for (_, group), setting in zip(labelled, collected, strict=True):
            setting["final_spec"] = write_final(group, setting["over_seeds"], out, is_only=is_only)
        finals = [{"folder": str(run.folder), **_measured([run])["seeds"][0]} for run in read if run.is_final]
        for final in finals:
            del final["coverage"]  # the widths of its intervals are quantiles of the errors for the same songs
        text = as_markdown(
            {"settings": collected, "differences": differences, "missing_tasks": missing, "final_models": finals},
            out,
            versions=len(versions),
            scale=scale,
        )
        record = {"scale": scale, "settings": collected, "differences": differences, "missing_tasks": missing}
        record |= {"final_models": finals, "versions": versions}
        write_json(out / "collected.json", record)
        write_text(out / "collected.csv", as_csv(collected))
        write_text(out / "collected.md", text)
        write_sweep_report(out, labelled, [run for run in read if run.is_final], record)
    except OSError as error:
        raise StorageError.of(
            error,
            f"collect: cannot use {error.filename} ({system_reason(error)}). Check its owner and mode, or name another with "
            f"--out.",
        ) from error
    return text


def _require_own(out: Path) -> None:
    """Raise SpecError unless the files to be replaced come from an earlier `collect`, which wrote a second file with each."""
    if out.exists() and not out.is_dir():
        raise SpecError(f"collect: --out: {printable(out)} is a file, expected a folder. Name another one.")
    if (out / MANIFEST).exists():
        raise SpecError(f"collect: --out: {printable(out)} is a published run, which is never overwritten. Name another folder.")
    for name, beside in ((REPORT, "collected.json"), (FINAL, OUT_OF_FOLD)):
        if (out / name).exists() and not (out / beside).exists():
            raise SpecError(
                f"collect: --out: {printable(out)} has a {name} that no earlier collect wrote: there is no {beside} beside it. "
                f"Name another folder."
            )


def _labelled(groups: Sequence[list[PublishedRun]], in_sweep: Mapping[Path, str]) -> list[tuple[str, list[PublishedRun]]]:
    """[(label, runs)] of each setting, ordered by the values in which settings differ.

    in_sweep: folder of a run → the name of its setting in a sweep, or "".
    """
    keys = differing_keys([group[0].setting for group in groups])
    ordered = sorted(groups, key=lambda group: [_sort_key(group[0].setting, key) for key in keys])
    names = [{run.name for run in group} for group in ordered]
    if len(groups) > 1:
        names = [{in_sweep[run.folder] or run.name for run in group} for group in ordered]
    return [*zip(labels_of([group[0].setting for group in ordered], names), ordered, strict=True)]


def _sort_key(setting: dict[str, Any], key: str) -> tuple[float, str]:
    """Sort key: numbers first, by value; then all other values."""
    value = setting.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value, ""
    return float("inf"), text_of(setting, key)


def _measured(group: list[PublishedRun]) -> dict[str, Any]:
    """The metrics of one setting, per seed and over seeds."""
    seeds = []
    for runs in by_seeds(group).values():
        _refuse_repeated_songs(runs)
        folds = runs[0].folds
        seeds.append(
            {
                "seed": runs[0].seed,
                "split_seed": runs[0].split_seed,
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
    """Names of all predictors, with the stack and the ViT first."""
    found = {name for run in runs for name in run.predicted}
    return [*(name for name in (STACK, MODEL) if name in found), *sorted(found - {STACK, MODEL})]


def _refuse_repeated_songs(runs: list[PublishedRun]) -> None:
    owner: dict[SongId, PublishedRun] = {}
    for run in runs:
        for song in run.actual:
            if song in owner:
                raise DataError(
                    f"collect: song {song} is a test song of both {owner[song].folder} and {run.folder}, which are runs of "
                    f"one setting with seed {run.seed} and split.seed {run.split_seed}; pooled, it would count twice. "
                    f"Leave one of them out."
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
    groups = groups_of(runs)
    table = scores(
        np.array([predicted[song] for song in actual]),
        np.array([*actual.values()]),
        groups=[groups[song] for song in actual],
        bootstrap_samples=samples,
        seed=seed,
    )
    by_fold = []
    for run in runs:
        own = np.array([run.predicted[predictor][song] for song in run.actual])
        by_fold.append(scores(own, np.array([*run.actual.values()]), groups=None, bootstrap_samples=0, seed=seed))
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
    """The CCC of each setting minus that of each setting before it, per seed, on the songs that both have predicted. Predictors:
    the one by which the runs are compared, and the ViT alone, as a stack may give it no share."""
    found = []
    predictors = dict.fromkeys([compared_by([run for _, group in labelled for run in group]), MODEL])
    for predictor, ((label_b, group_b), (label_a, group_a)) in itertools.product(predictors, itertools.combinations(labelled, 2)):
        seeds: list[dict[str, Any]] = []
        runs_a, runs_b = by_seeds(group_a), by_seeds(group_b)
        for seeds_of_pair in sorted(runs_a.keys() & runs_b.keys()):
            seed, split_seed = seeds_of_pair
            actual_a, predicted_a = _pooled_predictions(runs_a[seeds_of_pair], predictor)
            actual_b, predicted_b = _pooled_predictions(runs_b[seeds_of_pair], predictor)
            # In another dataset the same id may be another song.
            songs = in_order(song for song in actual_a if actual_b.get(song) == actual_a[song])
            if songs:
                # With split.grouped: false in one of them, its groups are single songs: those of the other are drawn.
                maps = [groups_of(runs[seeds_of_pair]) for runs in (runs_a, runs_b)]
                groups = min(([found[song] for song in songs] for found in maps), key=lambda names: (len(set(names)), names))
                table = paired_difference(
                    np.array([predicted_a[song] for song in songs]),
                    np.array([predicted_b[song] for song in songs]),
                    np.array([actual_a[song] for song in songs]),
                    groups=groups,
                    bootstrap_samples=group_a[0].bootstrap_samples,
                    seed=seed,
                )
                seeds.append({"seed": seed, "split_seed": split_seed, "songs": len(songs), **table})
        over_seeds = {
            dimension: _mean_and_sd([seed[dimension]["ccc_difference"] for seed in seeds]) if seeds else None
            for dimension in DIMENSIONS
        }
        pair = {"setting": label_a, "minus": label_b, "predictor": predictor}
        found.append({**pair, "seeds": seeds, "over_seeds": over_seeds})
    return found


def _pooled_predictions(runs: list[PublishedRun], predictor: str) -> tuple[dict[SongId, Pair], dict[SongId, Pair]]:
    """(labels, predictions) of all folds of a seed."""
    actual: dict[SongId, Pair] = {}
    predicted: dict[SongId, Pair] = {}
    for run in runs:
        actual |= run.actual
        predicted |= run.predicted[predictor]
    return actual, predicted


def _mean_and_sd(values: Sequence[Any]) -> dict[str, float | None]:
    """Mean and SD; both None if a value is None. A single value has no SD."""
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
