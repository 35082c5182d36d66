"""The table of songs is read as it was written, and nothing else is taken for one."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emotion.data.songs import Song, read_songs, write_songs
from emotion.errors import DataError

HEADER = "song_id,valence,arousal,valence_sd,arousal_sd,group,audio"
NUMBERS = st.floats(-1, 1)
NAMES = st.text(st.characters(exclude_categories=["Cc", "Cs"]))
SONGS = st.builds(Song, st.integers(0, 9999), NUMBERS, NUMBERS, NUMBERS, NUMBERS, NAMES, NAMES)


@settings(max_examples=50, deadline=None)
@given(songs=st.lists(SONGS, max_size=4))
def test_a_written_table_reads_as_the_same_songs(tmp_path_factory: pytest.TempPathFactory, songs: list[Song]) -> None:
    path = tmp_path_factory.mktemp("songs") / "songs.csv"
    write_songs(path, songs)
    assert read_songs(path) == songs
    assert path.read_text(encoding="utf-8").splitlines()[0] == HEADER


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a songs table .*expected the columns"),
        ("song_id,valence_mean\n2,3\n", "not a songs table .*expected the columns"),
        (f"{HEADER}\n2,0,0,0,0,g\n", "not a songs table .*line 2: "),
        (f"{HEADER}\n2,0,0,0,x,g,a\n", "not a songs table .*line 2: "),
        (f'{HEADER}\n2,0,0,0,0,g,"a', "not a songs table .*line 2: "),
    ],
)
def test_anything_but_a_songs_table_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "songs.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=says):
        read_songs(path)


def test_a_missing_songs_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"songs\.csv: not a songs table .*No such file"):
        read_songs(tmp_path / "songs.csv")
