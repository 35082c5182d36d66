"""A job that decides about its synthetic clips: what it publishes, and that it can be stopped."""

import shutil
from pathlib import Path

import pytest

from emotion.errors import Interrupted
from emotion.files import read_json, read_json_lines
from emotion.training.progress import WITH, WITHOUT
from job.pipeline.folders import JobFolders
from job.pipeline.runner import run_job
from job.preemption import StopRequest
from job.results.manifest import read_manifest
from job.spec.load import load_spec
from job.spec.model import JobSpec, run_name
from tests.conftest import TINY, TinyRun
from tests.job.soak import promised_bytes


def gated(*overrides: str) -> JobSpec:
    return load_spec(TINY, ["vit.synthetic=auto", *overrides])


class StopsWithin(StopRequest):
    """Asks to stop once a training of this name has been validated."""

    def __init__(self, work: Path, training: str) -> None:
        super().__init__()
        self.work, self.training = work, training

    def __call__(self) -> bool:
        for path in self.work.glob("tiny-*/vit-*/metrics.jsonl"):
            if any(record.get("training") == self.training and "epoch" in record for record in read_json_lines(path)):
                self.request("the test asked for it")
        return super().__call__()


@pytest.mark.full
def test_report_metrics_and_manifest_say_what_became_of_the_synthetic_clips(tiny_run: TinyRun, tmp_path: Path) -> None:
    work = shutil.copytree(tiny_run.work, tmp_path / "work")
    run_job(gated(), JobFolders(work, work / "scratch"), "publish", False, StopRequest())
    published = work / "published" / run_name(gated())
    decided = read_json(published / "metrics.json")["synthetic_clips"]
    assert decided["why"].startswith("kept:" if decided["kept"] else "left out:")
    assert decided["songs"] == read_json(published / "metrics.json")["songs"]["validation"]
    manifest = read_manifest(published / "manifest.json", "test")
    assert manifest.phases["vit"].notes["synthetic_clips"] == decided
    assert manifest.spec["vit"]["synthetic"] == "auto"
    report = (published / "report.html").read_text()
    assert f"Synthetic clips were {decided['why']}" in report
    curves = [record for record in read_json_lines(published / "logs/metrics.jsonl") if "validation_ccc" in record]
    assert {record["training"] for record in curves} == {WITHOUT, WITH}
    # A spec without the key has none of it.
    assert "synthetic_clips" not in read_json(tiny_run.published / "metrics.json")


@pytest.mark.full
@pytest.mark.parametrize("training", [WITHOUT, WITH])
def test_stopped_in_either_training_it_goes_on_on_another_machine_and_publishes_the_same(
    training: str, tiny_run: TinyRun, tmp_path: Path
) -> None:
    spec = gated(f"checkpoint.mirror={tmp_path / 'mirror'}")
    (tmp_path / "mirror").mkdir()
    published = []
    for name, should_stop in (("whole", None), ("first", StopsWithin(tmp_path / "first", training)), ("second", None)):
        work = tmp_path / name
        spec_of_run = gated() if name == "whole" else spec
        folders = JobFolders(work, tiny_run.work / "scratch")
        if should_stop is not None:
            with pytest.raises(Interrupted):
                run_job(spec_of_run, folders, "publish", False, should_stop)
            continue
        run_job(spec_of_run, folders, "publish", False, StopRequest())
        published.append(promised_bytes(work / "published" / run_name(spec)))
    assert published[0] == published[1]
