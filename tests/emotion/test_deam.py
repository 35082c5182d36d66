"""DEAM is found in every layout in circulation, and what is wrong with a copy is said with file and line."""

import csv
import logging
import statistics
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emotion.deam import Song, find_dataset, find_labels, read_labels, read_songs, write_songs
from emotion.errors import DataError, StorageError

FILE_1 = "static_annotations_averaged_songs_1_2000.csv"
FILE_2 = "static_annotations_averaged_songs_2000_2058.csv"
SONG_LEVEL = "annotations/annotations averaged per song/song_level"
EXCERPTS = """song_id, valence_mean, valence_std, arousal_mean, arousal_std
2,3.1,0.94,3,0.63
10,7,1.2,8.1,1
"""
FULL_SONGS = (
    "song_id, valence_mean, valence_std, valence_ max_mean, valence_max_std, valence_min_mean, valence_min_std,"
    " arousal_mean, arousal_std, arousal_max_mean, arousal_max_std, arousal_min_mean, arousal_min_std\n"
    "2001,3.2,0.98,5.0,1.41,2.2,0.98,6.6,0.8,8.6,0.49,3.4,1.02\n"
)


def write(path: Path, text: str | bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def make(root: Path, labels: str = SONG_LEVEL, audio: str = "MEMD_audio", second: str = FILE_2) -> Path:
    """Three songs; the audio is empty, as nothing here decodes it."""
    write(root / labels / FILE_1, EXCERPTS)
    write(root / labels / second, FULL_SONGS)
    for song_id in (2, 10, 2001):
        write(root / audio / f"{song_id}.mp3")
    return root


def labels_of(root: Path, text: str | bytes) -> list[tuple[float, ...]]:
    rows = read_labels(write(root / FILE_1, text))
    return [(row.song_id, row.valence, row.valence_sd, row.arousal, row.arousal_sd) for row in rows]


# Real files


def test_the_real_tables_have_the_published_statistics(real_data: Path) -> None:
    labels = find_labels(real_data / "deam_annotations")
    valence = [label.valence for label in labels]
    arousal = [label.arousal for label in labels]

    assert len(labels) == 1802
    assert sum(label.song_id <= 1000 for label in labels) == 744
    assert sum(label.song_id > 2000 for label in labels) == 58
    assert round(statistics.mean(valence), 3) == 4.904
    assert round(statistics.mean(arousal), 3) == 4.814
    assert round(statistics.stdev(valence), 3) == 1.174
    assert round(statistics.stdev(arousal), 3) == 1.282
    assert (min(valence), max(valence), min(arousal), max(arousal)) == (1.6, 8.4, 1.6, 8.1)
    assert round(statistics.correlation(valence, arousal), 3) == 0.570
    assert round(statistics.mean(label.valence_sd for label in labels), 2) == 1.50
    assert round(statistics.mean(label.arousal_sd for label in labels), 2) == 1.46


def test_the_real_excerpts_lie_in_the_published_quadrants(real_data: Path) -> None:
    labels = read_labels(real_data / "deam_annotations" / FILE_1)
    quadrants = Counter((label.valence > 5, label.arousal > 5) for label in labels)
    assert quadrants == {(False, False): 723, (True, True): 583, (True, False): 221, (False, True): 217}


def test_both_spellings_of_the_real_tables_hold_the_same_rows(real_data: Path) -> None:
    folder = real_data / "deam_annotations"
    for name, rows in ((FILE_1, 1744), (FILE_2, 58)):
        compact = read_labels(folder / name)
        assert len(compact) == rows
        assert read_labels(folder / "padded_original" / name) == compact
    assert len(find_labels(folder / "padded_original")) == 1802


def test_real_metadata_groups_the_songs_of_an_artist(real_data: Path, tmp_path: Path) -> None:
    # A dataset put together from symlinked folders, as on a cluster with one shared copy.
    (tmp_path / "labels").symlink_to(real_data / "deam_annotations")
    for label in find_labels(tmp_path):
        write(tmp_path / "MEMD_audio" / f"{label.song_id}.mp3")

    songs = find_dataset(tmp_path)

    assert len(songs) == 1802
    groups = {song.song_id: song.group for song in songs}
    assert groups[3] == groups[4] == groups[7] == "kevin macleod"  # 2013, with tabs
    assert groups[1001] == "the rope river blues band"  # 2014, whose genre spills over
    assert groups[2009] == groups[2003] == "joel helander"  # 2015, in another order
    assert list(groups.values()).count("jason shaw") == 23
    assert not [song for song in songs if song.group.startswith("song:")]


def test_vgmidi48_is_read_as_deam_with_its_groups(real_data: Path) -> None:
    root = real_data / "vgmidi48"
    with (root / "metadata/metadata_vgmidi.csv").open(encoding="utf-8", newline="") as file:
        games = {int(row["song_id"]): row["group"].lower() for row in csv.DictReader(file)}

    songs = find_dataset(root)

    assert len(songs) == 50
    assert {song.song_id: song.group for song in songs} == games
    assert len(set(games.values())) == 18
    first = songs[0]
    assert (first.song_id, first.audio) == (22, "DEAM_audio/MEMD_audio/22.mp3")
    assert first.valence == (4.39 - 5) / 4
    assert first.arousal == 0.25
    assert first.arousal_sd == 1.78 / 4


# Layouts


@pytest.mark.parametrize(
    ("labels", "audio", "second"),
    [
        (f"DEAM_Annotations/{SONG_LEVEL}", "DEAM_audio/MEMD_audio", FILE_2),
        (SONG_LEVEL, "MEMD_audio", FILE_2),
        (SONG_LEVEL.replace(" ", "_"), "MEMD_audio", FILE_2),
        (".", "MEMD_audio", FILE_2),
        ("uploads", "audio files/all", "static_annots_2058.csv"),
        (".", ".", "Static_Annots_2058.CSV"),
    ],
)
def test_every_known_layout_gives_the_same_songs(tmp_path: Path, labels: str, audio: str, second: str) -> None:
    songs = find_dataset(make(tmp_path, labels, audio, second))

    assert songs == [
        Song(2, (3.1 - 5) / 4, -0.5, 0.94 / 4, 0.63 / 4, "song:2", Path(audio, "2.mp3").as_posix()),
        Song(10, 0.5, (8.1 - 5) / 4, 0.3, 0.25, "song:10", Path(audio, "10.mp3").as_posix()),
        Song(2001, (3.2 - 5) / 4, (6.6 - 5) / 4, 0.245, 0.2, "song:2001", Path(audio, "2001.mp3").as_posix()),
    ]


def test_the_tables_of_single_raters_are_not_taken_for_labels(tmp_path: Path) -> None:
    make(tmp_path)
    write(
        tmp_path / "annotations/annotations per each rater/song_level/static_annotations_songs_1_2000.csv",
        "workerID, SongId, Valence, Arousal\nabc,2,9,9\n",
    )
    assert len(find_dataset(tmp_path)) == 3


def test_audio_is_found_with_any_known_ending_in_any_case(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "MEMD_audio/2.mp3").rename(tmp_path / "2.FLAC")
    (tmp_path / "MEMD_audio/10.mp3").rename(tmp_path / "MEMD_audio/10.m4a")
    assert [song.audio for song in find_dataset(tmp_path)] == ["2.FLAC", "MEMD_audio/10.m4a", "MEMD_audio/2001.mp3"]


def test_links_in_circles_and_out_of_the_dataset_are_not_followed(tmp_path: Path) -> None:
    root = make(tmp_path / "deam")
    write(tmp_path / "beside" / FILE_1, EXCERPTS.replace("3.1", "4.1"))
    (root / "MEMD_audio/again").symlink_to(root)
    (root / "outwards").symlink_to(tmp_path)
    assert len(find_dataset(root)) == 3


def test_hidden_folders_and_files_are_skipped(tmp_path: Path) -> None:
    make(tmp_path)
    write(tmp_path / ".trash" / FILE_1, EXCERPTS.replace("3.1", "4.1"))
    write(tmp_path / "__MACOSX" / f"._{FILE_1}", b"\x00\x05\x16\x07")
    write(tmp_path / "__MACOSX/._metadata_2013.csv", b"\x00\x05\x16\x07")
    assert find_dataset(tmp_path)[0].valence == (3.1 - 5) / 4


# Spellings of label files


@pytest.mark.parametrize(
    "text",
    [
        "song_id,valence_mean,valence_std,arousal_mean,arousal_std\n2,3.0,0.5,4.0,1.0\n",
        "song_id, valence_mean, valence_std, arousal_mean, arousal_std\r\n2,3,.5,4,1\r\n",
        "\ufeffsong_id,valence_ mean,valence_std,arousal_mean,arousal_std\n2.0,3,0.50,4.,1e0\n",
        "song_id, valence_mean, valence_std, arousal_mean, arousal_std\n      2,       3   ,        0.5 ,  4,  1 \n\n",
        "Song_ID, Valence_Mean, Valence_Std, Arousal_Mean, Arousal_Std\n2,3,0.5,4,1",
        ",arousal_std,arousal_mean,valence_std,valence_mean,song_id\n0,1,4,0.5,3,2\n",
        '"song_id", "valence_mean", "valence_std", "arousal_mean", "arousal_std"\n"2", "3", "0.5", "4", "1"\n',
    ],
)
def test_every_spelling_of_a_label_file_gives_the_same_row(tmp_path: Path, text: str) -> None:
    assert labels_of(tmp_path, text) == [(2, 3.0, 0.5, 4.0, 1.0)]


def test_equal_copies_count_once(tmp_path: Path) -> None:
    make(tmp_path)
    write(tmp_path / "padded" / FILE_1, EXCERPTS.replace(",", " ,  ").replace(",  3 ", ",  3.0 "))
    assert len(find_labels(tmp_path)) == 3


def test_contradicting_copies_are_refused_with_both_files_and_lines(tmp_path: Path) -> None:
    make(tmp_path)
    write(tmp_path / "other" / FILE_1, EXCERPTS.replace("10,7,", "10,7.5,"))
    with pytest.raises(DataError) as caught:
        find_labels(tmp_path)
    message = str(caught.value)
    assert "song 10" in message
    assert f"valence 7 (SD 1.2), arousal 8.1 (SD 1) in {tmp_path / SONG_LEVEL / FILE_1}, line 3" in message
    assert f"valence 7.5 (SD 1.2), arousal 8.1 (SD 1) in {tmp_path / 'other' / FILE_1}, line 3" in message
    assert "song 2:" not in message


def test_a_song_twice_in_one_file_with_other_numbers_is_refused(tmp_path: Path) -> None:
    write(tmp_path / FILE_1, EXCERPTS + "2,3.2,0.94,3,0.63\n")
    with pytest.raises(DataError, match=r"song 2: .*line 2, but .*line 4"):
        find_labels(tmp_path)


# Wrong label files


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("3,nan,1,5,1", "valence_mean is 'nan'"),
        ("3,5,1,inf,1", "arousal_mean is 'inf'"),
        ("3,0.99,1,5,1", "valence_mean is '0.99'"),
        ("3,5,1,9.01,1", "arousal_mean is '9.01'"),
        ("3,-0.5,1,5,1", "valence_mean is '-0.5'"),
        ("3,,1,5,1", "valence_mean is ''"),
        ("3,5,-1,5,1e999", "valence_std is '-1', arousal_std is '1e999'"),
        ("3.5,5,1,5,1", "song_id is '3.5'"),
        ("x,5,1,5,1", "song_id is 'x'"),
        ("1_0,5,1,5,1", "song_id is '1_0'"),
        ("3,5,1,5", "4 cells, the header has 5"),
        ("3,5,5,1,5,1", "6 cells, the header has 5"),
        ('3,"5,1,5,1', "2 cells, the header has 5"),
    ],
)
def test_a_wrong_row_is_refused_with_its_file_and_line(tmp_path: Path, row: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        labels_of(tmp_path, EXCERPTS + row)
    assert str(tmp_path / FILE_1) in str(caught.value)
    assert f"line 4: {says}" in str(caught.value)


def test_all_wrong_rows_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        labels_of(tmp_path, EXCERPTS + "".join(f"{song_id},0,1,5,1\n" for song_id in range(100, 123)))
    message = str(caught.value)
    assert "23 wrong rows" in message
    assert "line 4:" in message
    assert "line 23:" in message
    assert "line 24:" not in message
    assert "and 3 more" in message


def test_the_ends_of_the_scale_are_labels(tmp_path: Path) -> None:
    assert labels_of(tmp_path, EXCERPTS + "3,1,0,9,0")[-1] == (3, 1, 0, 9, 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            EXCERPTS.replace("valence_std", "deviation"),
            "found song_id, valence_mean, deviation, arousal_mean, arousal_std",
        ),
        (EXCERPTS.replace("arousal_mean", "valence_mean"), "repeated: valence_mean, arousal_mean"),
        (EXCERPTS.replace(",", ";"), "found song_id;valence_mean"),
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        (EXCERPTS.replace("7,", '"7,') + '11,5,"1,5,1\n', "ends in line 4 began in another"),
        (EXCERPTS.encode("utf-16"), "expected UTF-8 text"),
        (b"\xe9" + EXCERPTS.encode(), "expected UTF-8 text"),
    ],
)
def test_a_file_that_is_no_label_file_is_refused(tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(DataError) as caught:
        labels_of(tmp_path, text)
    assert str(tmp_path / FILE_1) in str(caught.value)
    assert says in str(caught.value)


def test_an_endless_cell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 4: not a CSV table"):
        labels_of(tmp_path, EXCERPTS + "1" * 200_000)


# Incomplete datasets


def refusal(root: Path) -> str:
    with pytest.raises(DataError) as caught:
        find_dataset(root)
    message = str(caught.value)
    assert str(root) in message
    assert "\n" not in message
    return message


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "no such folder" in refusal(write(tmp_path / "archive.zip"))


def test_a_folder_without_label_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "MEMD_audio/2.mp3")
    assert f"no label file in this folder or below. Expected {FILE_1}" in refusal(tmp_path)


