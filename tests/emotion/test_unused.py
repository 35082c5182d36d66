"""What lies beside the songs is named, with the reason why it is not used."""

import os
from pathlib import Path

import pytest

from emotion.data import unused as reasons
from emotion.data.deam import dataset_files, find_dataset
from emotion.data.unused import Unused, reason
from emotion.errors import DataError

LABELS = "static_annotations_averaged.csv"
TABLE = "song_id,valence_mean,valence_std,arousal_mean,arousal_std\n2,3,1,4,1\n"


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("song_1.mp3", reasons.MISNAMED),
        ("1 (1).mp3", reasons.MISNAMED),
        ("1.mp3.mp3", reasons.MISNAMED),
        ("\uff11.mp3", reasons.MISNAMED),
        ("Intro.FLAC", reasons.MISNAMED),
        ("1.wma", reasons.UNREAD),
        ("a.AAC", reasons.UNREAD),
        ("1.mp3.part", reasons.UNFINISHED),
        ("1.mp3.crdownload", reasons.UNFINISHED),
        ("1", reasons.UNKNOWN),
        ("1.song", reasons.UNKNOWN),
        ("labels.csv", reasons.TABLES),
        ("static_annotations_songs_1_2000.csv", reasons.TABLES),
        ("Songs.csv", reasons.MISPLACED),
        ("SONGS.CSV", reasons.MISPLACED),
        ("songs.csv", reasons.MISPLACED),
        ("my songs.csv", reasons.TABLES),
        ("labels.xlsx", reasons.SPREADSHEETS),
        ("MEMD_audio.zip", reasons.ARCHIVES),
        ("._1.mp3", reasons.HIDDEN),
        (".DS_Store", reasons.HIDDEN),
        ("Thumbs.db", reasons.HIDDEN),
        ("README", reasons.OTHER),
        ("1.txt", reasons.OTHER),
    ],
)
def test_a_file_that_is_not_used_has_a_reason(name: str, why: str) -> None:
    assert reason(name) == why


def test_every_file_is_used_or_counted_and_what_may_be_a_song_comes_first(tmp_path: Path) -> None:
    write(tmp_path / LABELS, TABLE)
    for name in ("2.MP3", "a/b.mp3", "a/c.mp3", "a/d.mp3", "a/e\n.mp3", "f.txt", ".git/9.mp3", "._2.mp3"):
        write(tmp_path / "audio" / name)
    unused = Unused()
    assert [path.name for path in dataset_files(tmp_path, unused)] == ["2.MP3", LABELS]
    lines = list(unused.lines().values())
    assert lines[0] == f"not used: {reasons.MISNAMED} (4: audio/a/b.mp3, audio/a/c.mp3, audio/a/d.mp3, …)"
    assert unused.counts == {reasons.MISNAMED: 4, reasons.HIDDEN: 2, reasons.OTHER: 1}
    assert sorted(unused.examples[reasons.HIDDEN]) == ["audio/._2.mp3", "audio/.git/"]


def test_links_to_absent_content_are_named_with_the_way_to_get_it(tmp_path: Path) -> None:
    write(tmp_path / LABELS, TABLE)
    for number in range(2, 6):
        target = f".git/annex/objects/x/{number}/MD5E-s9--00.mp3"
        (tmp_path / f"{number}.mp3").symlink_to(target)
    (tmp_path / "6.mp3").symlink_to("/nowhere/6.mp3")
    (tmp_path / "more").symlink_to("/nowhere/more")
    with pytest.raises(DataError) as caught:
        find_dataset(tmp_path)
    said = str(caught.value)
    assert f"Not used: {reasons.ANNEX} (4: 2.mp3, 3.mp3, 4.mp3, …)." in said
    assert "git annex get" in said
    assert f"Not used: {reasons.DANGLING} (2: 6.mp3, more)." in said


def test_a_folder_that_is_linked_twice_and_a_pipe_are_named(tmp_path: Path) -> None:

    write(tmp_path / "audio" / "2.mp3")
    (tmp_path / "again").symlink_to("audio")
    os.mkfifo(tmp_path / "3.mp3")
    unused = Unused()
    assert len(dataset_files(tmp_path, unused)) == 1
    assert unused.counts == {reasons.REPEATED: 1, reasons.IRREGULAR: 1}


def test_files_with_names_that_are_no_ids_explain_why_there_is_no_audio(tmp_path: Path) -> None:
    write(tmp_path / LABELS, TABLE)
    write(tmp_path / "song_2.mp3")
    with pytest.raises(DataError, match=r"no audio .*\. Not used: audio files whose names are no song ids; rename .*song_2\.mp3"):
        find_dataset(tmp_path)


def test_a_spreadsheet_explains_why_there_are_no_labels(tmp_path: Path) -> None:
    write(tmp_path / "static_annotations_averaged.xlsx")
    write(tmp_path / "2.mp3")
    with pytest.raises(DataError, match=r"no label file .*\. Not used: spreadsheets; save labels and metadata as CSV"):
        find_dataset(tmp_path)


def test_a_table_of_another_name_explains_why_there_are_no_labels(tmp_path: Path) -> None:
    write(tmp_path / "labels.csv", TABLE)
    write(tmp_path / "2.mp3")
    with pytest.raises(DataError, match=r"no label file .*\. Not used: CSV tables of other names .* \(1: labels\.csv\)"):
        find_dataset(tmp_path)
