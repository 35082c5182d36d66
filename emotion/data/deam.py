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

from emotion.characters import quoted, with_names
from emotion.data.csv_table import parse_table, read_text
from emotion.data.faults import Fault
from emotion.data.label_scale import HIGHEST_RATING, LOWEST_RATING, label_of, label_sd_of
from emotion.data.songs import AUDIO_SUFFIX, OTHER_FORMATS, Dataset, Song
from emotion.data.unused import ANNEX, DANGLING, HIDDEN, IRREGULAR, REPEATED, Unused
from emotion.errors import DataError, StorageError, first_of, printable, system_reason
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


def find_dataset(root: Path, files: Sequence[Path] | None = None, unused: Unused | None = None) -> Dataset:
    """Find the songs below `root`; labels, audio and metadata are recognised by their names, in any folders.

    files: the dataset's files, sorted, if it lies in object storage; only those of `files_needed_to_join` must be below `root`.
    unused: what else was found with them, to be named where labels or audio are missing.
    A song is left out, with a fault, if its label is wrong, missing or contradicts a copy, its audio is missing, or two
    different files claim to be it. Raises DataError for no folder, label file or audio at all, or unreadable metadata.
    """
    unused = Unused() if unused is None else unused
    files = dataset_files(root, unused) if files is None else files
    labels, faults = join_labels(root, files, unused.hint)
    # Songs of wrong rows count as labelled: whatever else is wrong with them is reported in the same pass.
    rows = {fault.song_id: fault.place for fault in faults if fault.song_id is not None}
    rows |= {label.song_id: label.found_at for label in labels}
    audio, audio_faults = _find_audio(root, files, unused.hint)
    faults += audio_faults
    for song_id in sorted(rows.keys() - audio.keys()):
        expected = f"expected {song_id}.mp3 (or {OTHER_FORMATS}) anywhere below the dataset's folder"
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


def dataset_files(root: Path, unused: Unused | None = None) -> list[Path]:
    """Every label, metadata and audio file below `root`, sorted. Hidden folders are skipped, symlinked folders entered once.
    unused: gets everything else."""
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder. Expected the folder that holds DEAM's annotations and audio; correct data.source."
        )
    unused = Unused() if unused is None else unused
    files: list[Path] = []
    # A link to a folder above root would lead out of the dataset, so these count as entered.
    entered = set(root.resolve().parents)
    for folder, subfolders, names in os.walk(root, onerror=_refuse_folder, followlinks=True):
        below = Path(folder).relative_to(root)
        real = Path(folder).resolve()
        if real in entered:
            unused.add(f"{below}/", REPEATED)
            subfolders.clear()
            continue
        entered.add(real)
        for name in sorted(names):
            path = Path(folder, name)
            # Other names of links to nothing are looked at where they may be those of folders.
            if is_dataset_file(name) or ("." not in name and path.is_symlink()):
                why = _why_no_file(path)
                if why is None and is_dataset_file(name):
                    files.append(path)
                    continue
                unused.add((below / name).as_posix(), why)
            else:
                unused.add((below / name).as_posix())
        for name in sorted(name for name in subfolders if name.startswith(".")):
            unused.add(f"{(below / name).as_posix()}/", HIDDEN)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
    return sorted(files)


def _why_no_file(path: Path) -> str | None:
    """Why a path that a folder lists is no file with content; None where it is one."""
    if path.is_file():
        return None
    if path.exists() or not path.is_symlink():
        return IRREGULAR
    return ANNEX if "annex/objects" in str(path.readlink()) else DANGLING


def _refuse_folder(error: OSError) -> NoReturn:
    raise StorageError.of(error, f"{error.filename}: cannot be listed ({system_reason(error)}).") from error


def is_dataset_file(name: str) -> bool:
    """Whether a file of this name, without folders, is a label file, metadata or audio."""
    return any(pattern.fullmatch(name) for pattern in (LABEL_FILES, METADATA_FILES, AUDIO_FILES))


def files_needed_to_join(files: Sequence[Path]) -> list[Path]:
    """The files that `find_dataset` opens: labels, metadata, and the audio of songs that have several audio files."""
    audio = [AUDIO_FILES.fullmatch(path.name) for path in files]
    copies = Counter(int(match[1]) for match in audio if match)
    return [path for path, match in zip(files, audio, strict=True) if not match or copies[int(match[1])] > 1]


def join_labels(root: Path, files: Sequence[Path], hint: str = "") -> tuple[list[Label], list[Fault]]:
    """The labels of all label files, sorted by id, and what is wrong with the others. Differing labels of a song are a fault.
    hint: the end of the message that there is no label file."""
    label_files = [path for path in files if LABEL_FILES.fullmatch(path.name)]
    if not label_files:
        raise DataError(
            f"{root}: no label file in this folder or below. Expected static_annotations_averaged_songs_1_2000.csv and "
            "static_annotations_averaged_songs_2000_2058.csv; unpack DEAM's annotations there or correct data.source."
            f"{hint}"
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
            found = first_of(
                [with_names(column[:40], repr(column[:40])) for column in table.columns]
            )  # of no table, they may be long
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
            problems.append(f"song_id is {quoted(id_text)}, expected a whole number")
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
        return None if 0 <= value < math.inf else f"{column} is {quoted(text)}, expected 0 or more"
    is_rating = LOWEST_RATING <= value <= HIGHEST_RATING
    return None if is_rating else f"{column} is {quoted(text)}, expected {LOWEST_RATING} to {HIGHEST_RATING}"


def _find_audio(root: Path, files: Sequence[Path], hint: str) -> tuple[dict[int, Path], list[Fault]]:
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
            f"{root}: label files, but no audio in this folder or below. Expected SONG_ID.mp3 (or {OTHER_FORMATS}), "
            f"such as MEMD_audio/2.mp3; unpack DEAM's audio there or correct data.source.{hint}"
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
        place = printable(path)
        table = parse_table(place, read_text(path, place, allow_latin_1=True))
        id_column = next((name for name in ID_COLUMNS if name in table.columns), None)
        if id_column is None or not {"group", "artist"} & set(table.columns):
            raise DataError(
                f"{place}: expected the columns song_id and group or artist, found "
                f"{first_of([quoted(column) for column in table.columns if column])}. "
                f"Rename the columns, or the file if it is not about songs."
            )
        without_id = []
        for line, cells in table.rows:
            # Not strict: in DEAM's metadata of 2014 the genre spills over several cells without a header.
            cell = dict(zip(table.columns, cells, strict=False))
            song_id = table.number(cell.get(id_column, ""))
            if not song_id.is_integer():
                without_id.append(line)
                continue
            for names, column in ((groups, "group"), (artists, "artist")):
                name = _group_name(cell.get(column, ""))
                if not name:
                    continue
                first, first_at = names.setdefault(int(song_id), (name, f"{place}, line {line}"))
                if first != name:
                    raise DataError(
                        f"song {song_id:g}: {column} is {quoted(first)} in {first_at}, but {quoted(name)} in {place}, "
                        f"line {line}. Keep one of them."
                    )
        if without_id:
            log.warning("deam: %s: no song id in lines %s, left out", place, first_of(without_id))
    return {song_id: name for song_id, (name, _) in (artists | groups).items()}


def _group_name(name: str) -> str:
    """One spelling per name, empty for none: blanks, tabs, case and Unicode variants do not make another artist."""
    name = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    return "" if name == "n/a" else name
