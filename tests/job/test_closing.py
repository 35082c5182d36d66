"""What a run says at its beginning and at its end."""

import json
import re
from pathlib import Path

import pytest

from job.results.closing import closing_lines
from job.spec.load import load_spec
from job.spec.location import S3, Local
from job.spec.model import JobSpec, run_name
from tests.conftest import TINY, TinyRun

FOLDS = {
    "valence": {"stack": (0.49, [0.14, 0.73]), "svr": 0.5, "boosting": 0.53},
    "arousal": {"stack": (-0.001, None), "svr": None, "boosting": None},
}


def published(folder: Path) -> Path:
    """The metrics of a run with known numbers."""
    folder.mkdir(parents=True)
    stack = {name: {"ccc": row["stack"][0], "ccc_ci": row["stack"][1]} for name, row in FOLDS.items()}
    baselines = {name: {dimension: {"ccc": row[name]} for dimension, row in FOLDS.items()} for name in ("svr", "boosting")}
    (folder / "metrics.json").write_text(json.dumps({"stack": stack, "baselines": baselines}))
    (folder / "manifest.json").touch()
    return folder


def spec_of_songs(*overrides: str) -> JobSpec:
    return load_spec(TINY, ["data.source=/songs", *overrides])


def test_a_run_says_what_it_will_do_and_for_how_long_before_its_first_phase(tiny_run: TinyRun) -> None:
    first, second = tiny_run.output.splitlines()[:2]
    assert re.search(
        rf"INFO run={tiny_run.run_folder.name} to_do=stage,features,split,gan,synth,quality,vit,stack,evaluate,publish "
        r"expected: about \d+(\.\d)? s on two free cores, by a cost model",
        first,
    )
    assert "phase=stage begins" in second


def test_a_run_ends_with_its_scores_its_report_and_the_next_step(tiny_run: TinyRun) -> None:
    metrics = json.loads((tiny_run.published / "metrics.json").read_text())
    *_, valence, arousal, report, following = tiny_run.output.splitlines()
    for line, dimension in ((valence, "valence"), (arousal, "arousal")):
        assert f"{dimension}  CCC {metrics['stack'][dimension]['ccc']:z.2f} (stack)" in line, "no interval: two groups"
        best = max(table[dimension]["ccc"] for table in metrics["baselines"].values())
        assert f"best baseline {best:z.2f} (" in line
    assert report.endswith(f"{tiny_run.published}/report.html")
    assert "emotion-job init" in following
    assert valence.split(" ", 1)[1] in (tiny_run.run_folder / "job.log").read_text()


def test_the_scores_stand_beside_the_best_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = spec_of_songs("split.protocol=holdout")
    folder = published(tmp_path / "work" / "published" / run_name(spec))
    assert closing_lines(spec, Local(folder), tmp_path) == [
        "valence  CCC 0.49 [0.14, 0.73] (stack); best baseline 0.53 (boosting)",
        "arousal  CCC 0.00 (stack); no baseline has one",
        f"report   work/published/{run_name(spec)}/report.html",
        f"next     emotion-job predict work/published/{run_name(spec)} SONG.mp3",
    ]


def test_after_a_fold_come_the_others_and_then_their_collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    steps = []
    for fold in (1, 0, 3, 2):
        spec = spec_of_songs(f"split.fold={fold}")
        folder = published(tmp_path / "published" / run_name(spec))
        steps.append(closing_lines(spec, Local(folder), tmp_path)[-1])
    assert [re.findall(r"split\.fold=(\d)", step) for step in steps] == [["0"], ["2"], ["2"], []]
    runs = [f"published/{run_name(spec_of_songs(f'split.fold={fold}'))}" for fold in range(4)]
    assert steps[-1] == f"next     emotion-job collect {' '.join(runs)}"


def test_results_in_object_storage_have_the_scores_of_the_run_folder(tmp_path: Path) -> None:
    spec = spec_of_songs("split.protocol=holdout")
    assert closing_lines(spec, S3("bucket", "published/x"), tmp_path)[0] == "report   s3://bucket/published/x/report.html"
    published(tmp_path / "evaluate-0123456789ab")
    assert closing_lines(spec, S3("bucket", "published/x"), tmp_path)[0].startswith("valence  CCC 0.49")
