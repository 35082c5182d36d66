"""A warm start from a published run: what is refused before the first phase, what enters the phase keys, what is published."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from emotion.data.leaks import SEEN, TRAINED, read_seen
from emotion.errors import DataError, EmotionError, ModelError, SpecError
from emotion.files import read_json, sha256_of, write_json
from job.pipeline.fetch_inputs import FetchedInputs, fetch_inputs
from job.pipeline.folders import JobFolders
from job.pipeline.phases import PHASES
from job.pipeline.runner import phase_key, plan_job, run_job
from job.pipeline.warm_start import check_warm_start
from job.preemption import StopRequest
from job.spec.load import load_spec
from job.spec.model import JobSpec, run_name
from tests.conftest import TINY, TinyRun, run_stopped_in_each_phase
from tests.job.soak import promised_bytes
from tests.job.test_runner import receipts_of
from tests.manifests import artifacts_in

BY_NAME = {phase.name: phase for phase in PHASES}


def warm_started(run: Path, *overrides: str) -> JobSpec:
    return load_spec(TINY, ["name=warm", "vit.weights=pretrained", f"init_from.run={run}", *overrides])


@pytest.fixture
def run(tiny_run: TinyRun, tmp_path: Path) -> Path:
    """A published run that a test may damage."""
    return Path(shutil.copytree(tiny_run.published, tmp_path / "published" / tiny_run.published.name))


def rewrite(run: Path, name: str, content: bytes) -> None:
    """Change the content of an artifact, in the manifest too."""
    (run / name).write_bytes(content)
    manifest = read_json(run / "manifest.json")
    manifest["artifacts"] = artifacts_in(run)
    write_json(run / "manifest.json", manifest)


# Refused before the first phase


def lose_run(run: Path) -> None:
    shutil.rmtree(run)


def lose_manifest(run: Path) -> None:
    (run / "manifest.json").unlink()


def tear_manifest(run: Path) -> None:
    (run / "manifest.json").write_text('{"name": "tiny"')


def lose_file(run: Path) -> None:
    (run / "gan" / "generator.safetensors").unlink()


def flip_bit(run: Path) -> None:
    path = run / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lack_discriminator(run: Path) -> None:
    manifest = read_json(run / "manifest.json")
    del manifest["artifacts"]["gan/discriminator.safetensors"]
    write_json(run / "manifest.json", manifest)


def change_constants(run: Path) -> None:
    config = read_json(run / "gan" / "config.json")
    config["normalisation"]["mean_db"][3] += 1
    rewrite(run, "gan/config.json", json.dumps(config).encode())


@pytest.mark.parametrize(
    ("damage", "error", "problem"),
    [
        (lose_run, DataError, r"there is no .*manifest\.json\. Expected a published run"),
        (lose_manifest, DataError, r"there is no .*manifest\.json\. Expected a published run"),
        (tear_manifest, DataError, r"manifest\.json is not a manifest that this version can read .* Copy the run again"),
        (lose_file, DataError, r"gan/generator\.safetensors is missing\. Copy the run again"),
        (flip_bit, DataError, r"model/model\.safetensors differs from manifest\.json\. Copy the run again"),
        (lack_discriminator, DataError, r"has no gan/discriminator\.safetensors.* Set init_from\.gan to false"),
        (change_constants, DataError, r"have different normalisations.* Set init_from\.normalisation to new"),
    ],
)
def test_a_damaged_or_incomplete_run_is_refused_with_one_line(
    run: Path, damage: Callable[[Path], None], error: type[EmotionError], problem: str
) -> None:
    check_warm_start(warm_started(run), run)
    damage(run)
    with pytest.raises(error, match=f"^init_from: .*{problem}[^\n]*$"):
        check_warm_start(warm_started(run), run)


def test_only_the_files_used_have_to_be_intact_and_to_fit(run: Path) -> None:
    change_constants(run)
    check_warm_start(warm_started(run, "init_from.normalisation=new"), run)
    check_warm_start(warm_started(run, "init_from.gan=false"), run)
    lack_discriminator(run)
    check_warm_start(warm_started(run, "init_from.gan=false", "gan.width=5"), run)
    flip_bit(run)
    with pytest.raises(DataError, match=r"differs? from manifest\.json"):
        check_warm_start(warm_started(run, "init_from.gan=false"), run)


def test_settings_that_do_not_fit_are_listed_one_by_one_with_both_values(run: Path) -> None:
    others = ("mel.mels=16", "gan.width=5", "gan.latent=3", "vit.channels=3", "vit.model=vit_tiny_patch16_224")
    with pytest.raises(SpecError) as caught:
        check_warm_start(warm_started(run, *others), run)
    name = run.name
    assert str(caught.value) == (
        f"init_from: the weights do not fit: mel.mels is 16 here, 32 in {name}; gan.latent is 3 here, 4 in {name}; "
        f"gan.width is 5 here, 4 in {name}; vit.model is vit_tiny_patch16_224 here, test_vit in {name}; "
        f"vit.channels is 3 here, 1 in {name}. Take the settings of that run, or leave out init_from."
    )
    for key, value in (("sample_rate_hz", 11025), ("fmin_hz", 30), ("hop_samples", 128)):
        with pytest.raises(SpecError, match=rf"mel\.{key} is {value}(\.0)? here"):
            check_warm_start(warm_started(run, f"mel.{key}={value}"), run)
    check_warm_start(warm_started(run, "gan.clip_seconds=2", "vit.clip_seconds=2", "gan.epochs=9", "split.fold=1"), run)


@pytest.mark.parametrize("phase", ["gan", "vit"])
def test_both_trainings_check_the_run_before_the_first_phase(run: Path, phase: str) -> None:
    with pytest.raises(SpecError, match=r"gan\.width is 5 here"):
        BY_NAME[phase].check(warm_started(run, "gan.width=5"), FetchedInputs(None, run), StopRequest())


@pytest.mark.parametrize(
    ("phase", "name", "tensor", "value", "problem"),
    [
        ("gan", "gan/generator.safetensors", "extra", torch.ones(1), "it has, left over, extra"),
        ("gan", "gan/discriminator.safetensors", "stem.bias", torch.full((4,), torch.nan), "stem.bias holds NaN"),
        ("vit", "model/model.safetensors", "blocks.0.ls1.gamma", torch.ones(64), "left over, blocks.0.ls1.gamma"),
        ("vit", "model/model.safetensors", "norm.bias", torch.ones(64, dtype=torch.int8), "norm.bias is int8"),
    ],
)
def test_networks_that_are_not_of_this_version_are_refused_before_the_first_phase(
    run: Path, phase: str, name: str, tensor: str, value: torch.Tensor, problem: str
) -> None:
    BY_NAME[phase].check(warm_started(run), FetchedInputs(None, run), StopRequest())
    rewrite(run, name, save(load((run / name).read_bytes()) | {tensor: value}))
    with pytest.raises(EmotionError, match=problem) as refused:
        BY_NAME[phase].check(warm_started(run), FetchedInputs(None, run), StopRequest())
    assert refused.value.exit_code in (64, 65)


@pytest.mark.full
def test_a_wrong_run_ends_the_command_before_its_first_phase(
    tiny_run: TinyRun, emotion_job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    start = ("--set", "vit.weights=pretrained", "--set", f"init_from.run={tiny_run.published}")
    for settings, code, problem in [
        (("--set", f"init_from.run={tmp_path / 'absent'}"), 65, "init_from: "),
        (("--set", "gan.width=5"), 64, "gan.width is 5 here, 4 in"),
    ]:
        found = emotion_job("run", TINY, "--work", tmp_path / "work", *start, *settings)
        assert found.returncode == code, found.stderr
        assert problem in found.stderr
        assert "begins" not in found.stderr
        assert "Traceback" not in found.stderr


def test_test_songs_that_the_run_has_seen_are_refused_before_anything_is_trained(tiny_run: TinyRun, tmp_path: Path) -> None:
    folders = JobFolders(tmp_path, tiny_run.work / "scratch")
    # Also where only the ViT knows them, hours later.
    for settings in ((), ("init_from.gan=false", "init_from.normalisation=new")):
        spec = warm_started(tiny_run.published, "split.fold=1", *settings)
        with pytest.raises(ModelError, match=r"leak: the run tiny-\w+, .* They are test songs here\. Keep the split of that run"):
            run_job(spec, folders, "gan", False, StopRequest())
        assert not list(tmp_path.glob("*/gan-*/metrics.jsonl"))


# Keys


def keys(spec: JobSpec) -> tuple[str, str]:
    fetched = fetch_inputs(spec, Path(), StopRequest())
    gan, vit = (phase_key(BY_NAME[name], spec, fetched, receipts_of(BY_NAME[name]), StopRequest()) for name in ("gan", "vit"))
    return gan, vit


def test_phase_keys_depend_on_the_content_of_the_run_and_not_on_its_location(run: Path, tmp_path: Path) -> None:
    first = keys(warm_started(run))
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    rewrite(moved, "report.html", b"another report")
    assert keys(warm_started(moved)) == first
    rewrite(moved, "gan/discriminator.safetensors", b"other weights")
    assert [a == b for a, b in zip(keys(warm_started(moved)), first, strict=True)] == [False, True]
    rewrite(moved, "model/model.safetensors", b"other weights")
    assert keys(warm_started(moved))[1] != first[1]
    (moved / "model" / "model.safetensors").write_bytes(b"weights that differ from the manifest")
    with pytest.raises(DataError, match=r"differs? from manifest\.json"):
        keys(warm_started(moved))


def test_each_way_to_start_has_keys_of_its_own_and_an_unaffected_part_keeps_its_key(run: Path) -> None:
    cold = keys(warm_started(run, "init_from=null"))
    ways = {
        "both": keys(warm_started(run)),
        "new": keys(warm_started(run, "init_from.normalisation=new")),
        "vit": keys(warm_started(run, "init_from.gan=false")),
        "gan": keys(warm_started(run, "init_from.vit=false")),
        "vit new": keys(warm_started(run, "init_from.gan=false", "init_from.normalisation=new")),
        "gan new": keys(warm_started(run, "init_from.vit=false", "init_from.normalisation=new")),
    }
    assert ways["vit new"][0] == cold[0]
    assert ways["gan new"][1] == cold[1]
    # Weights alone do not make a key: kept constants of the one are in the key of the other.
    assert len({cold[0], ways["both"][0], ways["new"][0], ways["vit"][0]}) == 4
    assert len({cold[1], ways["both"][1], ways["new"][1], ways["gan"][1]}) == 4
    assert ways["gan"][0] == ways["both"][0]
    assert ways["vit"][1] == ways["both"][1]


# The whole job


@pytest.fixture(scope="module")
def warm_run(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a run with a warm start and the same split."""
    folders = JobFolders(tmp_path_factory.mktemp("warm"), tiny_run.work / "scratch")
    run_job(warm_started(tiny_run.published), folders, "publish", False, StopRequest())
    return folders.work


