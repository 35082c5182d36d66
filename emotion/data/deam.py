"""DEAM on disk: labels, audio and metadata in any known layout, joined into one table of songs.

DEAM has 1,802 songs with static ratings on 1..9: 1,744 excerpts of 45 s (ids up to 2000, about ten raters) and 58 full
songs (ids above 2000, about five raters). Nothing here decodes audio.

Source: Aljanaki, Yang and Soleymani 2017, "Developing a benchmark for emotional analysis of music", PLOS ONE.
"""

import csv
import io
import logging
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import NoReturn

from emotion.data.faults import Fault, printable
from emotion.errors import DataError, StorageError, first_of
from emotion.files import sha256_of, write_csv

log = logging.getLogger(__name__)

# DEAM also ships static_annotations_songs_*.csv, a row per rater: not these.
LABEL_FILES = re.compile(r"static_(annotations_averaged|annots).*\.csv", re.IGNORECASE)
LABEL_COLUMNS = ("song_id", "valence_mean", "valence_std", "arousal_mean", "arousal_std")
METADATA_FILES = re.compile(r"metadata.*\.csv", re.IGNORECASE)
ID_COLUMNS = ("song_id", "songid", "id")
AUDIO_FILES = re.compile(r"([0-9]+)\.(mp3|wav|flac|ogg|m4a)", re.IGNORECASE)
SONG_ID = re.compile(r"([0-9]{1,9})(\.0*)?")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
LAST_EXCERPT_ID = 2000
"""Ids above are full songs, rated by fewer people."""
SONG_COLUMNS = ("song_id", "valence", "arousal", "valence_sd", "arousal_sd", "group", "audio")


@dataclass(frozen=True)
class Song:
    """One labelled song with audio.

    valence, arousal: mean over raters on -1..1, (x - 5) / 4 of DEAM's 1..9. valence_sd, arousal_sd: standard deviation
    over raters on the same scale. group: songs of one group stay together in splits. audio: posix path of the audio
    file relative to the dataset's folder.
    """

    song_id: int
    valence: float
    arousal: float
    valence_sd: float
    arousal_sd: float
    group: str
    audio: str


@dataclass(frozen=True)
class Label:
    """One row of a label file: mean and standard deviation over raters, on DEAM's 1..9. Equal if id and numbers are."""

    song_id: int
    valence: float
    valence_sd: float
    arousal: float
    arousal_sd: float
    found_at: str = field(compare=False)
    """File, relative to the dataset's folder, and line."""


@dataclass(frozen=True)
class Dataset:
    """What is usable, by id, and what is not."""

    songs: list[Song]
    faults: list[Fault]


def find_dataset(root: Path, files: Sequence[Path] | None = None) -> Dataset:
    """The songs below `root`; labels, audio and metadata are found by their names, in any folders.

    files: what there is, sorted, where the dataset lies in a store. Of these, labels, metadata and audio of which a song has
    several (`read_for_labels`) have to be below `root`, other audio not.

    A song is left out, and told of as a fault, where its label is wrong or missing, copies of its label contradict each
    other, its audio is missing, or two different files claim to be it. Raises DataError where there is no folder, label
    file or audio at all, and for metadata that cannot be read.
    """
    files = dataset_files(root) if files is None else files
    labels, faults = _join_labels(root, files)
    # A wrong row names a song, too: what else is wrong with it is not to be found out only when the row is mended.
    rows = {fault.song_id: fault.place for fault in faults if fault.song_id is not None}
    rows |= {label.song_id: label.found_at for label in labels}
    audio, audio_faults = _find_audio(root, files)
    faults += audio_faults
    for song_id in sorted(rows.keys() - audio.keys()):
        expected = f"expected {song_id}.mp3 (or wav, flac, ogg, m4a) anywhere below the dataset's folder"
        faults.append(Fault("label without audio", song_id, rows[song_id], expected))
    for song_id in sorted(audio.keys() - rows.keys()):
        place = printable(audio[song_id].relative_to(root))
        faults.append(Fault("audio without label", song_id, place, "no label file has a row with this id"))
    unusable = {fault.song_id for fault in faults}
    groups = _find_groups(root, files)
    songs = [
        Song(
            song_id=label.song_id,
            valence=(label.valence - 5) / 4,
            arousal=(label.arousal - 5) / 4,
            valence_sd=label.valence_sd / 4,
            arousal_sd=label.arousal_sd / 4,
            group=groups.get(label.song_id, f"song:{label.song_id}"),
            audio=audio[label.song_id].relative_to(root).as_posix(),
        )
        for label in labels
        if label.song_id not in unusable
    ]
    return Dataset(songs, faults)


