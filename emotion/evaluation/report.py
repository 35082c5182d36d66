"""The report of a published run: one HTML page that opens without a network, for readers who do not know the job."""

import base64
import csv
import importlib.resources
import io
import itertools
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
import numpy.typing as npt
import soundfile
import yaml

from emotion.data.song_ids import SongId, song_id_of
from emotion.evaluation.metrics import DIMENSIONS, paired_difference
from emotion.evaluation.plots import gan_curves, png_bytes, predicted_against_true, valence_arousal_plane, vit_curves
from emotion.files import read_json, read_json_lines, write_text
from emotion.training.progress import WITH, WITHOUT

Numbers = npt.NDArray[np.float64]

NOT_MEASURED = "not measured"
METRICS = {"ccc": "CCC", "mae": "MAE", "rmse": "RMSE", "r2": "R²", "pearson": "Pearson's r"}
LARGEST_MEDIA_BYTES = 3_800_000  # of the pictures and sounds in the page together, so that it stays below 4 MB
MP3_RATES_HZ = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


def write_report(run: Path, name: str) -> None:
    """Write `report.html` into the published folder `run`, from the files in it.

    name: of the run, for the title. Missing files and null values are shown as "not measured". Equal folders give equal bytes.
    """
    metrics = _json(run / "metrics.json")
    songs = _songs(run / "predictions.csv")
    records = read_json_lines(run / "logs" / "metrics.jsonl")
    training = _json(run / "model" / "training.json")
    pictures = _pictures(run, songs, records, training)
    room = LARGEST_MEDIA_BYTES - sum(len(picture) for picture in pictures.values())
    spec_path = run / "spec.yaml"
    spec_text = spec_path.read_text(encoding="utf-8") if spec_path.exists() else ""
    spec = yaml.safe_load(spec_text)
    warm_start = _at(spec, "init_from", "run")
    quality, memory = _json(run / "quality.json"), _json(run / "memory.json")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = importlib.resources.files("emotion.evaluation").joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        name=name,
        warm_start=Path(warm_start).name if warm_start else None,
        not_measured=NOT_MEASURED,
        scale=_shown(_at(metrics, "scale")),
        songs={split: _shown(_at(metrics, "songs", split)) for split in ("train", "validation", "test")},
        headline=_headline(metrics, _differences(run, songs, spec)),
        warnings=[record for record in records if "warning" in record],
        left_out=_csv_rows(run / "left_out.csv"),
        metric_names=list(METRICS.values()),
        intervals=_interval_rows(metrics),
        level=_percent(_at(metrics, "intervals", "level")),
        listeners=_listener_rows(metrics),
        dynamic=_dynamic_rows(metrics),
        no_listeners=_at(metrics, "no_ceiling") or NOT_MEASURED,
        tables={dimension: _metric_rows(metrics, dimension) for dimension in DIMENSIONS},
        pictures=pictures,
        synthetic_clips=_at(training, "synthetic_clips", "why"),
        learnt_from="real clips alone" if _at(training, "synthetic_per_batch") == 0 else "real and synthetic clips",
        quality=_quality_rows(quality),
        quality_space=_shown(_at(quality, "space")),
        not_held_out=_at(quality, "validation_songs_are"),
        out_of_fold=_at(metrics, "out_of_fold"),
        samples=_samples(run / "samples", room),
        phases=_phase_rows(memory),
        memory=_memory_rows(memory),
        spec=spec_text or NOT_MEASURED,
    )
    write_text(run / "report.html", page)


