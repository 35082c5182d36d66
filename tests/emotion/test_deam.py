"""DEAM is found in every layout in circulation, and what is wrong with a copy is reported with file and line."""

import csv
import gzip
import logging
import math
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emotion.data.deam import dataset_files, find_dataset, join_labels
from emotion.data.faults import Fault
from emotion.data.label_tables import DEAM, Label, read_labels
from emotion.data.songs import OTHER_FORMATS, Song
from emotion.errors import DataError

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
    rows, faults = read_labels(write(root / FILE_1, text), FILE_1)
    assert faults == []
    return [(row.song_id, row.valence, row.valence_sd, row.arousal, row.arousal_sd) for row in rows]


def songs_of(root: Path) -> list[Song]:
    dataset = find_dataset(root)
    assert dataset.faults == []
    return dataset.songs


def labels_below(root: Path) -> tuple[list[Label], list[Fault]]:
    return join_labels(root, dataset_files(root))


# Real files


def test_the_real_tables_have_the_published_statistics(real_data: Path) -> None:
    labels, faults = labels_below(real_data / "deam_annotations")
    valence = [label.valence for label in labels]
    arousal = [label.arousal for label in labels]

    assert faults == []
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
    labels, _ = read_labels(real_data / "deam_annotations" / FILE_1, FILE_1)
    quadrants = Counter((label.valence > 5, label.arousal > 5) for label in labels)
    assert quadrants == {(False, False): 723, (True, True): 583, (True, False): 221, (False, True): 217}


def test_both_spellings_of_the_real_tables_hold_the_same_rows(real_data: Path) -> None:
    folder = real_data / "deam_annotations"
    for name, rows in ((FILE_1, 1744), (FILE_2, 58)):
        compact = read_labels(folder / name, name)
        assert len(compact[0]) == rows
        assert read_labels(folder / "padded_original" / name, name) == compact
    assert len(labels_below(folder / "padded_original")[0]) == 1802


def test_real_metadata_groups_the_songs_of_an_artist(real_data: Path, tmp_path: Path) -> None:
    # A dataset put together from symlinked folders, as on a cluster with one shared copy.
    (tmp_path / "labels").symlink_to(real_data / "deam_annotations")
    for label in labels_below(tmp_path)[0]:
        write(tmp_path / "MEMD_audio" / f"{label.song_id}.mp3")

    songs = songs_of(tmp_path)

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

    songs = songs_of(root)

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
    songs = songs_of(make(tmp_path, labels, audio, second))

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
    assert len(songs_of(tmp_path)) == 3


def test_audio_is_found_with_any_known_ending_in_any_case(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "MEMD_audio/2.mp3").rename(tmp_path / "2.FLAC")
    (tmp_path / "MEMD_audio/10.mp3").rename(tmp_path / "MEMD_audio/10.m4a")
    assert [song.audio for song in songs_of(tmp_path)] == ["2.FLAC", "MEMD_audio/10.m4a", "MEMD_audio/2001.mp3"]
    for extension in ("opus", "oga", "Aiff", "aif", "w64", "caf", "au"):
        (tmp_path / "2.FLAC").rename(tmp_path / f"2.{extension}")
        assert songs_of(tmp_path)[0].audio == f"2.{extension}"
        (tmp_path / f"2.{extension}").rename(tmp_path / "2.FLAC")


def test_circular_links_and_links_out_of_the_dataset_are_not_followed(tmp_path: Path) -> None:
    root = make(tmp_path / "deam")
    write(tmp_path / "beside" / FILE_1, EXCERPTS.replace("3.1", "4.1"))
    (root / "MEMD_audio/again").symlink_to(root)
    (root / "outwards").symlink_to(tmp_path)
    assert len(songs_of(root)) == 3


def test_hidden_folders_and_files_are_skipped(tmp_path: Path) -> None:
    make(tmp_path)
    write(tmp_path / ".trash" / FILE_1, EXCERPTS.replace("3.1", "4.1"))
    write(tmp_path / "__MACOSX" / f"._{FILE_1}", b"\x00\x05\x16\x07")
    write(tmp_path / "__MACOSX/._metadata_2013.csv", b"\x00\x05\x16\x07")
    assert songs_of(tmp_path)[0].valence == (3.1 - 5) / 4


# Spellings of label files

HEADER = "song_id,valence_mean,valence_std,arousal_mean,arousal_std\n"


