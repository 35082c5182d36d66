"""A table of files beside audio of any names is a dataset, and what is wrong with it is named."""

import random
import unicodedata
from pathlib import Path

import pytest

from emotion.data import unused as reasons
from emotion.data.faults import Fault
from emotion.data.label_scale import Scale
from emotion.data.layouts import dataset_files, description, find_dataset
from emotion.data.song_ids import in_order, song_id_of
from emotion.data.songs import Dataset, Song, read_songs, write_songs
from emotion.data.unused import Unused
from emotion.errors import DataError, SpecError

NAMES = ["a.mp3", "B.WAV", "deep/er/c d, live.flac", "Ærøskøbing – 大阪.ogg", "10.mp3", "9.mp3"]


def write(root: Path, *rows: str, header: str = "file,valence,arousal", names: list[str] = NAMES) -> Path:
    """A folder with these rows and empty files of these names."""
    root.mkdir(exist_ok=True)
    (root / "songs.csv").write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(root: Path, scale: Scale | None = (1, 9), unused: Unused | None = None) -> Dataset:
    unused = Unused() if unused is None else unused
    return find_dataset(root, dataset_files(root, unused), unused, scale)


def row_of(name: str) -> str:
    return f'"{name}",3,7'


def test_files_of_any_name_are_songs_whose_id_is_their_path(tmp_path: Path) -> None:
    dataset = found(write(tmp_path / "songs", *map(row_of, NAMES)))
    # By code points, in every locale alike; digits are letters like others here.
    ordered = ["10.mp3", "9.mp3", "B.WAV", "a.mp3", "deep/er/c d, live.flac", "Ærøskøbing – 大阪.ogg"]
    assert [song.song_id for song in dataset.songs] == [song.audio for song in dataset.songs] == ordered
    assert {(song.valence, song.arousal, song.valence_sd, song.arousal_sd) for song in dataset.songs} == {(-0.5, 0.5, None, None)}
    assert dataset.faults == []


def test_neither_the_order_of_rows_nor_of_files_matters(tmp_path: Path) -> None:
    shuffled = random.Random(1).sample(NAMES, len(NAMES))
    one = found(write(tmp_path / "one", *map(row_of, NAMES)))
    two = found(write(tmp_path / "two", *map(row_of, shuffled), names=shuffled[::-1]))
    assert one.songs == two.songs


@pytest.mark.parametrize(
    ("scale", "rating", "deviation", "label", "label_deviation"),
    [
        ((1, 9), "3", "2", -0.5, 0.5),
        ((0, 100), "75", "10", 0.5, 0.2),
        ((-1, 1), "-0.25", "0.5", -0.25, 0.5),
        ((-5, 0), "-5", "0", -1, 0),
    ],
)
def test_the_scale_of_the_spec_is_that_of_the_labels(
    tmp_path: Path, scale: Scale, rating: str, deviation: str, label: float, label_deviation: float
) -> None:
    header = "file,valence,arousal,arousal_sd,valence_sd"
    (song,) = found(write(tmp_path, f"a.mp3,{rating},{rating},,{deviation}", header=header), scale).songs
    assert (song.valence, song.arousal, song.valence_sd, song.arousal_sd) == (label, label, label_deviation, None)


def test_a_table_without_a_scale_is_refused_and_so_is_a_scale_without_a_table(tmp_path: Path) -> None:
    write(tmp_path / "table", "a.mp3,3,7")
    with pytest.raises(SpecError, match=r"data\.scale: .*songs\.csv does not say on which scale"):
        found(tmp_path / "table", None)
    (tmp_path / "deam").mkdir()
    header = "song_id,valence_mean,valence_std,arousal_mean,arousal_std"
    (tmp_path / "deam/static_annotations_averaged.csv").write_text(f"{header}\n2,5,1,4,1\n")
    (tmp_path / "deam/2.mp3").touch()
    assert len(found(tmp_path / "deam", None).songs) == 1
    with pytest.raises(SpecError, match=r"data\.scale: .* have a scale of their own"):
        found(tmp_path / "deam", (1, 9))


def test_further_columns_are_read_and_one_spelling_of_a_group_is_enough(tmp_path: Path) -> None:
    header = "Split, group ,raters,file,title,arousal,valence"
    rows = ("train,Björk  G.,12,a.mp3,x,1,9", "TEST,björk g.,,B.WAV,y,9,1", ",,,10.mp3,z,5,5")
    unused = Unused()
    songs = {song.song_id: song for song in found(write(tmp_path, *rows, header=header), unused=unused).songs}
    assert [(songs[name].group, songs[name].raters, songs[name].split) for name in ("a.mp3", "B.WAV", "10.mp3")] == [
        ("björk g.", 12, "train"),
        ("björk g.", None, "test"),
        ("song:10.mp3", None, ""),
    ]
    assert (songs["a.mp3"].valence, songs["a.mp3"].arousal) == (1, -1)
    assert unused.examples[reasons.COLUMNS] == ["title"]