def test_label_files_without_a_song_are_refused(tmp_path: Path) -> None:
    write(tmp_path / FILE_1, EXCERPTS.splitlines()[0])
    write(tmp_path / "2.mp3")
    assert f"no song in {tmp_path / FILE_1}" in refusal(tmp_path)


def test_labels_without_any_audio_are_refused(tmp_path: Path) -> None:
    write(tmp_path / FILE_1, EXCERPTS)
    write(tmp_path / "features/2.csv")
    assert "no audio in this folder or below. Expected SONG_ID.mp3" in refusal(tmp_path)


def test_labelled_songs_without_audio_are_refused_with_their_ids(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "MEMD_audio/10.mp3").unlink()
    (tmp_path / "MEMD_audio/2001.mp3").unlink()
    assert "2 of 3 labelled songs have no audio file, ids 10, 2001." in refusal(tmp_path)


def test_many_missing_audio_files_are_counted_not_listed(tmp_path: Path) -> None:
    make(tmp_path)
    write(tmp_path / "more" / FILE_1, EXCERPTS + "".join(f"{song_id},5,1,5,1\n" for song_id in range(100, 130)))
    message = refusal(tmp_path)
    assert "30 of 33 labelled songs" in message
    assert "118, 119 and 10 more" in message


def test_audio_without_a_label_is_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path)
    write(tmp_path / "MEMD_audio/11.mp3")
    write(tmp_path / "MEMD_audio/cover.mp3")
    with caplog.at_level(logging.WARNING, logger="emotion.deam"):
        assert [song.song_id for song in find_dataset(tmp_path)] == [2, 10, 2001]
    assert "audio_without_label=1 left out, ids 11" in caplog.text


