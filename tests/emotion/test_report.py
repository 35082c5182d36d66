import base64
import io
import json
import re
import wave
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile

from emotion.data.faults import Fault, write_faults
from emotion.report.attempts import attempt_rows, goodput, goodput_text
from emotion.report.charts import Line, line_chart, plane_chart, scatter_chart
from emotion.report.curves import gan_charts, vit_charts
from emotion.report.errors import group_rows, quadrant_rows, worst_songs
from emotion.report.run_report import Facts, write_report
from emotion.training.progress import WITH, WITHOUT

VOID = {"meta", "img", "br", "link", "hr", "input", "path", "circle"}


class Page(HTMLParser):
    """Elements, text and table cells of a page; an element closed in the wrong order is an error."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data

    def row(self, head: str) -> list[str]:
        """The cells after the first, of the first row whose first cell is `head`."""
        return next(row[1:] for row in self.rows if row[0] == head)

    def sources(self, tag: str) -> list[str]:
        return [attributes["src"] or "" for name, attributes in self.elements if name == tag]


def write_wav(path: Path, rate: int, seconds: float, hertz: float = 440) -> None:
    samples = 0.3 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def scores(valence: float, arousal: float) -> dict[str, Any]:
    row: dict[str, Any] = {"pearson": None, "pearson_ci": None}
    for name in ("mae", "rmse", "r2"):
        row |= {name: 0.25, f"{name}_ci": [0.2, 0.3]}
    found = {"valence": valence, "arousal": arousal}
    return {axis: {**row, "ccc": ccc, "ccc_ci": [ccc - 0.1, ccc + 0.1]} for axis, ccc in found.items()}


def covered(*half_widths: float | None) -> dict[str, Any]:
    row = {"coverage": 0.875, "coverage_ci": [0.732, 0.958], "mean_width": 0.48, "held_out_songs": 50}
    return {axis: {**row, "half_width": width} for axis, width in zip(("valence", "arousal"), half_widths, strict=True)}


def listeners(single: float, worth: float | None) -> dict[str, Any]:
    found = {"value": worth, "ci": [1.25, None]}
    return {
        "single_listener_ccc": single,
        "all_listeners_ccc": 0.9,
        "listener_equivalents": {"stack": found, "model": {"value": 0.0, "ci": None}},
    }


PNG = b"\x89PNG of a spectrogram"
GAN = [{"step": step, "d_loss": 0.7, "g_loss": (6 + step) / 10, "d_accuracy": 0.5} for step in (1, 2)]
VIT = [
    {"step": 1, "loss": 1.5, "learning_rate": 0.1},
    {"step": 2, "loss": 1.4, "epoch": 1, "validation_ccc_valence": 0.3, "validation_ccc_arousal": 0.5},
]


def published(run: Path, drawn: bool = False) -> Path:
    """The files of a published run that the report reads; drawn: with the data of its figures, which takes a second.

    Forty songs. Predicted valence is nearly the true one, arousal its opposite; ridge predicts half of either.
    """
    (run / "logs").mkdir(parents=True)
    (run / "model").mkdir()
    (run / "samples").mkdir()
    spec = "name: a-run\nseed: 3\nevaluate:\n  bootstrap_samples: 200\n"
    (run / "spec.yaml").write_text(spec, encoding="utf-8")
    write(
        run / "metrics.json",
        {
            "scale": "labels on -1..1",
            "stack": scores(0.7, -0.9),
            "model": scores(0.65, -0.8),
            "baselines": {"constant": scores(0.0, 0.0), "ridge": scores(0.61, 0.5)},
            "ceiling": {"valence": {"ccc": 0.921}, "arousal": {"ccc": 0.934}},
            "intervals": {"level": 0.9, "stack": covered(0.25, 0.3), "model": covered(0.5, None)},
            "listeners": {"valence": listeners(0.45, 2.0), "arousal": listeners(0.35, None)},
            "songs": {"train": 100, "validation": 20, "test": 40},
        },
    )
    write(
        run / "quality.json",
        {
            "space": "4 principal components",
            "frechet": {
                "synthetic_to_validation": {"value": 13.5, "ci": [10.5, 16.5]},
                "training_to_validation": {"value": 4.25, "ci": [3.0, 5.5]},
                "difference": {"value": 9.25, "ci": [6.0, 12.5]},
            },
            "kernel": None,
            "copy_rate": {
                "synthetic": {"value": 0.25, "ci": [0.2, 0.3]},
                "validation": {"value": 0.02, "ci": [0.0, 0.1]},
                "training": {"value": 0.98, "ci": [0.9, 1.0]},
            },
            "diversity": {"value": 0.75, "ci": [0.5, 1.0]},
            "label_read_back": {"by": "ridge", "synthetic": scores(0.3, 0.2), "validation": scores(0.65, 0.6)},
            "notebook_score": {"overall": 55.06, "fd_score": 0.0, "freq_score": 91.0, "smooth_score": 60.0},
        },
    )
    account = {"predicted": {"peak": 3 << 20, "process": 500 << 20}, "measured": {"peak": 4 << 20}}
    write(run / "memory.json", {"gan": {"seconds": 35.53, "peak_process_bytes": 512 * 2**20, "memory": account}})
    write(run / "model" / "training.json", {"best_epoch": 1, "validation_ccc": 0.4, "steps_per_epoch": 2})
    write_wav(run / "samples" / "00_valence+0.50_arousal-0.50.wav", 22050, 1)
    (run / "samples" / "00_valence+0.50_arousal-0.50.png").write_bytes(PNG)
    if drawn:
        write_songs(run)
        write_log(run, time=1700000000.125)
    return run


def write_songs(run: Path) -> None:
    random = np.random.default_rng(0)
    true = random.uniform(-0.8, 0.8, (40, 2))
    half = true / 2 + random.normal(0, 0.2, (40, 2))
    rows = [f"{song},0,{v},0.0,{a},0.0,{v + 0.01},{-a}\n" for song, (v, a) in enumerate(true.tolist())]
    header = "song_id,fold,valence_true,valence_pred,arousal_true,arousal_pred,valence_stack,arousal_stack\n"
    (run / "predictions.csv").write_text(header + "".join(rows), encoding="utf-8")
    rows = [f"ridge,{song},{v},{a}\n" for song, (v, a) in enumerate(half.tolist())]
    (run / "baselines.csv").write_text("baseline,song_id,valence_pred,arousal_pred\n" + "".join(rows), encoding="utf-8")


def write_log(run: Path, time: float) -> None:
    records = [{"time": time, "phase": "gan", **record} for record in GAN]
    records += [{"time": time, "phase": "vit", **record} for record in VIT]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run / "logs" / "metrics.jsonl").write_text(text, encoding="utf-8")


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def page_of(run: Path, name: str = "a-run-0123456789ab") -> Page:
    write_report(run, name)
    return Page((run / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run, read only."""
    return published(tmp_path_factory.mktemp("published") / "run", drawn=True)


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return page_of(run)