@pytest.mark.full
def test_a_warm_start_without_learning_predicts_the_same(tiny_run: TinyRun, warm_run: Path) -> None:
    untrained = warm_started(tiny_run.published, "name=untrained", "vit.learning_rate=1e-12")
    evaluated = run_job(untrained, JobFolders(warm_run, tiny_run.work / "scratch"), "evaluate", False, StopRequest())
    tables = [np.loadtxt(run / "predictions.csv", delimiter=",", skiprows=1) for run in (tiny_run.published, evaluated)]
    # Training may have computed in another precision than fp32, in which both are evaluated.
    assert np.allclose(*tables, atol=1e-4)


@pytest.mark.full
def test_manifest_and_report_name_the_run_and_its_lists_of_songs_are_kept(tiny_run: TinyRun, warm_run: Path) -> None:
    (published,) = (warm_run / "published").iterdir()
    assert read_json(published / "manifest.json")["init_from"] == {
        "run": str(tiny_run.published),
        "name": tiny_run.published.name,
        "manifest_sha256": sha256_of(tiny_run.published / "manifest.json"),
    }
    assert read_json(tiny_run.published / "manifest.json")["init_from"] is None
    assert (
        f"Warm start: training started from the weights of the run {tiny_run.published.name}."
        in (published / "report.html").read_text()
    )
    assert "Warm start:" not in (tiny_run.published / "report.html").read_text()
    for folder, name in (("gan", SEEN), ("model", SEEN), ("model", TRAINED)):
        # The same split: no song is new.
        assert read_seen(published / folder, name) == read_seen(tiny_run.published / folder, name)
    assert read_seen(published / "model", TRAINED) < read_seen(published / "model")


@pytest.mark.full
def test_the_same_run_at_another_location_keeps_the_phases(tiny_run: TinyRun, warm_run: Path, run: Path) -> None:
    spec = warm_started(run, "name=moved")
    plan = dict(plan_job(spec, JobFolders(warm_run, tiny_run.work / "scratch")))
    assert all(state.startswith("done") for phase, state in plan.items() if phase != "publish")


@pytest.mark.full
def test_a_warm_start_that_is_stopped_in_each_phase_publishes_the_same_bytes(
    tiny_run: TinyRun, warm_run: Path, tmp_path: Path
) -> None:
    folders = JobFolders(tmp_path, tiny_run.work / "scratch")
    spec = warm_started(tiny_run.published)

    unbroken = promised_bytes(warm_run / "published" / run_name(spec))
    assert unbroken
    assert promised_bytes(run_stopped_in_each_phase(spec, folders)) == unbroken