@pytest.mark.parametrize(
    "text",
    [
        "song_id,valence_mean,valence_std,arousal_mean,arousal_std\n2,3.0,0.5,4.0,1.0\n",
        "song_id, valence_mean, valence_std, arousal_mean, arousal_std\r\n2,3,.5,4,1\r\n",
        "song_id,valence_mean,valence_std,arousal_mean,arousal_std\r2,3,0.5,4,1\r",
        "\ufeffsong_id,valence_ mean,valence_std,arousal_mean,arousal_std\n2.0,3,0.50,4.,1e0\n",
        "song_id, valence_mean, valence_std, arousal_mean, arousal_std\n      2,       3   ,        0.5 ,  4,  1 \n\n",
        "Song_ID, Valence_Mean, Valence_Std, Arousal_Mean, Arousal_Std\n2,3,0.5,4,1",
        ",arousal_std,arousal_mean,valence_std,valence_mean,song_id\n0,1,4,0.5,3,2\n",
        '"song_id", "valence_mean", "valence_std", "arousal_mean", "arousal_std"\n"2", "3", "0.5", "4", "1"\n',
        '\ufeffsong_id;valence_mean;valence_std;arousal_mean;arousal_std\r\n2;"3,0";0,5;4;1,00\r\n',
        "song_id\tvalence_mean\tvalence_std\tarousal_mean\tarousal_std\n2\t3,0\t0.5\t4\t1\n",
        "sep=;\r\nsong_id;valence_mean;valence_std;arousal_mean;arousal_std\r\n2;3,0;0,5;4;1\r\n",
        "\ufeffSEP=,\nsong_id,valence_mean,valence_std,arousal_mean,arousal_std\n2,3.0,0.5,4,1\n",
        "song_id,valence_mean,valence_std,arousal_mean,arousal_std\n2,3.0,0.5,4,1,,,\n",
        "song_id,valence_mean,valence_std,arousal_mean,arousal_std,,\n2,3.0,0.5,4,1,,\n",
        "song_id,valence_mean,valence_std,arousal_mean,arousal_std\n\u00a02\u00a0,3.0\u00a0,0.5,4,1\n",
        "song_id,valence_mean,valence_std,arousal_mean,arousal_std\n2,3.0,0.5,4,1\n".encode("utf-16"),
        b"\xfe\xff"
        + "song_id\tvalence_mean\tvalence_std\tarousal_mean\tarousal_std\r\n2\t3,0\t0,5\t4\t1\r\n".encode("utf-16-be"),
        "song_id ; valence_mean ; valence_std ; arousal_mean ; arousal_std\n2,0 ; 3.0 ; ,5 ; 4, ; 1\n;;;;\n",
    ],
)
def test_every_spelling_of_a_label_file_gives_the_same_row(tmp_path: Path, text: str | bytes) -> None:
    assert labels_of(tmp_path, text) == [(2, 3.0, 0.5, 4.0, 1.0)]


def test_the_ends_of_the_scale_are_labels(tmp_path: Path) -> None:
    assert labels_of(tmp_path, EXCERPTS + "3,1,0,9,0")[-1] == (3, 1, 0, 9, 0)


def test_equal_copies_count_once(tmp_path: Path) -> None:
    make(tmp_path)
    write(tmp_path / "padded" / FILE_1, EXCERPTS.replace(",", " ,  ").replace(",  3 ", ",  3.0 "))
    labels, faults = labels_below(tmp_path)
    assert [label.song_id for label in labels] == [2, 10, 2001]
    assert faults == []


# Wrong label files


def found(faults: Sequence[Fault]) -> list[tuple[str, int | None, str]]:
    return [(fault.kind, fault.song_id, fault.place) for fault in faults]


@pytest.mark.parametrize(
    ("row", "song_id", "says"),
    [
        ("3,nan,1,5,1", 3, "valence_mean is 'nan', expected 1 to 9"),
        ("3,5,1,inf,1", 3, "arousal_mean is 'inf', expected 1 to 9"),
        ("3,5,1,5,Infinity", 3, "arousal_std is 'Infinity', expected 0 or more"),
        ("3,0.99,1,5,1", 3, "valence_mean is '0.99', expected 1 to 9"),
        ("3,5,1,9.01,1", 3, "arousal_mean is '9.01', expected 1 to 9"),
        ("3,-0.5,1,5,1", 3, "valence_mean is '-0.5', expected 1 to 9"),
        ("3,happy,1,5,1", 3, "valence_mean is 'happy', expected 1 to 9"),
        ("3,,1,5,1", 3, "valence_mean is '', expected 1 to 9"),
        ("3,\u0665,1,5,1", 3, "valence_mean is '\u0665' with U+0665 (ARABIC-INDIC DIGIT FIVE), expected 1 to 9"),
        ("3,5.0\u200b,1,5,1", 3, "valence_mean is '5.0\\u200b' with U+200B (ZERO WIDTH SPACE), expected 1 to 9"),
        ("\ufeff3,5,1,5,1", None, "song_id is '\\ufeff3' with U+FEFF (ZERO WIDTH NO-BREAK SPACE), expected a whole number"),
        ("3,5,1,\u22125,1", 3, "arousal_mean is '\u22125' with U+2212 (MINUS SIGN), expected 1 to 9"),
        ("3,5\u066b5,1,5,1", 3, "valence_mean is '5\u066b5', expected 1 to 9"),
        ("3,5,-1,5,1e999", 3, "valence_std is '-1', expected 0 or more; arousal_std is '1e999', expected 0 or more"),
        ("3.5,5,1,5,1", None, "song_id is '3.5', expected a whole number"),
        ("-3,5,1,5,1", None, "song_id is '-3', expected a whole number"),
        ("x,5,1,5,1", None, "song_id is 'x', expected a whole number"),
        (",5,1,5,1", None, "song_id is '', expected a whole number"),
        ("1_0,5,1,5,1", None, "song_id is '1_0', expected a whole number"),
        ("x,5,1,0,1", None, "arousal_mean is '0', expected 1 to 9; song_id is 'x', expected a whole number"),
        ("3,5,1,5", 3, "4 cells, expected 5 as in the header"),
        ("3,5,5,1,5,1", 3, "6 cells, expected 5 as in the header"),
        ("3,3,1,0,94,3,0,63", 3, "8 cells, expected 5 as in the header"),
        ('3,"5,1,5,1', 3, "2 cells, expected 5 as in the header"),
        ('3,"5,5",1,5,1', 3, "valence_mean is '5,5', expected 1 to 9"),
        ('"2,000",5,1,5,1', None, "song_id is '2,000', expected a whole number"),
        ("3;5;1;5;1", None, "1 cells, expected 5 as in the header"),
    ],
)
def test_a_wrong_row_is_a_fault_with_its_file_line_and_song(tmp_path: Path, row: str, song_id: int | None, says: str) -> None:
    labels, faults = read_labels(write(tmp_path / "t.csv", EXCERPTS + row), "folder/t.csv")
    assert faults == [Fault("label", song_id, "folder/t.csv, line 4", says)]
    assert [label.song_id for label in labels] == [2, 10]


