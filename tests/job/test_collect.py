import csv
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emotion.errors import DataError, SpecError, StorageError
from emotion.files import read_json, write_json
from job.results.collect import collect_runs
from job.spec.model import JobSpec
from tests.manifests import write_manifest

# Six songs in three folds. Predicted valence is true / 2 + 0.1.
TRUE = {11: (-0.5, 0.4), 12: (0.5, -0.2), 21: (-0.3, 0.1), 22: (0.3, 0.6), 31: (-0.1, -0.5), 32: (0.1, 0.3)}
PREDICTED = {11: (-0.15, 0.5), 12: (0.35, -0.1), 21: (-0.05, -0.2), 22: (0.25, 0.7), 31: (0.05, 0.1), 32: (0.15, 0.2)}
FOLDS = ((11, 12), (21, 22), (31, 32))


def published(
    folder: Path,
    songs: Sequence[int],
    spec: dict[str, Any],
    predicted: dict[int, tuple[float, float]] = PREDICTED,
    torch: str = "2.13.0",
    name_of: Callable[[int], str] = str,
    widths: tuple[float, float] | None = None,
    stack: dict[int, tuple[float, float]] | None = None,
) -> Path:
    """A published run with the tables that are collected. Its baseline "constant" predicts (0.1, 0), "ridge" the truth.

    widths: of intervals around the predictions. stack: its predictions; None as in runs of earlier versions.
    """
    folder.mkdir(parents=True)
    fold = spec.get("split", {}).get("fold", 0)
    rows = [f"{name_of(song)},{fold},{TRUE[song][0]},{predicted[song][0]},{TRUE[song][1]},{predicted[song][1]}" for song in songs]
    header = "song_id,fold,valence_true,valence_pred,arousal_true,arousal_pred"
    if widths is not None:
        header += ",valence_lower,valence_upper,arousal_lower,arousal_upper"
        ends = [
            [pair[axis] + sign * widths[axis] for axis in (0, 1) for sign in (-1, 1)]
            for pair in map(predicted.get, songs)
            if pair
        ]
        rows = [f"{row},{','.join(map(str, found))}" for row, found in zip(rows, ends, strict=True)]
    if stack is not None:
        header += ",valence_stack,arousal_stack"
        rows = [f"{row},{stack[song][0]},{stack[song][1]}" for row, song in zip(rows, songs, strict=True)]
    header, rows = header + "\n", [row + "\n" for row in rows]
    (folder / "predictions.csv").write_text(header + "".join(rows), encoding="utf-8")
    # Not in the order of the predictions: rows are matched by song.
    rows = [f"constant,{name_of(song)},0.1,0.0\n" for song in reversed(songs)]
    rows += [f"ridge,{name_of(song)},{TRUE[song][0]},{TRUE[song][1]}\n" for song in reversed(songs)]
    header = "baseline,song_id,valence_pred,arousal_pred\n"
    (folder / "baselines.csv").write_text(header + "".join(rows), encoding="utf-8")
    rows = [f"{name_of(song)},artist of {song},test\n" for song in songs]
    (folder / "split.csv").write_text("song_id,group,split\n" + "".join(rows), encoding="utf-8")
    whole = {"name": "six", "data": {"source": "/songs"}, "evaluate": {"bootstrap_samples": 100}, **spec}
    return write_manifest(folder, spec=JobSpec.model_validate(whole).model_dump(mode="json"), libraries={"torch": torch})


def three_folds(folder: Path, seed: int = 0, widths: tuple[float, float] | None = None, **spec: Any) -> list[Path]:
    return [
        published(
            folder / f"seed{seed}-fold{fold}", songs, {"seed": seed, "split": {"folds": 3, "fold": fold}, **spec}, widths=widths
        )
        for fold, songs in enumerate(FOLDS)
    ]


def collected(out: Path) -> Any:
    return json.loads((out / "collected.json").read_text(encoding="utf-8"))


