"""The reader of DEAM's layout: label files, audio and metadata on disk → a `Dataset`. Nothing here decodes audio.

DEAM has 1,802 songs with static ratings on 1..9: 1,744 excerpts of 45 s (ids up to 2000, about ten raters) and 58 full
songs (ids above 2000, about five raters).

To read labels in another form, add a reader beside `read_labels`: see "A dataset layout" in tests/README.md. Everything later
works on the `Dataset` alone.

Source: Aljanaki, Yang and Soleymani 2017, "Developing a benchmark for emotional analysis of music", PLOS ONE.
"""

import logging
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from emotion.data.csv_table import parse_table, read_text
from emotion.data.faults import Fault, printable
from emotion.data.label_scale import HIGHEST_RATING, LOWEST_RATING, label_of, label_sd_of
from emotion.data.songs import AUDIO_FORMATS, AUDIO_SUFFIX, Dataset, Song
from emotion.errors import DataError, StorageError, first_of
from emotion.files import sha256_of

log = logging.getLogger(__name__)

# Not static_annotations_songs_*.csv, which DEAM also ships: these have a row per rater.
LABEL_FILES = re.compile(r"static_(annotations_averaged|annots).*\.csv", re.IGNORECASE)
LABEL_COLUMNS = ("song_id", "valence_mean", "valence_std", "arousal_mean", "arousal_std")
METADATA_FILES = re.compile(r"metadata.*\.csv", re.IGNORECASE)
ID_COLUMNS = ("song_id", "songid", "id")
AUDIO_FILES = re.compile(f"([0-9]+){AUDIO_SUFFIX}", re.IGNORECASE)
SONG_ID = re.compile(r"([0-9]{1,9})(\.0*)?")
LAST_EXCERPT_ID = 2000  # songs with higher ids are full songs, rated by fewer people


@dataclass(frozen=True)
class Label:
    """One row of a label file: mean and standard deviation over raters, on 1..9. found_at: relative path and line."""

    song_id: int
    valence: float
    valence_sd: float
    arousal: float
    arousal_sd: float
    found_at: str = field(compare=False)

    @property
    def numbers(self) -> str:
        return f"valence {self.valence:g} (SD {self.valence_sd:g}), arousal {self.arousal:g} (SD {self.arousal_sd:g})"


def find_dataset(root: Path, files: Sequence[Path] | None = None) -> Dataset:
    """Find the songs below `root`; labels, audio and metadata are recognised by their names, in any folders.

    files: the dataset's files, sorted, if it lies in object storage; only those of `files_needed_to_join` must be below `root`.
    A song is left out, with a fault, if its label is wrong, missing or contradicts a copy, its audio is missing, or two
    different files claim to be it. Raises DataError for no folder, label file or audio at all, or unreadable metadata.
    """
    files = dataset_files(root) if files is None else files
    labels, faults = join_labels(root, files)
    # Songs of wrong rows count as labelled: whatever else is wrong with them is reported in the same pass.
    rows = {fault.song_id: fault.place for fault in faults if fault.song_id is not None}
    rows |= {label.song_id: label.found_at for label in labels}
    audio, audio_faults = _find_audio(root, files)
    faults += audio_faults
    for song_id in sorted(rows.keys() - audio.keys()):
        expected = f"expected {song_id}.mp3 (or {AUDIO_FORMATS}) anywhere below the dataset's folder"
        faults.append(Fault("label without audio", song_id, rows[song_id], expected))
    for song_id in sorted(audio.keys() - rows.keys()):
        place = printable(audio[song_id].relative_to(root))
        faults.append(Fault("audio without label", song_id, place, "no label file has a row with this id"))
    unusable = {fault.song_id for fault in faults}
    groups = _find_groups(root, files)
    songs = [
        Song(
            song_id=label.song_id,
            valence=label_of(label.valence),
            arousal=label_of(label.arousal),
            valence_sd=label_sd_of(label.valence_sd),
            arousal_sd=label_sd_of(label.arousal_sd),
            group=groups.get(label.song_id, f"song:{label.song_id}"),
            audio=audio[label.song_id].relative_to(root).as_posix(),
        )
        for label in labels
        if label.song_id not in unusable
    ]
    return Dataset(root, songs, faults)


