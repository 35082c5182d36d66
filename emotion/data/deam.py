"""The reader of numbered songs: label files, audio and metadata as DEAM has them on disk → a `Dataset`. Decodes no audio.

DEAM has 1,802 songs with static ratings on 1..9: 1,744 excerpts of 45 s (ids up to 2000, about ten raters) and 58 full songs (ids
above 2000, about five raters). EmoMusic and PMEmo are read alike: their columns differ (see label_tables), and some songs have no
label.

To read labels in another form: see "A dataset layout" in tests/README.md. Everything later works on the `Dataset` alone.

Source: Aljanaki, Yang and Soleymani 2017, "Developing a benchmark for emotional analysis of music", PLOS ONE.
"""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from emotion.characters import quoted
from emotion.data.csv_table import parse_table, read_text
from emotion.data.dynamic import DYNAMIC_FILES
from emotion.data.faults import Fault
from emotion.data.folder_files import files_below
from emotion.data.label_scale import DEAM_SCALE, label_of, label_sd_of
from emotion.data.label_tables import PMEMO_DEVIATIONS, Label, read_labels
from emotion.data.song_ids import in_order
from emotion.data.songs import AUDIO_SUFFIX, OTHER_FORMATS, Dataset, Song, group_name
from emotion.data.unused import MISNAMED, UNLABELLED, Unused
from emotion.errors import DataError, first_of, printable
from emotion.files import sha256_of

log = logging.getLogger(__name__)

# Not static_annotations_songs_*.csv, which DEAM also ships: these have a row per rater.
LABEL_FILES = re.compile(r"static_((annotations_averaged|annots).*|annotations(_std)?)\.csv", re.IGNORECASE)
METADATA_FILES = re.compile(r"(metadata.*|songs_info)\.csv", re.IGNORECASE)  # the second of EmoMusic
ID_COLUMNS = ("song_id", "songid", "id", "musicid")
AUDIO_FILES = re.compile(f"([0-9]+){AUDIO_SUFFIX}", re.IGNORECASE)


def find_dataset(root: Path, files: Sequence[Path] | None = None, unused: Unused | None = None) -> Dataset:
    """Find the songs below `root`; labels, audio and metadata are recognised by their names, in any folders.

    files: the dataset's files, sorted, if it lies in object storage; only those of `files_needed_to_join` must be below `root`.
    unused: what else was found with them, to be named where labels or audio are missing.
    A song is left out, with a fault, if its label is wrong, missing or contradicts a copy, its audio is missing, or two
    different files claim to be it. Raises DataError for no folder, label file or audio at all, or unreadable metadata.
    """
    unused = Unused() if unused is None else unused
    files = dataset_files(root, unused) if files is None else files
    labels, faults = join_labels(root, files, unused.hint(MISNAMED))
    # Songs of wrong rows count as labelled: whatever else is wrong with them is reported in the same pass.
    rows = {fault.song_id: fault.place for fault in faults if fault.song_id is not None}
    rows |= {label.song_id: label.found_at for label in labels}
    audio, audio_faults = _find_audio(root, files, unused.hint())
    faults += audio_faults
    for song_id in in_order(rows.keys() - audio.keys()):
        expected = f"expected {song_id}.mp3 (or {OTHER_FORMATS}) anywhere below the dataset's folder"
        faults.append(Fault("label without audio", song_id, rows[song_id], expected))
    for song_id, path in sorted(audio.items()):
        if song_id in rows:
            continue
        place = printable(path.relative_to(root))
        if _labels_some(files):
            unused.add(path.relative_to(root).as_posix(), UNLABELLED)
        else:
            faults.append(Fault("audio without label", song_id, place, "no label file has a row with this id"))
    unusable = {fault.song_id for fault in faults}
    groups = _find_groups(root, files)
    songs = [
        Song(
            song_id=label.song_id,
            valence=label_of(label.valence, label.scale),
            arousal=label_of(label.arousal, label.scale),
            valence_sd=_scaled_deviation(label.valence_sd, label),
            arousal_sd=_scaled_deviation(label.arousal_sd, label),
            group=groups.get(label.song_id, f"song:{label.song_id}"),
            audio=audio[label.song_id].relative_to(root).as_posix(),
        )
        for label in labels
        if label.song_id not in unusable
    ]
    scales = {label.scale for label in labels}
    return Dataset(root, songs, faults, scale=scales.pop() if len(scales) == 1 else DEAM_SCALE)


def _labels_some(files: Sequence[Path]) -> bool:
    """Whether the labels are those of EmoMusic or PMEmo, which have more audio files than labels."""
    return any(path.name.lower() == "static_annotations.csv" for path in files)


def _scaled_deviation(deviation: float | None, label: Label) -> float | None:
    return None if deviation is None else label_sd_of(deviation, label.scale)


def dataset_files(root: Path, unused: Unused | None = None) -> list[Path]:
    """Every label, metadata and audio file below `root`, sorted; see `files_below`. unused: gets everything else."""
    return files_below(root, is_dataset_file, Unused() if unused is None else unused)


def is_dataset_file(path: str) -> bool:
    """Whether a file at this path is a label file, dynamic annotations, metadata or audio, by its name alone."""
    name = path.rpartition("/")[2]
    return bool(DYNAMIC_FILES.fullmatch(path)) or any(
        pattern.fullmatch(name) for pattern in (LABEL_FILES, METADATA_FILES, AUDIO_FILES)
    )


def files_needed_to_join(files: Sequence[Path]) -> list[Path]:
    """The files that are opened before audio is fetched: labels, metadata, and the audio of songs that have several files."""
    audio = [AUDIO_FILES.fullmatch(path.name) for path in files]
    copies = Counter(int(match[1]) for match in audio if match)
    return [path for path, match in zip(files, audio, strict=True) if not match or copies[int(match[1])] > 1]


def join_labels(root: Path, files: Sequence[Path], hint: str = "") -> tuple[list[Label], list[Fault]]:
    """The labels of all label files, sorted by id, and what is wrong with the others. Differing labels of a song are a fault.
    hint: the end of the message that there is no label file."""
    label_files = [path for path in files if LABEL_FILES.fullmatch(path.name) and path.name.lower() != PMEMO_DEVIATIONS]
    if not label_files:
        raise DataError(
            f"{root}: no label file in this folder or below. Write songs.csv in this folder, with the columns "
            "file,valence,arousal and, where it is known, group, and a row for each song; or put there DEAM's "
            "static_annotations_averaged_songs_1_2000.csv and static_annotations_averaged_songs_2000_2058.csv, or "
            f"static_annotations.csv of EmoMusic or PMEmo; or correct data.source.{hint}"
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
                name = group_name(cell.get(column, ""))
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