def decoded(uri: str) -> bytes:
    return base64.b64decode(uri.partition(";base64,")[2], validate=True)


def test_the_page_contains_everything_and_loads_nothing_from_the_network(page: Page, run: Path) -> None:
    tags = [tag for tag, _ in page.elements]
    assert not set(tags) & {"link", "iframe", "object", "embed"}
    assert tags.count("script") == 1
    named = [value or "" for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "href")]
    inside = [value for value in named if value.startswith("#")]
    assert all(value.startswith("data:") for value in named if value not in inside)
    assert len(named) - len(inside) == 2  # sound and picture of the sample
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert {value.removeprefix("#") for value in inside} <= ids
    assert "http" not in page.text
    assert "url(" not in (run / "report.html").read_text(encoding="utf-8")
    assert all(decoded(picture).startswith(b"\x89PNG") for picture in page.sources("img"))


def test_the_headline_has_stack_model_best_baseline_difference_and_ceiling(page: Page) -> None:
    valence, arousal = page.row("valence"), page.row("arousal")
    assert valence[:3] == ["0.700 [0.600, 0.800]", "0.650 [0.550, 0.750]", "ridge 0.610 [0.510, 0.710]"]
    assert (valence[4], valence[5]) == ("better than the best baseline", "0.921")
    assert (arousal[4], arousal[5]) == ("worse than the best baseline", "0.934")
    assert re.fullmatch(r"0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]", valence[3])
    assert re.fullmatch(r"-\d\.\d{3} \[-\d\.\d{3}, -\d\.\d{3}\]", arousal[3])