def dataset_files(root: Path) -> list[Path]:
    """Every label, metadata and audio file below `root`, sorted. Hidden folders are skipped, symlinked folders entered once."""
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
        files += [Path(folder, name) for name in names if is_dataset_file(name)]
    return sorted(path for path in files if path.is_file())


def _refuse_folder(error: OSError) -> NoReturn:
    raise StorageError.of(error, f"{error.filename}: cannot be listed ({error.strerror}).") from error


def is_dataset_file(name: str) -> bool:
    """Whether a file of this name, without folders, is a label file, metadata or audio."""
    return any(pattern.fullmatch(name) for pattern in (LABEL_FILES, METADATA_FILES, AUDIO_FILES))


def files_needed_to_join(files: Sequence[Path]) -> list[Path]:
    """The files that `find_dataset` opens: labels, metadata, and the audio of songs that have several audio files."""
    audio = [AUDIO_FILES.fullmatch(path.name) for path in files]
    copies = Counter(int(match[1]) for match in audio if match)
    return [path for path, match in zip(files, audio, strict=True) if not match or copies[int(match[1])] > 1]


def join_labels(root: Path, files: Sequence[Path]) -> tuple[list[Label], list[Fault]]:
    """The labels of all label files, sorted by id, and what is wrong with the others. Differing labels of a song are a fault."""
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
            first = labels.setdefault(label.song_id, label)
            if first != label:
                problem = f"{label.numbers}, but {first.numbers} in {first.found_at}"
                faults.append(Fault("contradicting labels", label.song_id, label.found_at, problem))
    unusable = {fault.song_id for fault in faults}
    return [labels[song_id] for song_id in sorted(labels.keys() - unusable)], faults


def read_labels(path: Path, name: str) -> tuple[list[Label], list[Fault]]:
    """The rows of one label file, in its order, and what is wrong with the others. `name` stands for the file in faults.

    Reads every spelling in circulation: blanks around and inside names (`valence_ max_mean`), `3` and `5.0`, CRLF, a byte order
    mark, further columns; semicolons, then with 3,1 for 3.1. Means must be in 1..9, standard deviations finite and 0 or more.
    """
    try:
        table = parse_table(name, read_text(path, name))
        wrong = [column for column in LABEL_COLUMNS if table.columns.count(column) != 1]
        if wrong:
            found = first_of([repr(column[:40]) for column in table.columns])  # of no table, a column may have any length
            raise DataError(
                f"{name}: expected one column each of {', '.join(LABEL_COLUMNS)}, found {found}; missing or repeated: "
                f"{', '.join(wrong)}"
            )
        if not table.rows:
            raise DataError(f"{name}: a header without rows, expected one row per song")
    except DataError as error:
        return [], [Fault("label file", None, name, str(error).removeprefix(f"{name}: "))]
    labels = []
    faults = []
    for line, cells in table.rows:
        place = f"{name}, line {line}"
        cell = dict(zip(table.columns, cells, strict=False))
        numbers = {column: table.number(cell.get(column, "")) for column in LABEL_COLUMNS[1:]}
        id_text = cell.get("song_id", "")
        match = SONG_ID.fullmatch(table.with_points(id_text))
        song_id = int(match[1]) if match else None
        problems = [_problem(column, value, cell.get(column, "")) for column, value in numbers.items()]
        if song_id is None:
            problems.append(f"song_id is {id_text!r}, expected a whole number")
        if len(cells) != len(table.columns):
            problems = [f"{len(cells)} cells, expected {len(table.columns)} as in the header"]
            if table.columns[0] != "song_id":
                song_id = None  # the cells are shifted, so this may be another column's number
        if any(problems):
            faults.append(Fault("label", song_id, place, "; ".join(filter(None, problems))))
        elif song_id is not None:
            valence, valence_sd, arousal, arousal_sd = numbers.values()
            labels.append(Label(song_id, valence, valence_sd, arousal, arousal_sd, place))
    return labels, faults


