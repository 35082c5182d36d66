"""The ids of songs: numbers where a dataset numbers its songs, as DEAM does, else text: the path of the file in `songs.csv`."""

from collections.abc import Iterable

SongId = int | str

LAST_EXCERPT_ID = 2000  # DEAM's songs with higher ids are full songs, rated by fewer people


def song_id_of(text: str) -> SongId:
    """The id that is written as `text` in a table of ours. Text that looks like a number is one: no id of a file does."""
    try:
        number = int(text)
    except ValueError:
        return text
    return number if str(number) == text else text


def order_of(song_id: SongId) -> tuple[bool, int, str]:
    """The key to sort ids by: numbers by size, then text by its code points, in every locale alike."""
    return (True, 0, song_id) if isinstance(song_id, str) else (False, song_id, "")


def in_order(song_ids: Iterable[SongId]) -> list[SongId]:
    return sorted(song_ids, key=order_of)


def is_full_song(song_id: SongId) -> bool:
    """Whether DEAM's numbers say so. A song whose id is text counts as an excerpt."""
    return isinstance(song_id, int) and song_id > LAST_EXCERPT_ID
