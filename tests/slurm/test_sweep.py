"""Sweep files."""

from pathlib import Path
from typing import Any

import pytest

from emotion.errors import SpecError
from emotion.training.schedule import steps_of
from job.spec.load import load_spec
from job.spec.model import run_name
from slurm.sweep import distinct_features, load_sweep
from tests.conftest import TINY
from tests.slurm.samples import EXAMPLES, sweep_file


def refused(path: Path) -> str:
    with pytest.raises(SpecError) as caught:
        load_sweep(path)
    return str(caught.value)


def test_a_sweep_has_a_task_for_each_setting_seed_and_fold(tmp_path: Path) -> None:
    settings = [{"name": "base"}, {"name": "long", "set": ["gan.epochs=9", "vit.epochs=5"]}]
    sweep = load_sweep(sweep_file(tmp_path, folds=[0, 3], seeds=[7, 8], settings=settings, set=["synth.songs=11"]))
    assert [task.label for task in sweep.tasks] == [
        "base seed=7 fold=0",
        "base seed=7 fold=3",
        "base seed=8 fold=0",
        "base seed=8 fold=3",
        "long seed=7 fold=0",
        "long seed=7 fold=3",
        "long seed=8 fold=0",
        "long seed=8 fold=3",
    ]
    # The run is the one that emotion-job starts from the same overrides.
    overrides = ["synth.songs=11", "gan.epochs=9", "vit.epochs=5", "seed=8", "split.fold=3"]
    assert run_name(sweep.tasks[-1].spec) == run_name(load_spec(TINY, overrides))


def test_by_default_a_sweep_has_all_folds_of_kfold_and_no_fold_for_other_protocols(tmp_path: Path) -> None:
    assert [task.fold for task in load_sweep(sweep_file(tmp_path)).tasks] == [0, 1, 2, 3]
    (task,) = load_sweep(sweep_file(tmp_path, set=["split.protocol=holdout"])).tasks
    assert (task.fold, task.label) == (None, "base seed=0")
    assert "remove folds" in refused(sweep_file(tmp_path, set=["split.protocol=holdout"], folds=[0]))


def test_the_name_of_a_sweep_folder_depends_only_on_settings_that_change_results(tmp_path: Path) -> None:
    one = load_sweep(sweep_file(tmp_path, folds=[0, 1])).folder_name
    assert one == load_sweep(sweep_file(tmp_path, folds=[0, 1], set=["device.threads=2"])).folder_name
    assert one != load_sweep(sweep_file(tmp_path, folds=[0, 2])).folder_name


def test_two_settings_with_the_same_result_are_refused(tmp_path: Path) -> None:
    # The number of threads does not change a result.
    settings = [{"name": "a"}, {"name": "b", "set": ["device.threads=2"]}]
    text = refused(sweep_file(tmp_path, folds=[1], settings=settings))
    assert "a seed=0 fold=1 and b seed=0 fold=1 are the same job" in text
    settings = [{"name": "a"}, {"name": "b", "set": ["name=other"]}]
    text = refused(sweep_file(tmp_path, folds=[1], settings=settings))
    assert "a seed=0 fold=1 and b seed=0 fold=1 are the same job" in text


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"folds": [4]}, "fold 4: split: fold is 4, but with 4 folds it must be 0 to 3"),
        ({"folds": [0, 0]}, "folds: 0 is listed twice"),
        ({"seeds": [-1]}, "seed -1, fold 0: seed: expected a whole number of at least 0, found -1"),
        ({"settings": []}, "settings"),
        ({"settings": [{"name": "a", "set": ["gan.epoch=1"]}]}, "setting a: --set gan.epoch=1: gan.epoch: unknown key"),
        ({"settings": [{"name": "a b"}]}, "settings[0].name: expected 1 to 40 letters"),
        ({"settings": []}, "settings: expected a list of at least one, each keys (name, set), found []"),
        ({"seed": 3}, "seed: unknown key; did you mean seeds?"),
        ({"spec": "$HOME/a.yaml"}, "spec: '$HOME/a.yaml' has $HOME, which is not replaced; write the path out"),
        ({"spec": "none.yaml"}, "no such file, expected a spec"),
        ({"seeds": [*range(3000)]}, "more than 10000 tasks"),
    ],
)
def test_mistakes_in_a_sweep_file_are_reported(tmp_path: Path, values: dict[str, Any], expected: str) -> None:
    assert expected in refused(sweep_file(tmp_path, **values))


def test_features_are_prepared_once_for_each_distinct_dataset_and_mel_setting(tmp_path: Path) -> None:
    settings = [{"name": "a"}, {"name": "b", "set": ["gan.epochs=5"]}, {"name": "c", "set": ["mel.mels=16"]}]
    sweep = load_sweep(sweep_file(tmp_path, folds=[0, 1], settings=settings))
    assert distinct_features(sweep.specs) == [0, 4]


def test_all_settings_of_the_augmentation_sweep_train_for_as_many_steps() -> None:
    sweep = load_sweep(EXAMPLES / "augmentation.yaml", ["data.source=/songs", "data.scale=[0, 1]"])
    assert {str(task.spec.data.source) for task in sweep.tasks} == {"/songs"}
    assert {task.spec.data.scale for task in sweep.tasks} == {(0, 1)}
    configs = [task.spec.vit for task in sweep.tasks]
    assert {config.synthetic_per_batch for config in configs} == {0, 2, 4, 5}
    for lengths in ([config.epochs for config in configs], [config.patience_epochs for config in configs]):
        clips = [
            length * config.batch_size / (config.batch_size - config.synthetic_per_batch)
            for length, config in zip(lengths, configs, strict=True)
        ]
        assert clips == pytest.approx([clips[0]] * len(clips))


def test_all_settings_of_the_recipe_sweep_train_for_as_many_steps_without_synthetic_clips() -> None:
    sweep = load_sweep(EXAMPLES / "recipe.yaml", ["data.source=/songs"])
    assert len(sweep.tasks) == 70
    configs = [task.spec.vit for task in sweep.tasks]
    assert {config.synthetic_per_batch for config in configs} == {0}
    # Of the 100 epochs of small.yaml six in eight clips of a batch are real.
    assert {config.epochs / config.batch_size for config in configs} == {133 / 8}
    assert {config.patience_epochs / config.batch_size for config in configs} == {53 / 8}


def test_the_recipe_sweep_with_pretrained_weights_keeps_all_blocks_in_one_setting() -> None:
    sweep = load_sweep(EXAMPLES / "recipe-pretrained.yaml", ["data.source=/songs"])
    assert len(sweep.tasks) == 45
    assert [task.spec.vit.epochs for task in sweep.tasks if task.spec.vit.depth is None] == [0] * 5
    assert {task.spec.vit.synthetic_per_batch for task in sweep.tasks} == {0}


def test_the_example_sweep_is_valid() -> None:
    sweep = load_sweep(EXAMPLES / "sweep.yaml")
    assert len(sweep.tasks) == 20
    assert distinct_features(sweep.specs) == [0]
    vits = [task.spec.vit for task in sweep.tasks]
    steps = {steps_of(vit.epochs, 1225, vit.batch_size - vit.synthetic_per_batch) for vit in vits}
    assert max(steps) - min(steps) <= 1