def dataset_files(root: Path) -> list[Path]:
    """Every label, metadata and audio file below `root`, sorted: all that `find_dataset` reads or names."""
    return [path for path in _files_below(root) if is_of_dataset(path.name)]


def is_of_dataset(name: str) -> bool:
    """Whether a file of this name (without folders) is label file, metadata or audio."""
    return any(pattern.fullmatch(name) for pattern in (LABEL_FILES, METADATA_FILES, AUDIO_FILES))


def read_for_labels(files: Sequence[Path]) -> list[Path]:
    """Those of a dataset's files that `find_dataset` reads: all but the audio of songs that have one file."""
    copies = Counter(int(match[1]) for match in (AUDIO_FILES.fullmatch(path.name) for path in files) if match)
    audio = [AUDIO_FILES.fullmatch(path.name) for path in files]
    return [path for path, match in zip(files, audio, strict=True) if not match or copies[int(match[1])] > 1]


def find_labels(root: Path) -> tuple[list[Label], list[Fault]]:
    """The labels of every averaged static label file below `root`, by id, and what is wrong with others; no audio is needed.

    A song found several times with the same numbers is taken once; where the numbers differ, it is not taken.
    """
    return _join_labels(root, dataset_files(root))


def read_labels(path: Path, name: str) -> tuple[list[Label], list[Fault]]:
    """The rows of one averaged static label file, in its order, and what is wrong with others. `name` is its place in faults.

    Reads every spelling in circulation: blanks around names, inside names (`valence_ max_mean`) and around numbers, `3`
    and `5.0`, CRLF, a byte order mark, more columns than needed; semicolons for commas, then with 3,1 for 3.1. Means have to
    be finite and in 1..9, standard deviations finite and not negative.
    """
    try:
        columns, rows, delimiter = _table(name, _read_text(path, name))
        wrong = [column for column in LABEL_COLUMNS if columns.count(column) != 1]
        if wrong:
            # What is no table at all has any bytes here, and any number of them.
            found = first_of([repr(column[:40]) for column in columns])
            raise DataError(
                f"{name}: expected one column each of {', '.join(LABEL_COLUMNS)}, found {found}; missing or repeated: "
                f"{', '.join(wrong)}"
            )
        if not rows:
            raise DataError(f"{name}: a header without rows, expected one row per song")
    except DataError as error:
        return [], [Fault("label file", None, name, str(error).removeprefix(f"{name}: "))]
    labels = []
    faults = []
    for line, cells in rows:
        place = f"{name}, line {line}"
        cell = dict(zip(columns, cells, strict=False))
        number = {column: _number(cell.get(column, ""), delimiter) for column in LABEL_COLUMNS[1:]}
        id_text = cell.get("song_id", "")
        match = SONG_ID.fullmatch(_with_points(id_text, delimiter))
        song_id = int(match[1]) if match else None
        problems = [_problem(column, value, cell.get(column, "")) for column, value in number.items()]
        if song_id is None:
            problems.append(f"song_id is {id_text!r}, expected a whole number")
        if len(cells) != len(columns):
            problems = [f"{len(cells)} cells, expected {len(columns)} as in the header"]
            if columns[0] != "song_id":
                song_id = None  # what stands in its column may be another's number
        if any(problems):
            faults.append(Fault("label", song_id, place, "; ".join(filter(None, problems))))
        elif song_id is not None:
            valence, valence_sd, arousal, arousal_sd = number.values()
            labels.append(Label(song_id, valence, valence_sd, arousal, arousal_sd, place))
    return labels, faults


