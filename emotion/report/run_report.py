"""The report of a published run: one HTML page that opens without a network, for readers who do not know the job."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import yaml
from markupsafe import Markup

from emotion.data.song_ids import SongId, song_id_of
from emotion.evaluation.metrics import DIMENSIONS, paired_difference
from emotion.files import read_json_lines, write_text
from emotion.report import tables
from emotion.report.attempts import attempt_rows, goodput_text
from emotion.report.charts import Estimate, interval_chart, lowest, plane_chart, scatter_chart
from emotion.report.curves import gan_charts, vit_charts
from emotion.report.errors import distance, group_rows, quadrant_rows, worst_songs
from emotion.report.page import (
    NOT_MEASURED,
    at,
    csv_rows,
    data_uri,
    in_words,
    json_at,
    mebibytes,
    render,
    shown,
    signed,
    sound_uri,
    with_interval,
)
from emotion.training.progress_files import METRICS

Numbers = npt.NDArray[np.float64]

LARGEST_PAGE_BYTES = 4_800_000
OTHER_TEXT_BYTES = 300_000  # room for tables and style, beside charts, pictures, sounds and the spec
WORST_SONGS = 8


@dataclass(frozen=True)
class Facts:
    """Facts for the report that are not in the files of a run.

    phases: in their order; attempts: as in the manifest; provenance: (what, value); genres: song → genre; excerpt: a song → a few
    seconds of it as MP3, or None if there is no audio or it may not be published.
    """

    phases: Sequence[str] = ()
    attempts: Sequence[Mapping[str, Any]] = ()
    provenance: Sequence[tuple[str, str]] = ()
    genres: Mapping[SongId, str] = field(default_factory=dict)
    excerpt: Callable[[SongId], bytes | None] = lambda _: None


@dataclass(frozen=True)
class Songs:
    """The test songs: ids, labels and predictions of the stack [songs, 2], groups."""

    ids: list[SongId]
    actual: Numbers
    predicted: Numbers
    groups: dict[SongId, str]

    @property
    def group_of_each(self) -> list[str]:
        """[songs]; a song that split.csv does not list is one of its own."""
        return [self.groups.get(song, str(song)) for song in self.ids]


def write_report(run: Path, name: str, facts: Facts | None = None) -> None:
    """Write `report.html` into the published folder `run`, from the files in it.

    name: of the run, for the title. Missing files and null values are shown as "not measured". Equal folders and facts give equal
    bytes.
    """
    facts = facts or Facts()
    metrics, quality, memory = (json_at(run / f"{kind}.json") for kind in ("metrics", "quality", "memory"))
    songs = _songs(run)
    records = read_json_lines(run / "logs" / METRICS)
    training = json_at(run / "model" / "training.json")
    spec_path = run / "spec.yaml"
    spec_text = spec_path.read_text(encoding="utf-8") if spec_path.exists() else ""
    spec = yaml.safe_load(spec_text)
    settings = {"bootstrap_samples": at(spec, "evaluate", "bootstrap_samples") or 0, "seed": at(spec, "seed") or 0}
    best = _best_baselines(metrics, _differences(run, songs, settings))
    charts = _charts(metrics, songs, records, training)
    pictures = {path.stem: data_uri("image/png", path.read_bytes()) for path in sorted(run.glob("pictures/*.png"))}
    room = LARGEST_PAGE_BYTES - OTHER_TEXT_BYTES
    room -= sum(len(text.encode()) for text in (spec_text, *charts.values(), *pictures.values()))
    worst, room = _worst(songs, facts, room)
    warm_start = at(spec, "init_from", "run")
    page = render(
        "run.html.jinja",
        name=name,
        verdict=_verdict(metrics, best, len(songs.ids) if songs else at(metrics, "songs", "test") or 0),
        warm_start=Path(warm_start).name if warm_start else None,
        scale=shown(at(metrics, "scale")),
        songs={split: shown(at(metrics, "songs", split)) for split in ("train", "validation", "test")},
        headline=_headline(metrics, best),
        charts=charts,
        pictures=pictures,
        quadrants=quadrant_rows(songs.group_of_each, songs.actual, songs.predicted, **settings) if songs else [],
        groupings=_groupings(songs, facts, settings),
        worst=worst,
        warnings=[record for record in records if "warning" in record],
        left_out=csv_rows(run / "left_out.csv"),
        metric_names=list(tables.METRICS.values()),
        intervals=tables.interval_rows(metrics),
        level=tables.percent(at(metrics, "intervals", "level")),
        listeners=tables.listener_rows(metrics),
        dynamic=tables.dynamic_rows(metrics),
        no_listeners=at(metrics, "no_ceiling") or NOT_MEASURED,
        tables={dimension: tables.metric_rows(metrics, dimension) for dimension in DIMENSIONS},
        synthetic_clips=at(training, "synthetic_clips", "why"),
        is_probe=at(training, "is_linear_probe") is True,
        learnt_from="real clips alone" if at(training, "synthetic_per_batch") == 0 else "real and synthetic clips",
        quality=tables.quality_rows(quality),
        quality_space=shown(at(quality, "space")),
        not_held_out=at(quality, "validation_songs_are"),
        out_of_fold=at(metrics, "out_of_fold"),
        samples=_samples(run / "samples", room),
        phases=_phase_rows(memory, facts.phases),
        memory=tables.memory_rows(memory),
        attempts=attempt_rows(facts.attempts),
        goodput=goodput_text(facts.attempts),
        provenance=facts.provenance,
        spec=spec_text or NOT_MEASURED,
    )
    write_text(run / "report.html", page)


@dataclass(frozen=True)
class Best:
    """The baseline with the highest CCC of a dimension: its name, or none, its scores; the stack minus it, paired by song."""

    name: str
    scores: Any
    difference: Any


def _best_baselines(metrics: Any, differences: dict[str, dict[str, Any]]) -> dict[str, Best]:
    """Dimension → its best baseline on the test songs."""
    baselines = at(metrics, "baselines") or {}
    best = {}
    for dimension in DIMENSIONS:
        found = {name: at(scores, dimension, "ccc") for name, scores in sorted(baselines.items())}
        name = max((name for name in found if found[name] is not None), key=lambda name: found[name], default="")
        best[dimension] = Best(name, at(baselines, name, dimension), at(differences, name, dimension))
    return best


def _verdict(metrics: Any, best: dict[str, Best], songs: int) -> str:
    """One sentence: how well the stack predicts, beside the best baseline and the ceiling. songs: of the predictions."""
    clauses = []
    for dimension in DIMENSIONS:
        own = at(metrics, "stack", dimension)
        if at(own, "ccc") is None:
            return f"The accuracy on test songs is {NOT_MEASURED}."
        clause = f"{dimension} with a CCC of {with_interval(own, 'ccc', 2)}"
        found = best[dimension]
        if found.name:
            words = in_words(at(found.difference, "ccc_difference_ci"))
            clause += f", {words} ({found.name}, {with_interval(found.scores, 'ccc', 2)})"
        ceiling = at(metrics, "ceiling", dimension, "ccc")
        clauses.append(clause if ceiling is None else f"{clause}, where the labels allow {shown(ceiling, 2)} at most")
    held_out = (
        f"songs, each held out by one of {len(folds)} folds" if (folds := at(metrics, "out_of_fold", "runs")) else "test songs"
    )
    return f"On {songs} {held_out}, the stack predicts {'; and '.join(clauses)}."


def _headline(metrics: Any, best: dict[str, Best]) -> list[list[str]]:
    """Cells of a row: dimension, CCC of stack, ViT alone and best baseline, stack minus baseline, a verdict, the ceiling."""
    rows = []
    for dimension, found in best.items():
        own = [with_interval(at(metrics, name, dimension), "ccc") for name in ("stack", "model")]
        baseline = f"{found.name} {with_interval(found.scores, 'ccc')}" if found.name else NOT_MEASURED
        interval = at(found.difference, "ccc_difference_ci")
        words = NOT_MEASURED if interval is None else in_words(interval)
        ceiling = at(metrics, "no_ceiling") or shown(at(metrics, "ceiling", dimension, "ccc"))
        rows.append([dimension, *own, baseline, with_interval(found.difference, "ccc_difference"), words, ceiling])
    return rows


def _differences(run: Path, songs: Songs | None, settings: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Per baseline, CCC of the stack minus CCC of the baseline, paired by song."""
    if songs is None:
        return {}
    predicted: dict[str, dict[SongId, tuple[float, float]]] = {}
    for row in csv_rows(run / "baselines.csv"):
        pair = float(row["valence_pred"]), float(row["arousal_pred"])
        predicted.setdefault(row["baseline"], {})[song_id_of(row["song_id"])] = pair
    differences = {}
    for name, by_song in sorted(predicted.items()):
        baseline = np.array([by_song[song] for song in songs.ids])
        differences[name] = paired_difference(songs.predicted, baseline, songs.actual, groups=songs.group_of_each, **settings)
    return differences


