"""How long a run will take: the arithmetic against torch's own count, the seconds against those of a run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from emotion import proc
from emotion.gan.networks import Generator
from emotion.training.memory_account import fake_tensors
from emotion.vit.network import identity_normalisation, network_on_meta, preprocessing_for
from job.pipeline.costs import Songs, gan_gigaflops, seconds_of, vit_gigaflops
from job.pipeline.estimate import duration, expected
from job.pipeline.folders import JobFolders
from job.pipeline.phases import PHASES
from job.spec.load import load_spec
from job.spec.model import JobSpec
from tests.conftest import TINY, TinyRun

SPECS = TINY.parent.parent / "job" / "specs"
PHASE_NAMES = [phase.name for phase in PHASES]
PARTS = ("gan", "vit")


def test_below_two_minutes_seconds_are_shown() -> None:
    assert [duration(seconds) for seconds in (9.4, 93, 119, 121, 5400)] == ["9.4 s", "93 s", "119 s", "2 min", "1 h 30 min"]


def preset(name: str, *overrides: str) -> JobSpec:
    return load_spec(SPECS / f"{name}.yaml", ["data.source=generated:96", *overrides])


@pytest.mark.parametrize("depth", ["null", "4"])
@pytest.mark.parametrize("name", ["demo", "deam", "deam-t4", "small-pretrained"])
def test_the_arithmetic_of_a_clip_is_that_which_torch_counts(name: str, depth: str) -> None:
    spec = preset(name, f"vit.depth={depth}")
    frames = spec.mel.frames(spec.gan.clip_seconds)
    with fake_tensors(), FlopCounterMode(display=False) as counted:
        G = Generator(spec.mel.mels, spec.gan.latent, spec.gan.width)
        G(torch.empty(1, 2), torch.empty(1, spec.gan.latent, 1 + Generator.columns(frames)), frames)
    assert gan_gigaflops(spec) == pytest.approx(counted.get_total_flops() / 1e9, rel=0.15)
    preprocessing = preprocessing_for(spec.vit, spec.mel, identity_normalisation(spec.mel))
    network = network_on_meta(spec.vit, preprocessing)
    height, width = spec.vit.image_size or (spec.mel.mels, preprocessing.frames)
    with FlopCounterMode(display=False) as counted:
        network(torch.empty(1, spec.vit.channels, height, width, device="meta"))
    assert vit_gigaflops(spec) == pytest.approx(counted.get_total_flops() / 1e9, rel=0.15)


def test_a_run_of_the_same_spec_takes_what_the_earlier_one_took(tiny_run: TinyRun) -> None:
    spec = load_spec(TINY)
    found = expected(spec, JobFolders(tiny_run.work, tiny_run.work / "scratch"), PHASE_NAMES, {})
    took = {}
    for name in PHASE_NAMES:
        took[name] = json.loads((tiny_run.phase(name) / "receipt.json").read_text())["measured"]["seconds"]
    assert found.seconds == pytest.approx(took, rel=1e-6)
    assert found.text().endswith(f"based on the earlier run {tiny_run.run_folder.name}")


def test_ten_times_the_epochs_take_longer_and_the_speed_is_that_of_the_earlier_run(tiny_run: TinyRun) -> None:
    folders = JobFolders(tiny_run.work, tiny_run.work / "scratch")
    once, more = (expected(load_spec(TINY, [f"gan.epochs={epochs}"]), folders, ["gan", "vit"], {}) for epochs in (2, 20_000))
    assert more.seconds["gan"] > 20 * once.seconds["gan"]
    assert more.seconds["vit"] == once.seconds["vit"]


def test_a_training_that_has_begun_takes_the_rest(tiny_run: TinyRun, tmp_path: Path) -> None:
    folders = JobFolders(tiny_run.work, tiny_run.work / "scratch")
    (tmp_path / "progress.json").write_text('{"step": 3, "steps": 4}')
    whole = expected(load_spec(TINY), folders, ["gan"], {})
    assert expected(load_spec(TINY), folders, ["gan"], {"gan": tmp_path}).seconds["gan"] == whole.seconds["gan"] / 4


def test_phases_that_ended_after_an_interruption_say_nothing(tiny_run: TinyRun, tmp_path: Path) -> None:
    work = shutil.copytree(tiny_run.work, tmp_path / "work")
    attempts = work / tiny_run.run_folder.name / "attempts.jsonl"
    start = json.loads(attempts.read_text().splitlines()[0])
    ended = (tiny_run.phase("synth") / "receipt.json").stat().st_mtime
    attempts.write_text("".join(json.dumps({**start, "time": time}) + "\n" for time in (start["time"], ended + 0.01)))
    found = expected(load_spec(TINY), JobFolders(work, work / "scratch"), PHASE_NAMES, {})
    by_model = expected(load_spec(TINY), JobFolders(tmp_path / "none", tmp_path / "none"), PHASE_NAMES, {})
    same = {name for name in PHASE_NAMES if found.seconds[name] == by_model.seconds[name]}
    assert same - {"split"} == {"quality", "vit", "stack", "evaluate", "publish"}  # it may take what the model says
    assert found.text().endswith(" and, for quality, vit, stack, evaluate, publish, by a cost model")


def test_what_is_done_before_the_first_step_costs_time() -> None:
    songs = Songs(count=1000, seconds=45_000, size=1)

    def seconds(phase: str, *overrides: str) -> float:
        found = seconds_of(phase, load_spec(TINY, ["vit.weights=pretrained", "vit.weights_mel=other", *overrides]), songs)
        assert found is not None
        return found

    run = "init_from.run=/published/earlier"
    # The head is fitted to pretrained weights, also beside a GAN of an earlier run; the ViT of one has its head.
    assert seconds("vit") == seconds("vit", run, "init_from.vit=false")
    assert seconds("vit") > seconds("vit", "vit.weights=random", "vit.weights_mel=same")
    assert seconds("synth", "synth.read_share=0.5") > seconds("synth") + 1


def test_a_final_model_is_trained_once_as_its_folds_have_decided_about_synthetic_clips() -> None:
    songs = Songs(count=200, seconds=9000, size=1)

    def seconds(*overrides: str) -> float:
        found = seconds_of("vit", preset("small", *overrides), songs)
        assert found is not None
        return found

    once, twice = seconds("vit.synthetic=always"), seconds()
    final = seconds("split.protocol=all", "split.out_of_fold=folds.json")
    assert twice > 1.9 * once
    # All songs are for training, and none for validation: 5 / 4 · 5 / 4 as many steps.
    assert once < final < 1.6 * once


def test_no_time_is_estimated_where_it_is_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    nowhere = JobFolders(tmp_path / "work", tmp_path / "scratch")
    assert "a cost model" in expected(preset("small"), nowhere, PHASE_NAMES, {}).text()
    assert expected(preset("small"), nowhere, PHASE_NAMES, {}).total is not None
    of_another = expected(preset("small", "vit.model=vit_xsmall_patch8_gap"), nowhere, PHASE_NAMES, {})
    assert of_another.unknown == ["vit"]
    assert of_another.text().endswith("the cost model does not know vit_xsmall_patch8_gap")
    assert expected(preset("small-pretrained"), nowhere, PHASE_NAMES, {}).total is not None
    in_s3 = load_spec(SPECS / "small.yaml", ["data.source=s3://bucket/songs"])
    assert expected(in_s3, nowhere, PHASE_NAMES, {}).text().endswith("the songs are not on this machine yet")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(proc, "DEVICE_FILES", tmp_path)
    (tmp_path / "nvidia0").touch()
    on_a_gpu = expected(preset("small"), nowhere, PHASE_NAMES, {})
    assert (on_a_gpu.unknown, on_a_gpu.total) == (["gan", "vit"], None)