def table(out: Path) -> list[dict[str, str]]:
    with (out / "collected.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def ccc(songs: Sequence[int], dimension: int) -> float:
    """Lin's formula, from numpy alone."""
    x = np.array([PREDICTED[song][dimension] for song in songs])
    y = np.array([TRUE[song][dimension] for song in songs])
    return float(2 * np.cov(x, y, bias=True)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2))


def test_songs_whose_ids_are_text_are_measured_like_numbered_ones(tmp_path: Path) -> None:
    collect_runs(three_folds(tmp_path / "numbers"), tmp_path / "out")
    runs = [
        published(tmp_path / f"text/{fold}", songs, {"split": {"folds": 3, "fold": fold}}, name_of=lambda song: f"é/{song}.mp3")
        for fold, songs in enumerate(FOLDS)
    ]
    collect_runs(runs, tmp_path / "of text")
    assert table(tmp_path / "of text") == table(tmp_path / "out")
    twice = published(tmp_path / "twice", FOLDS[1], {"split": {"folds": 3, "fold": 0}}, name_of=lambda song: f"é/{song}.mp3")
    with pytest.raises(DataError, match=r"song é/21\.mp3 is a test song of both"):
        collect_runs([*runs, twice], tmp_path / "out")


def test_folds_are_measured_as_one_set_of_songs(tmp_path: Path) -> None:
    collect_runs(three_folds(tmp_path), tmp_path / "out")
    rows = {(row["predictor"], row["dimension"]): row for row in table(tmp_path / "out")}
    valence, arousal = rows["model", "valence"], rows["model", "arousal"]
    # By hand: the labels' mean is 0 and their variance v = 0.7 / 6, so CCC = v / (v + v / 4 + 0.1²), and with the error
    # 0.1 - true / 2, R² = 1 - (0.1² + v / 4) / v.
    assert float(valence["ccc"]) == pytest.approx((0.7 / 6) / (1.25 * 0.7 / 6 + 0.01))
    assert float(valence["mae"]) == pytest.approx((0.35 + 0.15 + 0.25 + 0.05 + 0.15 + 0.05) / 6)
    assert float(valence["r2"]) == pytest.approx(1 - (0.01 + 0.7 / 24) / (0.7 / 6))
    assert float(valence["pearson"]) == pytest.approx(1)
    assert float(arousal["ccc"]) == pytest.approx(ccc(list(TRUE), 1))
    assert float(arousal["ccc_lo"]) < float(arousal["ccc"]) < float(arousal["ccc_hi"])
    assert (valence["seed"], valence["songs"], valence["folds"]) == ("0", "6", "3")


def test_mean_and_sd_of_the_ccc_of_the_folds_are_given_beside_the_pooled_one(tmp_path: Path) -> None:
    collect_runs(three_folds(tmp_path), tmp_path / "out")
    row = collected(tmp_path / "out")["settings"][0]["seeds"][0]["predictors"]["model"]["arousal"]
    own = [ccc(songs, 1) for songs in FOLDS]
    assert row["ccc_by_fold"] == pytest.approx(own)
    assert row["ccc_over_folds"]["mean"] == pytest.approx(statistics.mean(own))
    assert row["ccc_over_folds"]["sd"] == pytest.approx(statistics.stdev(own))


def test_baselines_are_pooled_by_song_like_the_model(tmp_path: Path) -> None:
    collect_runs(three_folds(tmp_path), tmp_path / "out")
    rows = {(row["predictor"], row["dimension"]): row for row in table(tmp_path / "out")}
    assert float(rows["ridge", "valence"]["ccc"]) == float(rows["ridge", "arousal"]["ccc"]) == 1
    assert float(rows["constant", "valence"]["mae"]) == pytest.approx((0.6 + 0.4 + 0.4 + 0.2 + 0.2 + 0) / 6)