def _headline(metrics: Any, differences: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Cells of a row: dimension, CCC of stack, ViT and best baseline, stack minus baseline, a verdict, the ceiling."""
    rows = []
    for dimension in DIMENSIONS:
        baselines = _at(metrics, "baselines") or {}
        found = {name: _at(scores, dimension, "ccc") for name, scores in sorted(baselines.items())}
        best = max((name for name in found if found[name] is not None), key=lambda name: found[name], default="")
        own = [_with_interval(_at(metrics, name, dimension), "ccc") for name in ("stack", "model")]
        baseline = f"{best} {_with_interval(baselines[best][dimension], 'ccc')}" if best else NOT_MEASURED
        difference = _at(differences, best, dimension)
        verdict = _verdict(_at(difference, "ccc_difference_ci"))
        ceiling = _at(metrics, "no_ceiling") or _shown(_at(metrics, "ceiling", dimension, "ccc"))
        rows.append([dimension, *own, baseline, _with_interval(difference, "ccc_difference"), verdict, ceiling])
    return rows


def _verdict(interval: list[float] | None) -> str:
    if interval is None:
        return NOT_MEASURED
    if interval[0] > 0:
        return "better than the best baseline"
    if interval[1] < 0:
        return "worse than the best baseline"
    return "no significant difference from the best baseline"


def _differences(run: Path, songs: dict[str, Numbers], spec: Any) -> dict[str, dict[str, Any]]:
    """Per baseline, CCC of the stack minus CCC of the baseline, paired by song."""
    settings = {"bootstrap_samples": _at(spec, "evaluate", "bootstrap_samples"), "seed": _at(spec, "seed")}
    if not songs or None in settings.values():
        return {}
    predicted: dict[str, dict[SongId, tuple[float, float]]] = {}
    for row in _csv_rows(run / "baselines.csv"):
        pair = float(row["valence_pred"]), float(row["arousal_pred"])
        predicted.setdefault(row["baseline"], {})[song_id_of(row["song_id"])] = pair
    differences = {}
    for name, by_song in sorted(predicted.items()):
        baseline = np.array([by_song[song] for song in songs["id"]])
        differences[name] = paired_difference(songs["predicted"], baseline, songs["actual"], **settings)
    return differences


def _metric_rows(metrics: Any, dimension: str) -> list[list[str]]:
    """Name and metrics of the stack, the ViT and every baseline."""
    own = {"stack": _at(metrics, "stack"), "ViT": _at(metrics, "model")}
    predictors = {**own, **(_at(metrics, "baselines") or {})}
    return [[name, *(_with_interval(_at(found, dimension), metric) for metric in METRICS)] for name, found in predictors.items()]


def _percent(share: float | None) -> str:
    return NOT_MEASURED if share is None else f"{100 * share:g} %"


def _interval_rows(metrics: Any) -> list[list[str]]:
    """Cells of a row: what it is of, half width, held-out songs, share of test songs inside, mean width."""
    rows = []
    for name, key in (("stack", "stack"), ("ViT", "model")):
        for dimension in DIMENSIONS:
            found = _at(metrics, "intervals", key, dimension)
            if found is not None:
                width = "whole range: too few songs" if found["half_width"] is None else f"± {_shown(found['half_width'])}"
                inside = _with_interval(found, "coverage")
                rows.append([f"{name}, {dimension}", width, _shown(found["held_out_songs"]), inside, _shown(found["mean_width"])])
    return rows


def _listener_rows(metrics: Any) -> list[list[str]]:
    """Cells of a row: dimension, CCC of one listener, listeners that stack and ViT are worth, the ceiling."""
    rows = []
    for dimension in DIMENSIONS:
        found = _at(metrics, "listeners", dimension)
        if found is not None:
            worth = [_listeners(_at(found, "listener_equivalents", name)) for name in ("stack", "model")]
            ceiling = _shown(_at(metrics, "ceiling", dimension, "ccc"))
            rows.append([dimension, _shown(found["single_listener_ccc"]), *worth, ceiling])
    return rows


def _dynamic_rows(metrics: Any) -> list[list[str]]:
    """Cells of a row: what it is of, CCC and RMSE of all points, means of those over songs."""
    names = ("ccc", "rmse", "song_ccc", "song_rmse")
    rows = []
    for name, key in (("curve", "curve"), ("one number per song", "flat")):
        for dimension in DIMENSIONS:
            found = _at(metrics, "dynamic", key, dimension)
            if found is not None:
                rows.append([f"{name}, {dimension}", *(_with_interval(found, measure) for measure in names)])
    return rows


def _listeners(found: Any) -> str:
    """2.1 [1.5, 4.0]. More than any number have no value."""
    value, *ends = (_shown(number, 1) if number is not None else "∞" for number in (found["value"], *(found["ci"] or [])))
    return f"{value} [{', '.join(ends)}]" if ends else value


def _quality_rows(quality: Any) -> list[list[str]]:
    """Cells of a row: the measure, its value for the synthetic clips, the anchor, and what the anchor is."""
    read_back = _at(quality, "label_read_back")
    rows = []
    for name, measure in (("frechet", "Fréchet distance"), ("kernel", "kernel distance (squared MMD)")):
        distances = _at(quality, name)
        found = [_estimate(_at(distances, f"{origin}_to_validation")) for origin in ("synthetic", "training")]
        rows.append([f"{measure} to validation songs", *found, "training songs to validation songs; lower is closer"])
        difference = _estimate(_at(distances, "difference"))
        rows.append([f"{measure}: synthetic minus anchor", difference, "0", "as close as other real music"])
    copies = _at(quality, "copy_rate")
    rates = [_estimate(_at(copies, origin)) for origin in ("synthetic", "validation", "training")]
    anchor = "validation songs taken for copies (false positives); other clips of training songs found (true positives)"
    rows.append(["share that copy a training song", rates[0], f"{rates[1]}; {rates[2]}", anchor])
    rows.append(["diversity", _estimate(_at(quality, "diversity")), "1", "as diverse as training songs"])
    for dimension, metric in itertools.product(DIMENSIONS, ("ccc", "mae")):
        shown = [_with_interval(_at(read_back, origin, dimension), metric) for origin in ("synthetic", "validation")]
        name = f"{METRICS[metric]} of {dimension} read back"
        rows.append([name, *shown, "the same regressor on validation songs"])
    for score in ("overall", "fd_score", "freq_score", "smooth_score"):
        shown = [_shown(_at(quality, "notebook_score", score), 1), "100"]
        rows.append([f"notebook's score, {score}", *shown, "the maximum; takes no account of labels or copies"])
    return rows


def _estimate(found: Any) -> str:
    """0.512 [0.401, 0.623]"""
    value, interval = _at(found, "value"), _at(found, "ci")
    return _shown(value) if interval is None else f"{_shown(value)} [{_shown(interval[0])}, {_shown(interval[1])}]"


def _phase_rows(memory: Any) -> list[list[str]]:
    """Cells of a row: phase, seconds, peak memory of the process and on the GPU."""
    rows = []
    for phase, measured in (memory or {}).items():
        peaks = [_mebibytes(_at(measured, f"peak_{kind}_bytes")) for kind in ("process", "device")]
        rows.append([phase, _shown(_at(measured, "seconds"), 1), *peaks])
    return rows


def _memory_rows(memory: Any) -> dict[str, list[list[str]]]:
    """Training phase → rows of component, predicted and measured memory at the peak of a step."""
    tables = {}
    for phase, found in (memory or {}).items():
        predicted = _at(found, "memory", "predicted")
        if predicted is None:
            continue
        measured = {**(_at(found, "memory", "measured") or {}), "process": _at(found, "peak_process_bytes")}
        names = predicted or measured
        tables[phase] = [[name, *(_mebibytes(_at(kind, name)) for kind in (predicted, measured))] for name in names]
    return tables


def _mebibytes(size: int | None) -> str:
    return NOT_MEASURED if size is None else f"{size / 2**20:.0f} MiB"


def _pictures(run: Path, songs: dict[str, Numbers], records: list[dict[str, Any]], training: Any) -> dict[str, str]:
    """Name → PNG as a data URI; without the figures that have no data."""
    figures = {}
    if songs:
        figures["scatter"] = predicted_against_true(songs["actual"], songs["predicted"])
        figures["plane"] = valence_arousal_plane(songs["actual"], songs["predicted"])
    gan = [record for record in records if record["phase"] == "gan" and "d_loss" in record]
    if gan:
        figures["gan"] = gan_curves(gan)
    # Of two trainings, one without and one with synthetic clips, one is published.
    kept = _at(training, "synthetic_clips", "kept")
    published = None if kept is None else WITH if kept else WITHOUT
    of_vit = [record for record in records if record["phase"] == "vit"]
    losses, epochs = ([record for record in of_vit if name in record] for name in ("loss", "epoch"))
    others = [record for record in epochs if record.get("training") != published]
    losses, epochs = ([record for record in some if record.get("training") == published] for some in (losses, epochs))
    if losses or epochs:
        figures["vit"] = vit_curves(losses, epochs, _at(training, "best_epoch"), others)
    drawn = {name: png_bytes(figure) for name, figure in figures.items()}
    drawn |= {path.stem: path.read_bytes() for path in sorted(run.glob("pictures/*.png"))}
    return {name: _data_uri("image/png", picture) for name, picture in drawn.items()}


def _samples(folder: Path, room: int) -> list[dict[str, str]]:
    """Sound and picture of each sample: data URIs up to `room` bytes in all, then relative links to the files."""
    rows = []
    for stem in sorted({path.stem for path in folder.glob("*") if path.suffix in (".wav", ".png")}):
        row = {"name": stem.replace("_", " "), "linked": "", "sound": "", "picture": ""}
        for kind, path in (("sound", folder / f"{stem}.wav"), ("picture", folder / f"{stem}.png")):
            if not path.exists():
                continue
            row[kind] = _sound_uri(path) if kind == "sound" else _data_uri("image/png", path.read_bytes())
            if len(row[kind]) > room:
                row[kind] = quote(f"{folder.name}/{path.name}")
                row["linked"] = "yes"
            else:
                room -= len(row[kind])
        rows.append(row)
    return rows


def _sound_uri(path: Path) -> str:
    """MP3, an eighth of the size of WAV; WAV if MP3 does not have the sample rate."""
    sound, rate = soundfile.read(path, dtype="float32")
    if rate not in MP3_RATES_HZ:
        return _data_uri("audio/wav", path.read_bytes())
    content = io.BytesIO()
    soundfile.write(content, sound, rate, format="MP3")
    return _data_uri("audio/mpeg", content.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _with_interval(scores: Any, metric: str) -> str:
    return _estimate({"value": _at(scores, metric), "ci": _at(scores, f"{metric}_ci")})


def _shown(value: object, decimals: int = 3) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value:z.{decimals}f}" if isinstance(value, float) else str(value)


def _at(value: Any, *keys: str) -> Any:
    """The value under nested keys, or None."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def _json(path: Path) -> Any:
    return read_json(path) if path.exists() else None


def _songs(path: Path) -> dict[str, Numbers]:
    """id [songs], actual and predicted [songs, 2] of predictions.csv, by the stack; empty if it has no songs."""
    rows = _csv_rows(path)
    if not rows:
        return {}
    return {
        "id": np.array([song_id_of(row["song_id"]) for row in rows], dtype=object),
        "actual": np.array([[float(row[f"{dimension}_true"]) for dimension in DIMENSIONS] for row in rows]),
        "predicted": np.array([[float(row[f"{dimension}_stack"]) for dimension in DIMENSIONS] for row in rows]),
    }


def _csv_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