def _problem(column: str, value: float, text: str) -> str | None:
    if column.endswith("_std"):
        return None if 0 <= value < math.inf else f"{column} is {text!r}, expected 0 or more"
    is_rating = LOWEST_RATING <= value <= HIGHEST_RATING
    return None if is_rating else f"{column} is {text!r}, expected {LOWEST_RATING} to {HIGHEST_RATING}"


def _find_audio(root: Path, files: Sequence[Path]) -> tuple[dict[int, Path], list[Fault]]:
    """Song id → its audio file, the first of several; and a fault for each further one with different bytes."""
    audio: dict[int, Path] = {}
    faults = []
    for path in files:
        match = AUDIO_FILES.fullmatch(path.name)
        if match is None:
            continue
        song_id = int(match[1])
        first = audio.setdefault(song_id, path)
        if first is not path and sha256_of(first) != sha256_of(path):
            problem = f"another file than {printable(first.relative_to(root))}, expected one for a song"
            faults.append(Fault("two audio files", song_id, printable(path.relative_to(root)), problem))
    if not audio:
        raise DataError(
            f"{root}: label files, but no audio in this folder or below. Expected SONG_ID.mp3 (or {AUDIO_FORMATS}), "
            "such as MEMD_audio/2.mp3; unpack DEAM's audio there or correct data.source."
        )
    return audio, faults


def _find_groups(root: Path, files: Sequence[Path]) -> dict[int, str]:
    """Song id → its group, for songs in the metadata: the column `group` if a song has one, else `artist`."""
    metadata_files = [path for path in files if METADATA_FILES.fullmatch(path.name)]
    if not metadata_files:
        log.warning("deam: no metadata*.csv below %s, so splits cannot keep the songs of an artist together", root)
    groups: dict[int, tuple[str, str]] = {}
    artists: dict[int, tuple[str, str]] = {}
    for path in metadata_files:
        # Names are only compared, so wrong letters do no harm.
        table = parse_table(str(path), read_text(path, str(path), allow_latin_1=True))
        id_column = next((name for name in ID_COLUMNS if name in table.columns), None)
        if id_column is None or not {"group", "artist"} & set(table.columns):
            raise DataError(
                f"{path}: expected the columns song_id and group or artist, found "
                f"{', '.join(filter(None, table.columns))}. Rename the columns, or the file if it is not about songs."
            )
        without_id = []
        for line, cells in table.rows:
            # Not strict: in DEAM's metadata of 2014 the genre spills over several cells without a header.
            cell = dict(zip(table.columns, cells, strict=False))
            song_id = table.number(cell[id_column])
            if not song_id.is_integer():
                without_id.append(line)
                continue
            for names, column in ((groups, "group"), (artists, "artist")):
                name = _group_name(cell.get(column, ""))
                if not name:
                    continue
                first, first_at = names.setdefault(int(song_id), (name, f"{path}, line {line}"))
                if first != name:
                    raise DataError(
                        f"song {song_id:g}: {column} is {first!r} in {first_at}, but {name!r} in {path}, line {line}. "
                        "Keep one of them."
                    )
        if without_id:
            log.warning("deam: %s: no song id in lines %s, left out", path, first_of(without_id))
    return {song_id: name for song_id, (name, _) in (artists | groups).items()}


def _group_name(name: str) -> str:
    """One spelling per name, empty for none: blanks, tabs, case and Unicode variants do not make another artist."""
    name = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    return "" if name == "n/a" else name