def test_two_different_audio_files_of_one_song_are_refused(tmp_path: Path) -> None:
    make(tmp_path)
    write(tmp_path / "converted/2.wav", b"RIFF")
    with pytest.raises(DataError) as caught:
        find_dataset(tmp_path)
    assert f"song 2: {tmp_path / 'MEMD_audio/2.mp3'} and {tmp_path / 'converted/2.wav'}" in str(caught.value)


def test_the_same_audio_twice_is_one_file(tmp_path: Path) -> None:
    make(tmp_path)
    write(tmp_path / "copy/2.mp3")
    assert len(find_dataset(tmp_path)) == 3


# Groups


def groups_of(root: Path, **metadata: str | bytes) -> list[str]:
    make(root)
    for name, text in metadata.items():
        write(root / "metadata" / f"metadata_{name}.csv", text)
    return [song.group for song in find_dataset(root)]


def test_each_year_s_metadata_names_the_artist(tmp_path: Path) -> None:
    assert groups_of(
        tmp_path,
        **{
            "2013": 'song_id,album,artist,title,Genre\n2,"\t2.mp3","Kevin  MacLeod\t","\tSlow Burn\t","\tBlues\t"\n',
            "2014": "song_id,artist,album,title,Genre,,,,\n10,KEVIN MACLEOD,An Album,A Title,Rock,indie,00s,x,y\n",
            "2015": "song_id,title,artist,album,Genre,,,,\n2001,Definition,Joel Helander,n/a,Classical,,,,\n",
        },
    ) == ["kevin macleod", "kevin macleod", "joel helander"]


