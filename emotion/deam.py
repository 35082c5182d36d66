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
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import NoReturn

from emotion.errors import SHOWN, DataError, StorageError, first_of
from emotion.files import sha256_of, write_csv

log = logging.getLogger(__name__)

# DEAM also ships static_annotations_songs_*.csv, a row per rater: not these.
LABEL_FILES = re.compile(r"static_(annotations_averaged|annots).*\.csv", re.IGNORECASE)
LABEL_COLUMNS = ("song_id", "valence_mean", "valence_std", "arousal_mean", "arousal_std")
METADATA_FILES = re.compile(r"metadata.*\.csv", re.IGNORECASE)
ID_COLUMNS = ("song_id", "songid", "id")
AUDIO_FILES = re.compile(r"([0-9]+)\.(mp3|wav|flac|ogg|m4a)", re.IGNORECASE)
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
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


def find_dataset(root: Path) -> list[Song]:
    """The songs below `root`, by id; labels, audio and metadata are found by their names, in any folders.

    Raises DataError where there is no folder, label file, labelled song or audio, where a labelled song has no audio,
    and where copies contradict each other. Audio without a label is left out with a warning.
    """
    labels = find_labels(root)
    files = dataset_files(root)
    audio = _find_audio(root, files)
    missing = [label.song_id for label in labels if label.song_id not in audio]
    if missing:
        raise DataError(
            f"{root}: {len(missing)} of {len(labels)} labelled songs have no audio file, ids {first_of(missing)}. "
            "Expected SONG_ID.mp3 (or wav, flac, ogg, m4a) anywhere below; fetch the audio again, or take these rows "
            "out of the label files."
        )
    unlabelled = sorted(audio.keys() - {label.song_id for label in labels})
    if unlabelled:
        log.warning("deam: audio_without_label=%d left out, ids %s", len(unlabelled), first_of(unlabelled))
    groups = _find_groups(root, files)
    return [
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
    ]


def dataset_files(root: Path) -> list[Path]:
    """Every label, metadata and audio file below `root`, sorted: all that `find_dataset` reads or names."""
    wanted = (LABEL_FILES, METADATA_FILES, AUDIO_FILES)
    return [path for path in _files_below(root) if any(pattern.fullmatch(path.name) for pattern in wanted)]


def find_labels(root: Path) -> list[Label]:
    """The labels of every averaged static label file below `root`, by id; no audio is needed.

    A song found several times with the same numbers is taken once. Raises DataError where copies differ.
    """
    return _join_labels(root, dataset_files(root))


def read_labels(path: Path) -> list[Label]:
    """The rows of one averaged static label file, in its order.

    Reads every spelling in circulation: blanks around names, inside names (`valence_ max_mean`) and around numbers, `3`
    and `5.0`, CRLF, a byte order mark, more columns than needed. Raises one DataError with all rows that are wrong:
    means have to be finite and in 1..9, standard deviations finite and not negative.
    """
    columns, rows = _table(path, _read_text(path))
    wrong = [name for name in LABEL_COLUMNS if columns.count(name) != 1]
    if wrong:
        raise DataError(
            f"{path}: expected one column each of {', '.join(LABEL_COLUMNS)}; found {', '.join(columns)}. "
            f"Missing or repeated: {', '.join(wrong)}. Take the file from DEAM's averaged song-level annotations."
        )
    labels = []
    problems = []
    for line, cells in rows:
        if len(cells) != len(columns):
            problems.append(f"line {line}: {len(cells)} cells, the header has {len(columns)}")
            continue
        cell = dict(zip(columns, cells, strict=True))
        found = [_problem(name, cell[name]) for name in LABEL_COLUMNS]
        if any(found):
            problems.append(f"line {line}: " + ", ".join(filter(None, found)))
            continue
        valence, valence_sd, arousal, arousal_sd = (_number(cell[name]) for name in LABEL_COLUMNS[1:])
        song_id = int(_number(cell["song_id"]))
        labels.append(Label(song_id, valence, valence_sd, arousal, arousal_sd, f"{path}, line {line}"))
    if problems:
        _refuse(f"{path}: {len(problems)} wrong rows; expected whole ids, means in 1..9, SDs of 0 or more", problems)
    return labels


