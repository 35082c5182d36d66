"""What `predict` writes, without a model."""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from emotion.errors import SpecError, StorageError
from emotion.evaluation.plots import save_figure
from emotion.vit.curve import Curve
from emotion.vit.predict import Prediction
from job.results.curves import CurveFiles, check_curve_names, curve_writer
from job.results.predict_files import form_of
from job.results.predictions import Form, header_of, row_of

CURVE = Curve(np.array([1.5, 2.0]), np.array([[0.25, -1 / 3], [0.5, 1]], np.float32))
ODD_NAME = os.fsdecode(b'a, "b"\n\xff.wav')
SILENT = {"silent": "is silent, so to speak", "short": "lasts 1.00 s"}


def cells_of(file: str, prediction: Prediction, form: Form) -> dict[str, str]:
    """Column → cell of a row that a program reads."""
    text = f"{header_of(form)}\n{row_of(file, prediction, form)}\n"
    header, row = csv.reader(io.StringIO(text), delimiter="\t" if form == "tsv" else ",")
    return dict(zip(header, row, strict=True))


def test_a_row_has_its_values_under_their_names_in_all_forms() -> None:
    prediction = Prediction(0.25, -0.5, SILENT, ((-0.125, 0.625), (-1.0, -0.125)))
    cells = cells_of("a.wav", prediction, "tsv")
    assert cells == cells_of("a.wav", prediction, "csv") == cells_of("a.wav", prediction, "csv-bom")
    assert cells == {
        **{"valence": "+0.250", "arousal": "-0.500", "valence_1_9": "6.00", "arousal_1_9": "3.00"},
        **{"valence_lower": "-0.125", "valence_upper": "+0.625", "arousal_lower": "-1.000", "arousal_upper": "-0.125"},
        **{"quadrant": "4", "words": "calm, content", "one_quadrant": "no", "warnings": "silent, short", "file": "a.wav"},
    }
    assert json.loads(row_of("a.wav", prediction, "jsonl")) == {
        **{"file": "a.wav", "valence": 0.25, "arousal": -0.5, "valence_1_9": 6, "arousal_1_9": 3},
        **{"valence_lower": -0.125, "valence_upper": 0.625, "arousal_lower": -1, "arousal_upper": -0.125},
        **{"quadrant": 4, "words": ["calm", "content"], "one_quadrant": False},
        "warnings": [{"kind": "silent", "text": SILENT["silent"]}, {"kind": "short", "text": SILENT["short"]}],
    }
    words = row_of("a.wav", prediction, "table").split("  ")
    assert [word.strip() for word in words if word] == [
        *("+0.25 [-0.12, +0.62]", "-0.50 [-1.00, -0.12]", "calm, content ?", "a.wav", "(silent, short)")
    ]


def test_a_model_without_intervals_leaves_their_places_empty() -> None:
    prediction = Prediction(0.25, -0.5, {})
    cells = cells_of("a.wav", prediction, "tsv")
    assert {cells[name] for name in ("valence_lower", "arousal_upper", "one_quadrant", "warnings")} == {""}
    said = json.loads(row_of("a.wav", prediction, "jsonl"))
    assert said["valence_lower"] is said["arousal_upper"] is said["one_quadrant"] is None
    assert "calm, content" in row_of("a.wav", prediction, "table")
    assert "?" not in row_of("a.wav", prediction, "table")


def test_a_point_in_the_middle_has_no_quadrant() -> None:
    prediction = Prediction(0.05, -0.05, {})
    cells = cells_of("a.wav", prediction, "csv")
    assert (cells["quadrant"], cells["words"]) == ("", "neutral")
    assert json.loads(row_of("a.wav", prediction, "jsonl"))["quadrant"] is None


def test_a_name_of_several_lines_stays_on_one() -> None:
    for form in ("tsv", "csv", "jsonl", "table"):
        assert "\n" not in row_of(ODD_NAME, Prediction(0, 0, {}), form)  # type: ignore[arg-type]


def test_forms_exclude_each_other() -> None:
    assert form_of(as_json=False, as_csv=True, bom=True) == "csv-bom"
    assert form_of(as_json=False, as_csv=True, bom=False) == "csv"
    with pytest.raises(SpecError, match="--json and --csv exclude each other"):
        form_of(as_json=True, as_csv=True, bom=False)
    for as_json in (False, True):
        with pytest.raises(SpecError, match="--bom is for --csv only"):
            form_of(as_json=as_json, as_csv=False, bom=True)


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


def test_a_picture_of_curves_has_the_first_songs_and_any_name(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    from matplotlib.image import imread

    from emotion.evaluation.curve_plot import MOST_SONGS

    files = CurveFiles([tmp_path / "c.png", tmp_path / "c.csv"], 1.984)
    heights = []
    for number in range(MOST_SONGS + 2):
        files.add(["$x_{$.wav", ODD_NAME, "曲.wav"][number % 3], CURVE)
        if number in (0, 1, MOST_SONGS - 1, MOST_SONGS + 1):
            files.draw()
            heights.append(imread(tmp_path / "c.png").shape[0])
    assert heights[0] < heights[1] < heights[2] == heights[3]
    assert len((tmp_path / "c.csv").read_text().splitlines()) > 2 * MOST_SONGS, "tables have all"
    assert not list(recwarn)
    none = CurveFiles([tmp_path / "none.png"], 1.984)
    none.draw()  # no song could be decoded


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".png"])
def test_a_file_of_curves_may_be_replaced_and_no_other(tmp_path: Path, suffix: str) -> None:
    ours, others = tmp_path / f"c{suffix}", tmp_path / f"labels{suffix}"
    others.write_text('file,valence,arousal\na.wav,1,2\n{"file": "a.wav", "valence": 1}\n', encoding="utf-8")
    if suffix == ".jsonl":
        others.write_text(f"{row_of('a.wav', Prediction(0, 0, {}), 'jsonl')}\n", encoding="utf-8")
    if suffix == ".png":
        figure = Figure()
        figure.subplots()
        save_figure(others, figure)
    with pytest.raises(SpecError, match=rf"labels\{suffix} exists and holds no curves\. Name another file, or remove it"):
        check_curve_names([ours, others])
    files = CurveFiles([ours], 1.984)
    check_curve_names([ours])  # stopped before the first song
    files.add(os.fsdecode(b"\xff" * 4000), CURVE)
    files.draw()
    check_curve_names([ours])


def test_a_curve_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for name in ("c.txt", "song.mp3", "csv"):
        with pytest.raises(SpecError, match=r"has to end in \.csv, \.jsonl or \.png"):
            check_curve_names([tmp_path / "c.png", tmp_path / name])
    check_curve_names([])
    for name in ("c.csv", "c.png"):
        with pytest.raises(StorageError, match=r"cannot write .*c\....: No such file"):
            CurveFiles([tmp_path / "no" / name], 1.0)
    full = curve_writer(Path("/dev/full"), 1.0)  # its name says JSON Lines, which have no header
    with pytest.raises(StorageError, match="No space left"):
        full("a.wav", CURVE)