def test_a_row_of_another_length_names_no_song_if_its_id_may_have_shifted(tmp_path: Path) -> None:
    header = "valence_mean,valence_std,arousal_mean,arousal_std,song_id\n"
    text = f"{header}5,1,5,1,300\n5,1,5,1,2,301\n5,1,5,2\n"
    labels, faults = read_labels(write(tmp_path / "t.csv", text), "t.csv")
    assert [label.song_id for label in labels] == [300]
    assert found(faults) == [("label", None, "t.csv, line 3"), ("label", None, "t.csv, line 4")]


def test_all_wrong_rows_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    text = EXCERPTS + "".join(f"{song_id},0,1,5,1\n" for song_id in range(100, 123))
    labels, faults = read_labels(write(tmp_path / "t.csv", text), "t.csv")
    assert found(faults) == [("label", 96 + line, f"t.csv, line {line}") for line in range(4, 27)]
    assert [label.song_id for label in labels] == [2, 10]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            EXCERPTS.replace("valence_std", "deviation"),
            "found 'song_id', 'valence_mean', 'deviation', 'arousal_mean', 'arousal_std'; missing or repeated: valence_std",
        ),
        (EXCERPTS.replace("arousal_mean", "valence_mean"), "repeated: valence_mean, arousal_mean"),
        (EXCERPTS.replace(",", "|"), "found 'song_id|valence_mean"),
        ("x" * 9999, f"found '{40 * 'x'}'; missing"),
        (EXCERPTS.replace("valence_mean", "valence\u200b_mean"), "'valence\\u200b_mean' with U+200B (ZERO WIDTH SPACE)"),
        ("<!DOCTYPE html>" + 9999 * "x", "expected text, found a web page"),
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            "found a git-lfs pointer and not the file itself",
        ),
        ("/annex/objects/MD5E-s9--00.csv\n", "found a git-annex pointer and not the file itself; run `git annex get`"),
        (b"PK\x03\x04\x14\0\x06\0\x08\0", "expected text, found an Excel workbook or another zip archive"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "found an old Excel workbook"),
        (gzip.compress(EXCERPTS.encode(), mtime=0), "found a compressed file; unpack it"),
        (bytes(4096), "found nothing but zero bytes"),
        (EXCERPTS.encode("utf-16-le"), "NUL bytes, so it is damaged, or UTF-16 without a byte order mark"),
        (EXCERPTS.replace("7,1.2", "7\0,1.2"), "NUL bytes, so it is damaged"),
        (EXCERPTS.split("\n", 1)[1], "missing or repeated: song_id"),
        ("", "the file is empty"),
        ("\ufeff", "the file is empty"),
        ("\r\n , \n", "the file is empty"),
        (HEADER, "a header without rows"),
        (HEADER + ",,,,\n\n", "a header without rows"),
        (EXCERPTS.replace("7,", '"7,') + '11,5,"1,5,1\n', "ends in line 4 began in another"),
        (EXCERPTS.encode() + b"3,5,1,5,1,caf\xe9", "expected UTF-8 text, found byte 0xe9 in line 4, as in Windows-1252"),
        (EXCERPTS + "1" * 200_000, "line 4 is not a row of a CSV table"),
    ],
)
def test_a_file_that_is_no_label_file_is_a_fault_that_names_it(tmp_path: Path, text: str | bytes, says: str) -> None:
    labels, faults = read_labels(write(tmp_path / "t.csv", text), "folder/t.csv")
    assert labels == []
    assert found(faults) == [("label file", None, "folder/t.csv")]
    assert says in faults[0].what
    assert "folder" not in faults[0].what


