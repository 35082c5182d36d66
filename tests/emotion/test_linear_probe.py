"""The head that a training from pretrained weights begins with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from emotion.audio.clips import normalisation_of, spread_starts
from emotion.audio.feature_store import Features, cut_clip
from emotion.audio.partition import TrainingSongs
from emotion.config import VitConfig
from emotion.errors import Interrupted, ModelError
from emotion.files import read_json, read_json_lines
from emotion.vit.crops import SongLogMel, predict_songs
from emotion.vit.linear_probe import fit_head
from emotion.vit.network import Preprocessing, create_network, load_model, network_input, preprocessing_for
from tests.emotion.trainings import CPU, SMALL_MEL, context, partition, pretrained_vit, run_vit, stop_at_question, write_songs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> VitConfig:
    return pretrained_vit(tmp_path_factory.mktemp("pretrained"))


def records_of(out: Path) -> dict[int, float]:
    """Epoch → CCC of the validation songs."""
    return {line["epoch"]: line["validation_ccc"] for line in read_json_lines(out / "metrics.jsonl") if "epoch" in line}


def test_labels_that_are_linear_in_the_features_are_predicted_at_once(config: VitConfig, tmp_path: Path) -> None:
    songs = write_songs(tmp_path / "features", SMALL_MEL, 160, seed=5)
    preprocessing = preprocessing_for(config, SMALL_MEL, normalisation_of(songs))
    network = create_network(config, preprocessing, np.zeros(2, np.float32), 0).eval()
    views = [songs.stored(song) for song in range(160)]
    features = pooled_features(network, preprocessing, views)
    # The label of a song is a hidden combination of the features, which are numbers of any size.
    hidden = np.random.default_rng(1).normal(size=(features.shape[1], 2)) / features.std(axis=0)[:, None]
    combined = (features - features.mean(axis=0)) @ hidden
    labels = 0.4 * combined / np.abs(combined).max(axis=0) + [0.2, -0.3]
    songs.labels = labels.astype(np.float32)
    groups = [str(song) for song in range(160)]
    training = TrainingSongs(songs.only(range(120)))
    fit_head(network, preprocessing, training, groups=groups[:120], context=context(tmp_path), micro_batch=8)
    predicted = predict_songs(network, preprocessing, CPU, views[120:])
    for column in (0, 1):
        assert np.corrcoef(predicted[:, column], labels[120:, column])[0, 1] > 0.95
        assert abs((predicted[:, column] - labels[120:, column]).mean()) < 0.02


def pooled_features(network: nn.Module, preprocessing: Preprocessing, views: list[SongLogMel]) -> np.ndarray:
    """[songs, features], song by song in the plainest way: what the head of the network is given, a mean over crops."""
    given: list[torch.Tensor] = []
    hook = network.get_classifier().register_forward_hook(lambda _module, inputs, _output: given.append(inputs[0]))
    rows = []
    for song in views:
        starts = spread_starts(len(song), preprocessing.frames, preprocessing.max_crops)
        clips = [preprocessing.normalisation.apply(cut_clip(song, start, preprocessing.frames)).T for start in starts]
        with torch.no_grad():
            network(network_input(torch.from_numpy(np.stack(clips)[:, None]), preprocessing))
        rows.append(given.pop().mean(dim=0).numpy())
    hook.remove()
    return np.stack(rows).astype(np.float64)


def test_pretrained_weights_begin_with_it_and_random_ones_do_not(
    real: Features, synthetic: Features, config: VitConfig, tmp_path: Path
) -> None:
    songs = partition(real.only(range(7)), real.only([7, 8, 9]))
    run_vit(songs, synthetic, config, context(tmp_path / "pretrained"))
    random = config.model_copy(update={"weights": "random", "weights_mel": "same"})
    run_vit(songs, synthetic, random, context(tmp_path / "random"))
    assert sorted(records_of(tmp_path / "pretrained")) == [0, 1, 2]
    assert sorted(records_of(tmp_path / "random")) == [1, 2]


def test_it_stays_the_model_where_no_epoch_is_better(
    real: Features, synthetic: Features, config: VitConfig, tmp_path: Path
) -> None:
    # The second training begins at the same head; its learning rate is too high for anything to come of it.
    songs = partition(real.only(range(7)), real.only([7, 8, 9]))
    models = []
    for name, rate in (("none", 1e-12), ("spoilt", 3.0)):
        changed = config.model_copy(update={"learning_rate": rate, "ema_decay": 0.0})
        run_vit(songs, synthetic, changed, context(tmp_path / name))
        models.append(load_model(tmp_path / name / "model", CPU)[0].get_classifier().weight)
    summary = read_json(tmp_path / "spoilt" / "summary.json")
    assert (summary["best_epoch"], summary["is_linear_probe"]) == (0, True)
    assert torch.allclose(*models, atol=1e-6)


def test_with_no_epochs_it_is_the_model(real: Features, synthetic: Features, config: VitConfig, tmp_path: Path) -> None:
    songs = partition(real.only(range(7)), real.only([7, 8, 9]))
    models = []
    for name, changes in (("none", {"epochs": 0}), ("untrained", {"learning_rate": 1e-12, "ema_decay": 0.0})):
        run_vit(songs, synthetic, config.model_copy(update=changes), context(tmp_path / name))
        models.append(load_model(tmp_path / name / "model", CPU)[0].get_classifier().weight)
    assert torch.allclose(*models, atol=1e-6)
    assert records_of(tmp_path / "none").keys() == {0}
    assert read_json(tmp_path / "none" / "summary.json")["is_linear_probe"] is True
    assert not any("warning" in line for line in read_json_lines(tmp_path / "none" / "metrics.jsonl"))
    with pytest.raises(Interrupted):  # in the validation, which a resumed run repeats
        run_vit(songs, synthetic, config.model_copy(update={"epochs": 0}), context(tmp_path / "stopped", stop_at_question(3)))
    run_vit(songs, synthetic, config.model_copy(update={"epochs": 0}), context(tmp_path / "stopped"))
    model = "model/model.safetensors"
    assert (tmp_path / "stopped" / model).read_bytes() == (tmp_path / "none" / model).read_bytes()


@pytest.mark.parametrize(
    "other", [{"weights": "random"}, {"synthetic_share": 0.25}, {"teacher": "teacher.npz"}], ids=lambda other: next(iter(other))
)
def test_with_no_epochs_there_must_be_a_probe_and_nothing_to_train(other: dict[str, Any]) -> None:
    settings = {"epochs": 0, "weights": "pretrained", "synthetic_share": 0.0}
    assert VitConfig.model_validate(settings).epochs == 0
    ((key, value),) = other.items()
    with pytest.raises(ValueError, match=f"epochs 0 is only a linear probe: it needs pretrained weights.*found.*{key} {value!r}"):
        VitConfig.model_validate(settings | other)


def test_stopped_anywhere_it_ends_with_the_same_bytes(
    real: Features, synthetic: Features, config: VitConfig, tmp_path: Path
) -> None:
    config = config.model_copy(update={"epochs": 1})
    songs = partition(real.only(range(7)), real.only([7, 8, 9]))
    run_vit(songs, synthetic, config, context(tmp_path / "whole"))
    for asked in (0, 2, 4, 7):  # while the head is fitted, in the first validation, after a step, in the last validation
        out, answers = tmp_path / f"stopped {asked}", iter([False] * asked + [True])
        try:
            run_vit(songs, synthetic, config, context(out, lambda answers=answers: next(answers, True)))
        except Interrupted:
            run_vit(songs, synthetic, config, context(out))
        model = "model/model.safetensors"
        assert (out / model).read_bytes() == (tmp_path / "whole" / model).read_bytes(), asked


def test_what_was_fitted_is_not_fitted_again(real: Features, synthetic: Features, config: VitConfig, tmp_path: Path) -> None:
    config = config.model_copy(update={"epochs": 1})
    songs = partition(real.only(range(7)), real.only([7, 8, 9]))
    asked = {"whole": 0, "stopped": 0}

    def run(name: str) -> None:
        def should_stop() -> bool:
            asked[name] += 1
            return False

        run_vit(songs, synthetic, config, context(tmp_path / name, should_stop))

    run("whole")
    with pytest.raises(Interrupted):  # in the first validation
        run_vit(songs, synthetic, config, context(tmp_path / "stopped", stop_at_question(3)))
    run("stopped")
    assert asked["stopped"] == asked["whole"] - 2  # which were asked while the head was fitted
    models = [tmp_path / name / "model" / "model.safetensors" for name in asked]
    assert models[0].read_bytes() == models[1].read_bytes()


@pytest.mark.parametrize("gate", ["always", "auto"])
def test_labels_of_one_value_are_no_fault(
    real: Features, synthetic: Features, config: VitConfig, tmp_path: Path, gate: str
) -> None:
    # A regression predicts that value, of which no CCC is defined; the training of a random head goes through, too.
    training, validation = real.only(range(7)), real.only([7, 8, 9])
    for some in (training, validation):
        some.labels = some.labels * [0, 1] + np.float32([0.3, 0])
    songs = partition(training, validation)
    changes = {"synthetic": gate, "synthetic_share": 0.5, "learning_rate": 1e-12}
    run_vit(songs, synthetic, config.model_copy(update=changes), context(tmp_path))
    first = next(line for line in read_json_lines(tmp_path / "metrics.jsonl") if "epoch" in line)
    assert first["validation_ccc_valence"] == 0
    assert first["training_ccc"] > 0.1


def test_weights_that_give_no_numbers_are_refused(real: Features, synthetic: Features, config: VitConfig, tmp_path: Path) -> None:
    weights = {name: value * 1e30 if "patch_embed" in name else value for name, value in torch.load(config.weights).items()}
    torch.save(weights, tmp_path / "huge.pt")
    songs = partition(real.only(range(7)), real.only([7, 8, 9]))
    huge = config.model_copy(update={"weights": str(tmp_path / "huge.pt")})
    with pytest.raises(ModelError, match=r"NaN or infinity.*precision.*vit\.weights"):
        run_vit(songs, synthetic, huge, context(tmp_path))


def test_a_final_model_may_be_the_probe(real: Features, synthetic: Features, config: VitConfig, tmp_path: Path) -> None:
    # Of folds whose median of the best epochs is 0; more epochs begin with the same one.
    songs = partition(real)
    for name, stop_epoch, rate in (("none", 0, 1e-3), ("one", 1, 1e-12)):
        changed = config.model_copy(update={"learning_rate": rate})
        run_vit(songs, synthetic, changed, context(tmp_path / name), stop_epoch=stop_epoch)
    weights = [load_model(tmp_path / name / "model", CPU)[0].get_classifier().weight for name in ("none", "one")]
    assert torch.allclose(*weights, atol=1e-6)
    assert weights[0].abs().max() > 0.01
