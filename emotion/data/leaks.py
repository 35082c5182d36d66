"""The guard against leaks: nothing is tested on a song that it was made from.

A song is identified by its content, not by its id. Everything that is fitted on songs leaves beside its weights a list of the
digests of these songs, of those behind its inputs and of those behind its warm start, to compare with held-out songs. A model
has a second list without the songs that validated it: a warm start from it may use these for validation again.
"""

from collections.abc import Iterable, Set
from pathlib import Path
from typing import Protocol

from emotion.data.song_ids import SongId
from emotion.errors import DataError, ModelError, first_of
from emotion.files import write_text

SEEN = "seen_songs.txt"
TRAINED = "trained_songs.txt"
CORRECT = "Train it again on other songs, or correct the split."


class IdentifiedSong(Protocol):
    """A song with the digests of its file and of its decoded sound; a synthetic clip has empty ones."""

    @property
    def song_id(self) -> SongId: ...
    @property
    def group(self) -> str: ...
    @property
    def file_sha256(self) -> str: ...
    @property
    def sound_sha256(self) -> str: ...


def identities(songs: Iterable[IdentifiedSong]) -> set[str]:
    """Digests of the songs' files and of their decoded sound. Raises ModelError for a synthetic clip."""
    found = set()
    for song in songs:
        if not (song.file_sha256 and song.sound_sha256):
            raise ModelError(
                f"leak: clip {song.song_id} ({song.group}) is no song: a synthetic clip has no file digests to compare."
            )
        found |= {song.file_sha256, song.sound_sha256}
    return found


def refuse_leak(what: str, seen: Set[str], held_out: Iterable[IdentifiedSong], to_do: str = CORRECT) -> None:
    """Raise ModelError if `what`, made from the songs with the identities `seen`, has seen one of `held_out`."""
    leaked = [song.song_id for song in held_out if identities([song]) & seen]
    if leaked:
        found = f"has seen held-out songs, under these or other ids: {first_of(leaked)}"
        raise ModelError(f"leak: {what} {found}. {to_do}")


def write_seen(folder: Path, seen: set[str], name: str = SEEN) -> None:
    """Write one digest a line, sorted."""
    write_text(folder / name, "".join(f"{digest}\n" for digest in sorted(seen)))


def read_seen(folder: Path, name: str = SEEN) -> set[str]:
    """The digests of the songs that the content of `folder` was made from. Raises DataError if there are none."""
    try:
        seen = set((folder / name).read_text(encoding="utf-8").splitlines())
        if not seen:
            raise ValueError("the file is empty")
        return seen
    except (FileNotFoundError, ValueError) as error:
        raise DataError(
            f"{folder / name}: expected the digests of the songs that it was made from ({error}). "
            "Delete the folder to create it again."
        ) from error