def test_a_line_for_excel_alone_does_not_shift_the_numbers_of_lines(tmp_path: Path) -> None:
    text = "sep=;\n" + HEADER.replace(",", ";") + "2;3,0;1;4;1\n3;0,5;1;4;1\n"
    assert found(read_labels(write(tmp_path / "t.csv", text), "t.csv")[1]) == [("label", 3, "t.csv, line 4")]


def test_contradicting_copies_are_a_fault_with_both_files_and_lines(tmp_path: Path) -> None:
    make(tmp_path)
    write(tmp_path / "other" / FILE_1, EXCERPTS.replace("10,7,", "10,7.5,"))
    labels, faults = labels_below(tmp_path)
    assert [label.song_id for label in labels] == [2, 2001]
    assert faults == [
        Fault(
            "contradicting labels",
            10,
            f"other/{FILE_1}, line 3",
            "valence 7.5 (SD 1.2), arousal 8.1 (SD 1), but valence 7 (SD 1.2), arousal 8.1 (SD 1) in "
            f"{SONG_LEVEL}/{FILE_1}, line 3",
        )
    ]


def test_a_song_labelled_twice_with_different_numbers_is_a_fault_and_not_used(tmp_path: Path) -> None:
    write(tmp_path / FILE_1, EXCERPTS + "2,3.2,0.94,3,0.63\n2,3.1,0.94,3,0.64\n2,3.1,0.94,3,0.63\n")
    labels, faults = labels_below(tmp_path)
    assert [label.song_id for label in labels] == [10]
    assert found(faults) == [("contradicting labels", 2, f"{FILE_1}, line {line}") for line in (4, 5)]


def test_a_song_with_a_wrong_row_is_not_used_even_if_a_copy_of_the_row_is_right(tmp_path: Path) -> None:
    make(tmp_path)
    write(tmp_path / "a copy" / FILE_1, EXCERPTS.replace("10,7,", "10,77,"))
    write(tmp_path / "z copy" / FILE_1, EXCERPTS.replace("2,3.1,", "2,,"))
    dataset = find_dataset(tmp_path)
    assert [song.song_id for song in dataset.songs] == [2001]
    assert found(dataset.faults) == [("label", 10, f"a copy/{FILE_1}, line 3"), ("label", 2, f"z copy/{FILE_1}, line 2")]


def test_all_faults_of_a_dataset_are_reported_together(tmp_path: Path) -> None:
    rows = [
        "2,3,1,4,1",
        "3,nan,1,4,1",
        "4,3,1,inf,1",
        "5,0.9,1,4,1",
        "6,sad,1,4,1",
        "7,3,1,4",
        "8,3,1,4,1,1",
        "x,3,1,4,1",
        "9,3,1,4,1",
        "10,3,1,4,1",
        "11,3,1,4,1",
        "12,3,1,4,1",
        "14,3,nan,4,1",
        "16,3,1,4,1",
        "10,33,1,4,1",
        "16,3,1,44,1",
    ]
    write(tmp_path / "b" / FILE_1, HEADER + "\n".join(rows))
    write(tmp_path / "a" / FILE_1, "\ufeff" + HEADER.replace("\n", "\r\n") + "9,3,1,4,1.5\r\n20,3,1,4,1\r\n")
    write(tmp_path / "c" / FILE_1, HEADER.replace(",", ";") + "17;3,5;1;4;1\n18;9,5;1;4;1\n")
    write(tmp_path / "empty" / FILE_1)
    write(tmp_path / "no column" / FILE_1, HEADER.replace(",arousal_std", "") + "19,3,1,4\n")
    write(tmp_path / "no utf 8" / FILE_1, b"\xe9" + EXCERPTS.encode())
    # 11, 14 and 20 have no sound; 12, 15 and 16 have two; 13 has no label, 15 and 19 have none that can be read.
    for song_id in (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 15, 16, 17, 18, 19):
        write(tmp_path / f"audio/{song_id}.mp3", f"sound {song_id}")
    for song_id in (12, 15, 16):
        write(tmp_path / f"more/{song_id}.wav", "another sound")
    write(tmp_path / "more/0017.MP3", "sound 17")

    dataset = find_dataset(tmp_path)

    assert [song.song_id for song in dataset.songs] == [2, 17]
    at = f"b/{FILE_1}, line"
    assert found(dataset.faults) == [
        ("label", 3, f"{at} 3"),
        ("label", 4, f"{at} 4"),
        ("label", 5, f"{at} 5"),
        ("label", 6, f"{at} 6"),
        ("label", 7, f"{at} 7"),
        ("label", 8, f"{at} 8"),
        ("label", None, f"{at} 9"),
        ("label", 14, f"{at} 14"),
        ("label", 10, f"{at} 16"),
        ("label", 16, f"{at} 17"),
        ("contradicting labels", 9, f"{at} 10"),
        ("label", 18, f"c/{FILE_1}, line 3"),
        ("label file", None, f"empty/{FILE_1}"),
        ("label file", None, f"no column/{FILE_1}"),
        ("label file", None, f"no utf 8/{FILE_1}"),
        ("two audio files", 12, "more/12.wav"),
        ("two audio files", 15, "more/15.wav"),
        ("two audio files", 16, "more/16.wav"),
        ("label without audio", 11, f"{at} 12"),
        ("label without audio", 14, f"{at} 14"),
        ("label without audio", 20, f"a/{FILE_1}, line 3"),
        ("audio without label", 13, "audio/13.mp3"),
        ("audio without label", 15, "audio/15.mp3"),
        ("audio without label", 19, "audio/19.mp3"),
    ]