def test_the_model_and_every_baseline_have_every_metric_with_its_interval(page: Page) -> None:
    assert page.row("constant")[:2] == ["0.000 [-0.100, 0.100]", "0.250 [0.200, 0.300]"]
    assert page.row("ridge")[0] == "0.610 [0.510, 0.710]"
    assert [row[0] for row in page.rows].count("stack") == [row[0] for row in page.rows].count("ViT alone") == 2
    assert "100 for training, 20 for validation, 40 for test. Scale: labels on -1..1." in page.text


def test_every_quality_measure_is_shown_with_its_anchor(page: Page) -> None:
    assert page.row("Fréchet distance to validation songs")[:2] == ["13.500 [10.500, 16.500]", "4.250 [3.000, 5.500]"]
    assert page.row("Fréchet distance: synthetic minus anchor")[:2] == ["9.250 [6.000, 12.500]", "0"]
    assert page.row("kernel distance (squared MMD) to validation songs")[:2] == ["not measured", "not measured"]
    assert page.row("share that copy a training song")[:2] == [
        "0.250 [0.200, 0.300]",
        "0.020 [0.000, 0.100]; 0.980 [0.900, 1.000]",
    ]
    assert page.row("diversity")[:2] == ["0.750 [0.500, 1.000]", "1"]
    assert page.row("CCC of valence read back")[:2] == ["0.300 [0.200, 0.400]", "0.650 [0.550, 0.750]"]
    assert page.row("notebook's score, overall")[:2] == ["55.1", "100"]


def test_the_page_says_which_weights_the_vit_has(tmp_path: Path, page: Page) -> None:
    assert "It has the weights of the epoch with the highest CCC" in page.text
    run = published(tmp_path / "run")
    write(run / "model" / "training.json", {"best_epoch": 0, "steps_per_epoch": 2, "is_linear_probe": True})
    text = page_of(run).text
    assert "only its last layer was fitted, to the training songs." in text
    assert "No epoch of fine-tuning" not in text
    assert "the epoch with the highest CCC" not in text
    write_log(run, time=1700000000.125)
    assert "to the training songs. No epoch of fine-tuning had a higher CCC on validation songs." in page_of(run).text


