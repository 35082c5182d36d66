"""The report of a published run: one page that opens without a network, for people who do not know the job."""

import base64
import csv
import importlib.resources
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

import jinja2
import numpy as np
import numpy.typing as npt
import soundfile
import yaml

from emotion.evaluation.metrics import DIMENSIONS, paired_difference
from emotion.evaluation.plots import gan_curves, png_bytes, predicted_against_true, valence_arousal_plane, vit_curves
from emotion.files import read_json, write_text

Numbers = npt.NDArray[np.float64]
Row: TypeAlias = dict[str, str]

NOT_MEASURED = "not measured"
METRICS = {"ccc": "CCC", "mae": "MAE", "rmse": "RMSE", "r2": "R²", "pearson": "Pearson's r"}
MOST_BYTES = 3_800_000
"""What the pictures and sounds in the page may take together, so that it stays below 4 MB."""
MP3_RATES_HZ = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


def write_report(run: Path, name: str) -> None:
    """Write `report.html` into the published folder `run`, from what lies there.

    name: the run's, for the title. What a run does not have, or what has no value, is shown as "not measured". The same
    folder gives the same page: no time enters it.
    """
    metrics = _json(run / "metrics.json")
    songs = _songs(run / "predictions.csv")
    records = _records(run / "logs" / "metrics.jsonl")
    pictures = _pictures(run, songs, records, _json(run / "model" / "training.json"))
    room = MOST_BYTES - sum(len(picture) for picture in pictures.values())
    spec = run / "spec.yaml"
    spec_text = spec.read_text(encoding="utf-8") if spec.exists() else ""
    settings = yaml.safe_load(spec_text)
    started_from = _at(settings, "init_from", "run")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = importlib.resources.files("emotion.evaluation").joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        name=name,
        started_from=Path(started_from).name if started_from else None,
        not_measured=NOT_MEASURED,
        scale=_shown(_at(metrics, "scale")),
        songs={split: _shown(_at(metrics, "songs", split)) for split in ("train", "validation", "test")},
        headline=_headline(metrics, _differences(run, songs, settings)),
        warnings=[record for record in records if "warning" in record],
        left_out=list(_csv_rows(run / "left_out.csv")) if (run / "left_out.csv").exists() else [],
        metric_names=list(METRICS.values()),
        tables={dimension: _metric_rows(metrics, dimension) for dimension in DIMENSIONS},
        pictures=pictures,
        quality=_quality_rows(_json(run / "quality.json")),
        quality_space=_shown(_at(_json(run / "quality.json"), "space")),
        samples=_samples(run / "samples", room),
        phases=_phase_rows(_json(run / "memory.json")),
        memory=_memory_rows(_json(run / "memory.json")),
        spec=spec_text or NOT_MEASURED,
    )
    write_text(run / "report.html", page)


def _headline(metrics: Any, differences: dict[str, dict[str, Any]]) -> list[Row]:
    """Per dimension the model's CCC beside the best baseline's, their difference in words, and the ceiling."""
    rows = []
    for dimension in DIMENSIONS:
        baselines = _at(metrics, "baselines") or {}
        found = {name: _at(scores, dimension, "ccc") for name, scores in sorted(baselines.items())}
        measured = {name: value for name, value in found.items() if value is not None}
        best = max(measured, key=lambda name: measured[name]) if measured else None
        difference = differences.get(best or "", {}).get(dimension)
        rows.append(
            {
                "dimension": dimension,
                "model": _with_interval(_at(metrics, "model", dimension), "ccc"),
                "baseline": f"{best} {_with_interval(baselines[best][dimension], 'ccc')}" if best else NOT_MEASURED,
                "difference": _with_interval(difference, "ccc_difference"),
                "verdict": _verdict(_at(difference, "ccc_difference_ci")),
                "ceiling": _shown(_at(metrics, "ceiling", dimension, "ccc")),
            }
        )
    return rows