# Any label files

WRONG_MEANS = ["nan", "inf", "-inf", "", "sad", "0.99", "9.01", "-5", "1e999", "5.5.5", "0x5", "5 5", "٥"]
WRONG_SDS = ["nan", "inf", "", "-0.01", "1e999", "low"]
WRONG_IDS = ["", "x", "3.5", "-3", "nan", "1e3", "3 4", "٣", "1234567890"]
Numbers = tuple[int, int, int, int]


@dataclass(frozen=True)
class Row:
    """One row to be written: hundredths of the four numbers; `wrong` is the content of one wrong cell."""

    song_id: int
    numbers: Numbers
    wrong: tuple[str, str] | None = None


@dataclass
class LabelFiles:
    """Contents of files, and the expected labels and faults, derived from the rows alone."""

    contents: dict[str, bytes]
    labels: dict[int, Numbers]
    faults: list[tuple[str, int | None, str]]


MEANS, SDS = st.integers(100, 900), st.integers(0, 400)
NUMBERS_OF_SONG = st.tuples(MEANS, SDS, MEANS, SDS) | st.tuples(*[st.integers(10, 90).map(lambda n: 10 * n)] * 4)
SOME_SONGS = st.dictionaries(st.integers(0, 3000), NUMBERS_OF_SONG, min_size=1, max_size=8)
DAMAGE = st.one_of(
    st.tuples(st.sampled_from(["valence_mean", "arousal_mean"]), st.sampled_from(WRONG_MEANS)),
    st.tuples(st.sampled_from(["valence_std", "arousal_std"]), st.sampled_from(WRONG_SDS)),
    st.tuples(st.just("song_id"), st.sampled_from(WRONG_IDS)),
    st.tuples(st.just("length"), st.sampled_from(["one less", "one more"])),
)


def spelled(draw: st.DrawFn, hundredths: int, comma: str) -> str:
    """3, 3.0, 3.00 or 3. for three."""
    shortest = f"{hundredths / 100:g}"
    point = "" if "." in shortest else "."
    return draw(st.sampled_from([shortest, f"{hundredths / 100:.2f}", shortest + point])).replace(".", comma)


@st.composite
def label_files(draw: st.DrawFn, with_faults: bool) -> LabelFiles:
    """A table of songs, some rows several times, over two files, each in a spelling of its own."""
    table = draw(SOME_SONGS)
    rows = [Row(*song) for song in table.items()]
    rows += [Row(*song) for song in draw(st.lists(st.sampled_from(sorted(table.items())), max_size=3))]
    if with_faults:
        rows = [replace(row, wrong=draw(st.none() | DAMAGE)) for row in rows]
        others = draw(st.lists(st.sampled_from(sorted(table)), max_size=2))
        rows += [Row(song_id, draw(NUMBERS_OF_SONG)) for song_id in others]
    rows = draw(st.permutations(rows))
    cut = draw(st.integers(0, len(rows)))
    labels: dict[int, Numbers] = {}
    faults: list[tuple[str, int | None, str]] = []
    contents = {}
    for name, part in ((FILE_1, rows[:cut]), (FILE_2, rows[cut:])):
        if part:
            contents[name] = written(draw, name, part, labels, faults)
    unusable = {song_id for _, song_id, _ in faults}
    return LabelFiles(contents, {song: numbers for song, numbers in labels.items() if song not in unusable}, faults)


