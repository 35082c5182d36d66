"""Rows of the tables of a run's report, from its metrics.json, quality.json and memory.json. Cells are text."""

import itertools
from typing import Any

from emotion.evaluation.metrics import DIMENSIONS
from emotion.report.page import NOT_MEASURED, at, estimate, mebibytes, shown, with_interval

METRICS = {"ccc": "CCC", "mae": "MAE", "rmse": "RMSE", "r2": "R²", "pearson": "Pearson's r"}


def metric_rows(metrics: Any, dimension: str) -> list[list[str]]:
    """Name and metrics of the stack, the ViT and every baseline."""
    own = {"stack": at(metrics, "stack"), "ViT alone": at(metrics, "model")}
    predictors = {**own, **(at(metrics, "baselines") or {})}
    return [[name, *(with_interval(at(found, dimension), metric) for metric in METRICS)] for name, found in predictors.items()]


def percent(share: float | None) -> str:
    return NOT_MEASURED if share is None else f"{100 * share:g} %"


def interval_rows(metrics: Any) -> list[list[str]]:
    """Cells of a row: what it is of, half width, held-out songs, share of test songs inside, mean width."""
    rows = []
    for name, key in (("stack", "stack"), ("ViT alone", "model")):
        for dimension in DIMENSIONS:
            found = at(metrics, "intervals", key, dimension)
            if found is not None:
                width = "whole range: too few songs" if found["half_width"] is None else f"± {shown(found['half_width'])}"
                inside = with_interval(found, "coverage")
                rows.append([f"{name}, {dimension}", width, shown(found["held_out_songs"]), inside, shown(found["mean_width"])])
    return rows


def listener_rows(metrics: Any) -> list[list[str]]:
    """Cells of a row: dimension, CCC of one listener, listeners that stack and ViT are worth, CCC of all listeners."""
    rows = []
    for dimension in DIMENSIONS:
        found = at(metrics, "listeners", dimension)
        if found is not None:
            worth = [_listeners(at(found, "listener_equivalents", name)) for name in ("stack", "model")]
            rows.append([dimension, shown(found["single_listener_ccc"]), *worth, shown(found["all_listeners_ccc"])])
    return rows


def dynamic_rows(metrics: Any) -> list[list[str]]:
    """Cells of a row: what it is of, CCC and RMSE of all points, means of those over songs."""
    names = ("ccc", "rmse", "song_ccc", "song_rmse")
    rows = []
    for name, key in (("curve", "curve"), ("one number per song", "flat")):
        for dimension in DIMENSIONS:
            found = at(metrics, "dynamic", key, dimension)
            if found is not None:
                rows.append([f"{name}, {dimension}", *(with_interval(found, measure) for measure in names)])
    return rows


def _listeners(found: Any) -> str:
    """Such as 2.1 [1.5, 4.0]. None stands for more than any number."""
    value, *ends = (shown(number, 1) if number is not None else "∞" for number in (found["value"], *(found["ci"] or [])))
    return f"{value} [{', '.join(ends)}]" if ends else value


def quality_rows(quality: Any) -> list[list[str]]:
    """Cells of a row: the measure, its value for the synthetic clips, the anchor, and what the anchor is."""
    read_back = at(quality, "label_read_back")
    rows = []
    for name, measure in (("frechet", "Fréchet distance"), ("kernel", "kernel distance (squared MMD)")):
        distances = at(quality, name)
        found = [estimate(at(distances, f"{origin}_to_validation")) for origin in ("synthetic", "training")]
        rows.append([f"{measure} to validation songs", *found, "training songs to validation songs; lower is closer"])
        difference = estimate(at(distances, "difference"))
        rows.append([f"{measure}: synthetic minus anchor", difference, "0", "as close as other real music"])
    copies = at(quality, "copy_rate")
    rates = [estimate(at(copies, origin)) for origin in ("synthetic", "validation", "training")]
    anchor = "validation songs taken for copies (false positives); other clips of training songs found (true positives)"
    rows.append(["share that copy a training song", rates[0], f"{rates[1]}; {rates[2]}", anchor])
    rows.append(["diversity", estimate(at(quality, "diversity")), "1", "as diverse as training songs"])
    for dimension, metric in itertools.product(DIMENSIONS, ("ccc", "mae")):
        cells = [with_interval(at(read_back, origin, dimension), metric) for origin in ("synthetic", "validation")]
        name = f"{METRICS[metric]} of {dimension} read back"
        rows.append([name, *cells, "the same regressor on validation songs"])
    for score in ("overall", "fd_score", "freq_score", "smooth_score"):
        cells = [shown(at(quality, "notebook_score", score), 1), "100"]
        rows.append(
            [f"notebook's score, {score}", *cells, "the maximum; of the notebook that this replaces, blind to labels and copies"]
        )
    return rows


def memory_rows(memory: Any) -> dict[str, list[list[str]]]:
    """Training phase → rows of component, predicted and measured memory at the peak of a step."""
    tables = {}
    for phase, found in (memory or {}).items():
        predicted = at(found, "memory", "predicted")
        if predicted is None:
            continue
        measured = {**(at(found, "memory", "measured") or {}), "process": at(found, "peak_process_bytes")}
        names = predicted or measured
        tables[phase] = [[name, *(mebibytes(at(kind, name)) for kind in (predicted, measured))] for name in names]
    return tables