def _verdict(interval: list[float] | None) -> str:
    if interval is None:
        return NOT_MEASURED
    if interval[0] > 0:
        return "better than the best baseline"
    if interval[1] < 0:
        return "worse than the best baseline"
    return "not to be told apart from the best baseline on so few songs"


def _differences(run: Path, songs: dict[str, Numbers], spec: Any) -> dict[str, dict[str, Any]]:
    """Per baseline, CCC of the model minus CCC of the baseline, paired by song."""
    path, resamples, seed = run / "baselines.csv", _at(spec, "evaluate", "bootstrap_samples"), _at(spec, "seed")
    if not songs or not path.exists() or resamples is None or seed is None:
        return {}
    predicted: dict[str, dict[int, tuple[float, float]]] = {}
    for row in _csv_rows(path):
        of_baseline = predicted.setdefault(row["baseline"], {})
        of_baseline[int(row["song_id"])] = (float(row["valence_pred"]), float(row["arousal_pred"]))
    return {
        name: paired_difference(
            songs["predicted"], np.array([of_song[song] for song in songs["id"]]), songs["actual"], resamples, seed
        )
        for name, of_song in sorted(predicted.items())
    }


def _metric_rows(metrics: Any, dimension: str) -> list[list[str]]:
    """The model's and every baseline's name and metrics."""
    predictors = {"model": _at(metrics, "model"), **(_at(metrics, "baselines") or {})}
    return [
        [name, *(_with_interval(_at(scores, dimension), metric) for metric in METRICS)]
        for name, scores in predictors.items()
    ]


def _quality_rows(quality: Any) -> list[list[str]]:
    """What is measured, the synthetic clips' number, the number it stands beside, and what that one is."""
    read_back = _at(quality, "label_read_back")
    rows = []
    for name, measure in (("frechet", "Fréchet distance"), ("kernel", "kernel distance (squared MMD)")):
        distances = _at(quality, name)
        found = [_estimate(_at(distances, f"{origin}_to_validation")) for origin in ("synthetic", "training")]
        rows.append([f"{measure} to validation songs", *found, "training songs to validation songs; lower is nearer"])
        difference = _estimate(_at(distances, "difference"))
        rows.append([f"{measure}: synthetic minus anchor", difference, "0", "as near as other real music is"])
    copies = _at(quality, "copy_rate")
    alarms = f"{_estimate(_at(copies, 'validation'))}; {_estimate(_at(copies, 'training'))}"
    what = "false alarms, on validation songs; copies found, on other clips of training songs"
    rows.append(["share that copy a training song", _estimate(_at(copies, "synthetic")), alarms, what])
    rows.append(["diversity", _estimate(_at(quality, "diversity")), "1", "as far from one another as training songs"])
    for dimension in DIMENSIONS:
        for metric in ("ccc", "mae"):
            made, real = (_at(read_back, origin, dimension) for origin in ("synthetic", "validation"))
            shown = [_with_interval(made, metric), _with_interval(real, metric)]
            rows.append([f"{METRICS[metric]} of {dimension} read back", *shown, "the same reader on validation songs"])
    for score in ("overall", "fd_score", "freq_score", "smooth_score"):
        shown = [_shown(_at(quality, "notebook_score", score), 1), "100"]
        rows.append([f"notebook's score, {score}", *shown, "the most there is; sees neither labels nor copies"])
    return rows


def _estimate(found: Any) -> str:
    value, interval = _at(found, "value"), _at(found, "ci")
    return _shown(value) if interval is None else f"{_shown(value)} [{_shown(interval[0])}, {_shown(interval[1])}]"


def _phase_rows(memory: Any) -> list[Row]:
    rows = []
    for phase, measured in (memory or {}).items():
        seconds = _shown(_at(measured, "seconds"), 1)
        peaks = {kind: _mebibytes(_at(measured, f"peak_{kind}_bytes")) for kind in ("process", "device")}
        rows.append({"phase": phase, "seconds": seconds, **peaks})
    return rows