def written(
    draw: st.DrawFn, name: str, rows: Sequence[Row], labels: dict[int, Numbers], faults: list[tuple[str, int | None, str]]
) -> bytes:
    """The content of a file; its labels and faults are added to those of the files before."""
    delimiter, comma = draw(st.sampled_from([(",", "."), (";", ","), (";", ".")]))
    newline = draw(st.sampled_from(["\n", "\r\n"]))
    quote = draw(st.sampled_from(["", '"']))
    blanks = draw(st.sampled_from([("", ""), (" ", ""), ("   ", "  ")]))
    columns = list(draw(st.permutations(["extra", "", *DEAM.columns][draw(st.integers(0, 2)) :])))
    lines = [[draw(st.sampled_from([column, column.upper(), column.replace("_", "_ ")])) for column in columns]]
    for row in rows:
        while draw(st.integers(0, 4)) == 4:
            lines.append([""] * draw(st.sampled_from([1, len(columns)])))
        cell = {"song_id": draw(st.sampled_from([f"{row.song_id}", f"{row.song_id:04}", f"{row.song_id}{comma}0"]))}
        cell |= {key: spelled(draw, n, comma) for key, n in zip(DEAM.columns[1:], row.numbers, strict=True)}
        place = f"{name}, line {len(lines) + 1}"
        named: int | None = row.song_id
        if row.wrong is None:
            if labels.setdefault(row.song_id, row.numbers) != row.numbers:
                faults.append(("contradicting labels", named, place))
        elif row.wrong[0] == "length":
            named = row.song_id if columns[0] == "song_id" else None
        else:
            cell[row.wrong[0]] = row.wrong[1].replace(".", comma)
            named = None if row.wrong[0] == "song_id" else row.song_id
        cells = [cell.get(column, "7") for column in columns]
        if row.wrong is not None:
            faults.append(("label", named, place))
            if row.wrong[0] == "length":
                cells = cells[:-1] if row.wrong[1] == "one less" else [*cells, "5"]
        lines.append(cells)
    before, behind = blanks
    text = newline.join(delimiter.join(f"{before}{quote}{cell}{quote}{behind}" for cell in line) for line in lines)
    return (draw(st.sampled_from(["", "\ufeff"])) + text + draw(st.sampled_from(["", newline]))).encode()


def written_labels(folder: Path, files: LabelFiles) -> tuple[dict[int, tuple[float, ...]], list[tuple[str, int | None, str]]]:
    for name, content in files.contents.items():
        write(folder / name, content)
    labels, faults = labels_below(folder)
    assert [label.song_id for label in labels] == sorted({label.song_id for label in labels}), "each once, by id"
    hundredths: dict[int, tuple[float, ...]] = {
        label.song_id: tuple(round(100 * n, 9) for n in (label.valence, label.valence_sd, label.arousal, label.arousal_sd))
        for label in labels
    }
    return hundredths, found(faults)


ANY_FILES = settings(max_examples=40, deadline=None)


@ANY_FILES
@given(files=label_files(with_faults=False))
def test_labels_are_read_in_every_spelling(tmp_path_factory: pytest.TempPathFactory, files: LabelFiles) -> None:
    labels, faults = written_labels(tmp_path_factory.mktemp("labels"), files)
    assert labels == files.labels
    assert faults == []


@ANY_FILES
@given(files=label_files(with_faults=True))
def test_exactly_the_wrong_rows_are_reported_and_all_others_read(
    tmp_path_factory: pytest.TempPathFactory, files: LabelFiles
) -> None:
    labels, faults = written_labels(tmp_path_factory.mktemp("labels"), files)
    assert sorted(faults, key=str) == sorted(files.faults, key=str)
    assert labels == files.labels


SOME_BYTES = st.binary(max_size=60) | st.text("0159.,;\"'\t\r\n\0 exn-\u00a0\u2028\ufeff", max_size=60).map(str.encode)


@settings(max_examples=60, deadline=None)
@given(before=SOME_BYTES, at=st.integers(0, len(EXCERPTS)))
def test_a_file_with_any_bytes_gives_labels_on_the_scale_or_a_fault(
    tmp_path_factory: pytest.TempPathFactory, before: bytes, at: int
) -> None:
    whole = EXCERPTS.encode()
    path = write(tmp_path_factory.mktemp("labels") / FILE_1, whole[:at] + before + whole[at:])
    labels, faults = read_labels(path, FILE_1)
    assert labels or faults
    for label in labels:
        assert label.song_id >= 0
        assert all(1 <= mean <= 9 for mean in (label.valence, label.arousal))
        assert all(0 <= sd < math.inf for sd in (label.valence_sd, label.arousal_sd))
    assert all(str(fault).isprintable() for fault in faults)


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
    said = refusal(tmp_path)
    assert "no label file in this folder or below. Write songs.csv in this folder, with the columns file,valence,arousal" in said
    assert f"DEAM's {FILE_1}" in said


def test_labels_without_any_audio_are_refused(tmp_path: Path) -> None:
    write(tmp_path / FILE_1, EXCERPTS)
    write(tmp_path / "features/2.csv")
    assert "no audio in this folder or below. Expected SONG_ID.mp3" in refusal(tmp_path)