def test_the_coverage_of_the_intervals_is_pooled_and_its_mean_over_the_folds_given(tmp_path: Path) -> None:
    runs = three_folds(tmp_path, widths=(0.2, 0.5))
    text = collect_runs(runs, tmp_path / "out")
    found = collected(tmp_path / "out")["settings"][0]["seeds"][0]["coverage"]
    # By hand: |errors| of valence .35 .15 | .25 .05 | .15 .05, of arousal .1 .1 | .3 .1 | .6 .1.
    assert found["valence"]["by_fold"] == [0.5, 0.5, 1]
    assert found["valence"]["mean_over_folds"] == found["valence"]["coverage"] == pytest.approx(4 / 6)
    assert found["arousal"]["by_fold"] == [1, 1, 0.5]
    assert found["arousal"]["mean_width"] == pytest.approx(1)
    assert "- seed 0: the stack's 90 % intervals hold valence of 0.67 [0.22, 0.96] of the songs (mean over folds 0.67" in text
    # Folds of different sizes: the mean is of the folds, the share of the songs.
    one_song = published(tmp_path / "one", [31], {"split": {"folds": 3, "fold": 2}}, widths=(0.2, 0.5))
    collect_runs([*runs[:2], one_song], tmp_path / "out")
    found = collected(tmp_path / "out")["settings"][0]["seeds"][0]["coverage"]["arousal"]
    assert (found["coverage"], found["mean_over_folds"]) == (4 / 5, pytest.approx(2 / 3))


def test_runs_without_intervals_have_no_coverage(tmp_path: Path) -> None:
    text = collect_runs(three_folds(tmp_path), tmp_path / "out")
    assert collected(tmp_path / "out")["settings"][0]["seeds"][0]["coverage"] == {}
    assert "intervals hold" not in text


def test_an_undefined_metric_has_an_empty_cell(tmp_path: Path) -> None:
    run = published(tmp_path / "run", [11], {"split": {"protocol": "holdout"}})
    text = collect_runs([run], tmp_path / "out")
    row = next(row for row in table(tmp_path / "out") if row["predictor"] == "model")
    assert (row["ccc"], row["ccc_lo"], row["r2"], row["mae"]) == ("", "", "", "0.35")
    assert "undefined" in text
    assert "missing" not in text


def test_the_markdown_has_a_row_per_predictor_with_the_hand_worked_numbers(tmp_path: Path) -> None:
    text = collect_runs(three_folds(tmp_path), tmp_path / "out")
    assert (tmp_path / "out" / "collected.md").read_text(encoding="utf-8") == text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == ["ViT alone", "constant", "ridge"]
    assert {len(row) for row in rows} == {10}
    model = dict(zip(rows[0], rows[2], strict=True))
    assert model["valence CCC"].startswith("0.749 [")
    assert (model["valence MAE"], model["valence R²"]) == ("0.167", "0.664")
    assert "- seed 0: 6 songs, 3 of 3 folds\n" in text


def test_a_missing_fold_is_named(tmp_path: Path) -> None:
    first, _, last = three_folds(tmp_path)
    text = collect_runs([first, last], tmp_path / "out")
    assert "- seed 0: 4 songs, 2 of 3 folds; missing: fold 1 of 3\n" in text
    assert collected(tmp_path / "out")["settings"][0]["seeds"][0]["missing_folds"] == [1]
    assert "missing: folds 1, 2 of 3\n" in collect_runs([first], tmp_path / "out")


def test_a_file_in_the_place_of_the_folder_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine", encoding="utf-8")
    with pytest.raises(SpecError, match=r"^collect: --out: .*/notes is a file, expected a folder\. Name another one\.$"):
        collect_runs(three_folds(tmp_path / "runs"), tmp_path / "notes")
    assert (tmp_path / "notes").read_text(encoding="utf-8") == "mine"


