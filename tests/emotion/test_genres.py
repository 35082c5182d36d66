from pathlib import Path

from emotion.data.genres import GENRES, read_genres, write_genres

# As DEAM's: of 2013 with tabs around the names, of 2014 with genres that spill over cells without a header.
OF_2013 = 'song_id,Artist,Genre\n7,"\tAnn\t","\tClassical\t"\n8,Ben,n/a\n'
OF_2014 = "Id,Artist,Genre,,\n1001,Cem,Folk,Indie,,\n7,Ann,Rock,,,\nx,Dot,Jazz,,,\n"


def test_genres_are_read_from_the_metadata_in_one_spelling(tmp_path: Path) -> None:
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "metadata_2013.csv").write_text(OF_2013)
    (tmp_path / "metadata" / "metadata_2014.csv").write_text(OF_2014)
    (tmp_path / "metadata" / "metadata_2015.csv").write_bytes(b"\0 damaged")
    (tmp_path / "other.csv").write_text("song_id,genre\n9,Jazz\n")
    write_genres(tmp_path, sorted(tmp_path.rglob("*.csv")))
    assert read_genres(tmp_path) == {7: "classical", 1001: "folk"}


def test_genres_are_read_from_songs_csv(tmp_path: Path) -> None:
    (tmp_path / "songs.csv").write_text("file,valence,arousal,genre\na/1.wav,5,5,Rock\n2.wav,5,5,\n")
    write_genres(tmp_path, [tmp_path / "songs.csv"])
    assert read_genres(tmp_path) == {"a/1.wav": "rock"}


def test_without_genres_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "songs.csv").write_text("file,valence,arousal\n1.wav,5,5\n")
    write_genres(tmp_path, [tmp_path / "songs.csv"])
    assert not (tmp_path / GENRES).exists()
    assert read_genres(tmp_path) == {}