def _charts(metrics: Any, songs: Songs | None, records: list[dict[str, Any]], training: Any) -> dict[str, Markup]:
    """Name → chart; without those that have no data."""
    charts = {}
    rows = {dimension: _estimates(metrics, dimension) for dimension in DIMENSIONS}
    for dimension in DIMENSIONS:
        if at(metrics, "stack", dimension, "ccc") is not None:
            charts[f"ccc {dimension}"] = interval_chart(
                dimension.capitalize(), rows[dimension], x="CCC", low=lowest(rows.values()), limit=_ceiling(metrics, dimension)
            )
    if songs is not None:
        charts["plane"] = plane_chart("Labels and predictions", songs.ids, songs.actual, songs.predicted, songs.groups)
        for column, dimension in enumerate(DIMENSIONS):
            pair = songs.actual[:, column], songs.predicted[:, column]
            charts[f"scatter {dimension}"] = scatter_chart(dimension.capitalize(), *pair, style="ab"[column])
    return charts | gan_charts(records) | vit_charts(records, training)


def _estimates(metrics: Any, dimension: str) -> list[Estimate]:
    """The CCC of stack, ViT alone, baselines and, where it is known, one listener."""
    named = {"stack": at(metrics, "stack"), "ViT alone": at(metrics, "model"), **(at(metrics, "baselines") or {})}
    rows = []
    for name, scores in named.items():
        found = at(scores, dimension)
        style = "a" if name == "stack" else "b" if name == "ViT alone" else "muted"
        rows.append(Estimate(name, at(found, "ccc"), at(found, "ccc_ci"), style))
    listener = at(metrics, "listeners", dimension, "single_listener_ccc")
    if listener is not None:
        rows.append(Estimate("one listener", listener, None, "c"))
    return rows