def test_a_label_without_audio_is_a_fault_at_its_row(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "MEMD_audio/10.mp3").unlink()
    dataset = find_dataset(tmp_path)
    assert [song.song_id for song in dataset.songs] == [2, 2001]
    says = f"expected 10.mp3 (or {OTHER_FORMATS}) anywhere below the dataset's folder"
    assert dataset.faults == [Fault("label without audio", 10, f"{SONG_LEVEL}/{FILE_1}, line 3", says)]


def test_audio_without_a_label_is_a_fault_if_its_name_is_an_id(tmp_path: Path) -> None:
    make(tmp_path)
    write(tmp_path / "MEMD_audio/0011.mp3")
    write(tmp_path / "MEMD_audio/cover.mp3")
    dataset = find_dataset(tmp_path)
    assert [song.song_id for song in dataset.songs] == [2, 10, 2001]
    assert found(dataset.faults) == [("audio without label", 11, "MEMD_audio/0011.mp3")]


def test_two_different_audio_files_of_one_song_are_a_fault_that_names_both(tmp_path: Path) -> None:
    make(tmp_path)
    write(tmp_path / "converted/2.wav", b"RIFF")
    dataset = find_dataset(tmp_path)
    assert [song.song_id for song in dataset.songs] == [10, 2001]
    says = "another file than MEMD_audio/2.mp3, expected one for a song"
    assert dataset.faults == [Fault("two audio files", 2, "converted/2.wav", says)]


def test_a_dataset_without_a_usable_song_is_all_faults(tmp_path: Path) -> None:
    write(tmp_path / FILE_1, HEADER)
    write(tmp_path / "2.mp3")
    dataset = find_dataset(tmp_path)
    assert dataset.songs == []
    assert found(dataset.faults) == [("label file", None, FILE_1), ("audio without label", 2, "2.mp3")]


def test_the_same_audio_twice_is_one_file(tmp_path: Path) -> None:
    make(tmp_path)
    write(tmp_path / "copy/2.mp3")
    assert len(songs_of(tmp_path)) == 3


# Names and order of files


def a_dozen(root: Path, order: Sequence[int], folders: tuple[str, str, str]) -> Path:
    """Songs 1 to 12, of which four are wrong, in two label files and a folder for odd and for even songs."""
    labels, odd, even = folders
    rows = {song_id: f"{song_id},{3 + song_id / 10},1,5,1\n" for song_id in range(1, 13) if song_id != 9}
    rows[4] = "4,44,1,5,1\n"
    files = {
        f"{labels}/one/{FILE_1}": HEADER + "".join(rows[song_id] for song_id in (1, 2, 3, 4, 5, 6)),
        f"{labels}/two/{FILE_2}": HEADER + "".join(rows[song_id] for song_id in (7, 8, 10, 11, 12)) + "6,8,1,8,1\n",
        "metadata.csv": "song_id,artist\n" + "".join(f"{song_id},A{song_id % 3}\n" for song_id in range(1, 13)),
    }
    files |= {f"{odd if song_id % 2 else even}/{song_id}.mp3": f"{song_id}" for song_id in range(1, 12)}
    names = list(files)
    for place in order:
        write(root / names[place], files[names[place]])
    return root


@pytest.mark.parametrize("order", [range(14), range(13, -1, -1), [7, 2, 9, 0, 12, 5, 11, 1, 8, 3, 13, 6, 4, 10]])
def test_the_order_in_which_files_were_written_does_not_matter(tmp_path: Path, order: Sequence[int]) -> None:
    dataset = find_dataset(a_dozen(tmp_path, order, ("labels", "odd", "even")))
    assert [(song.song_id, song.group) for song in dataset.songs] == [
        (song_id, f"a{song_id % 3}") for song_id in (1, 2, 3, 5, 7, 8, 10, 11)
    ]
    assert found(dataset.faults) == [
        ("label", 4, f"labels/one/{FILE_1}, line 5"),
        ("contradicting labels", 6, f"labels/two/{FILE_2}, line 7"),
        ("label without audio", 12, f"labels/two/{FILE_2}, line 6"),
        ("audio without label", 9, "odd/9.mp3"),
    ]


@pytest.mark.parametrize("folders", [("z", "a", "b"), ("a", "z", "b"), ("Ärger 🎵", "B", "a"), ("same", "same", "same")])
def test_names_of_folders_change_only_the_places_of_faults(tmp_path: Path, folders: tuple[str, str, str]) -> None:
    dataset = find_dataset(a_dozen(tmp_path, range(14), folders))
    plain = find_dataset(a_dozen(tmp_path / "plain", range(14), ("labels", "odd", "even")))
    assert [replace(song, audio="") for song in dataset.songs] == [replace(song, audio="") for song in plain.songs]
    assert [(fault.kind, fault.song_id) for fault in dataset.faults] == [(fault.kind, fault.song_id) for fault in plain.faults]