def write_songs(path: Path, songs: Sequence[Song]) -> None:
    """The table of songs as CSV with a fixed header; numbers are written so that reading gives the same bits."""
    write_csv(path, SONG_COLUMNS, (astuple(song) for song in songs))


def read_songs(path: Path) -> list[Song]:
    """The table that `write_songs` wrote, in its order. Raises DataError for anything else."""
    songs = []
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
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
    raise StorageError(f"{error.filename}: cannot be listed ({error.strerror}).") from error


def _join_labels(root: Path, files: Sequence[Path]) -> list[Label]:
    label_files = [path for path in files if LABEL_FILES.fullmatch(path.name)]
    if not label_files:
        raise DataError(
            f"{root}: no label file in this folder or below. Expected static_annotations_averaged_songs_1_2000.csv and "
            "static_annotations_averaged_songs_2000_2058.csv; unpack DEAM's annotations there or correct data.source."
        )
    labels: dict[int, Label] = {}
    problems = []
    for path in label_files:
        for label in read_labels(path):
            known = labels.setdefault(label.song_id, label)
            if known != label:
                problems.append(f"song {label.song_id}: {_numbers(known)}, but {_numbers(label)}")
    if problems:
        _refuse(f"{root}: contradicting labels; keep one of the copies", problems)
    if not labels:
        raise DataError(
            f"{root}: no song in {first_of(label_files)}. Expected a header and one row per song; fetch the files again."
        )
    return sorted(labels.values(), key=lambda label: label.song_id)


def _numbers(label: Label) -> str:
    return (
        f"valence {label.valence:g} (SD {label.valence_sd:g}), arousal {label.arousal:g} (SD {label.arousal_sd:g}) "
        f"in {label.found_at}"
    )


def _find_audio(root: Path, files: Sequence[Path]) -> dict[int, Path]:
    """Song id → its audio file. The same bytes twice are one file, two different ones an error."""
    audio: dict[int, Path] = {}
    problems = []
    for path in files:
        match = AUDIO_FILES.fullmatch(path.name)
        if match is None:
            continue
        known = audio.setdefault(int(match[1]), path)
        if known is not path and sha256_of(known) != sha256_of(path):
            problems.append(f"song {match[1]}: {known} and {path}")
    if problems:
        _refuse(f"{root}: two different audio files for one song; keep one of them", problems)
    if not audio:
        raise DataError(
            f"{root}: label files, but no audio in this folder or below. Expected SONG_ID.mp3 (or wav, flac, ogg, "
            "m4a), such as MEMD_audio/2.mp3; unpack DEAM's audio there or correct data.source."
        )
    return audio


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
        columns, rows = _table(path, text)
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
            song_id = _number(cell[id_column])
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


def _table(path: Path, text: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Column names in lower case without any blanks; line number and stripped cells of every row that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        rows = [(reader.line_num, cells) for cells in reader]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not a CSV table ({error}). Fetch the file again.") from error
    for line, cells in rows:
        if any("\n" in cell or "\r" in cell for cell in cells):
            raise DataError(f"{path}: a quoted cell that ends in line {line} began in another. Close its quote.")
    filled = [(line, [cell.strip() for cell in cells]) for line, cells in rows if any(map(str.strip, cells))]
    if not filled:
        raise DataError(f"{path}: the file is empty. Expected a header and one row per song; fetch the file again.")
    return ["".join(name.split()).casefold() for name in filled[0][1]], filled[1:]


def _number(text: str) -> float:
    """A number in plain decimal spelling, NaN for anything else."""
    return float(text) if NUMBER.fullmatch(text) else math.nan


def _problem(name: str, text: str) -> str | None:
    value = _number(text)
    if name == "song_id":
        fine = value.is_integer() and value >= 0
    elif name.endswith("_std"):
        fine = 0 <= value < math.inf
    else:
        fine = 1 <= value <= 9
    return None if fine else f"{name} is {text!r}"


def _refuse(what: str, problems: Sequence[str]) -> NoReturn:
    lines = [f"{what}:", *problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"and {len(problems) - SHOWN} more")
    raise DataError("\n  ".join(lines))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror}).") from error


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, found another encoding ({error}). Save it as UTF-8.") from error