def test_a_final_model_is_called_one_and_its_scores_those_of_its_folds(tmp_path: Path) -> None:
    assert "final model" not in page_of(published(tmp_path / "other")).text
    run = published(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    write(run / "metrics.json", metrics | {"out_of_fold": {"runs": ["a", "b", "c"], "stop_epoch": 7}})
    quality = json.loads((run / "quality.json").read_text())
    write(run / "quality.json", quality | {"validation_songs_are": "a part of the training songs"})
    text = page_of(run).text
    assert "a final model, trained on all songs, so that none is left to test it" in text
    assert "3 runs with the same settings" in text
    assert "up to epoch 7" in text
    assert "neither for training nor for any choice" not in text
    assert "the epoch with the highest CCC" not in text
    assert "validation songs of this table are a part of the training songs" in text


def test_time_and_memory_of_each_phase_are_shown(page: Page) -> None:
    assert page.row("gan") == ["35.5", "512 MiB", "not measured"]


def test_predicted_and_measured_memory_are_shown(page: Page) -> None:
    assert page.row("peak") == ["3 MiB", "4 MiB"]
    assert page.row("process") == ["500 MiB", "512 MiB"]


def test_an_empty_run_gives_a_page_of_not_measured(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert page.sources("img") == page.sources("audio") == []
    assert page.row("valence") == ["not measured"] * 6
    assert page.row("stack") == ["not measured"] * 5
    assert page.row("Fréchet distance to validation songs")[:2] == ["not measured"] * 2


def test_warnings_and_left_out_songs_are_shown(tmp_path: Path) -> None:
    run = published(tmp_path / "run")
    warning = {"phase": "gan", "step": 12, "warning": "collapsed", "text": "raise <gan.latent>"}
    (run / "logs" / "metrics.jsonl").write_text(json.dumps(warning) + "\n", encoding="utf-8")
    faults = [Fault("label", 7, "a.csv, line 3", "valence_mean is 'nan'"), Fault("label file", None, "b.csv", "empty")]
    write_faults(run / "left_out.csv", faults)
    page = page_of(run)
    assert "gan, step 12: raise <gan.latent>" in page.text
    assert page.row("7") == ["label", "a.csv, line 3", "valence_mean is 'nan'"]
    assert ["", "label file", "b.csv", "empty"] in page.rows


def test_intervals_and_listeners_are_shown(page: Page) -> None:
    assert page.row("stack, valence") == ["± 0.250", "50", "0.875 [0.732, 0.958]", "0.480"]
    assert page.row("ViT alone, arousal")[0] == "whole range: too few songs"
    assert "in 90 % of the cases" in " ".join(page.text.split())
    of_listeners = [row[1:] for row in page.rows if row[0] in ("valence", "arousal")][2:]
    assert of_listeners == [["0.450", "2.0 [1.2, ∞]", "0.0", "0.900"], ["0.350", "∞ [1.2, ∞]", "0.0", "0.900"]]


def test_scores_over_time_are_shown_where_there_are_any(tmp_path: Path, page: Page) -> None:
    assert "Over time" not in page.text
    run = published(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    row = {
        "ccc": 0.3,
        "ccc_ci": [0.1, 0.5],
        "rmse": 0.25,
        "rmse_ci": None,
        "song_ccc": None,
        "song_ccc_ci": None,
        "song_rmse": 0.2,
    }
    both = {"valence": row, "arousal": {**row, "ccc": 0.4}}
    write(run / "metrics.json", {**metrics, "dynamic": {"curve": both, "flat": both}})
    found = page_of(run)
    assert found.row("curve, arousal") == ["0.400 [0.100, 0.500]", "0.250", "not measured", "0.200"]
    assert found.row("one number per song, valence")[0] == "0.300 [0.100, 0.500]"


def test_the_page_says_why_there_is_no_ceiling(tmp_path: Path) -> None:
    run = published(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    del metrics["listeners"]
    write(run / "metrics.json", {**metrics, "ceiling": None, "no_ceiling": "none: no deviations"})
    assert page_of(run).text.count("none: no deviations") == 3
    assert [row[-1] for row in page_of(run).rows if row[0] in ("valence", "arousal")][:2] == ["none: no deviations"] * 2


@pytest.mark.parametrize("name", ["metrics.json", "quality.json", "memory.json", "model/training.json"])
def test_nulls_are_shown_as_not_measured(tmp_path: Path, name: str) -> None:
    run = published(tmp_path / "run")

    def hollow(value: Any) -> Any:
        return {key: hollow(inner) for key, inner in value.items()} if isinstance(value, dict) else None

    write(run / name, hollow(json.loads((run / name).read_text(encoding="utf-8"))))
    assert "not measured" in page_of(run).text
    write(run / name, None)
    assert "not measured" in page_of(run).text


def test_a_single_test_song_gives_a_page_without_intervals(tmp_path: Path) -> None:
    run = published(tmp_path / "run")
    write_songs(run)
    for name in ("predictions.csv", "baselines.csv"):
        lines = (run / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (run / name).write_text("".join(lines[:2]), encoding="utf-8")
    assert page_of(run).row("valence")[3:5] == ["not measured", "not measured"]


def test_markup_in_names_and_spec_is_escaped(tmp_path: Path) -> None:
    run = published(tmp_path / "run")
    evil = '<script>alert("x")</script>'
    with (run / "spec.yaml").open("a", encoding="utf-8") as file:
        file.write(f"# </pre>{evil}\n")
    (run / "samples" / "01_<b>.png").write_bytes(b"\x89PNG")
    page = page_of(run, name=f"a{evil}&amp;")
    assert [tag for tag, _ in page.elements if tag in ("script", "b")] == ["script"]  # our own
    assert page.text.count(evil) == 3
    assert f"a{evil}&amp;" in page.text
    assert "01 <b>" in page.text


def test_the_page_does_not_depend_on_the_time_of_the_run(tmp_path: Path, run: Path, page: Page) -> None:
    later = published(tmp_path / "later", drawn=True)
    write_log(later, time=1800000000.875)
    page_of(later)
    assert (later / "report.html").read_bytes() == (run / "report.html").read_bytes()


@pytest.mark.parametrize("rate", [22050, 20000])
def test_the_embedded_sample_sounds_like_its_wav(tmp_path: Path, rate: int) -> None:
    run = published(tmp_path / "run")
    (run / "samples" / "00_valence+0.50_arousal-0.50.wav").unlink()
    write_wav(run / "samples" / "00.wav", rate, 2, hertz=1000)
    (source,) = page_of(run).sources("audio")
    sound, found_rate = soundfile.read(io.BytesIO(decoded(source)))
    assert found_rate == rate
    assert len(sound) / rate == pytest.approx(2, abs=0.1)
    assert np.abs(np.fft.rfft(sound)).argmax() * rate / len(sound) == pytest.approx(1000, abs=1)


def test_the_page_stays_below_5_mb_and_links_samples_that_do_not_fit(tmp_path: Path) -> None:
    run = published(tmp_path / "run")
    for number in (1, 2):
        write_wav(run / "samples" / f"0{number}_valence+0.10_arousal+0.10.wav", 20000, 45)
    page = page_of(run)
    assert (run / "report.html").stat().st_size < 5_000_000
    first, second = page.sources("audio")
    assert first.startswith("data:audio/mpeg;")
    assert second.startswith("data:audio/wav;")
    (link,) = [value for tag, attributes in page.elements if tag == "a" and (value := attributes["href"]) and value[0] != "#"]
    assert (run / unquote(link)).is_file()


def points(chart: str, style: str) -> list[list[float]]:
    """The points of the path with this class, on the chart: x to the right, y downwards."""
    commands = re.findall(rf'class="{style}" d="([^"]*)"', chart)[0]  # the legend comes after it
    return [[float(x), float(y)] for x, y in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", commands)]


def test_the_scatter_chart_has_labels_to_the_right_and_predictions_upwards() -> None:
    chart = scatter_chart("valence", np.array([-0.5, 0.5]), np.array([0.25, -0.25]), "a")
    (x, y), (u, v) = points(chart, "dots a")
    assert (x < u, y < v) == (True, True)
    (left, bottom), (right, top) = points(chart, "level")
    assert (left < x, bottom > y, right > u, top < v) == (True, True, True, True)
    # On the diagonal label and prediction are equal, so half of the way up is half of the way to the right.
    assert (y - bottom) / (top - bottom) == pytest.approx((0.25 + 1.05) / 2.1, abs=0.01)


def test_songs_on_the_plane_have_their_names_and_only_the_first_is_a_tab_stop() -> None:
    actual, predicted = np.array([[0.3, -0.4], [-0.1, 0.2]]), np.array([[1.5, -0.6], [0.7, 0.8]])
    page = Page(str(plane_chart("plane", ["b.mp3", 7], actual, predicted, {7: "<Ann>"})))
    songs = [attributes for tag, attributes in page.elements if tag == "g"]
    assert [song["tabindex"] for song in songs] == ["0", "-1"]  # in the order of valence: song 7 first
    assert page.text.index("7, <Ann>: label -0.10, +0.20; predicted +0.70, +0.80") < page.text.index("b.mp3: label")
    at = [(float(str(a["cx"])), float(str(a["cy"]))) for tag, a in page.elements if tag == "circle" and "cx" in a][:4]
    (label_x, label_y), (own_x, own_y), _, (outside_x, _) = at
    assert own_x > label_x  # more pleasant
    assert own_y < label_y  # more excited
    assert outside_x < 360  # a prediction outside of the scale is on the chart


def test_the_curves_show_the_records_of_the_log() -> None:
    damaged = {"step": 9, "d_loss": 1.0}  # its other numbers have damaged names
    charts = gan_charts([{"phase": "gan", **record} for record in [*GAN, damaged]])
    assert "discriminator: from 0.700 to 0.700" in charts["gan loss"]
    assert "generator: from 0.700 to 0.800" in charts["gan loss"]
    assert "ranked correctly: from 0.500 to 0.500" in charts["gan accuracy"]
    (_, chance), (_, found), *_ = points(charts["gan accuracy"], "level") + points(charts["gan accuracy"], "line c")
    assert chance == found
    charts = vit_charts([{"phase": "vit", **record} for record in VIT], {"best_epoch": 1})
    assert "training loss: from 1.500 to 1.400" in charts["vit loss"]
    assert "valence: from 0.300 to 0.300" in charts["vit ccc"]
    assert "published: epoch 1" in charts["vit ccc"]


def test_a_line_goes_up_where_its_values_do_and_its_legend_names_it() -> None:
    chart = line_chart("<title>", [Line("<loss>", [0, 10], [1.0, 3.0], "a")], x="step", y="loss")
    (x, y), (u, v) = points(chart, "line a")
    assert x < u
    assert y > v  # downwards on the screen is less
    assert "&lt;loss&gt;</li>" in chart
    assert "<title>" not in chart


def test_errors_of_a_quadrant_are_those_of_its_songs() -> None:
    # Two songs in one quadrant, one in another, on the border of two one more: zero counts as pleasant and excited.
    actual = np.array([[0.5, 0.5], [0.5, 0.1], [-0.5, -0.5], [0.0, 0.0]])
    predicted = actual + np.array([[-0.2, 0.1], [0.0, 0.3], [0.4, 0.0], [-0.1, 0.2]])
    rows = {row[0]: row[1:] for row in quadrant_rows([*"abcd"], actual, predicted, bootstrap_samples=0, seed=0)}
    assert rows["pleasant, excited"] == ["3", "0.10", "0.20", "-0.10", "+0.20"]
    assert rows["unpleasant, calm"] == ["1", "0.40", "0.00", "+0.40", "0.00"]
    assert rows["unpleasant, excited"] == ["0", "", "", "", ""]
    assert worst_songs(actual, predicted, 2) == [2, 1]


def test_groups_are_in_the_order_of_their_mean_error_and_single_songs_are_none() -> None:
    actual = np.zeros((7, 2))
    predicted = np.array([[0.1, 0], [0.3, 0], [0.5, 0], [0.5, 0], [0.9, 0], [0.2, 0], [0.8, 0]])
    rows, number = group_rows(["a", "a", "b", "b", "c", "", ""], actual, predicted, groups=None, bootstrap_samples=0, seed=0)
    assert [row[:3] for row in rows] == [["b", "2", "0.50"], ["a", "2", "0.20"]]
    assert number == 2


def test_the_intervals_of_a_genre_are_over_its_artists() -> None:
    # Three artists with an error of their own each: a mean of one error alone has a chance of 1/27 > 2.5 %.
    errors = np.repeat([0.1, 0.2, 0.6], 4)
    predicted = np.stack([errors, errors], axis=1)
    artists = np.repeat([*"abc"], 4).tolist()
    ((row,), _) = group_rows(["rock"] * 12, np.zeros((12, 2)), predicted, groups=artists, bootstrap_samples=2000, seed=0)
    assert row[2] == "0.30 [0.10, 0.60]"


def attempt(began: str, seconds: float | None, reason: str, **more: Any) -> dict[str, Any]:
    return {"began": f"2026-11-27T{began}+00:00", "duration_seconds": seconds, "reason": reason, "host": "node1", **more}


def test_what_interruptions_cost_is_added_up() -> None:
    attempts = [
        attempt("10:00:00", 100.0, "killed", lost_seconds=20.0),
        attempt("10:05:00", 60.0, "Interrupted", lost_seconds=0.5, message="gan: stopped"),
        attempt("10:06:30", 240.0, "publishing"),
    ]
    assert goodput(attempts) == (400.0, pytest.approx(1 - 20.5 / 400))
    text = goodput_text(attempts)
    assert "3 attempts of 6 min 40 s in all, of which 20.5 s were lost" in text
    assert "a goodput of 94.9 %" in text
    first, second, last = attempt_rows(attempts)
    assert first == ["1", "2026-11-27 10:00:00", "node1", "100.0 s", "killed", "20.0 s", "3 min 20 s"]
    assert second[4:] == ["asked to stop: gan: stopped", "0.5 s", "30.0 s"]
    assert last[4:] == ["published this run", "", ""]
    # On another machine it is not known what was lost: then no share is invented.
    attempts[0] |= {"lost_seconds": None, "duration_seconds": None}
    assert goodput(attempts) == (300.0, None)
    assert attempt_rows(attempts)[0][3:] == ["not measured", "killed", "not measured", "not measured"]


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2.2 of two colours, #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dark + 0.05)


def test_colours_of_both_themes_have_enough_contrast(run: Path, page: Page) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    style = (run / "report.html").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6});", block)) for block in re.findall(r":root \{([^}]*)\}", style))
    assert light.keys() == dark.keys()
    for theme in (light, dark):
        behind = theme["page"], theme["panel"]
        assert min(contrast(theme[name], back) for name in ("text", "muted", "link") for back in behind) >= 4.5
        # Lines and points of charts, the ring around what has the focus.
        assert min(contrast(theme[name], theme["page"]) for name in ("a", "b", "c", "d", "muted", "focus")) >= 3


def test_the_verdict_is_one_sentence_with_intervals_baselines_and_ceiling(page: Page) -> None:
    assert (
        "On 40 test songs, the stack predicts valence with a CCC of 0.70 [0.60, 0.80], better than the best baseline "
        "(ridge, 0.61 [0.51, 0.71]), where the labels allow 0.92 at most; and arousal with a CCC of -0.90 [-1.00, -0.80], worse "
        "than the best baseline (ridge, 0.50 [0.40, 0.60]), where the labels allow 0.93 at most."
    ) in page.text


def test_songs_can_be_heard_only_where_an_excerpt_is_given(tmp_path: Path, page: Page) -> None:
    assert len(page.sources("audio")) == 1  # the sample
    assert "Songs cannot be heard here" in page.text
    run = published(tmp_path / "run", drawn=True)
    asked = []

    def excerpt(song: int | str) -> bytes | None:
        asked.append(song)
        return b"ID3 of a song" if len(asked) < 3 else None

    facts = Facts(genres={song: "rock" if song < 20 else "folk" for song in range(40)}, excerpt=excerpt)
    write_report(run, "a-run", facts)
    found = Page((run / "report.html").read_text(encoding="utf-8"))
    assert len(asked) == 8
    sounds = [attributes for tag, attributes in found.elements if tag == "audio"]
    assert [sound["aria-label"] for sound in sounds[:2]] == [f"excerpt of song {song}" for song in asked[:2]]
    assert decoded(str(sounds[0]["src"])) == b"ID3 of a song"
    assert len(sounds) == 3
    assert "Songs cannot be heard here" not in found.text
    assert {row[0] for row in found.rows if row[0] in ("rock", "folk")} == {"rock", "folk"}


def test_of_two_trainings_the_published_one_is_drawn_beside_the_other_and_the_choice_is_told(tmp_path: Path) -> None:
    run = published(tmp_path / "run")
    why = "left out: CCC of 20 validation songs 0.300 with them, 0.400 without"
    write(
        run / "model" / "training.json",
        {"best_epoch": 1, "synthetic_per_batch": 0, "synthetic_clips": {"kept": False, "why": why}},
    )
    page = page_of(run)
    assert f"Synthetic clips were {why}." in page.text
    assert "trained on real clips alone" in page.text
    assert "Synthetic clips were" not in page_of(published(tmp_path / "other")).text

    def epoch(training: str, ccc: float) -> dict[str, Any]:
        both = {"validation_ccc_valence": ccc - 0.1, "validation_ccc_arousal": ccc + 0.1}
        return {"step": 9, "training_step": 2, "training": training, "epoch": 1, "validation_ccc": ccc, **both}

    records = [
        {"phase": "vit", "step": 8, "training_step": 1, "loss": 1.5, "training": WITH},
        epoch(WITH, 0.4),
        epoch(WITHOUT, 0.3),
    ]
    charts = vit_charts([{"phase": "vit", **record} for record in records], {"best_epoch": 1, "synthetic_clips": {"kept": True}})
    assert "mean of both: from 0.400" in charts["vit ccc"]
    assert f"not published, {WITHOUT}: mean of both: from 0.300" in charts["vit ccc"]
    assert "loss over step. training loss: from 1.500" in charts["vit loss"]
