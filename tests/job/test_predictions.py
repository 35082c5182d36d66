"""What `predict` writes, without a model."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from emotion.errors import SpecError, StorageError
from emotion.vit.curve import Curve
from emotion.vit.predict import Prediction
from job.results.predictions import HEADER, check_curve_name, curve_writer, row_of

CURVE = Curve(np.array([1.5, 2.0]), np.array([[0.25, -1 / 3], [0.5, 1]], np.float32))
ODD_NAME = os.fsdecode(b'a, "b"\n\xff.wav')


def test_a_row_has_the_ends_of_both_intervals_under_their_names() -> None:
    prediction = Prediction(0.25, -0.5, (), ((-0.125, 0.625), (-1.0, 0.0)))
    row = dict(zip(HEADER.split("\t"), row_of("a.wav", prediction, as_json=False).split("\t"), strict=True))
    assert (row["valence"], row["valence_1_9"], row["file"]) == ("+0.250", "6.00", "a.wav")
    assert [row[f"{axis}_{end}"] for axis in ("valence", "arousal") for end in ("lower", "upper")] == [
        *("-0.125", "+0.625"),
        *("-1.000", "+0.000"),
    ]
    said = json.loads(row_of("a.wav", prediction, as_json=True))
    assert [said["valence_lower"], said["valence_upper"], said["arousal_lower"], said["arousal_upper"]] == [-0.125, 0.625, -1, 0]


def test_a_model_without_intervals_leaves_their_places_empty() -> None:
    prediction = Prediction(0.25, -0.5)
    assert row_of("a.wav", prediction, as_json=False).split("\t")[4:] == ["", "", "", "", "a.wav"]
    said = json.loads(row_of("a.wav", prediction, as_json=True))
    assert said["valence_lower"] is said["arousal_upper"] is None


def test_a_csv_of_curves_has_a_row_per_song_and_time(tmp_path: Path) -> None:
    add = curve_writer(tmp_path / "c.CSV", 1.984)
    add("a.wav", CURVE)
    add(ODD_NAME, CURVE)
    rows = list(csv.reader((tmp_path / "c.CSV").read_text(encoding="utf-8").splitlines(keepends=True)))
    assert rows[:3] == [
        ["file", "seconds", "valence", "arousal"],
        ["a.wav", "1.5", "0.25", "-0.3333"],
        ["a.wav", "2.0", "0.5", "1.0"],
    ]
    assert rows[3] == ['a, "b"\n\\udcff.wav', "1.5", "0.25", "-0.3333"]


def test_json_lines_of_curves_have_one_object_per_song_with_its_window(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text("of an earlier call\n")
    add = curve_writer(tmp_path / "c.jsonl", 1.984)
    add("a.wav", CURVE)
    add(ODD_NAME, CURVE)
    first, second = map(json.loads, (tmp_path / "c.jsonl").read_text(encoding="utf-8").splitlines())
    points = {"seconds": [1.5, 2.0], "valence": [0.25, 0.5], "arousal": [-0.3333, 1.0]}
    assert first == {"file": "a.wav", "window_seconds": 1.984, "step_seconds": 0.5, **points}
    assert second == first | {"file": 'a, "b"\n\\udcff.wav'}


def test_a_curve_writer_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for name in ("c.txt", "song.mp3", "csv"):
        with pytest.raises(SpecError, match=r"has to end in \.csv or \.jsonl"):
            check_curve_name(tmp_path / name)
    check_curve_name(None)
    with pytest.raises(StorageError, match=r"cannot write .*c\.csv: No such file"):
        curve_writer(tmp_path / "no" / "c.csv", 1.0)
    full = curve_writer(Path("/dev/full"), 1.0)  # its name says JSON Lines, which have no header
    with pytest.raises(StorageError, match="No space left"):
        full("a.wav", CURVE)
