"""The reader of `songs.csv`: a table of files, valence and arousal beside audio of any names → a `Dataset`.

A row names a file by its path in the dataset's folder, and that path is the song's id. Nothing here decodes audio.
"""

import logging
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from emotion.characters import quoted
from emotion.data.csv_table import CsvTable, parse_table, read_text
from emotion.data.faults import Fault
from emotion.data.label_scale import Scale, label_of, label_sd_of, shown_scale
from emotion.data.song_ids import order_of
from emotion.data.songs import AUDIO_FILE, AUDIO_FORMATS, Dataset, Song, group_name
from emotion.data.unused import COLUMNS, UNLISTED, Unused
from emotion.errors import DataError, SpecError, counted, first_of

log = logging.getLogger(__name__)

SONGS_TABLE = "songs.csv"
NEEDED = ("file", "valence", "arousal")
OPTIONAL = ("valence_sd", "arousal_sd", "raters", "group", "split", "genre")
SPLITS = ("train", "validation", "test")
LONGEST_NAME = 200  # bytes of a component of a path: a file in work has a longer name
FEWEST_RATERS = 2  # one rater has no deviation


@dataclass(frozen=True)
class Row:
    """A row of the table that is as it should be. file: relative path, normalised."""

    file: str
    line: int
    valence: float
    arousal: float
    valence_sd: float | None
    arousal_sd: float | None
    raters: int | None
    group: str
    split: str

    @property
    def content(self) -> tuple[Any, ...]:
        return self.valence, self.arousal, self.valence_sd, self.arousal_sd, self.raters, self.group, self.split


def is_collection_file(path: str) -> bool:
    """Whether a file at this path, relative to the dataset's folder, is the table or audio, by its name alone."""
    name = path.rpartition("/")[2]
    return path == SONGS_TABLE or (AUDIO_FILE.fullmatch(name) is not None and not name.startswith("."))


def find_collection(root: Path, files: Sequence[Path], unused: Unused, scale: Scale | None) -> Dataset:
    """The songs that the table in `root` lists.

    files: those of the dataset, sorted; only the table must be below `root`. unused: gets audio that is not listed. scale: of the
    table's numbers. A song is left out, with a fault, if its row is wrong or contradicts another, or its file is absent, leads
    out of the folder or is another song's. Raises SpecError for no scale, DataError for a table without rows or columns.
    """
    path = root / SONGS_TABLE
    table = parse_table(str(path), read_text(path, str(path)))
    _require_columns(table, path)
    if scale is None:
        raise SpecError(
            f"data.scale: {path} does not say on which scale its numbers are; name it, such as data.scale=[1, 9] or "
            f"data.scale=[-1, 1]."
        )
    for column in sorted({column for column in table.columns if column not in (*NEEDED, *OPTIONAL)}):
        unused.add(column or "(no name)", COLUMNS)
    if "group" not in table.columns:
        log.warning("data: %s has no column group, so splits cannot keep the songs of an artist together", path)
    audio = {file.relative_to(root).as_posix(): file for file in files if file != path}
    rows, faults = _read_rows(table, scale)
    listed = {fault.song_id for fault in faults}
    found: dict[str, str] = {}
    owner: dict[str, Row] = {}
    by_spelling = _by_spelling(audio)
    by_case = {_normal(name).casefold(): name for name in sorted(audio)}
    real_root = root.resolve()
    for row in rows:
        place = f"{SONGS_TABLE}, line {row.line}"
        name = row.file if row.file in audio else by_spelling.get(_normal(row.file))
        if name is None:
            faults.append(Fault("label without audio", row.file, place, _absent(row.file, by_case)))
        elif not audio[name].resolve().is_relative_to(real_root):
            problem = "a link that leads out of the dataset's folder; copy the file there"
            faults.append(Fault("label without audio", row.file, place, problem))
        elif (first := owner.setdefault(name, row)) is not row:
            faults.append(Fault("two audio files", row.file, place, f"the file of line {first.line}, under another spelling"))
        else:
            found[row.file] = name
        listed |= {row.file, name}
    for name in sorted(audio.keys() - listed):
        unused.add(name, UNLISTED)
    if not audio:
        raise DataError(f"{root}: {SONGS_TABLE}, but no audio in this folder or below; expected {AUDIO_FORMATS}.{unused.hint()}")
    unusable = {fault.song_id for fault in faults}
    songs = [_song(row, found[row.file], scale) for row in rows if row.file not in unusable]
    return Dataset(root, sorted(songs, key=lambda song: order_of(song.song_id)), faults, scale=scale)


def _require_columns(table: CsvTable, path: Path) -> None:
    wrong = [column for column in NEEDED if table.columns.count(column) != 1]
    wrong += [column for column in OPTIONAL if table.columns.count(column) > 1]
    if wrong:
        found = first_of([quoted(column) for column in table.columns])
        raise DataError(
            f"{path}: expected one column each of {', '.join(NEEDED)} and, if you have them, {', '.join(OPTIONAL)}; found "
            f"{found}; missing or repeated: {', '.join(wrong)}"
        )
    if not table.rows:
        raise DataError(f"{path}: a header without rows, expected one row per song")