def test_the_archive_s_own_names_of_the_id_column_are_known(tmp_path: Path) -> None:
    assert groups_of(
        tmp_path,
        **{
            "2014": "Id, Artist, Album, Track, Genre\n10,A,b,c,d,e,f\n",
            "2015": "id,Filename,title,artist,album,genre\n2001,2001.mp3,t,B,n/a,g\n",
        },
    ) == ["song:2", "a", "b"]


def test_a_group_wins_over_an_artist(tmp_path: Path) -> None:
    assert groups_of(
        tmp_path,
        a="song_id,artist\n2,X\n10,Y\n2001,Z\n",
        b="song_id,group,title\n2,Game,t\n10,Game,u\n2001,n/a,v\n",
    ) == ["game", "game", "z"]


def test_songs_without_a_name_are_groups_of_their_own(tmp_path: Path) -> None:
    assert groups_of(tmp_path, a="song_id,artist\n2,N/A\n10,\t\n") == ["song:2", "song:10", "song:2001"]


def test_spellings_of_one_name_are_one_group(tmp_path: Path) -> None:
    names = "song_id,artist\n2,Vieux Farka Touré\n10,VIEUX\u00a0FARKA  TOURE\u0301\n2001,Vieux Farka Touré\t\n"
    assert groups_of(tmp_path, a=names) == ["vieux farka touré"] * 3