def test_spellings_of_a_spreadsheet_are_read(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "songs.csv").write_bytes("\ufeffFile;Valence;Arousal\r\n a.mp3 ;3,5;7\r\n;;\r\n".encode())
    (song,) = found(tmp_path).songs
    assert (song.song_id, song.valence) == ("a.mp3", -0.375)


@pytest.mark.parametrize(
    ("row", "song", "says"),
    [
        (",3,7", None, "file is empty"),
        ("/a.mp3,3,7", None, "file is '/a.mp3', expected a path inside the dataset's folder"),
        ("../songs/a.mp3,3,7", None, "file is '../songs/a.mp3', expected a path inside the dataset's folder"),
        ("deep/../a.mp3,3,7", None, "expected a path inside the dataset's folder"),
        ("a\u200b.mp3,3,7", None, "with a character that does not print"),
        ("a.txt,3,7", None, "file is 'a.txt', expected the name of an audio file: mp3, wav"),
        (f"{'é' * 101}.mp3,3,7", None, "with a name of over 200 bytes"),
        ("a.mp3,0.5,7", "a.mp3", "valence is '0.5', expected 1..9 (data.scale)"),
        ("a.mp3,3,9.01", "a.mp3", "arousal is '9.01', expected 1..9 (data.scale)"),
        ("a.mp3,nan,7", "a.mp3", "valence is 'nan', expected 1..9"),
        ("a.mp3,3,inf", "a.mp3", "arousal is 'inf', expected 1..9"),
        ("a.mp3,,happy", "a.mp3", "valence is '', expected 1..9 (data.scale); arousal is 'happy', expected 1..9"),
        ("./a.mp3,3", "a.mp3", "2 cells, expected 3 as in the header"),
        ("c d, live.flac,3,7", None, "4 cells, expected 3 as in the header; quote a name that has a comma"),
    ],
)
def test_a_wrong_row_is_a_fault_that_names_song_value_and_line(tmp_path: Path, row: str, song: str | None, says: str) -> None:
    dataset = found(write(tmp_path / "songs", row_of("B.WAV"), row))
    (fault,) = dataset.faults
    assert (fault.kind, fault.song_id, fault.place) == ("label", song, "songs.csv, line 3")
    assert says in fault.what
    assert [song.song_id for song in dataset.songs] == ["B.WAV"]


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("valence_sd", "-1", "valence_sd is '-1', expected 0 or more, or nothing"),
        ("arousal_sd", "nan", "arousal_sd is 'nan', expected 0 or more, or nothing"),
        ("arousal_sd", "inf", "arousal_sd is 'inf', expected 0 or more, or nothing"),
        ("raters", "1", "raters is '1', expected a whole number, 2 or more, or nothing"),
        ("raters", "2.5", "raters is '2.5', expected a whole number"),
        ("split", "dev", "split is 'dev', expected train, validation, test or nothing"),
    ],
)
def test_a_wrong_optional_cell_is_a_fault(tmp_path: Path, column: str, value: str, says: str) -> None:
    dataset = found(write(tmp_path, f"a.mp3,3,7,{value}", header=f"file,valence,arousal,{column}"))
    (fault,) = dataset.faults
    assert (fault.kind, fault.song_id) == ("label", "a.mp3")
    assert says in fault.what
    assert dataset.songs == []


def test_equal_rows_count_once_and_different_ones_are_a_fault(tmp_path: Path) -> None:
    dataset = found(write(tmp_path, "a.mp3,3,7", "./a.mp3,3.0,7", "B.WAV,3,7", "B.WAV,3,6"))
    assert [song.song_id for song in dataset.songs] == ["a.mp3"]
    expected = Fault("contradicting labels", "B.WAV", "songs.csv, line 5", "other contents than in line 4; keep one of the rows")
    assert dataset.faults == [expected]


def test_a_file_that_is_not_there_is_a_fault_that_names_what_is_like_it(tmp_path: Path) -> None:
    rows = ("b.wav,3,7", "deep\\er\\c.flac,3,7", "none.mp3,3,7", ".hidden.mp3,3,7")
    faults = found(write(tmp_path, *rows, names=[*NAMES, ".hidden.mp3"])).faults
    assert [(fault.kind, fault.song_id) for fault in faults] == [("label without audio", row.split(",")[0]) for row in rows]
    assert [fault.what for fault in faults] == [
        "there is no such file, but 'B.WAV'",
        "there is no such file in the dataset's folder; folders are separated by /",
        "there is no such file in the dataset's folder",
        "there is no such file in the dataset's folder",
    ]


def test_a_link_that_leads_out_is_a_fault_and_one_that_stays_inside_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "secret.mp3").touch()
    root = write(tmp_path / "songs", "out.mp3,3,7", "folder/out.mp3,3,7", "in.mp3,3,7", names=["a.mp3"])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/out.mp3").touch()
    (root / "out.mp3").symlink_to("../secret.mp3")
    (root / "folder").symlink_to("../elsewhere")
    (root / "in.mp3").symlink_to("a.mp3")
    dataset = found(root)
    assert [song.song_id for song in dataset.songs] == ["in.mp3"]
    assert [(fault.song_id, fault.what) for fault in dataset.faults] == [
        (name, "a link that leads out of the dataset's folder; copy the file there") for name in ("out.mp3", "folder/out.mp3")
    ]


