"""Collected results as CSV and Markdown."""

import csv
import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emotion.data.label_scale import DEAM_SCALE, scale_text
from emotion.errors import counted, printable
from emotion.evaluation.metrics import DIMENSIONS
from job.results.coverage import coverage_text
from job.results.published_runs import MODEL
from job.results.settings import differing_keys, text_of, values_text

METRICS = ("ccc", "mae", "rmse", "r2", "pearson")
SHOWN_NAMES = {MODEL: "ViT alone"}  # of predictors; others are shown as they are
INTERVALS = "in brackets 95 % intervals, bootstrap over the groups of the split"


def scale_of_labels(is_deams: bool) -> str:
    """The scale of labels and intervals, in words. is_deams: whether the ratings of all runs are on DEAM's scale."""
    labels = scale_text(DEAM_SCALE) if is_deams else "labels on -1..1, made from each dataset's own scale (its metrics.json)"
    return f"{labels}; {INTERVALS}"


def shown_name(predictor: str) -> str:
    return SHOWN_NAMES.get(predictor, predictor)


def as_csv(collected: list[dict[str, Any]]) -> str:
    """A row per setting, seed, predictor and dimension. The cells of an undefined metric are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [column for metric in METRICS for column in (metric, f"{metric}_lo", f"{metric}_hi")]
    writer.writerow(["setting", "seed", "split_seed", "predictor", "dimension", *columns, "songs", "folds"])
    for setting in collected:
        for seed in setting["seeds"]:
            for predictor, table in seed["predictors"].items():
                for dimension, row in table.items():
                    numbers = [number for metric in METRICS for number in (row[metric], *(row[f"{metric}_ci"] or ("", "")))]
                    labels = [setting["label"], seed["seed"], seed["split_seed"], predictor, dimension]
                    writer.writerow([*labels, *numbers, row["songs"], row["folds"]])
    return text.getvalue()


def as_markdown(record: dict[str, Any], out: Path, versions: int, scale: str) -> str:
    """The results as Markdown. record: settings, differences, missing_tasks and final_models, as in collected.json. out: the
    folder of the specs of final models."""
    missing, differences = record["missing_tasks"], record["differences"]
    lines = ["# Collected runs", "", f"Scale: {scale}. ± is the SD, over folds or over seeds. Folds are counted from 0."]
    if versions > 1:
        lines += ["", f"These runs were made by {versions} versions of code or libraries: see collected.json."]
    if missing:
        lines += ["", f"Missing, {counted(len(missing), 'task')}:", ""]
        lines += [f"- {task['task']} ({task['run']})" for task in missing]
    keys = differing_keys([setting["spec"] for setting in record["settings"]])
    for setting in record["settings"]:
        lines += ["", f"## {setting['label']}", ""]
        lines += [_songs_and_folds(seed, setting["seeds"]) for seed in setting["seeds"]]
        names = [_name_of(seed, setting["seeds"]) for seed in setting["seeds"]]
        lines += filter(None, map(coverage_text, names, [seed["coverage"] for seed in setting["seeds"]]))
        if values := _values_beside(setting, keys):
            lines += ["", "Where the settings differ, this one has:", "", *(f"- `{printable(value)}`" for value in values)]
        if final := setting["final_spec"]:
            lines += ["", f"The final model learns from all songs, up to epoch {final['stop_epoch']}, the median of the best "]
            lines[-1] += (
                f"epochs of these {final['runs']} runs: `emotion-job run {printable(shlex.quote(str(out / final['spec'])))}`."
            )
        lines += ["", *aligned(rows_of_predictors(setting["seeds"], setting["over_seeds"]))]
    for final in record["final_models"]:
        lines += ["", f"## Final model {Path(final['folder']).name}", ""]
        lines += [f"Trained on all {final['songs']} songs. The scores are those of its folds, for songs that they have not seen."]
        lines += [f"It is in `{printable(final['folder'])}`."]
        lines += ["", *aligned(rows_of_predictors([final], final["predictors"]))]
    if differences:
        explanation = "CCC on the same songs; above 0 the first is better."
        lines += ["", "## Paired differences", "", explanation, "", *aligned(rows_of_differences(differences))]
    return "\n".join(lines) + "\n"


def _values_beside(setting: dict[str, Any], keys: Sequence[str]) -> list[str]:
    """KEY=VALUE of the keys in which settings differ; empty if the label already shows them."""
    return [] if setting["label"] == values_text(setting["spec"], keys) else [values_text(setting["spec"], [key]) for key in keys]


def _name_of(seed: dict[str, Any], among: list[dict[str, Any]]) -> str:
    """Seed as text: "0"; or "0, split 1" if folds were repeated with other split seeds."""
    is_repeated = len({other["split_seed"] for other in among}) > 1
    return f"{seed['seed']}, split {seed['split_seed']}" if is_repeated else str(seed["seed"])


def _songs_and_folds(seed: dict[str, Any], among: list[dict[str, Any]]) -> str:
    """- seed 0: 1440 songs, 4 of 5 folds; missing: fold 3 of 5"""
    folds, missing = seed["folds"], seed["missing_folds"]
    songs = counted(seed["songs"], "song")
    text = f"- seed {_name_of(seed, among)}: {songs}"
    if folds:
        text += f", {folds - len(missing)} of {folds} folds"
    if missing:
        text += f"; missing: fold{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {folds}"
    return text


def rows_of_settings(settings: list[dict[str, Any]]) -> list[list[str]]:
    """A header, and a row per key in which settings differ, with a column per setting; empty if the labels show these values."""
    keys = differing_keys([setting["spec"] for setting in settings])
    if not any(_values_beside(setting, keys) for setting in settings):
        return []
    return [
        ["key", *(setting["label"] for setting in settings)],
        *([key, *(text_of(setting["spec"], key) for setting in settings)] for key in keys),
    ]


def rows_of_predictors(seeds: list[dict[str, Any]], over_seeds: dict[str, Any]) -> list[list[str]]:
    """A header, and a row per predictor and seed, then one over the seeds."""
    columns = ("CCC", "CCC over folds", "MAE", "R²")
    rows = [["predictor", "seed", *(f"{dimension} {column}" for dimension in DIMENSIONS for column in columns)]]
    for predictor, found in over_seeds.items():
        for seed in seeds:
            if predictor in seed["predictors"]:
                rows.append([shown_name(predictor), _name_of(seed, seeds)])
                for row in seed["predictors"][predictor].values():
                    ccc = with_interval(row, "ccc")
                    rows[-1] += [ccc, _mean_text(row["ccc_over_folds"]), _number(row["mae"]), _number(row["r2"])]
        if len(seeds) > 1:
            rows.append([shown_name(predictor), "mean ± SD"])
            for row in found.values():
                rows[-1] += [_mean_text(row["ccc"]), "", _mean_text(row["mae"]), _mean_text(row["r2"])]
    return rows


def rows_of_differences(differences: list[dict[str, Any]]) -> list[list[str]]:
    """A header, and a row per pair of settings and seed, then one over the seeds."""
    rows = [["settings", "predictor", "seed", *(f"{dimension} CCC" for dimension in DIMENSIONS), "songs"]]
    for pair in differences:
        first = [f"{pair['setting']} − {pair['minus']}", shown_name(pair["predictor"])]
        for seed in pair["seeds"]:
            cells = [with_interval(seed[dimension], "ccc_difference") for dimension in DIMENSIONS]
            rows.append([*first, _name_of(seed, pair["seeds"]), *cells, str(seed["songs"])])
        if len(pair["seeds"]) > 1:
            rows.append([*first, "mean ± SD", *(_mean_text(pair["over_seeds"][dimension]) for dimension in DIMENSIONS), ""])
        if not pair["seeds"]:
            rows.append([*first, "", *("no songs in common" for _ in DIMENSIONS), "0"])
    return rows


def aligned(rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table with aligned columns. The first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]


def with_interval(row: dict[str, Any], name: str) -> str:
    text = _number(row[name])
    interval = row[f"{name}_ci"]
    return text if interval is None else f"{text} [{_number(interval[0])}, {_number(interval[1])}]"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:z.3f}"


def _mean_text(row: dict[str, float | None]) -> str:
    return _number(row["mean"]) + ("" if row["sd"] is None else f" ± {row['sd']:.3f}")
