"""The guard against leaks: nothing is judged on a song that it was made from. A song is known by its content, not by its id.

Whatever is fitted on songs leaves a file beside its weights that lists the digests of all of them, also of those that its own
inputs were made from, and those behind the weights that it started from. Who judges it, or goes on from it, compares. A model,
which validation songs chose but did not train, has a second list without these: who goes on from it may choose by them again.
"""

from collections.abc import Iterable, Set
from pathlib import Path

from emotion.audio.feature_store import SongFeatures
from emotion.errors import DataError, ModelError, first_of
from emotion.files import write_text

SEEN = "seen_songs.txt"
TRAINED = "trained_songs.txt"
CORRECT = "Make it again from other songs, or correct the split."


def identities(songs: Iterable[SongFeatures]) -> set[str]:
    """Digests of the songs' files and of their decoded sound. Raises ModelError for a synthetic clip, which has none."""
    found = set()
    for song in songs:
        if not (song.file_sha256 and song.sound_sha256):
            raise ModelError(
                f"leak: clip {song.song_id} ({song.group}) is no song with a file and cannot stand for one."
            )
        found |= {song.file_sha256, song.sound_sha256}
    return found


def refuse_leak(what: str, seen: Set[str], held_out: Iterable[SongFeatures], to_do: str = CORRECT) -> None:
    """Raise ModelError where `what`, made from the songs with the identities `seen`, has seen one of `held_out`."""
    leaked = [song.song_id for song in held_out if identities([song]) & seen]
    if leaked:
        raise ModelError(
            f"leak: {what} has seen songs that it must not know, under these or other ids: {first_of(leaked)}. {to_do}"
        )


def write_seen(folder: Path, seen: set[str], name: str = SEEN) -> None:
    """One digest a line, sorted."""
    write_text(folder / name, "".join(f"{digest}\n" for digest in sorted(seen)))


def read_seen(folder: Path, name: str = SEEN) -> set[str]:
    """What the things in `folder` were made from, which is never nothing. Raises DataError where it is not told."""
    try:
        seen = set((folder / name).read_text(encoding="utf-8").splitlines())
        if not seen:
            raise ValueError("the file is empty")
        return seen
    except (FileNotFoundError, ValueError) as error:
        raise DataError(
            f"{folder / name}: expected the digests of the songs that it was made from ({error}). Make the folder again."
        ) from error