def test_a_name_that_macos_decomposed_is_found_and_no_file_is_used_twice(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é.mp3") for form in ("NFC", "NFD"))
    dataset = found(write(tmp_path / "one", row_of(composed), names=[decomposed]))
    assert [(song.song_id, song.audio) for song in dataset.songs] == [(composed, decomposed)]
    dataset = found(write(tmp_path / "two", row_of(composed), row_of(decomposed), names=[decomposed]))
    assert [(fault.kind, fault.song_id) for fault in dataset.faults] == [("two audio files", decomposed)]
    dataset = found(write(tmp_path / "both", row_of(composed), row_of(decomposed), names=[composed, decomposed]))
    assert {song.song_id: song.audio for song in dataset.songs} == {composed: composed, decomposed: decomposed}


def test_what_the_table_does_not_list_is_named_and_not_used(tmp_path: Path) -> None:
    unused = Unused()
    root = write(tmp_path, "a.mp3,3,7", "B.WAV,0,7", names=[*NAMES, "x.wma", "._a.mp3", "other.csv", "deep/songs.csv"])
    found(root, unused=unused)
    # Not B.WAV, which has a fault.
    assert unused.counts == {reasons.UNLISTED: 4, reasons.UNREAD: 1, reasons.HIDDEN: 1, reasons.TABLES: 1, reasons.MISPLACED: 1}
    assert next(iter(unused.lines().values())).startswith("not used: audio files that songs.csv does not list; add a row")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the file is empty"),
        ("file,valence\na.mp3,3\n", "expected one column each of file, valence, arousal .*missing or repeated: arousal"),
        ("file,valence,arousal,group,Group\na.mp3,3,7,x,y\n", "missing or repeated: group"),
        ("file,valence,arousal\n", "a header without rows"),
        ("PK\x03\x04", "found an Excel workbook"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path, text: str, says: str) -> None:
    write(tmp_path)
    (tmp_path / "songs.csv").write_text(text)
    with pytest.raises(DataError, match=rf"songs\.csv: .*{says}") as caught:
        found(tmp_path)
    assert "\n" not in str(caught.value)


def test_two_layouts_in_one_folder_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.mp3,3,7", names=["a.mp3", "deep/static_annots.csv"])
    with pytest.raises(DataError, match=r"both songs\.csv and deep/static_annots\.csv"):
        found(tmp_path)


def test_a_table_without_any_audio_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.mp3,3,7", names=["a.wma"])
    with pytest.raises(DataError, match=r"but no audio .*audio files in unsupported formats"):
        found(tmp_path)


def test_the_description_says_scale_deviations_groups_and_splits(tmp_path: Path) -> None:
    header = "file,valence,arousal,valence_sd,arousal_sd,group,split"
    rows = ("a.mp3,3,7,1,1,x,train", "B.WAV,3,7,1,,x,test", "10.mp3,3,7,,,y,train")
    assert description(found(write(tmp_path, *rows, header=header), (0, 10))) == (
        "data: labels on 0..10, standard deviations of 1 song, 2 groups, 2 for train, 1 for test"
    )
    plain = found(write(tmp_path, "a.mp3,3,7"), (0, 10))
    assert description(plain) == "data: labels on 0..10, no standard deviations, so no ceiling, 1 group"


def test_numbers_sort_by_size_before_text_by_code_points() -> None:
    assert in_order(["b", 10, "a", 9, "B", "10.mp3"]) == [9, 10, "10.mp3", "B", "a", "b"]


@pytest.mark.parametrize("song_id", [0, 7, 2001, "7.mp3", "007", "a, b.mp3", '"', "１"])
def test_an_id_reads_back_as_it_was_written(song_id: int | str) -> None:
    assert song_id_of(str(song_id)) == song_id
    assert type(song_id_of(str(song_id))) is type(song_id)


def test_songs_of_a_table_read_back_and_songs_of_deam_keep_their_columns(tmp_path: Path) -> None:
    songs = [
        Song("é, b.mp3", 0.1, 0.2, None, 0.5, "g", "audio/é, b.mp3", raters=3, split="test"),
        Song("c.mp3", 0.1, 0.2, None, None, "g", "audio/c.mp3"),
    ]
    write_songs(tmp_path / "table.csv", songs)
    assert read_songs(tmp_path / "table.csv") == songs
    write_songs(tmp_path / "deam.csv", [Song(7, 0.1, 0.2, 0.3, 0.4, "g", "audio/7.mp3")])
    assert (tmp_path / "deam.csv").read_bytes() == (
        b"song_id,valence,arousal,valence_sd,arousal_sd,group,audio\n7,0.1,0.2,0.3,0.4,g,audio/7.mp3\n"
    )