def test_the_order_of_contradicting_copies_does_not_change_which_songs_are_used(tmp_path: Path) -> None:
    for root, first, second in (("forth", "a", "b"), ("back", "b", "a")):
        write(tmp_path / root / first / FILE_1, EXCERPTS)
        write(tmp_path / root / second / FILE_1, EXCERPTS.replace("10,7,", "10,7.5,"))
    forth, back = labels_below(tmp_path / "forth"), labels_below(tmp_path / "back")
    assert [label.song_id for label in forth[0]] == [label.song_id for label in back[0]] == [2]
    assert found(forth[1]) == found(back[1]) == [("contradicting labels", 10, f"b/{FILE_1}, line 3")]


ODD_FOLDERS = [os.fsdecode(b"caf\xe9 \xff"), "🎵 Ünïcode\u0301", "  blanks  ", "new\nline\r", "\x1b[31m", 'com,ma;"quote']


@pytest.mark.parametrize("folder", ODD_FOLDERS)
def test_a_folder_may_have_any_name(tmp_path: Path, folder: str) -> None:
    make(tmp_path, labels=folder, audio=f"audio/{folder}")
    (tmp_path / "audio" / folder / "2.mp3").rename(tmp_path / "audio" / folder / "00002.MP3")
    write(tmp_path / folder / "10.wav", "another")
    write(tmp_path / folder / "12.ogg", "no label")
    write(tmp_path / folder / "static_annots.csv", HEADER + "3,0,1,5,1\n2001,5,1,5,1\n")
    write(tmp_path / folder / "static_annots_empty.csv")
    dataset = find_dataset(tmp_path)
    assert [song.song_id for song in dataset.songs] == [2]
    assert (tmp_path / dataset.songs[0].audio).name == "00002.MP3"
    assert [(fault.kind, fault.song_id) for fault in dataset.faults] == [
        ("label", 3),
        ("contradicting labels", 2001),
        ("label file", None),
        ("two audio files", 10),
        ("label without audio", 3),
        ("audio without label", 12),
    ]
    for fault in dataset.faults:
        assert str(fault).isprintable()
        assert str(fault).encode().decode() == str(fault)


# Groups


def groups_of(root: Path, **metadata: str | bytes) -> list[str]:
    make(root)
    for name, text in metadata.items():
        write(root / "metadata" / f"metadata_{name}.csv", text)
    return [song.group for song in songs_of(root)]


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


def test_the_group_column_overrides_the_artist(tmp_path: Path) -> None:
    assert groups_of(
        tmp_path, a="song_id,artist\n2,X\n10,Y\n2001,Z\n", b="song_id,group,title\n2,Game,t\n10,Game,u\n2001,n/a,v\n"
    ) == ["game", "game", "z"]


def test_songs_without_a_name_are_groups_of_their_own(tmp_path: Path) -> None:
    assert groups_of(tmp_path, a="song_id,artist\n2,N/A\n10,\t\n") == ["song:2", "song:10", "song:2001"]


def test_spellings_of_one_name_are_one_group(tmp_path: Path) -> None:
    names = "song_id,artist\n2,Vieux Farka Touré\n10,VIEUX\u00a0FARKA  TOURE\u0301\n2001,Vieux Farka Touré\t\n"
    assert groups_of(tmp_path, a=names) == ["vieux farka touré"] * 3


def test_metadata_in_latin_1_is_read(tmp_path: Path) -> None:
    assert groups_of(tmp_path, a="song_id,artist\n2,Touré\n".encode("latin-1"))[0] == "touré"


def test_contradicting_names_of_one_song_are_refused_with_both_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"song 2: artist is 'a' in .*metadata_a.csv, line 2, but 'b' in .*_b.csv, line 3"):
        groups_of(tmp_path, a="song_id,artist\n2,A\n", b="song_id,artist\n10,A\n2,B\n")


def test_metadata_without_known_columns_is_refused_with_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metadata_a.csv: expected .* found 'song_id', 'title'\."):
        groups_of(tmp_path, a="song_id,title,,\n2,A,,\n")


def test_metadata_rows_without_an_id_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="emotion.data.deam"):
        assert groups_of(tmp_path, a="song_id,artist\nsource: x,A\n,\n2,B\n")[0] == "b"
    assert "no song id in lines 2, left out" in caplog.text


def test_missing_metadata_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="emotion.data.deam"):
        find_dataset(make(tmp_path))
    assert "no metadata*.csv" in caplog.text


@pytest.mark.parametrize("line", ['"sep=;"\r\n', '"SEP=;"\n'])
def test_a_separator_line_in_quotes_is_read_as_one_without(tmp_path: Path, line: str) -> None:
    row = "7;5;1;4,5;1\n"
    table = write(tmp_path / "static_annotations_averaged.csv", line + ";".join(DEAM.columns) + "\n" + row)
    labels, faults = read_labels(table, table.name)
    assert not faults
    assert [(label.song_id, label.valence, label.arousal) for label in labels] == [(7, 5.0, 4.5)]
