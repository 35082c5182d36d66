"""The genres of songs, where their metadata has any. Only the report shows them; no model is made from them."""

import contextlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from emotion.data.csv_table import CsvTable, parse_table, read_text
from emotion.data.deam import ID_COLUMNS, METADATA_FILES
from emotion.data.song_ids import SongId, song_id_of
from emotion.data.songs import group_name
from emotion.data.songs_table import SONGS_TABLE
from emotion.errors import DataError, StorageError
from emotion.files import read_json, write_json

GENRES = (
    ".genres.json"  # beside a songs table: song → genre; no output of a phase, so that nothing is computed anew because of it
)


def write_genres(folder: Path, tables: Iterable[Path]) -> None:
    """Write GENRES into a folder, where there are any: the column `genre` of metadata*.csv by song id, or of songs.csv by file.
    One spelling per genre. tables: of the dataset; one that cannot be read has none. Of a song's genres that of the first table
    counts."""
    found: dict[SongId, str] = {}
    for path in tables:
        if not METADATA_FILES.fullmatch(path.name) and path.name != SONGS_TABLE:
            continue
        with contextlib.suppress(DataError, StorageError):
            table = parse_table(path.name, read_text(path, path.name, allow_latin_1=True))
            for song, genre in _genres(table):
                found.setdefault(song, genre)
    if found:
        write_json(folder / GENRES, {str(song): genre for song, genre in found.items()})


def read_genres(folder: Path) -> dict[SongId, str]:
    """Song → genre; empty without GENRES."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return {song_id_of(song): str(genre) for song, genre in read_json(folder / GENRES).items()}
    return {}


def _genres(table: CsvTable) -> list[tuple[SongId, str]]:
    column = next((name for name in ("file", *ID_COLUMNS) if name in table.columns), None)
    if column is None or "genre" not in table.columns:
        return []
    pairs: list[tuple[SongId, str]] = []
    for _, cells in table.rows:
        # Not strict: in DEAM's metadata of 2014 the genre spills over several cells without a header.
        cell = dict(zip(table.columns, cells, strict=False))
        genre, text = group_name(cell.get("genre", "")), cell.get(column, "")
        number = table.number(text)
        if genre and (column == "file" or number.is_integer()):
            pairs.append((PurePosixPath(text).as_posix() if column == "file" else int(number), genre))
    return pairs