def test_a_song_predicted_twice_is_refused_and_both_runs_are_named(tmp_path: Path) -> None:
    runs = three_folds(tmp_path)
    again = published(tmp_path / "again", [22], {"name": "other", "split": {"folds": 3, "fold": 0}})
    with pytest.raises(DataError, match="song 22 ") as caught:
        collect_runs([*runs, again], tmp_path / "out")
    assert str(runs[1]) in str(caught.value)
    assert str(again) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_each_seed_is_pooled_alone_and_seeds_are_averaged(tmp_path: Path) -> None:
    worse = {song: (valence + 0.1, arousal) for song, (valence, arousal) in PREDICTED.items()}
    three_folds(tmp_path, seed=0)
    for fold, songs in enumerate(FOLDS):
        published(tmp_path / f"b{fold}", songs, {"seed": 7, "split": {"folds": 3, "fold": fold}}, worse)
    text = collect_runs([tmp_path], tmp_path / "out")
    variance = 0.7 / 6
    pooled = [variance / (1.25 * variance + 0.1**2), variance / (1.25 * variance + 0.2**2)]
    (setting,) = collected(tmp_path / "out")["settings"]
    assert [seed["seed"] for seed in setting["seeds"]] == [0, 7]
    assert setting["over_seeds"]["model"]["valence"]["ccc"]["mean"] == pytest.approx(statistics.mean(pooled))
    assert setting["over_seeds"]["model"]["valence"]["ccc"]["sd"] == pytest.approx(statistics.stdev(pooled))
    assert f"{statistics.mean(pooled):.3f} ± {statistics.stdev(pooled):.3f}" in text
    assert setting["over_seeds"]["ridge"]["arousal"]["ccc"] == {"mean": pytest.approx(1), "sd": pytest.approx(0)}


def test_names_and_runtime_keys_do_not_make_another_setting(tmp_path: Path) -> None:
    specs: list[dict[str, Any]] = [
        {"name": "a", "device": {"kind": "cuda"}, "gan": {"micro_batch": 4}},
        {"name": "b", "device": {"threads": 3}, "checkpoint": {"keep": 9}, "vit": {"micro_batch": 2}},
        {"name": "c", "artifacts": {"destination": "/elsewhere"}, "data": {"source": "/songs", "copy": "never"}},
    ]
    for fold, (songs, spec) in enumerate(zip(FOLDS, specs, strict=True)):
        published(tmp_path / str(fold), songs, {"split": {"folds": 3, "fold": fold}, **spec})
    text = collect_runs([tmp_path], tmp_path / "out")
    (setting,) = collected(tmp_path / "out")["settings"]
    assert setting["seeds"][0]["songs"] == 6
    assert "## a, b, c\n" in text


def test_settings_are_labelled_by_the_keys_that_differ_and_ordered_by_number(tmp_path: Path) -> None:
    for epochs in (10, 2, 2.5):
        three_folds(tmp_path / str(epochs), gan={"epochs": epochs}, vit={"weights": "random"})
    runs = [run for epochs in (10, 2, 2.5) for run in (tmp_path / str(epochs)).iterdir()]
    text = collect_runs(runs, tmp_path / "out")
    labels = [setting["label"] for setting in collected(tmp_path / "out")["settings"]]
    assert labels == ["gan.epochs=2.0", "gan.epochs=2.5", "gan.epochs=10.0"]
    assert {row["setting"] for row in table(tmp_path / "out")} == set(labels)
    assert "this one has" not in text  # once is enough
    assert "Where the settings differ" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


LONG = "/a|b/*c*/" + "long/" * 20 + "songs"
MANY: tuple[dict[str, Any], ...] = (
    {"gan": {"epochs": 3}, "vit": {"epochs": 12, "synthetic_share": 0.0}, "mel": {"hop_samples": 441}},
    {"gan": {"epochs": 15}, "vit": {"epochs": 30, "weights": "random"}, "data": {"source": LONG}},
)
"""Settings that differ in more than a heading can say."""


