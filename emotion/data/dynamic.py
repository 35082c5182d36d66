"""DEAM's dynamic annotations: valence and arousal at every half second, averaged over raters, on -1..1. A dataset may have them.

They lie in `annotations averaged per song/dynamic (per second annotations)/`, one file for valence and one for arousal, with the
columns song_id, sample_15000ms, sample_15500ms, … A song's row ends with empty cells. The first 15 seconds are left out, as
raters need them to find their way into the song.

Source: Aljanaki, Yang and Soleymani 2017, PLOS ONE 12:e0173392.
"""

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from emotion.data.csv_table import parse_table, read_records, read_text, write_records
from emotion.data.song_ids import SongId
from emotion.errors import DataError, printable

DYNAMIC_FILES = re.compile(r"(.*/)?[^/]*dynamic[^/]*/(valence|arousal)\.csv", re.IGNORECASE)
SAMPLE = re.compile(r"sample_([0-9]+)ms")
DYNAMIC_TABLE = "dynamic.csv"  # ours, in the folder of a phase
FIRST_SECONDS = 15.0


@dataclass(frozen=True)
class DynamicPoint:
    """Mean rating of a song at one time. valence, arousal: on -1..1."""

    song_id: SongId
    seconds: float
    valence: float
    arousal: float


def dynamic_points(root: Path, files: Iterable[Path], song_ids: Collection[SongId]) -> list[DynamicPoint]:
    """Of these songs, by song and time: where both dimensions have a number. Empty without files, or with one of two only.

    Raises DataError for files that are no such tables.
    """
    found: dict[str, Path] = {}
    for path in files:
        match = DYNAMIC_FILES.fullmatch(path.relative_to(root).as_posix())
        if match:
            found.setdefault(match[2].lower(), path)
    if len(found) < 2:
        return []
    valence, arousal = (_read(found[name], printable(found[name].relative_to(root))) for name in ("valence", "arousal"))
    both = sorted((song, ms) for song, ms in valence.keys() & arousal.keys() if song in song_ids and ms >= 1000 * FIRST_SECONDS)
    return [DynamicPoint(song, ms / 1000, valence[song, ms], arousal[song, ms]) for song, ms in both]


def _read(path: Path, name: str) -> dict[tuple[int, int], float]:
    """(song, milliseconds) → number."""
    table = parse_table(name, read_text(path, name))
    samples = [SAMPLE.fullmatch(column) for column in table.columns]
    if "song_id" not in table.columns or not any(samples):
        raise DataError(f"{name}: expected the columns song_id, sample_15000ms, …; move the file away if it is something else.")
    place = table.columns.index("song_id")
    numbers: dict[tuple[int, int], float] = {}
    for line, cells in table.rows:
        song = table.number(cells[place]) if place < len(cells) else math.nan
        if not song.is_integer():
            raise DataError(f"{name}, line {line}: expected the number of a song in song_id, found {cells[place : place + 1]}.")
        for sample, cell in zip(samples, cells, strict=False):
            if sample is None or cell.casefold() in ("", "nan", "na"):
                continue
            value = table.number(cell)
            if not -1 <= value <= 1:
                raise DataError(f"{name}, line {line}: expected a number from -1 to 1 in {sample[0]}, found {printable(cell)}.")
            numbers[int(song), int(sample[1])] = value
    return numbers


def write_dynamic(folder: Path, points: Sequence[DynamicPoint]) -> None:
    write_records(folder / DYNAMIC_TABLE, DynamicPoint, points)


def read_dynamic(folder: Path) -> dict[SongId, list[DynamicPoint]]:
    """Song → its points; empty for a dataset without. Raises DataError for anything but what `write_dynamic` wrote."""
    found: dict[SongId, list[DynamicPoint]] = {}
    if (folder / DYNAMIC_TABLE).exists():
        for point in read_records(folder / DYNAMIC_TABLE, DynamicPoint, "the table of dynamic annotations"):
            found.setdefault(point.song_id, []).append(point)
    return found
