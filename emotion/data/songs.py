"""The table of songs that every dataset reader returns, and its CSV file."""

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from emotion.data.csv_table import read_text
from emotion.data.faults import Fault
from emotion.errors import DataError
from emotion.files import write_csv


@dataclass(frozen=True)
class SongLabels:
    """The labels of a song or of a synthetic clip.

    valence, arousal: mean over raters on -1..1 (see label_scale). valence_sd, arousal_sd: standard deviation over raters on
    the same scale; 0 for a synthetic clip. group: songs of one group stay together in splits.
    """

    song_id: int
    valence: float
    arousal: float
    valence_sd: float
    arousal_sd: float
    group: str


@dataclass(frozen=True)
class Song(SongLabels):
    """A labelled song with audio. audio: POSIX path of the audio file, relative to the dataset's folder."""

    audio: str


@dataclass(frozen=True)
class Dataset:
    """The usable songs below the folder `root`, sorted by id, and what is wrong with the others."""

    root: Path
    songs: list[Song]
    faults: list[Fault]


COLUMNS = [field.name for field in fields(Song)]


def write_songs(path: Path, songs: Sequence[Song]) -> None:
    """Write the songs as CSV; reading gives the same bits."""
    write_csv(path, COLUMNS, (astuple(song) for song in songs))


def read_songs(path: Path) -> list[Song]:
    """Read what `write_songs` wrote, in its order. Raises DataError for anything else."""
    songs = []
    reader = csv.reader(io.StringIO(read_text(path, str(path)), newline=""), strict=True)
    try:
        if next(reader, []) != COLUMNS:
            raise DataError(f"{path}: expected a songs table with the header {','.join(COLUMNS)}.")
        for song_id, valence, arousal, valence_sd, arousal_sd, group, audio in reader:
            mean, sd = (float(valence), float(arousal)), (float(valence_sd), float(arousal_sd))
            songs.append(Song(int(song_id), *mean, *sd, group, audio))
    except (csv.Error, ValueError) as error:
        raise DataError(
            f"{path}, line {reader.line_num}: not a row of a songs table ({error}). Delete the folder to create it again."
        ) from error
    return songs