def test_settings_that_differ_in_much_are_labelled_by_the_names_of_their_runs_and_list_their_values(tmp_path: Path) -> None:
    for name, spec in zip(("no-gan", "vgmidi"), MANY, strict=True):
        three_folds(tmp_path / "runs" / name, name=name, **spec)
    text = collect_runs([tmp_path / "runs" / name for name in ("no-gan", "vgmidi")], tmp_path / "out")
    sections = dict(section.split("\n", 1) for section in text.split("\n## ")[1:])
    assert [*sections] == ["vgmidi", "no-gan", "Paired differences"]  # by data.source, the first key in which they differ
    values = {name: [line for line in sections[name].splitlines() if line.startswith("- `")] for name in ("vgmidi", "no-gan")}
    keys = "data.source={} gan.epochs={} mel.hop_samples={} vit.epochs={} vit.synthetic_share={} vit.weights={}"
    assert values == {
        "vgmidi": [f"- `{text}`" for text in keys.format(LONG, 15.0, 512, 30.0, 0.25, "random").split()],
        "no-gan": [f"- `{text}`" for text in keys.format("/songs", 3.0, 441, 12.0, 0.0, "pretrained").split()],
    }
    assert "| no-gan − vgmidi | ViT alone | 0    |" in sections["Paired differences"]
    assert {row["setting"] for row in table(tmp_path / "out")} == {"vgmidi", "no-gan"}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<h1>no-gan, vgmidi: 6 runs of 2 settings</h1>" in page
    assert "<h3>2. no-gan</h3>" in page
    assert '<th scope="row">vit.epochs</th><td class="number">30.0</td><td class="number">12.0</td>' in page


def test_settings_whose_runs_have_one_name_are_numbered_unless_a_sweep_names_them(tmp_path: Path) -> None:
    tasks = []
    for setting, spec in zip(("none", "wide"), MANY, strict=True):
        tasks += [
            {"label": f"{setting} seed=0", "setting": setting, "published": str(run)}
            for run in three_folds(tmp_path / "runs" / setting, **spec)
        ]
    (tmp_path / "sweep").mkdir()
    write_json(tmp_path / "sweep" / "sweep.json", {"tasks": tasks})
    folders = [tmp_path / "runs" / "none", tmp_path / "runs" / "wide"]
    for paths, labels in (
        (folders, ["six (1)", "six (2)"]),
        ([tmp_path / "sweep"], ["wide", "none"]),
        ([tmp_path / "sweep", *folders], ["wide", "none"]),
        ([*folders, tmp_path / "sweep"], ["wide", "none"]),
    ):
        collect_runs(paths, tmp_path / "out")
        assert [setting["label"] for setting in collected(tmp_path / "out")["settings"]] == labels


def test_many_names_make_no_long_heading(tmp_path: Path) -> None:
    for fold, songs in enumerate(FOLDS):
        published(tmp_path / str(fold), songs, {"name": f"{fold}-{'long-' * 6}name", "split": {"folds": 3, "fold": fold}})
    text = collect_runs([tmp_path], tmp_path / "out")
    name = "0-long-long-long-long-long-long-name and 2 more"
    assert f"## {name}\n" in text
    assert f"<h1>{name}: 3 runs</h1>" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_single_setting_is_labelled_by_its_name(tmp_path: Path) -> None:
    collect_runs(three_folds(tmp_path), tmp_path / "out")
    assert {row["setting"] for row in table(tmp_path / "out")} == {"six"}


def test_runs_in_a_folder_or_its_published_folder_are_found_and_count_once(tmp_path: Path) -> None:
    first, *_ = three_folds(tmp_path / "work" / "published")
    (tmp_path / "work" / "six-0123456789ab").mkdir()
    (tmp_path / "link").symlink_to(first)
    work, out = tmp_path / "work", tmp_path / "out"
    found = [collect_runs(paths, out) for paths in ([work], [work / "published"], [first, work, tmp_path / "link"])]
    assert found[0] == found[1] == found[2]
    assert "6 songs" in found[0]


