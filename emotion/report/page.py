"""Shared code of all pages: templates, files of a published run, number formats, pictures and sounds as data URIs."""

import base64
import csv
import hashlib
import importlib.resources
import io
from pathlib import Path
from typing import Any

import jinja2
import soundfile
from markupsafe import Markup

from emotion.files import read_json

NOT_MEASURED = "not measured"
MP3_RATES_HZ = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
DECIMALS = 3
LONGEST_NUMBER = 28  # characters of a cell, such as 13.500 [10.500, 16.500]


def render(template: str, **values: Any) -> str:
    """The page of a template in `templates/`. Its content security policy blocks all loading and all scripts but our own."""
    style, script = Markup(_text("style.css.jinja")), Markup(_text("script.js.jinja"))  # noqa: S704 - files of this package
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["numeric"] = is_numeric
    shared = {"style": style, "script": script, "script_sha256": digest, "not_measured": NOT_MEASURED}
    return environment.get_template(template).render(**shared, **values)


def _text(name: str) -> str:
    return importlib.resources.files("emotion.report").joinpath("templates", name).read_text(encoding="utf-8")


def is_numeric(cell: str) -> bool:
    """Whether a cell of a table is a number, with its interval or unit, or a date: it stays on one line."""
    return cell[:1] in (*"0123456789-+±∞",) and len(cell) <= LONGEST_NUMBER


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def sound_uri(path: Path) -> str:
    """MP3, an eighth of the size of WAV; WAV if MP3 does not have the sample rate."""
    sound, rate = soundfile.read(path, dtype="float32")
    if rate not in MP3_RATES_HZ:
        return data_uri("audio/wav", path.read_bytes())
    content = io.BytesIO()
    soundfile.write(content, sound, rate, format="MP3")
    return data_uri("audio/mpeg", content.getvalue())


def shown(value: object, decimals: int = DECIMALS) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value:z.{decimals}f}" if isinstance(value, float) else str(value)


def signed(value: float, decimals: int = 2) -> str:
    """+0.25, -0.25, 0.00"""
    text = f"{value:+z.{decimals}f}"
    return text[1:] if float(text) == 0 else text


def estimate(found: Any, decimals: int = DECIMALS) -> str:
    """0.512 [0.401, 0.623]"""
    value, interval = at(found, "value"), at(found, "ci")
    if interval is None:
        return shown(value, decimals)
    return f"{shown(value, decimals)} [{shown(interval[0], decimals)}, {shown(interval[1], decimals)}]"


def with_interval(scores: Any, metric: str, decimals: int = DECIMALS) -> str:
    """A metric of `emotion.evaluation.metrics.scores`, as `estimate`."""
    return estimate({"value": at(scores, metric), "ci": at(scores, f"{metric}_ci")}, decimals)


def in_words(interval: list[float] | None) -> str:
    """The interval of a difference in words. interval: of the CCC of the model minus that of the best baseline."""
    if interval is None:
        return "beside the best baseline"
    if interval[0] > 0:
        return "better than the best baseline"
    if interval[1] < 0:
        return "worse than the best baseline"
    return "not significantly different from the best baseline"


def seconds_text(seconds: float) -> str:
    """35.5 s, 12 min 3 s or 5 h 40 min"""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def mebibytes(size: int | None) -> str:
    return NOT_MEASURED if size is None else f"{size / 2**20:,.0f} MiB"


def at(value: Any, *keys: str) -> Any:
    """The value under nested keys, or None."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def json_at(path: Path) -> Any:
    """The content of a JSON file; None without it."""
    return read_json(path) if path.exists() else None


def csv_rows(path: Path) -> list[dict[str, str]]:
    """Rows by column; none without the file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