def _memory_rows(memory: Any) -> dict[str, list[list[str]]]:
    """Training phase → per component its name, and what was predicted and measured of it at the peak of a step."""
    tables = {}
    for phase, found in (memory or {}).items():
        predicted = _at(found, "memory", "predicted")
        if predicted is None:
            continue
        measured = {**(_at(found, "memory", "measured") or {}), "process": _at(found, "peak_process_bytes")}
        tables[phase] = [
            [name, *(_mebibytes(_at(kind, name)) for kind in (predicted, measured))]
            for name in predicted or measured or ()
        ]
    return tables


def _mebibytes(size: int | None) -> str:
    return NOT_MEASURED if size is None else f"{size / 2**20:.0f} MiB"


def _pictures(run: Path, songs: dict[str, Numbers], records: list[dict[str, Any]], training: Any) -> dict[str, str]:
    """Name → PNG as a data URI; without those that nothing was measured for."""
    figures = {}
    if songs:
        figures["scatter"] = predicted_against_true(songs["actual"], songs["predicted"])
        figures["plane"] = valence_arousal_plane(songs["actual"], songs["predicted"])
    gan = [record for record in records if record["phase"] == "gan" and "d_loss" in record]
    if gan:
        figures["gan"] = gan_curves(gan)
    losses = [record for record in records if record["phase"] == "vit" and "loss" in record]
    epochs = [record for record in records if record["phase"] == "vit" and "epoch" in record]
    if losses or epochs:
        figures["vit"] = vit_curves(losses, epochs, _at(training, "best_epoch"))
    drawn = {name: png_bytes(figure) for name, figure in figures.items()}
    drawn |= {path.stem: path.read_bytes() for path in sorted(run.glob("pictures/*.png"))}
    return {name: _data_uri("image/png", picture) for name, picture in drawn.items()}


def _samples(folder: Path, room: int) -> list[Row]:
    """Sound and picture of each sample, as data URIs while there is room in the page, then by their place beside it."""
    rows = []
    for stem in sorted({path.stem for path in folder.glob("*") if path.suffix in (".wav", ".png")}):
        row = {"name": stem.replace("_", " "), "beside": "", "sound": "", "picture": ""}
        for kind, path in (("sound", folder / f"{stem}.wav"), ("picture", folder / f"{stem}.png")):
            if not path.exists():
                continue
            row[kind] = _sound_uri(path) if kind == "sound" else _data_uri("image/png", path.read_bytes())
            if len(row[kind]) > room:
                row[kind] = quote(f"{folder.name}/{path.name}")
                row["beside"] = "yes"
            else:
                room -= len(row[kind])
        rows.append(row)
    return rows


def _sound_uri(path: Path) -> str:
    """As MP3, an eighth of the wav, where MP3 knows the sample rate."""
    sound, rate = soundfile.read(path, dtype="float32")
    if rate not in MP3_RATES_HZ:
        return _data_uri("audio/wav", path.read_bytes())
    content = io.BytesIO()
    soundfile.write(content, sound, rate, format="MP3")
    return _data_uri("audio/mpeg", content.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _with_interval(scores: Any, metric: str) -> str:
    """0.512 [0.401, 0.623]"""
    return _estimate({"value": _at(scores, metric), "ci": _at(scores, f"{metric}_ci")})


def _shown(value: object, decimals: int = 3) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value:z.{decimals}f}" if isinstance(value, float) else str(value)


def _at(value: Any, *keys: str) -> Any:
    """The value below nested keys, None where there is none."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def _json(path: Path) -> Any:
    return read_json(path) if path.exists() else None


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _songs(path: Path) -> dict[str, Numbers]:
    """id [songs], actual and predicted [songs, 2] of predictions.csv; empty without songs."""
    rows = list(_csv_rows(path)) if path.exists() else []
    if not rows:
        return {}
    return {
        "id": np.array([int(row["song_id"]) for row in rows]),
        "actual": np.array([[float(row[f"{dimension}_true"]) for dimension in DIMENSIONS] for row in rows]),
        "predicted": np.array([[float(row[f"{dimension}_pred"]) for dimension in DIMENSIONS] for row in rows]),
    }


def _csv_rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)
