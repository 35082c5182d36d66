"""The table of songs that every dataset reader returns."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emotion.data.csv_table import read_records, write_records
from emotion.data.faults import Fault
from emotion.data.label_scale import DEAM_SCALE, Scale
from emotion.data.song_ids import SongId

# What can be decoded, and its length verified: the name of a song's file ends in one of these.
AUDIO_EXTENSIONS = ("mp3", "wav", "flac", "ogg", "oga", "opus", "aiff", "aif", "aifc", "au", "caf", "w64", "rf64", "mp2")
OTHER_FORMATS = ", ".join(AUDIO_EXTENSIONS[1:-1]) + f" or {AUDIO_EXTENSIONS[-1]}"  # than mp3, for messages
AUDIO_FORMATS = f"{AUDIO_EXTENSIONS[0]}, {OTHER_FORMATS}"
# m4a cannot be decoded: such a file is reported, not passed over.
AUDIO_SUFFIX = rf"\.({'|'.join(AUDIO_EXTENSIONS)}|m4a)"
AUDIO_FILE = re.compile(f".+{AUDIO_SUFFIX}", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class SongLabels:
    """The labels of a song or of a synthetic clip: mean and standard deviation over raters on -1..1 (see label_scale).

    Deviations are None where they are unknown, and 0 for a synthetic clip. group: songs of one group stay together in splits.
    raters: how many rated the song, if the dataset says so. split: the dataset's own train, validation or test; else empty.
    """

    song_id: SongId
    valence: float
    arousal: float
    valence_sd: float | None
    arousal_sd: float | None
    group: str
    raters: int | None = field(default=None, kw_only=True)
    split: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class Song(SongLabels):
    """A labelled song with audio. audio: POSIX path of the audio file, relative to the dataset's folder."""

    audio: str


@dataclass(frozen=True)
class Dataset:
    """The usable songs below the folder `root`, sorted by id, and what is wrong with the others.
    digests: audio → hex SHA-256 that the file must have, where it is known. scale: of the ratings behind the labels."""

    root: Path
    songs: list[Song]
    faults: list[Fault]
    digests: Mapping[str, str] = field(default_factory=dict)
    scale: Scale = DEAM_SCALE


def write_songs(path: Path, songs: Sequence[Song]) -> None:
    write_records(path, Song, songs)


def read_songs(path: Path) -> list[Song]:
    """Raises DataError for anything but what `write_songs` wrote."""
    return read_records(path, Song, "a songs table")


def group_name(name: str) -> str:
    """One spelling per name, empty for none: blanks, tabs, case and Unicode variants do not make another artist."""
    name = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    return "" if name == "n/a" else name
