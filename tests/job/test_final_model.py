"""The final model: trained on all songs, stopped where its folds found, scored by their predictions."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from emotion.data.leaks import read_seen
from emotion.data.out_of_fold import read_out_of_fold
from emotion.errors import DataError, SpecError
from emotion.files import read_json, sha256_of, write_json
from job.pipeline.fetch_inputs import FetchedInputs, fetch_inputs
from job.pipeline.final_model import check_final_model
from job.pipeline.folders import JobFolders
from job.pipeline.phases import PHASES
from job.pipeline.reproduce import reproduce_run, spec_to_reproduce
from job.pipeline.runner import phase_key, run_job
from job.preemption import StopRequest
from job.results.collect import collect_runs
from job.results.manifest import read_manifest
from job.run_folder.receipts import Receipt
from job.spec.load import load_spec
from job.spec.model import JobSpec, run_name
from tests.conftest import TINY
from tests.manifests import write_manifest

FOLDS = 2
QUICK = [f"split.folds={FOLDS}", "gan.epochs=1"]


def run(spec: JobSpec, work: Path) -> Path:
    """The published folder."""
    run_job(spec, JobFolders(work, work / "scratch"), "publish", False, StopRequest())
    return work / "published" / run_name(spec)


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@pytest.mark.full
def test_the_final_model_of_a_set_of_folds(tmp_path: Path, emotion_job: Any) -> None:
    work, out = tmp_path / "work", tmp_path / "collected"
    folds = [run(load_spec(TINY, [*QUICK, f"split.fold={fold}"]), work) for fold in range(FOLDS)]
    text = collect_runs([work], out)
    assert f"`emotion-job run {out / 'final.yaml'}`" in text
    best = [read_json(fold / "model" / "training.json")["best_epoch"] for fold in folds]
    stop = int(sum(best) / 2 + 0.5)
    assert read_json(out / "out_of_fold.json")["stop_epoch"] == stop

    final = run(load_spec(out / "final.yaml"), work)
    # Trained on every song, up to that epoch.
    songs = rows(final / "split.csv")
    assert [row["split"] for row in songs] == ["train"] * 24
    training = read_json(final / "model" / "training.json")
    assert training == {"stop_epoch": stop, "steps_per_epoch": training["steps_per_epoch"], "synthetic_per_batch": 2}
    steps = [json.loads(line) for line in (final / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert max(record["step"] for record in steps if record["phase"] == "vit") == stop * training["steps_per_epoch"]
    assert not any("validation_ccc" in record for record in steps)
    assert read_seen(final / "model") == read_seen(final / "stack") == set.union(*(read_seen(fold / "model") for fold in folds))

    # Scored by the folds: the numbers are those of the collected table, and the predictions those of the folds.
    of_folds = read_json(out / "collected.json")["settings"][0]["seeds"][0]["predictors"]
    metrics = read_json(final / "metrics.json")
    for name, scored in {"stack": metrics["stack"], "model": metrics["model"], **metrics["baselines"]}.items():
        for dimension, found in scored.items():
            assert found == {key: of_folds[name][dimension][key] for key in found}, name
    expected = sorted((row for fold in folds for row in rows(fold / "predictions.csv")), key=lambda row: int(row["song_id"]))

    def without_intervals(table: list[dict[str, str]]) -> list[dict[str, str]]:  # those are the final model's
        return [{name: cell for name, cell in row.items() if not name.endswith(("_lower", "_upper"))} for row in table]

    assert without_intervals(rows(final / "predictions.csv")) == without_intervals(expected)
    assert metrics["songs"] == {"train": 24, "validation": 0, "test": 0}
    assert len(metrics["out_of_fold"]["runs"]) == FOLDS
    report = (final / "report.html").read_text(encoding="utf-8")
    assert "This is a final model, trained on all songs" in report
    assert "neither for training nor for any choice" not in report
    assert "a part of the training songs" in report

    # Other settings are refused where the first phases of the final model are finished, too.
    for key, value in (("vit.epochs", 1), ("evaluate.bootstrap_samples", 150)):
        refused = emotion_job("run", out / "final.yaml", "--work", work, "--set", f"{key}={value}")
        assert refused.returncode == 65, refused.stderr
        assert f"is of folds with other settings: {key} is {value}" in refused.stderr

    # predict, with the stack.
    (song,) = (work / "scratch").glob("stage-*/**/" + f"{songs[0]['song_id']}.*")
    found = emotion_job("predict", final, song, "--json")
    assert found.returncode == 0, found.stderr
    assert -1 <= json.loads(found.stdout)["arousal"] <= 1

    # collect names it, and does not take it for one more setting.
    text = collect_runs([work], tmp_path / "again")
    assert f"## Final model {final.name}\n" in text
    assert len(read_json(tmp_path / "again" / "collected.json")["settings"]) == 1
    assert (tmp_path / "again" / "out_of_fold.json").read_bytes() == (out / "out_of_fold.json").read_bytes()
    assert "Final model" in collect_runs([final], tmp_path / "alone")

    # reproduce, with the folds' file elsewhere.
    manifest = read_manifest(final / "manifest.json", "a test")
    moved = shutil.copy(final / "out_of_fold.json", tmp_path / "moved.json")
    elsewhere = tmp_path / "reproduced"
    spec = spec_to_reproduce(manifest, elsewhere, (f"split.out_of_fold={moved}",))
    shutil.rmtree(out)
    said = reproduce_run(manifest, spec, JobFolders(elsewhere, elsewhere / "scratch"), StopRequest())
    assert "files are equal" in said


# Folds that nobody has run: what `collect` makes of them, and what fits.

TRUE = {song: (song / 10 - 0.5, 0.3 - song / 20) for song in range(6)}


def published(
    folder: Path, fold: int, *, best: int = 2, stack: bool = True, inputs: dict[str, str] | None = None, **spec: Any
) -> Path:
    """A published run of one of two folds."""
    (folder / "model").mkdir(parents=True)
    own = [song for song in TRUE if song % 2 == fold]
    header = "song_id,fold,valence_true,valence_pred,arousal_true,arousal_pred" + ",valence_stack,arousal_stack" * stack
    lines = [f"{song},{fold},{TRUE[song][0]},0.1,{TRUE[song][1]},-0.1" + ",0.2,-0.2" * stack for song in own]
    (folder / "predictions.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    lines = [f"{name},{song},0.0,0.25" for name in ("constant", "ridge", "svr", "boosting") for song in own]
    (folder / "baselines.csv").write_text(
        "\n".join(["baseline,song_id,valence_pred,arousal_pred", *lines]) + "\n", encoding="utf-8"
    )
    (folder / "split.csv").write_text(
        "song_id,group,split\n" + "".join(f"{song},{song},test\n" for song in own), encoding="utf-8"
    )
    write_json(folder / "model" / "training.json", {"best_epoch": best, "validation_ccc": 0.5, "steps_per_epoch": 4})
    whole = {"name": "six", "data": {"source": "/songs"}, "evaluate": {"bootstrap_samples": 100}, "vit": {"weights": "random"}}
    split = {"folds": 2, "fold": fold, **spec.pop("split", {})}
    return write_manifest(
        folder,
        name=f"six-{fold}",
        spec=JobSpec.model_validate({**whole, "split": split, **spec}).model_dump(mode="json"),
        inputs={"data.source/audio/0.mp3": "a", **(inputs or {})},
    )


def two_folds(folder: Path, **spec: Any) -> list[Path]:
    return [published(folder / f"{fold}", fold, **spec) for fold in range(2)]


def test_complete_folds_give_the_spec_of_their_final_model(tmp_path: Path) -> None:
    text = collect_runs(two_folds(tmp_path / "runs", seed=4, gan={"micro_batch": 3}), tmp_path / "out")
    path = tmp_path / "out" / "final.yaml"
    assert f"up to epoch 2, the median of the best epochs of these 2 runs: `emotion-job run {path}`." in text
    spec = load_spec(tmp_path / "out" / "final.yaml")
    assert (spec.name, spec.seed, spec.split.protocol, spec.gan.micro_batch) == ("six-final", 4, "all", 3)
    assert spec.split.out_of_fold == str(tmp_path / "out" / "out_of_fold.json")
    found = read_out_of_fold(tmp_path / "out" / "out_of_fold.json")
    assert {song.song_id: song.actual for song in found.songs} == TRUE
    assert {song.song_id: song.fold for song in found.songs} == {song: song % 2 for song in TRUE}
    assert found.songs[0].predicted["stack"] == (0.2, -0.2)
    assert found.files == {"a"}
    check_final_model(spec, None)


@pytest.mark.parametrize("why", ["a fold is missing", "an earlier version", "no folds"])
def test_other_runs_have_no_final_model(tmp_path: Path, why: str) -> None:
    if why == "no folds":
        runs = [published(tmp_path / "run", 0, split={"protocol": "holdout", "fold": 0})]
    else:
        runs = two_folds(tmp_path / "runs", stack=why != "an earlier version")[: 1 if why == "a fold is missing" else 2]
    assert "final" not in collect_runs(runs, tmp_path / "out")
    assert not [*(tmp_path / "out").glob("final*"), *(tmp_path / "out").glob("out_of_fold*")]


def test_each_of_several_settings_has_its_own(tmp_path: Path) -> None:
    runs = [
        run
        for share in (0.0, 0.5)
        for run in two_folds(tmp_path / f"{share}", vit={"weights": "random", "synthetic_share": share})
    ]
    text = collect_runs(runs, tmp_path / "out")
    specs = sorted((tmp_path / "out").glob("final-????????.yaml"))
    assert len(specs) == 2
    for path in specs:
        assert f"`emotion-job run {path}`" in text
        check_final_model(load_spec(path), None)
    assert {load_spec(path).vit.synthetic_share for path in specs} == {0.0, 0.5}


def test_the_only_setting_with_complete_folds_has_the_plain_name(tmp_path: Path) -> None:
    other = published(tmp_path / "other", 0, split={"protocol": "holdout", "fold": 0})
    collect_runs([*two_folds(tmp_path / "folds"), other], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("final*")] == ["final.yaml"]


def test_epochs_are_those_of_all_repetitions_and_scores_those_of_the_first(tmp_path: Path) -> None:
    for split_seed, best in ((1, 9), (0, 2), (2, 5)):
        two_folds(tmp_path / f"runs/{split_seed}", best=best, split={"seed": split_seed})
    runs = sorted(tmp_path.glob("runs/*/*"))
    text = collect_runs(runs, tmp_path / "out")
    found = read_out_of_fold(tmp_path / "out" / "out_of_fold.json")
    assert (found.stop_epoch, len(found.runs), len(found.songs)) == (5, 6, 6)
    assert load_spec(tmp_path / "out" / "final.yaml").split.seed == 0
    # One setting, three times: not three settings, and no song twice.
    (setting,) = read_json(tmp_path / "out" / "collected.json")["settings"]
    assert [seed["split_seed"] for seed in setting["seeds"]] == [0, 1, 2]
    assert "- seed 0, split 2: 6 songs, 2 of 2 folds" in text
    assert "mean ± SD" in text
    assert found.over_seeds["stack"]["valence"]["mae"]["sd"] == pytest.approx(0)


def test_other_settings_than_those_of_the_folds_are_named(tmp_path: Path) -> None:
    collect_runs(two_folds(tmp_path / "runs"), tmp_path / "out")
    path = tmp_path / "out" / "final.yaml"
    check_final_model(load_spec(path, ["data.source=/elsewhere", "device.threads=3", "precision=fp32", "seed=9"]), None)
    with pytest.raises(DataError, match=r"^split\.out_of_fold: .* other settings: gan\.epochs is 7\.0 here, 150\.0 there\. Run"):
        check_final_model(load_spec(path, ["gan.epochs=7"]), None)


def test_other_weights_than_those_of_the_folds_are_named_whatever_their_path(tmp_path: Path) -> None:
    weights, same = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    weights.write_text("weights")
    same.write_text("weights")
    vit = {"weights": str(weights)}
    collect_runs(two_folds(tmp_path / "runs", vit=vit, inputs={"vit.weights": sha256_of(weights)}), tmp_path / "out")
    path = tmp_path / "out" / "final.yaml"

    def check(*overrides: str) -> None:
        spec = load_spec(path, overrides)
        check_final_model(spec, fetch_inputs(spec, tmp_path / "scratch", StopRequest()))

    check()
    check(f"vit.weights={same}")
    same.write_text("others")
    with pytest.raises(DataError, match=r"other settings: vit\.weights is another file"):
        check(f"vit.weights={same}")


def test_the_protocol_and_its_file_come_together(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="split: out_of_fold must be given if protocol is 'all', and only then"):
        load_spec(TINY, ["split.protocol=all"])
    with pytest.raises(SpecError, match="out_of_fold must be given if protocol is 'all', and only then"):
        load_spec(TINY, ["split.out_of_fold=x"])
    with pytest.raises(DataError, match=r"there is no .*x\.json"):
        check_final_model(load_spec(TINY, ["split.protocol=all", f"split.out_of_fold={tmp_path}/x.json"]), None)


def test_a_spec_without_the_new_keys_has_the_fingerprint_of_before() -> None:
    fields = JobSpec.model_validate({"name": "a", "data": {"source": "/x"}}).result_fields()["split"]
    assert set(fields) == {"protocol", "folds", "fold", "test_fraction", "validation_fraction", "grouped", "lists", "seed"}


def test_the_digest_of_the_file_is_in_the_keys_of_the_phases_that_read_it(tmp_path: Path) -> None:
    file = tmp_path / "out_of_fold.json"
    spec = load_spec(TINY, ["split.protocol=all", f"split.out_of_fold={file}"])
    receipts = {phase.name: Receipt(Path(), "", {}, {}) for phase in PHASES}
    keys = []
    for content in ("one", "two"):
        file.write_text(content)
        keys.append([phase_key(phase, spec, FetchedInputs(None, None), receipts, StopRequest()) for phase in PHASES])
    changed = [phase.name for phase, one, two in zip(PHASES, *keys, strict=True) if one != two]
    assert changed == ["split", "vit", "stack", "evaluate"]