def write_songs(path: Path, songs: Sequence[Song]) -> None:
    """The table of songs as CSV with a fixed header; numbers are written so that reading gives the same bits."""
    write_csv(path, SONG_COLUMNS, (astuple(song) for song in songs))


def read_songs(path: Path) -> list[Song]:
    """The table that `write_songs` wrote, in its order. Raises DataError for anything else."""
    songs = []
    reader = csv.reader(io.StringIO(_read_text(path, str(path)), newline=""), strict=True)
    try:
        if tuple(next(reader, ())) != SONG_COLUMNS:
            raise DataError(f"{path}: expected a songs table with the header {','.join(SONG_COLUMNS)}.")
        for song_id, valence, arousal, valence_sd, arousal_sd, group, audio in reader:
            mean = (float(valence), float(arousal))
            sd = (float(valence_sd), float(arousal_sd))
            songs.append(Song(int(song_id), *mean, *sd, group, audio))
    except (csv.Error, ValueError) as error:
        raise DataError(
            f"{path}, line {reader.line_num}: not a row of a songs table ({error}). Make it again."
        ) from error
    return songs


def _files_below(root: Path) -> list[Path]:
    """Every file below `root` outside hidden folders, sorted. Symlinked folders are entered, each real folder once."""
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder. Expected the folder that holds DEAM's annotations and audio; correct data.source."
        )
    files: list[Path] = []
    # A link to a folder above root would lead out of the dataset, so these count as entered.
    entered = set(root.resolve().parents)
    for folder, subfolders, names in os.walk(root, onerror=_refuse_folder, followlinks=True):
        real = Path(folder).resolve()
        if real in entered:
            subfolders.clear()
            continue
        entered.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += [Path(folder, name) for name in names]
    return sorted(path for path in files if path.is_file())


def _refuse_folder(error: OSError) -> NoReturn:
    raise StorageError.of(error, f"{error.filename}: cannot be listed ({error.strerror}).") from error


def _join_labels(root: Path, files: Sequence[Path]) -> tuple[list[Label], list[Fault]]:
    label_files = [path for path in files if LABEL_FILES.fullmatch(path.name)]
    if not label_files:
        raise DataError(
            f"{root}: no label file in this folder or below. Expected static_annotations_averaged_songs_1_2000.csv and "
            "static_annotations_averaged_songs_2000_2058.csv; unpack DEAM's annotations there or correct data.source."
        )
    labels: dict[int, Label] = {}
    faults: list[Fault] = []
    for path in label_files:
        found, wrong = read_labels(path, printable(path.relative_to(root)))
        faults += wrong
        for label in found:
            known = labels.setdefault(label.song_id, label)
            if known != label:
                what = f"{_numbers(label)}, but {_numbers(known)} in {known.found_at}"
                faults.append(Fault("contradicting labels", label.song_id, label.found_at, what))
    unusable = {fault.song_id for fault in faults}
    return [labels[song_id] for song_id in sorted(labels.keys() - unusable)], faults


def _numbers(label: Label) -> str:
    return f"valence {label.valence:g} (SD {label.valence_sd:g}), arousal {label.arousal:g} (SD {label.arousal_sd:g})"


def _find_audio(root: Path, files: Sequence[Path]) -> tuple[dict[int, Path], list[Fault]]:
    """Song id → its audio file, the first of several; and a fault for each that is not the same bytes as the first."""
    audio: dict[int, Path] = {}
    faults = []
    for path in files:
        match = AUDIO_FILES.fullmatch(path.name)
        if match is None:
            continue
        song_id = int(match[1])
        known = audio.setdefault(song_id, path)
        if known is not path and sha256_of(known) != sha256_of(path):
            what = f"another file than {printable(known.relative_to(root))}, expected one for a song"
            faults.append(Fault("two audio files", song_id, printable(path.relative_to(root)), what))
    if not audio:
        raise DataError(
            f"{root}: label files, but no audio in this folder or below. Expected SONG_ID.mp3 (or wav, flac, ogg, "
            "m4a), such as MEMD_audio/2.mp3; unpack DEAM's audio there or correct data.source."
        )
    return audio, faults


