"""Writes `report.html` for collected runs: a comparison of the settings, and the best setting song by song."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from emotion.data.song_ids import SongId, in_order
from emotion.errors import counted
from emotion.evaluation.metrics import DIMENSIONS, paired_difference
from emotion.files import read_json_lines, write_text
from emotion.report.attempts import goodput
from emotion.report.charts import Estimate, interval_chart, lowest, plane_chart, scatter_chart
from emotion.report.curves import fold_chart
from emotion.report.errors import distance, quadrant_rows, worst_songs
from emotion.report.page import at, in_words, json_at, mebibytes, render, seconds_text, shown, signed, with_interval
from emotion.training.progress_files import METRICS
from job.results.published_runs import MODEL, STACK, PublishedRun, by_seeds, groups_of
from job.results.settings import names_text
from job.results.tables import rows_of_differences, rows_of_predictors, rows_of_settings, shown_name
from job.storage.local_folder import LocalFolder

REPORT = "report.html"
METRICS_FILE = "metrics.json"
WORST_SONGS = 8

Labelled = Sequence[tuple[str, list[PublishedRun]]]


def write_sweep_report(out: Path, labelled: Labelled, finals: Sequence[PublishedRun], record: dict[str, Any]) -> None:
    """Write REPORT into `out`. labelled: the runs of each setting, in the order of `record["settings"]`; finals: final models;
    record: the content of collected.json."""
    settings = record["settings"]
    best = max(range(len(settings)), key=lambda index: _mean_ccc(settings[index]), default=None)
    runs = [run for _, group in labelled for run in group]
    page = render(
        "sweep.html.jinja",
        name=_title(labelled, finals),
        verdict=_verdict(labelled, settings, best),
        charts=_charts(labelled, settings, best),
        settings=[{"number": number, **_tables(setting)} for number, setting in enumerate(settings, 1)],
        differing=rows_of_settings(settings),
        best=None if best is None else settings[best]["label"],
        quadrants=[] if best is None else _quadrants(labelled[best][1]),
        worst=[] if best is None else _worst(labelled[best][1]),
        differences=rows_of_differences(record["differences"]) if record["differences"] else [],
        missing=record["missing_tasks"],
        finals=[
            {"folder": Path(final["folder"]).name, **_tables({"seeds": [final], "over_seeds": final["predictors"]})}
            for final in record["final_models"]
        ],
        runs=[_run_cells(run, out) for run in [*runs, *finals]],
        goodput=_goodput([*runs, *finals]),
        scale=record["scale"],
        versions=[_version_cells(version) for version in record["versions"]],
    )
    write_text(out / REPORT, page)


def _title(labelled: Labelled, finals: Sequence[PublishedRun]) -> str:
    names = {run.name for _, group in labelled for run in group} | {run.name for run in finals}
    runs = counted(sum(len(group) for _, group in labelled) + len(finals), "run")
    title = f"{names_text(names)}: {runs}" if names else runs
    return f"{title} of {len(labelled)} settings" if len(labelled) > 1 else title


def _predictor(setting: dict[str, Any]) -> str:
    """Name of the predictor that a setting publishes: the stack, or the ViT in runs of earlier versions."""
    return STACK if STACK in setting["over_seeds"] else MODEL


def _mean_ccc(setting: dict[str, Any]) -> float:
    found = [setting["over_seeds"][_predictor(setting)][dimension]["ccc"]["mean"] for dimension in DIMENSIONS]
    return -2.0 if None in found else float(np.mean(found))


def _verdict(labelled: Labelled, settings: list[dict[str, Any]], best: int | None) -> str:
    """One sentence: how well the best setting predicts, by its first seed, compared with its best baseline."""
    if best is None:
        return "None of the runs has test songs of its own: they are final models, with the scores of their folds."
    setting, runs = settings[best], _first_seed(labelled[best][1])
    seed, name = setting["seeds"][0], _predictor(setting)
    clauses = []
    for dimension in DIMENSIONS:
        baselines = {key: found[dimension] for key, found in seed["predictors"].items() if key not in (STACK, MODEL)}
        known = [key for key in sorted(baselines) if baselines[key]["ccc"] is not None]
        clause = f"{dimension} with a CCC of {with_interval(seed['predictors'][name][dimension], 'ccc', 2)}"
        if known:
            baseline = max(known, key=lambda key: baselines[key]["ccc"])
            words = in_words(_difference(runs, name, baseline)[dimension]["ccc_difference_ci"])
            clause += f", {words} ({baseline}, {with_interval(baselines[baseline], 'ccc', 2)})"
        ceiling = _ceiling(runs, dimension)
        clauses.append(clause if ceiling is None else f"{clause}, where the labels allow {shown(ceiling, 2)} at most")
    which = f"the {shown_name(name)}" if len(settings) == 1 else f"the best of {len(settings)} settings, {setting['label']},"
    folds = f", each held out by one of {len(seed['runs'])} folds" if len(seed["runs"]) > 1 else ""
    many = f", with the first of {len(setting['seeds'])} seeds" if len(setting["seeds"]) > 1 else ""
    return f"On {seed['songs']} test songs{folds}, {which} predicts {'; and '.join(clauses)}{many}."


def _first_seed(group: list[PublishedRun]) -> list[PublishedRun]:
    """The folds of the first seed of a setting."""
    return next(iter(by_seeds(group).values()))


def _ceiling(runs: list[PublishedRun], dimension: str) -> float | None:
    """Mean over the folds of the highest CCC that the labels of their test songs allow; None if a run has no such value here."""
    found = []
    for run in runs:
        if METRICS_FILE in run.manifest.changed(LocalFolder(run.folder), [METRICS_FILE]):
            return None  # not fetched for a run in object storage
        found.append(at(json_at(run.folder / METRICS_FILE), "ceiling", dimension, "reliability"))
    # Not "ccc": runs of earlier versions have a lower one.
    return None if None in found else float(np.mean(np.sqrt(found)))


def _difference(runs: list[PublishedRun], name: str, baseline: str) -> dict[str, Any]:
    """Difference of the CCC of a predictor and a baseline on the pooled folds, paired by song."""
    ids, actual, predicted = _pooled(runs, name)
    other = {song: pair for run in runs for song, pair in run.predicted.get(baseline, {}).items()}
    if set(ids) - set(other):
        return {dimension: {"ccc_difference_ci": None} for dimension in DIMENSIONS}
    against = np.array([other[song] for song in ids])
    settings = {"bootstrap_samples": runs[0].bootstrap_samples, "seed": runs[0].seed}
    of_song = groups_of(runs)
    groups = [of_song[song] for song in ids]
    return dict(paired_difference(predicted, against, actual, groups=groups, **settings))


def _pooled(runs: Sequence[PublishedRun], name: str) -> tuple[list[SongId], Any, Any]:
    """Ids, labels and predictions [songs, 2] of the test songs of all folds."""
    actual = {song: pair for run in runs for song, pair in run.actual.items()}
    predicted = {song: pair for run in runs for song, pair in run.predicted[name].items()}
    ids = in_order(actual)
    return ids, np.array([actual[song] for song in ids]), np.array([predicted[song] for song in ids])


def _best_songs(group: list[PublishedRun]) -> tuple[list[SongId], Any, Any, dict[str, int]]:
    """The songs of the first seed of a setting, and the settings of its intervals."""
    runs = _first_seed(group)
    name = STACK if all(STACK in run.predicted for run in runs) else MODEL
    return *_pooled(runs, name), {"bootstrap_samples": runs[0].bootstrap_samples, "seed": runs[0].seed}


def _charts(labelled: Labelled, settings: list[dict[str, Any]], best: int | None) -> dict[str, Markup]:
    if best is None:
        return {}
    charts, estimates = {}, {}
    for dimension in DIMENSIONS:
        if len(settings) == 1:
            seed = settings[0]["seeds"][0]
            found = [(name, scores[dimension]) for name, scores in seed["predictors"].items()]
        else:
            found = [
                (f"setting {number}", setting["seeds"][0]["predictors"][_predictor(setting)][dimension])
                for number, setting in enumerate(settings, 1)
            ]
        names = {STACK: "a", MODEL: "b", f"setting {best + 1}": "a"}
        rows = [Estimate(shown_name(name), scores["ccc"], scores["ccc_ci"], names.get(name, "muted")) for name, scores in found]
        estimates[dimension] = rows
    for dimension, rows in estimates.items():
        ceiling = _ceiling(_first_seed(labelled[best][1]), dimension)
        limit = None if ceiling is None else (f"ceiling {shown(ceiling, 2)}", ceiling)
        low = lowest(estimates.values())
        charts[f"ccc {dimension}"] = interval_chart(dimension.capitalize(), rows, x="CCC", low=low, limit=limit)
    chart = fold_chart(
        [
            (f"fold {run.fold}", read_json_lines(run.folder / "logs" / METRICS), run.training)
            for run in _first_seed(labelled[best][1])
        ]
    )
    if chart is not None:
        charts["folds"] = chart
    ids, actual, predicted, _ = _best_songs(labelled[best][1])
    charts["plane"] = plane_chart("Labels and predictions", ids, actual, predicted, {})
    for column, dimension in enumerate(DIMENSIONS):
        charts[f"scatter {dimension}"] = scatter_chart(
            dimension.capitalize(), actual[:, column], predicted[:, column], style="ab"[column]
        )
    return charts


def _quadrants(group: list[PublishedRun]) -> list[list[str]]:
    ids, actual, predicted, settings = _best_songs(group)
    of_song = groups_of(group)
    return quadrant_rows([of_song[song] for song in ids], actual, predicted, **settings)


def _worst(group: list[PublishedRun]) -> list[list[str]]:
    ids, actual, predicted, _ = _best_songs(group)
    far = distance(actual, predicted)
    rows = []
    for index in worst_songs(actual, predicted, WORST_SONGS):
        pairs = [", ".join(map(signed, pair[index].tolist())) for pair in (actual, predicted)]
        rows.append([str(ids[index]), *pairs, shown(float(far[index]), 2)])
    return rows


def _tables(setting: dict[str, Any]) -> dict[str, Any]:
    """header and rows of the predictors of a setting, its missing folds; its label and the spec of the final model, if any."""
    header, *rows = rows_of_predictors(setting["seeds"], setting["over_seeds"])
    missing = [fold for seed in setting["seeds"] for fold in seed.get("missing_folds", [])]
    return {
        "label": setting.get("label"),
        "header": header,
        "rows": rows,
        "missing_folds": missing,
        "final_spec": setting.get("final_spec"),
    }


def _run_cells(run: PublishedRun, out: Path) -> dict[str, Any]:
    """The row of a run. name: its folder; cells: seed, fold, time, peak memory, attempts, goodput, warnings; link: to its report,
    if that is a local file."""
    manifest = run.manifest
    measured = [record.measured for record in manifest.phases.values()]
    peaks = [peak for one in measured if isinstance(peak := one.get("peak_process_bytes"), int)]
    seconds, share = goodput([attempt.model_dump() for attempt in manifest.attempts])
    fold = "all songs" if run.is_final else str(run.fold)
    cells = [str(run.seed), fold, seconds_text(seconds), mebibytes(max(peaks, default=None)), str(len(manifest.attempts))]
    cells += [shown(None) if share is None else f"{100 * share:.1f} %", str(len(manifest.warnings))]
    report = run.folder / REPORT
    link = Path(os.path.relpath(report, out)).as_posix() if report.is_file() else None
    return {"name": run.folder.name, "cells": cells, "link": link}


def _goodput(runs: Sequence[PublishedRun]) -> str:
    found = [goodput([attempt.model_dump() for attempt in run.manifest.attempts]) for run in runs]
    total = sum(seconds for seconds, _ in found)
    attempts = sum(len(run.manifest.attempts) for run in runs)
    text = f"{counted(len(runs), 'run')} took {seconds_text(total)} in {counted(attempts, 'attempt')}"
    if total > 0 and all(share is not None for _, share in found):
        useful = sum(seconds * (share or 0) for seconds, share in found)
        text += f"; {seconds_text(total - useful)} of it were lost with interruptions and computed again"
    return f"{text}."


def _version_cells(version: dict[str, Any]) -> list[str]:
    code = version["code"]
    libraries = ", ".join(f"{name} {number}" for name, number in version["libraries"].items() if number)
    return [
        f"{code['version']}, sources {code['source_sha256'][:12]}",
        f"Python {version['python']}, {libraries}",
        str(len(version["runs"])),
    ]
