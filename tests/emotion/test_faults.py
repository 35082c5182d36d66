"""All faults are reported and kept, and counted by song against the share that may be left out."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emotion.config import DataConfig
from emotion.data.faults import Fault, fail_or_leave_out, read_faults, write_faults
from emotion.errors import DataError, printable


def config(**values: Any) -> DataConfig:
    return DataConfig.model_validate({"source": "somewhere", **values})


def of_songs(*song_ids: int | None, kind: str = "label") -> list[Fault]:
    return [Fault(kind, song_id, f"labels.csv, line {song_id}", "is wrong") for song_id in song_ids]


def refusal(found: list[Fault], songs: int, table: Path, **values: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        fail_or_leave_out(found, songs, config(**values), table)
    return str(caught.value).splitlines()


# The table

# A carriage return is in no fault: `printable` leaves none in a place, and cells of a table have none.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"))
FAULTS = st.builds(Fault, TEXT, st.none() | st.integers(0, 10**9), TEXT, TEXT)


@settings(max_examples=60, deadline=None)
@given(faults=st.lists(FAULTS, max_size=5))
def test_a_written_table_reads_as_the_same_faults(tmp_path_factory: pytest.TempPathFactory, faults: list[Fault]) -> None:
    path = tmp_path_factory.mktemp("faults") / "faults.csv"
    write_faults(path, faults)
    assert read_faults(path) == faults
    assert path.read_text(encoding="utf-8").splitlines()[0] == "kind,song_id,place,what"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"kind,song_id,place\n",
        b"kind,song_id,place,what\nlabel,2,here\n",
        b'kind,song_id,place,what\nlabel,2,here,"wrong\n',
        b"kind,song_id,place,what\nlabel,2,caf\xe9,wrong\n",
        None,
    ],
)
def test_anything_but_a_table_of_faults_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "faults.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"faults\.csv: not a table of faults"):
        read_faults(path)


@settings(max_examples=60, deadline=None)
@given(name=st.binary(min_size=1).filter(lambda name: b"\0" not in name))
def test_any_path_a_disk_can_have_becomes_one_line_of_utf_8(tmp_path_factory: pytest.TempPathFactory, name: bytes) -> None:
    text = printable(Path(os.fsdecode(name)))
    assert text.isprintable()
    table = tmp_path_factory.mktemp("faults") / "faults.csv"
    fault = Fault("label", 2, text, "is wrong")
    write_faults(table, [fault])
    assert read_faults(table) == [fault]


def test_a_fault_says_what_is_wrong_with_which_song_where() -> None:
    assert str(Fault("label", 2, "a.csv, line 3", "is wrong")) == "label: song 2, a.csv, line 3: is wrong"
    assert str(Fault("label file", None, "a.csv", "is empty")) == "label file: a.csv: is empty"


# Fail or leave out


def test_without_faults_nothing_is_logged_and_the_table_of_an_earlier_attempt_is_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = tmp_path / "faults.csv"
    fail_or_leave_out([], 10, config(), table)
    assert not table.exists()
    write_faults(table, of_songs(1))
    fail_or_leave_out([], 10, config(faults="drop", drop_at_most=0.0), table)
    assert not table.exists()
    assert caplog.messages == []


def test_the_error_shows_the_first_faults_of_each_kind_and_the_table_has_all(tmp_path: Path) -> None:
    faults = [*of_songs(*range(100, 112)), *of_songs(None, kind="label file"), *of_songs(7, 100, kind="unfit audio")]
    table = tmp_path / "faults.csv"
    head, *lines, advice = refusal(faults, 40, table)
    assert head == f"data: 13 of 40 songs cannot be used as they are; 15 faults, all in {table}"
    assert lines == [
        *(f"  label: song {song_id}, labels.csv, line {song_id}: is wrong" for song_id in range(100, 110)),
        "  label: 2 more",
        "  label file: labels.csv, line None: is wrong",
        "  unfit audio: song 7, labels.csv, line 7: is wrong",
        "  unfit audio: song 100, labels.csv, line 100: is wrong",
    ]
    assert "data.faults to drop" in advice
    assert read_faults(table) == faults


def test_a_fault_of_no_song_fails_too(tmp_path: Path) -> None:
    head, *_ = refusal(of_songs(None), 40, tmp_path / "faults.csv")
    assert "0 of 40 songs" in head
    assert "1 fault, " in head


def test_leaving_out_few_songs_is_a_warning_and_the_table_has_all_faults(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faults = [*of_songs(1, 2, 2), *of_songs(2, 3, kind="unfit audio"), *of_songs(None, kind="label file")]
    table = tmp_path / "faults.csv"
    with caplog.at_level(logging.WARNING):
        fail_or_leave_out(faults, 60, config(faults="drop", drop_at_most=0.05), table)
    assert caplog.messages == [f"data: left out 3 of 60 songs (faults: label 3, unfit audio 2, label file 1), see {table}"]
    assert read_faults(table) == faults


@pytest.mark.parametrize(
    ("share", "songs", "allowed"),
    [(0.05, 60, 3), (0.05, 79, 3), (0.05, 80, 4), (0.29, 100, 29), (0.58, 50, 29), (1.0, 4, 4), (0.0, 9, 0)],
)
def test_one_song_more_than_the_allowed_share_is_an_error(tmp_path: Path, share: float, songs: int, allowed: int) -> None:
    table = tmp_path / "faults.csv"
    fail_or_leave_out(of_songs(*range(allowed)), songs, config(faults="drop", drop_at_most=share), table)
    if allowed < songs:
        head, *_, advice = refusal(of_songs(*range(allowed + 1)), songs, table, faults="drop", drop_at_most=share)
        assert f"{allowed + 1} of {songs} songs" in head
        assert f"data.drop_at_most {share:g} allows {allowed} songs to be left out" in advice
        assert len(read_faults(table)) == allowed + 1


def test_the_allowed_share_matters_only_if_songs_may_be_dropped(tmp_path: Path) -> None:
    assert refusal(of_songs(1), 100, tmp_path / "faults.csv", drop_at_most=1.0)