def test_metadata_in_latin_1_is_read(tmp_path: Path) -> None:
    assert groups_of(tmp_path, a="song_id,artist\n2,Touré\n".encode("latin-1"))[0] == "touré"


def test_contradicting_names_of_one_song_are_refused_with_both_places(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"song 2: artist is 'a' in .*metadata_a.csv, line 2, but 'b' in .*_b.csv, line 3"
    ):
        groups_of(tmp_path, a="song_id,artist\n2,A\n", b="song_id,artist\n10,A\n2,B\n")


def test_metadata_without_known_columns_is_refused_with_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metadata_a.csv: expected .* found song_id, title\."):
        groups_of(tmp_path, a="song_id,title,,\n2,A,,\n")


def test_metadata_rows_without_an_id_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="emotion.deam"):
        assert groups_of(tmp_path, a="song_id,artist\nsource: x,A\n,\n2,B\n")[0] == "b"
    assert "no song id in lines 2, left out" in caplog.text


def test_missing_metadata_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="emotion.deam"):
        find_dataset(make(tmp_path))
    assert "no metadata*.csv" in caplog.text


# The songs table

NUMBERS = st.floats(-1, 1)
NAMES = st.text(st.characters(exclude_categories=["Cc", "Cs"]))
SONGS = st.builds(Song, st.integers(0, 9999), NUMBERS, NUMBERS, NUMBERS, NUMBERS, NAMES, NAMES)


@settings(max_examples=50, deadline=None)
@given(songs=st.lists(SONGS, max_size=4))
def test_a_written_table_reads_as_the_same_songs(tmp_path_factory: pytest.TempPathFactory, songs: list[Song]) -> None:
    path = tmp_path_factory.mktemp("songs") / "songs.csv"
    write_songs(path, songs)
    assert read_songs(path) == songs
    assert (
        path.read_text(encoding="utf-8").splitlines()[0] == "song_id,valence,arousal,valence_sd,arousal_sd,group,audio"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a songs table"),
        (EXCERPTS, "expected a songs table"),
        ("song_id,valence,arousal,valence_sd,arousal_sd,group,audio\n2,0,0,0,0,g\n", "line 2: not a row"),
        ("song_id,valence,arousal,valence_sd,arousal_sd,group,audio\n2,0,0,0,x,g,a\n", "line 2: not a row"),
        ('song_id,valence,arousal,valence_sd,arousal_sd,group,audio\n2,0,0,0,0,g,"a', "line 2: not a row"),
    ],
)
def test_anything_but_a_songs_table_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_songs(write(tmp_path / "songs.csv", text))


def test_a_missing_songs_table_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"songs\.csv: cannot be read"):
        read_songs(tmp_path / "songs.csv")