def test_the_order_of_the_arguments_changes_no_byte(tmp_path: Path) -> None:
    runs = [*three_folds(tmp_path), *three_folds(tmp_path, seed=1)]
    for name, order in (("a", runs), ("b", runs[::-1])):
        collect_runs(order, tmp_path / name)
    for name in ("collected.json", "collected.csv", "collected.md", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_runs_of_different_versions_are_collected_with_a_note(tmp_path: Path) -> None:
    old, new, newer = (
        published(tmp_path / f"{torch}-{fold}", songs, {"split": {"folds": 3, "fold": fold}}, torch=torch)
        for fold, (songs, torch) in enumerate(zip(FOLDS, ("2.12.0", "2.13.0", "2.13.0"), strict=True))
    )
    text = collect_runs([tmp_path], tmp_path / "out")
    found = [(entry["libraries"]["torch"], entry["runs"]) for entry in collected(tmp_path / "out")["versions"]]
    assert found == [("2.12.0", [str(old)]), ("2.13.0", [str(new), str(newer)])]
    assert "made by 2 versions of code or libraries" in text
    assert "versions" not in collect_runs([new, newer], tmp_path / "out")


@pytest.mark.parametrize("name", ["predictions.csv", "baselines.csv"])
def test_a_table_that_differs_from_its_manifest_is_refused(tmp_path: Path, name: str) -> None:
    _, run, _ = three_folds(tmp_path)
    content = (run / name).read_text(encoding="utf-8")
    (run / name).write_text(content.replace("0.1", "0.2", 1), encoding="utf-8")
    with pytest.raises(DataError, match=f"fold1: {name} differs from manifest.json"):
        collect_runs([tmp_path], tmp_path / "out")
    (run / name).unlink()
    with pytest.raises(DataError, match=f"fold1: {name} is missing. Copy"):
        collect_runs([tmp_path], tmp_path / "out")


def test_a_path_without_a_published_run_is_refused_with_advice(tmp_path: Path) -> None:
    run, *_ = three_folds(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", tmp_path / "no-such-folder"):
        with pytest.raises(DataError, match=f"no manifest.json in {nothing}.*Name the folder"):
            collect_runs([run, nothing], tmp_path / "out")


def test_a_damaged_manifest_or_one_with_an_incomplete_spec_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, spec={"name": "six"})
    with pytest.raises(DataError, match=r"predictions\.csv, baselines\.csv, split\.csv are missing"):
        collect_runs([tmp_path], tmp_path / "out")
    for name in ("predictions.csv", "baselines.csv", "split.csv"):
        (tmp_path / name).write_text("")
    write_manifest(tmp_path, spec={"name": "six"})
    with pytest.raises(DataError, match=r"the spec in .*manifest\.json has no seed"):
        collect_runs([tmp_path], tmp_path / "out")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"collect: .* is not a manifest that this version can read"):
        collect_runs([tmp_path], tmp_path / "out")


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run, *_ = three_folds(tmp_path)
    with pytest.raises(StorageError, match=r"/proc/out.*--out"):
        collect_runs([run], Path("/proc/out"))


def test_a_published_run_is_no_output_folder_and_keeps_every_byte(tmp_path: Path) -> None:
    run, other, _ = three_folds(tmp_path)
    (run / "report.html").write_text("of the run", encoding="utf-8")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(SpecError, match=f"--out: {run} is a published run.*Name another folder"):
        collect_runs([run, other], run)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("name", ["report.html", "final.yaml"])
def test_a_file_that_no_collection_wrote_is_not_replaced_and_one_of_an_earlier_collection_is(tmp_path: Path, name: str) -> None:
    runs, out = three_folds(tmp_path / "runs"), tmp_path / "out"
    out.mkdir()
    (out / name).write_text("of a person", encoding="utf-8")
    (out / "final-notes.yaml").write_text("of a person", encoding="utf-8")
    with pytest.raises(SpecError, match=f"--out: {out} has a {name} that no earlier collect wrote"):
        collect_runs(runs, out)
    assert (out / name).read_text(encoding="utf-8") == "of a person"
    (out / name).unlink()
    collect_runs(runs, out)
    (out / "report.html").write_text("stale", encoding="utf-8")
    collect_runs(runs, out)
    assert (out / "report.html").read_text(encoding="utf-8") != "stale"
    assert (out / "final-notes.yaml").read_text(encoding="utf-8") == "of a person"


