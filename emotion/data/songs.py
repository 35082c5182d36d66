"""The table of songs that every dataset reader returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emotion.data.csv_table import read_records, write_records
from emotion.data.faults import Fault


@dataclass(frozen=True)
class SongLabels:
    """The labels of a song or of a synthetic clip: mean and standard deviation over raters on -1..1 (see label_scale).

    Deviations of a synthetic clip are 0. group: songs of one group stay together in splits.
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
    """The usable songs below the folder `root`, sorted by id, and what is wrong with the others.
    digests: audio → hex SHA-256 that the file must have, where it is known."""

    root: Path
    songs: list[Song]
    faults: list[Fault]
    digests: Mapping[str, str] = field(default_factory=dict)


def write_songs(path: Path, songs: Sequence[Song]) -> None:
    write_records(path, Song, songs)


def read_songs(path: Path) -> list[Song]:
    """Raises DataError for anything but what `write_songs` wrote."""
    return read_records(path, Song, "a songs table")