def _read_rows(table: CsvTable, scale: Scale) -> tuple[list[Row], list[Fault]]:
    """The rows that are as they should be, each file once, and what is wrong with the others."""
    rows: dict[str, Row] = {}
    faults: list[Fault] = []
    for line, cells in table.rows:
        place = f"{SONGS_TABLE}, line {line}"
        cell = dict(zip(table.columns, cells, strict=False))
        file = PurePosixPath(cell.get("file", "")).as_posix()
        problems = [_file_problem(cell.get("file", ""))]
        # The song is named where its file can be one, so that everything that is wrong with it counts once.
        song_id = None if problems[0] else file
        problems += [_number_problem(table, cell, column, scale) for column in ("valence", "arousal", "valence_sd", "arousal_sd")]
        problems += [_raters_problem(cell.get("raters", "")), _split_problem(cell.get("split", ""))]
        if len(cells) != len(table.columns):
            problems = [f"{len(cells)} cells, expected {len(table.columns)} as in the header; quote a name that has a comma"]
            song_id = song_id if table.columns[0] == "file" else None  # the cells are shifted
        if any(problems):
            faults.append(Fault("label", song_id, place, "; ".join(filter(None, problems))))
            continue
        row = Row(
            file,
            line,
            valence=table.number(cell["valence"]),
            arousal=table.number(cell["arousal"]),
            valence_sd=table.number(cell["valence_sd"]) if cell.get("valence_sd") else None,
            arousal_sd=table.number(cell["arousal_sd"]) if cell.get("arousal_sd") else None,
            raters=int(cell["raters"]) if cell.get("raters") else None,
            group=group_name(cell.get("group", "")),
            split=cell.get("split", "").lower(),
        )
        first = rows.setdefault(file, row)
        if first.content != row.content:
            problem = f"other contents than in line {first.line}; keep one of the rows"
            faults.append(Fault("contradicting labels", file, place, problem))
    return list(rows.values()), faults


def _file_problem(text: str) -> str | None:
    path = PurePosixPath(text)
    if not text:
        return "file is empty, expected the path of an audio file"
    if path.is_absolute() or ".." in path.parts:
        return f"file is {quoted(text)}, expected a path inside the dataset's folder, relative to it"
    if not text.isprintable():
        return f"file is {quoted(text)}, with a character that does not print; rename the file"
    if any(len(part.encode()) > LONGEST_NAME for part in path.parts):
        return f"file is {quoted(text)}, with a name of over {LONGEST_NAME} bytes; rename it"
    if not AUDIO_FILE.fullmatch(path.name):
        return f"file is {quoted(text)}, expected the name of an audio file: {AUDIO_FORMATS}"
    return None


def _number_problem(table: CsvTable, cell: Mapping[str, str], column: str, scale: Scale) -> str | None:
    text = cell.get(column, "")
    value = table.number(text)
    if column.endswith("_sd"):
        return None if not text or 0 <= value < math.inf else f"{column} is {quoted(text)}, expected 0 or more, or nothing"
    low, high = scale
    return None if low <= value <= high else f"{column} is {quoted(text)}, {_expected(scale)}"


def _expected(scale: Scale) -> str:
    return f"expected {shown_scale(scale)} (data.scale)"


def scale_question(faults: Sequence[Fault], scale: Scale) -> str | None:
    """What to ask where most of the faults are numbers that are not on `scale`; else None."""
    number = re.compile(rf"is '[^']*[0-9][^']*', {re.escape(_expected(scale))}")
    outside = sum(number.search(fault.what) is not None for fault in faults)
    if 2 * outside <= len(faults):
        return None
    option = f"--scale {scale[0]:g} {scale[1]:g}"
    return f"{counted(outside, 'song')} have ratings outside of {option}. Is that the scale of the raters?"


def _raters_problem(text: str) -> str | None:
    if not text or (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) >= FEWEST_RATERS):
        return None
    return f"raters is {quoted(text)}, expected a whole number, {FEWEST_RATERS} or more, or nothing"


def _split_problem(text: str) -> str | None:
    return None if not text or text.lower() in SPLITS else f"split is {quoted(text)}, expected {', '.join(SPLITS)} or nothing"


def _normal(name: str) -> str:
    """One spelling of names that look alike: macOS writes é as two characters."""
    return unicodedata.normalize("NFC", name)


def _by_spelling(audio: Mapping[str, Path]) -> dict[str, str]:
    """Normalised name → the name of the file; without those of several files."""
    names: dict[str, list[str]] = {}
    for name in audio:
        names.setdefault(_normal(name), []).append(name)
    return {normal: found[0] for normal, found in names.items() if len(found) == 1}


def _absent(file: str, by_case: Mapping[str, str]) -> str:
    """The message for a missing file. by_case: normalised name in lower case → the name of a file."""
    alike = by_case.get(_normal(file).casefold())
    if alike is not None:
        return f"there is no such file, but {quoted(alike)}"
    separator = "; folders are separated by /" if "\\" in file else ""
    return f"there is no such file in the dataset's folder{separator}"


def _song(row: Row, name: str, scale: Scale) -> Song:
    return Song(
        row.file,
        label_of(row.valence, scale),
        label_of(row.arousal, scale),
        None if row.valence_sd is None else label_sd_of(row.valence_sd, scale),
        None if row.arousal_sd is None else label_sd_of(row.arousal_sd, scale),
        row.group or f"song:{row.file}",
        name,
        raters=row.raters,
        split=row.split,
    )