def a_sweep(folder: Path, tasks: list[tuple[str, Path]]) -> Path:
    folder.mkdir()
    write_json(folder / "sweep.json", {"tasks": [{"label": label, "published": str(run)} for label, run in tasks]})
    return folder


def test_unpublished_tasks_of_a_sweep_are_listed_as_missing(tmp_path: Path) -> None:
    there = three_folds(tmp_path / "there")[:2]
    tasks = [("base fold=0", there[0]), ("base fold=1", there[1]), ("base fold=2", tmp_path / "six-abc")]
    text = collect_runs([a_sweep(tmp_path / "sweep", tasks)], tmp_path / "out")
    assert "Missing, 1 task:\n\n- base fold=2 (six-abc)\n" in text
    assert collected(tmp_path / "out")["missing_tasks"] == [{"task": "base fold=2", "run": "six-abc"}]
    (setting,) = collected(tmp_path / "out")["settings"]
    assert setting["seeds"][0]["songs"] == 4


def test_all_tasks_of_a_sweep_that_has_just_begun_are_missing(tmp_path: Path) -> None:
    text = collect_runs([a_sweep(tmp_path / "sweep", [("base", tmp_path / "six-abc")])], tmp_path / "out")
    assert "- base (six-abc)" in text
    assert collected(tmp_path / "out")["settings"] == []


def test_a_damaged_list_of_tasks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text('{"tasks": [{}]}', encoding="utf-8")
    with pytest.raises(DataError, match="does not list the tasks of a sweep"):
        collect_runs([tmp_path / "sweep"], tmp_path / "out")


def test_two_settings_are_compared_on_the_songs_that_both_have(tmp_path: Path) -> None:
    # The truth itself scores a CCC of 1. The other setting has the first two folds only: four songs in common.
    exact = [
        published(tmp_path / f"exact{fold}", songs, {"split": {"folds": 3, "fold": fold}, "vit": {"epochs": 9}}, TRUE)
        for fold, songs in enumerate(FOLDS)
    ]
    text = collect_runs([*exact, *three_folds(tmp_path / "half", vit={"epochs": 4})[:2]], tmp_path / "out")
    (pair,) = collected(tmp_path / "out")["differences"]
    assert (pair["setting"], pair["minus"]) == ("vit.epochs=9.0", "vit.epochs=4.0")
    (seed,) = pair["seeds"]
    assert seed["songs"] == 4
    valence = np.array([[TRUE[song][0], PREDICTED[song][0]] for fold in FOLDS[:2] for song in fold])
    covariance = np.cov(valence.T, ddof=0)
    ccc = 2 * covariance[0, 1] / (covariance[0, 0] + covariance[1, 1] + (valence[:, 0].mean() - valence[:, 1].mean()) ** 2)
    assert seed["valence"]["ccc_difference"] == pytest.approx(1 - ccc)
    assert f"| vit.epochs=9.0 − vit.epochs=4.0 | ViT alone | 0    | {1 - ccc:.3f} [" in text


def test_settings_are_compared_by_the_stack_where_all_runs_have_one(tmp_path: Path) -> None:
    """Here the ViT alone is equally good in both settings, and the stack of one of them knows the truth."""

    def runs(name: str, epochs: int, stack: dict[int, tuple[float, float]] | None) -> list[Path]:
        spec: dict[str, Any] = {"vit": {"epochs": epochs}}
        return [
            published(tmp_path / f"{name}{fold}", songs, {"split": {"folds": 3, "fold": fold}, **spec}, stack=stack)
            for fold, songs in enumerate(FOLDS)
        ]

    exact, usual, old = runs("exact", 9, TRUE), runs("usual", 4, PREDICTED), runs("old", 4, None)
    text = collect_runs([*exact, *usual], tmp_path / "out")
    pair, alone = collected(tmp_path / "out")["differences"]
    assert (pair["setting"], pair["predictor"]) == ("vit.epochs=9.0", "stack")
    assert pair["seeds"][0]["valence"]["ccc_difference"] == pytest.approx(1 - ccc([*PREDICTED], 0))
    assert (alone["predictor"], alone["seeds"][0]["valence"]["ccc_difference"]) == ("model", 0)
    label = "| vit.epochs=9.0 − vit.epochs=4.0 |"
    assert f"{label} stack     | 0    |" in text
    assert f"{label} ViT alone | 0    | 0.000 [" in text
    assert "<td>stack</td>" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    text = collect_runs([*exact, *old], tmp_path / "out")
    (pair,) = collected(tmp_path / "out")["differences"]
    assert (pair["predictor"], pair["seeds"][0]["valence"]["ccc_difference"]) == ("model", 0)
    assert f"{label} ViT alone | 0    | 0.000 [" in text