def _ceiling(metrics: Any, dimension: str) -> tuple[str, float] | None:
    ceiling = at(metrics, "ceiling", dimension, "ccc")
    return None if ceiling is None else (f"ceiling {shown(ceiling, 2)}", ceiling)


def _groupings(songs: Songs | None, facts: Facts, settings: dict[str, int]) -> list[dict[str, Any]]:
    """Tables of errors by group and by genre, where songs have them: name, rows, number of groups."""
    found = []
    for name, names in (("group", songs.groups if songs else {}), ("genre", facts.genres)):
        if songs is None or len({names.get(song) for song in songs.ids}) < 2:
            continue
        own = [names.get(song, "") for song in songs.ids]
        groups = None if name == "group" else songs.group_of_each
        rows, number = group_rows(own, songs.actual, songs.predicted, groups=groups, **settings)
        if rows:
            found.append({"name": name, "rows": rows, "number": number})
    return found


def _worst(songs: Songs | None, facts: Facts, room: int) -> tuple[list[dict[str, Any]], int]:
    """Rows of the songs with the largest errors: cells, sound; and what is left of `room` bytes for sounds."""
    if songs is None:
        return [], room
    rows = []
    distances = distance(songs.actual, songs.predicted)
    for index in worst_songs(songs.actual, songs.predicted, WORST_SONGS):
        song = songs.ids[index]
        pairs = [", ".join(map(signed, pair[index].tolist())) for pair in (songs.actual, songs.predicted)]
        sound = facts.excerpt(song)
        uri = "" if sound is None else data_uri("audio/mpeg", sound)
        if len(uri) > room:
            uri = ""
        room -= len(uri)
        cells = [str(song), songs.groups.get(song, ""), *pairs, shown(float(distances[index]), 2)]
        rows.append({"name": str(song), "cells": cells, "sound": uri})
    return rows, room


def _phase_rows(memory: Any, order: Sequence[str]) -> list[dict[str, Any]]:
    """Cells of a row: phase, seconds, peak memory of the process and on the GPU; share: of the longest phase, in percent.
    order: of the phases."""
    longest = max((at(measured, "seconds") or 0 for measured in (memory or {}).values()), default=0) or 1
    rows = []
    ordered = [phase for phase in order if phase in (memory or {})]
    for phase in [*ordered, *(phase for phase in memory or {} if phase not in order)]:
        measured = memory[phase]
        seconds = at(measured, "seconds")
        peaks = [mebibytes(at(measured, f"peak_{kind}_bytes")) for kind in ("process", "device")]
        rows.append({"cells": [phase, shown(seconds, 1), *peaks], "share": f"{100 * (seconds or 0) / longest:.1f}"})
    return rows


def _samples(folder: Path, room: int) -> list[dict[str, str]]:
    """Sound and picture of each sample: data URIs up to `room` bytes in all, then relative links to the files."""
    rows = []
    for stem in sorted({path.stem for path in folder.glob("*") if path.suffix in (".wav", ".png")}):
        row = {"name": stem.replace("_", " "), "linked": "", "sound": "", "picture": ""}
        for kind, path in (("sound", folder / f"{stem}.wav"), ("picture", folder / f"{stem}.png")):
            if not path.exists():
                continue
            row[kind] = sound_uri(path) if kind == "sound" else data_uri("image/png", path.read_bytes())
            if len(row[kind]) > room:
                row[kind], row["linked"] = "", quote(f"{folder.name}/{path.name}")
            else:
                room -= len(row[kind])
        rows.append(row)
    return rows


def _songs(run: Path) -> Songs | None:
    """Of predictions.csv and split.csv; None if there are none."""
    rows = csv_rows(run / "predictions.csv")
    if not rows:
        return None
    actual, predicted = (
        np.array([[float(row[f"{dimension}_{column}"]) for dimension in DIMENSIONS] for row in rows])
        for column in ("true", "stack")
    )
    groups = {song_id_of(row["song_id"]): row["group"] for row in csv_rows(run / "split.csv")}
    return Songs([song_id_of(row["song_id"]) for row in rows], actual, predicted, groups)
