"""Charts as inline SVG. Colours come from the page's style, so that they follow its theme. Equal data gives equal text.

Every chart is 360 units wide, the width of a small phone, so that its letters stay readable there. A chart has a title and a
description in words; the plane has a name for each of its songs.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from emotion.data.song_ids import SongId
from emotion.errors import counted
from emotion.report.page import shown, signed

Numbers = npt.NDArray[np.float64]

WIDTH = 360
FEW_SONGS = 200  # with more, lines hide what they join
MOST_NAMED_SONGS = 4000  # on the plane; about 350 bytes each


@dataclass(frozen=True)
class Line:
    """One line of a chart. style: "a" to "d", or "muted": its colour and dashes."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "a"


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its interval, where it has one."""

    label: str
    value: float | None
    interval: Sequence[float] | None
    style: str = "muted"


@dataclass(frozen=True)
class Frame:
    """Where the values lie: x and y ranges of a chart and its margins in units."""

    x: tuple[float, float]
    y: tuple[float, float]
    height: int
    left: int = 46
    right: int = 12
    top: int = 8
    bottom: int = 40

    def at_x(self, value: float) -> str:
        return _number(self.left + (value - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - self.left - self.right))

    def at_y(self, value: float) -> str:
        span = self.height - self.top - self.bottom
        return _number(self.height - self.bottom - (value - self.y[0]) / (self.y[1] - self.y[0]) * span)


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    y_range: tuple[float, float] | None = None,
    level: tuple[str, float] | None = None,
    mark: tuple[str, float] | None = None,
) -> Markup:
    """Lines over steps or epochs, and their legend. x, y: names of the axes; level: (name, y) of a horizontal line; mark: (name,
    x) of a vertical one."""
    values = [value for line in lines for value in line.y]
    steps = [value for line in lines for value in line.x] + ([mark[1]] if mark else [])
    low, high = y_range or _padded(values)
    frame = Frame((min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1), (low, high), 250)
    parts = [_axes(frame, x, y, whole_x=True)]
    if level:
        parts.append(_path("level", f"M{frame.at_x(frame.x[0])} {frame.at_y(level[1])}H{frame.at_x(frame.x[1])}"))
    if mark:
        parts.append(_path("mark", f"M{frame.at_x(mark[1])} {frame.at_y(low)}V{frame.at_y(high)}"))
    described = []
    for line in lines:
        points = [
            f"{frame.at_x(across)} {frame.at_y(min(max(up, low), high))}" for across, up in zip(line.x, line.y, strict=True)
        ]
        parts.append(_path(f"line {line.style}", "M" + "L".join(points)))
        if len(points) <= 40:  # a single point has no line
            parts.append(_path(f"dots {line.style}", "".join(f"M{point}h0" for point in points)))
        described.append(f"{line.label}: from {shown(float(line.y[0]))} to {shown(float(line.y[-1]))}")
        described[-1] += f", between {shown(float(min(line.y)))} and {shown(float(max(line.y)))}"
    legend = [(line.label, f"line {line.style}") for line in lines]
    legend += [(found[0], style) for found, style in ((level, "level"), (mark, "mark")) if found]
    return _figure(title, f"{y} over {x}. {'; '.join(described)}.", frame.height, parts, legend)


def lowest(charts: Iterable[Sequence[Estimate]]) -> float:
    """Where the axis of a CCC begins, so that several charts have the same: at 0, or lower where a value or an interval is."""
    rows = [row for chart in charts for row in chart]
    ends = [end for row in rows for end in (row.value, *(row.interval or ())) if end is not None]
    return max(-1.0, min(0.0, math.floor(min(ends, default=0.0) * 5) / 5))


def interval_chart(title: str, rows: Sequence[Estimate], *, x: str, low: float, limit: tuple[str, float] | None = None) -> Markup:
    """A row per value, with its interval, from `low` to 1. limit: (name, x) of a vertical line."""
    frame = Frame((low, 1.0), (0, len(rows)), 30 * len(rows) + 48, left=112, right=14)
    parts = [_axes(frame, x, "", y_ticks=False)]
    if limit is not None:
        parts.append(_path("mark", f"M{frame.at_x(limit[1])} {frame.at_y(0)}V{frame.at_y(len(rows))}"))
    described = []
    for number, row in enumerate(rows):
        y = frame.at_y(len(rows) - number - 0.5)
        parts.append(Markup('<text class="name {}" x="104" y="{}">{}</text>').format(row.style, y, row.label))
        if row.value is None:
            continue
        if row.interval is not None:
            first, last = (frame.at_x(min(max(end, frame.x[0]), 1.0)) for end in row.interval)
            parts.append(_path(f"line {row.style}", f"M{first} {y}H{last}"))
        parts.append(_circle(f"point {row.style}", frame.at_x(max(row.value, frame.x[0])), y, 5))
        interval = f", interval {shown(float(row.interval[0]))} to {shown(float(row.interval[1]))}" if row.interval else ""
        described.append(f"{row.label} {shown(float(row.value))}{interval}")
    legend = [("value and 95 % interval", "line muted")] + ([(limit[0], "mark")] if limit else [])
    return _figure(title, f"{'; '.join(described)}.", frame.height, parts, legend)


def scatter_chart(title: str, actual: Numbers, predicted: Numbers, style: str) -> Markup:
    """A point per song: labels [songs] to the right, predictions [songs] upwards. Perfect predictions lie on the line."""
    edge = _edge(actual, predicted)
    frame = Frame((-edge, edge), (-edge, edge), WIDTH - 6)
    points = "".join(f"M{frame.at_x(x)} {frame.at_y(y)}h0" for x, y in zip(actual.tolist(), predicted.tolist(), strict=True))
    diagonal = f"M{frame.at_x(-edge)} {frame.at_y(-edge)}L{frame.at_x(edge)} {frame.at_y(edge)}"
    parts = [_axes(frame, "label", "prediction"), _path("level", diagonal), _path(f"dots {style}", points)]
    spread = f"Labels from {shown(float(actual.min()))} to {shown(float(actual.max()))}, "
    spread += f"predictions from {shown(float(predicted.min()))} to {shown(float(predicted.max()))}."
    return _figure(title, f"{counted(len(actual), 'song')}. {spread}", frame.height, parts, [("prediction = label", "level")])


def plane_chart(title: str, ids: Sequence[SongId], actual: Numbers, predicted: Numbers, groups: dict[SongId, str]) -> Markup:
    """Label and prediction of each song, joined by a line, on valence (to the right) and arousal (upwards), [songs, 2] each.

    Songs have their names on hover and focus. In the order of their labels' valence, as the arrow keys go from one to the next.
    Of more than FEW_SONGS the symbols are small and lines are drawn for one song at a time. Of more than MOST_NAMED_SONGS those
    with the largest errors are shown.
    """
    edge = _edge(actual, predicted)
    frame = Frame((-edge, edge), (-edge, edge), WIDTH - 6)
    radius, kind = (4.0, "plane") if len(ids) <= FEW_SONGS else (1.7, "plane many")
    errors = np.hypot(*(predicted - actual).T)
    picked = np.argsort(-errors, kind="stable")[:MOST_NAMED_SONGS]
    parts = [_axes(frame, "valence (unpleasant to pleasant)", "arousal (calm to excited)")]
    zero = (frame.at_x(0), frame.at_y(0))
    cross = f"M{frame.at_x(-edge)} {zero[1]}H{frame.at_x(edge)}M{zero[0]} {frame.at_y(-edge)}V{frame.at_y(edge)}"
    parts.append(_path("level", cross))
    for number, index in enumerate(picked[np.argsort(actual[picked, 0], kind="stable")].tolist()):
        true, own = actual[index], predicted[index]
        (x, y), (u, v) = ((frame.at_x(point[0]), frame.at_y(point[1])) for point in (true, own))
        name = f"{ids[index]}, {groups[ids[index]]}" if groups.get(ids[index]) else str(ids[index])
        text = f"{name}: label {signed(true[0])}, {signed(true[1])}; predicted {signed(own[0])}, {signed(own[1])}"
        parts.append(
            Markup('<g class="song" tabindex="{}" role="img"><title>{}</title>{}{}{}</g>').format(
                -1 if number else 0,
                text,
                _path("error", f"M{x} {y}L{u} {v}"),
                _circle("label", x, y, radius),
                _circle("own", u, v, radius),
            )
        )
    legend = [("label", "ring"), ("prediction of the same song", "disc")]
    text = counted(len(ids), "song")
    if len(picked) < len(ids):
        text = f"{len(picked)} of {text}, those with the largest errors"
    return _figure(title, f"{text}. With the arrow keys from song to song.", frame.height, parts, legend, kind=kind)


def _figure(
    title: str, description: str, height: int, parts: list[Markup], legend: list[tuple[str, str]], kind: str = ""
) -> Markup:
    """kind: class of a chart with parts that have names of their own, see plane_chart."""
    key = Markup("").join(
        Markup('<li><svg class="key" viewBox="0 0 26 12" aria-hidden="true">{}</svg>{}</li>').format(_key(style), label)
        for label, style in legend
    )
    role, keys = ("group", Markup('<p class="readout" aria-hidden="true">&nbsp;</p>')) if kind else ("img", Markup(""))
    return Markup(
        '<figure class="chart {}"><figcaption>{}</figcaption>'
        '<svg viewBox="0 0 {} {}" role="{}" aria-label="{}. {}">{}</svg>{}<ul class="legend">{}</ul></figure>'
    ).format(kind, title, WIDTH, height, role, title, description, Markup("\n").join(parts), keys, key)


def _key(style: str) -> Markup:
    if style == "ring":
        return Markup('<circle class="label" cx="13" cy="6" r="4"/>')
    if style == "disc":
        return Markup('<circle class="own" cx="13" cy="6" r="4"/>')
    return _path(style, "M2 6H24")


def _axes(frame: Frame, x: str, y: str, *, whole_x: bool = False, y_ticks: bool = True) -> Markup:
    """Grid, numbers and names of the axes."""
    parts = []
    left, right, bottom, top = frame.at_x(frame.x[0]), frame.at_x(frame.x[1]), frame.at_y(frame.y[0]), frame.at_y(frame.y[1])
    for tick in _ticks(*frame.x, whole=whole_x):
        parts.append(_path("grid", f"M{frame.at_x(tick)} {bottom}V{top}"))
        parts.append(_text("middle", frame.at_x(tick), frame.height - frame.bottom + 15, f"{tick:g}"))
    for tick in _ticks(*frame.y) if y_ticks else ():
        parts.append(_path("grid", f"M{left} {frame.at_y(tick)}H{right}"))
        parts.append(_text("end", frame.left - 5, float(frame.at_y(tick)) + 4, f"{tick:g}"))
    parts.append(_text("middle", (frame.left + WIDTH - frame.right) / 2, frame.height - 5, x))
    if y:
        middle = (frame.top + frame.height - frame.bottom) / 2
        turned = Markup('<text class="middle" transform="translate(11 {}) rotate(-90)">{}</text>')
        parts.append(turned.format(_number(middle), y))
    return Markup("").join(parts)


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About five round numbers from low to high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _padded(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * 0.06 or 0.5
    return low - pad, high + pad


def _edge(actual: Numbers, predicted: Numbers) -> float:
    """Limit of both axes: a little more than 1, or than the largest value if a prediction lies outside -1..1."""
    return 1.05 * max(1.0, float(np.abs(actual).max()), float(np.abs(predicted).max()))


def _path(style: str, commands: str) -> Markup:
    return Markup('<path class="{}" d="{}"/>').format(style, commands)


def _circle(style: str, x: str, y: str, radius: float) -> Markup:
    return Markup('<circle class="{}" cx="{}" cy="{}" r="{}"/>').format(style, x, y, radius)


def _text(anchor: str, x: float | str, y: float, text: str) -> Markup:
    at_x = x if isinstance(x, str) else _number(x)
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(anchor, at_x, _number(y), escape(text))


def _number(value: float) -> str:
    """At most one decimal, without a trailing zero: charts have hundreds of numbers."""
    return f"{value:z.1f}".removesuffix(".0")