def _find_groups(root: Path, files: Sequence[Path]) -> dict[int, str]:
    """Song id → its group, for songs that metadata names: the column `group` where a song has one, else `artist`."""
    metadata_files = [path for path in files if METADATA_FILES.fullmatch(path.name)]
    if not metadata_files:
        log.warning("deam: no metadata*.csv below %s, so splits cannot keep the songs of an artist together", root)
    groups: dict[int, tuple[str, str]] = {}
    artists: dict[int, tuple[str, str]] = {}
    for path in metadata_files:
        content = _read_bytes(path)
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            # Names serve only to be compared, and Latin-1 reads any bytes.
            text = content.decode("latin-1")
        columns, rows, delimiter = _table(str(path), text)
        id_column = next((name for name in ID_COLUMNS if name in columns), None)
        if id_column is None or not {"group", "artist"} & set(columns):
            raise DataError(
                f"{path}: expected the columns song_id and group or artist, found {', '.join(filter(None, columns))}. "
                "Rename the columns, or the file if it is not about songs."
            )
        without_id = []
        for line, cells in rows:
            # Not strict: a genre of DEAM spills over any number of cells without a name.
            cell = dict(zip(columns, cells, strict=False))
            song_id = _number(cell[id_column], delimiter)
            if not song_id.is_integer():
                without_id.append(line)
                continue
            for named, column in ((groups, "group"), (artists, "artist")):
                name = _group_name(cell.get(column, ""))
                if not name:
                    continue
                known, known_at = named.setdefault(int(song_id), (name, f"{path}, line {line}"))
                if known != name:
                    raise DataError(
                        f"song {song_id:g}: {column} is {known!r} in {known_at}, but {name!r} in {path}, line {line}. "
                        "Keep one of them."
                    )
        if without_id:
            log.warning("deam: %s: no song id in lines %s, left out", path, first_of(without_id))
    return {song_id: name for song_id, (name, _) in (artists | groups).items()}


def _group_name(name: str) -> str:
    """One spelling of a name, empty for none: blanks and tabs, case and Unicode variants do not make another artist."""
    name = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    return "" if name == "n/a" else name


def _table(name: str, text: str) -> tuple[list[str], list[tuple[int, list[str]]], str]:
    """Column names in lower case without any blanks; line number and stripped cells of every row that is not blank.

    And what separates the cells: semicolons, as spreadsheets of half the world write them, where the header has no comma.
    """
    header = text.lstrip().partition("\n")[0]
    delimiter = ";" if ";" in header and "," not in header else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        rows = [(reader.line_num, cells) for cells in reader]
    except csv.Error as error:
        raise DataError(
            f"{name}: line {reader.line_num} is not of a CSV table ({error}). Fetch the file again."
        ) from error
    for line, cells in rows:
        if any("\n" in cell or "\r" in cell for cell in cells):
            raise DataError(f"{name}: a quoted cell that ends in line {line} began in another. Close its quote.")
    filled = [(line, [cell.strip() for cell in cells]) for line, cells in rows if any(map(str.strip, cells))]
    if not filled:
        raise DataError(f"{name}: the file is empty. Expected a header and one row per song; fetch the file again.")
    return ["".join(column.split()).casefold() for column in filled[0][1]], filled[1:], delimiter


def _number(text: str, delimiter: str) -> float:
    """A number in plain decimal spelling, NaN for anything else."""
    plain = _with_points(text, delimiter)
    return float(plain) if NUMBER.fullmatch(plain) else math.nan


def _with_points(text: str, delimiter: str) -> str:
    """A comma is decimal only where it separates no cells."""
    return text.replace(",", ".") if delimiter == ";" else text


def _problem(column: str, value: float, text: str) -> str | None:
    if column.endswith("_std"):
        return None if 0 <= value < math.inf else f"{column} is {text!r}, expected 0 or more"
    return None if 1 <= value <= 9 else f"{column} is {text!r}, expected 1 to 9"


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError.of(error, f"{path}: cannot be read ({error.strerror}).") from error


def _read_text(path: Path, name: str) -> str:
    try:
        return _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: expected UTF-8 text, found another encoding ({error}). Save it as UTF-8.") from error