def test_settings_with_other_groups_are_compared_by_the_larger_ones_whichever_comes_first(tmp_path: Path) -> None:
    songs, shrunk = [*TRUE], {song: (0.5 * valence, arousal) for song, (valence, arousal) in TRUE.items()}
    intervals = []
    for average in (0.1, 0.9):  # settings are in the order of this number
        folder = tmp_path / f"{average}"
        grouped = published(folder / "artists", songs, {"vit": {"ema_decay": average}})
        table = "".join(f"{song},{song // 10},test\n" for song in songs)
        (grouped / "split.csv").write_text(f"song_id,group,split\n{table}", encoding="utf-8")
        write_manifest(grouped, spec=read_json(grouped / "manifest.json")["spec"])
        published(folder / "songs", songs, {"vit": {"ema_decay": 0.5}}, predicted=shrunk)
        collect_runs([folder], tmp_path / f"out{average}")
        difference = collected(tmp_path / f"out{average}")["differences"][0]
        intervals.append(sorted(abs(end) for end in difference["seeds"][0]["valence"]["ccc_difference_ci"]))
    assert intervals[0] == pytest.approx(intervals[1])


def test_differences_over_seeds_have_a_mean_and_an_sd(tmp_path: Path) -> None:
    runs = [run for seed in (0, 1) for run in three_folds(tmp_path / "a", seed, vit={"epochs": 4})]
    runs += [run for seed in (0, 1, 2) for run in three_folds(tmp_path / "b", seed, vit={"epochs": 9})]
    collect_runs(runs, tmp_path / "out")
    (pair,) = collected(tmp_path / "out")["differences"]
    assert [seed["seed"] for seed in pair["seeds"]] == [0, 1]
    assert pair["over_seeds"]["valence"] == {"mean": 0, "sd": 0}


def test_the_report_of_a_sweep_names_its_best_setting_and_links_the_reports_of_its_runs(tmp_path: Path) -> None:
    runs = three_folds(tmp_path / "runs")
    for run in runs[:2]:
        (run / "report.html").write_text("a report")
    worse = {song: (0.1, -labels[1]) for song, labels in TRUE.items()}
    others = [
        published(tmp_path / f"others/{fold}", songs, {"split": {"folds": 3, "fold": fold}, "gan": {"epochs": 3}}, worse)
        for fold, songs in enumerate(FOLDS)
    ]
    collect_runs([*others, *runs], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    best = "On 6 test songs, each held out by one of 3 folds, the best of 2 settings, gan.epochs="
    assert best in page
    assert f"{best}3" not in page
    # By hand: see the test of folds that are measured as one set. The baseline knows the truth.
    assert "predicts valence with a CCC of 0.75 [" in page
    assert "worse than the best baseline (ridge, 1.00 [1.00, 1.00])" in page
    assert page.count("</title>") - 1 == len(TRUE)  # a name for each song on the plane
    assert 'href="../runs/seed0-fold0/report.html"' in page
    assert page.count('/report.html"') == 2
    collect_runs(runs, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "each held out by one of 3 folds, the ViT alone predicts valence with a CCC of 0.75" in page
