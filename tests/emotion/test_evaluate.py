import copy
import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from emotion.audio.clips import Normalisation
from emotion.audio.feature_store import Features, FeatureWriter
from emotion.audio.partition import Partition
from emotion.config import DeviceConfig, EvaluateConfig, MelConfig, VitConfig
from emotion.data.dynamic import DynamicPoint, write_dynamic
from emotion.data.label_scale import DEAM_SCALE, Scale
from emotion.data.leaks import read_seen, write_seen
from emotion.data.songs import SongLabels
from emotion.errors import DataError, Interrupted, ModelError
from emotion.evaluation.conformal import HalfWidths, write_intervals
from emotion.evaluation.evaluate import TrainedModel, evaluate, write_predictions
from emotion.evaluation.stack import fit_stack
from emotion.training.device import Device, resolve_device
from emotion.vit.network import create_network, preprocessing_for, save_model
from emotion.vit.predict import AudioPredictor, Prediction, SongPredictor

pytestmark = pytest.mark.usefixtures("one_thread")

MEL = MelConfig(sample_rate_hz=8000, window_samples=512, hop_samples=256, mels=32, fmax_hz=4000)
VIT = VitConfig(model="test_vit", weights="random", clip_seconds=1.1, max_crops=2)
CONFIG = EvaluateConfig(bootstrap_samples=100, raters_per_excerpt=10, raters_per_full_song=5)
# Exact in binary, so that nothing is rounded on the way.
BIAS = (0.25, -0.5)
TRAINING, VALIDATION, TEST = [0, 1, 2, 3], [4, 5], [9, 6, 8, 7]
SONGS = [  # song_id, valence, arousal
    (10, 0.75, 0.5),
    (11, -0.75, 0.5),
    (12, 0.5, -0.25),
    (13, -0.5, 0.25),
    (14, 0.5, 0.75),
    (15, 0.25, -1.0),
    (20, -0.5, 0.5),
    (2010, 0.5, 0.5),
    (30, -0.5, -0.5),
    (5, 0.5, -0.5),
]


def never() -> bool:
    return False


@pytest.fixture(scope="module")
def device() -> Device:
    return resolve_device(DeviceConfig(kind="cpu", threads=1), "fp32")


def write_features(
    out: Path,
    songs: list[tuple[int, float, float]],
    deviation: Callable[[int], float | None] = lambda _: 0.3,
    raters: int | None = None,
    scale: Scale = DEAM_SCALE,
    frames: int = 80,
) -> Features:
    rng = np.random.default_rng(0)
    with FeatureWriter(out, MEL, scale=scale) as writer:
        for song_id, valence, arousal in songs:
            log_mel = (-40 + 5 * rng.standard_normal((frames, 32))).astype(np.float32)
            labels = SongLabels(song_id, valence, arousal, 0.3, deviation(song_id), f"artist {song_id}", raters=raters)
            writer.append(labels, log_mel, file_sha256=f"file {song_id}", sound_sha256=f"sound {song_id}")
    return Features(out)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Features:
    return write_features(tmp_path_factory.mktemp("features"), SONGS)


def save_network(folder: Path, listens: float) -> Path:
    """A network with random weights whose head's weights are scaled by `listens`; its bias is BIAS."""
    folder.mkdir()
    normalisation = Normalisation(np.full(32, -40, np.float32), np.full(32, 10, np.float32))
    preprocessing = preprocessing_for(VIT, MEL, normalisation)
    network = create_network(VIT, preprocessing, np.array(BIAS, np.float32), 0)
    with torch.no_grad():
        network.get_classifier().weight.mul_(listens)  # type: ignore[operator]
    save_model(network, preprocessing, folder)
    write_seen(folder, {"nobody"})
    return folder


@pytest.fixture(scope="module")
def constant_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that predicts BIAS for every song."""
    return save_network(tmp_path_factory.mktemp("published") / "model", 0)


@pytest.fixture
def evaluated(features: Features, constant_model: Path, device: Device, tmp_path: Path) -> Callable[..., Any]:
    def run(
        test: list[int] = TEST,
        songs: Features = features,
        model: Path = constant_model,
        should_stop: Callable[[], bool] = never,
        stack_seen: set[str] | None = None,
        change_stack: Callable[[Path], None] = lambda _: None,
    ) -> Any:
        groups = ([songs.songs[index].group for index in positions] for positions in (TRAINING, VALIDATION, test))
        partition = Partition(songs.only(TRAINING), songs.only(VALIDATION), songs.only(test), *groups)
        predict = SongPredictor(model, device)
        fit_stack(partition, embed=None, predict=predict, seed=0, threads=1, out=tmp_path, should_stop=never)
        write_seen(tmp_path / "stack", stack_seen or read_seen(tmp_path / "stack"))
        change_stack(tmp_path / "stack")
        evaluate(
            partition,
            model=TrainedModel(model, tmp_path / "stack", predict, predict.curve),
            fold=3,
            config=CONFIG,
            seed=0,
            out=tmp_path,
            should_stop=should_stop,
        )
        return json.loads((tmp_path / "metrics.json").read_text())

    return run


def rows(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def test_predictions_are_those_of_the_network_in_the_order_of_the_test_songs(
    evaluated: Callable[..., Any], tmp_path: Path
) -> None:
    evaluated()
    assert [row[:6] for row in rows(tmp_path / "predictions.csv")] == [
        ["song_id", "fold", "valence_true", "valence_pred", "arousal_true", "arousal_pred"],
        ["5", "3", "0.5", "0.25", "-0.5", "-0.5"],
        ["20", "3", "-0.5", "0.25", "0.5", "-0.5"],
        ["30", "3", "-0.5", "0.25", "-0.5", "-0.5"],
        ["2010", "3", "0.5", "0.25", "0.5", "-0.5"],
    ]


def test_the_order_of_the_test_songs_does_not_change_their_predictions(evaluated: Callable[..., Any], tmp_path: Path) -> None:
    listening = save_network(tmp_path / "listening", 1)

    def predicted(test: list[int]) -> dict[str, list[float]]:
        evaluated(test, model=listening)
        return {row[0]: [float(row[3]), float(row[5])] for row in rows(tmp_path / "predictions.csv")[1:]}

    found = predicted(TEST)
    assert len({round(valence, 4) for valence, _ in found.values()}) == 4
    assert predicted(sorted(TEST)) == found


def test_the_metrics_of_a_constant_model_are_those_worked_out_by_hand(evaluated: Callable[..., Any]) -> None:
    metrics = evaluated()
    valence, arousal = metrics["model"]["valence"], metrics["model"]["arousal"]
    assert valence["ccc"] == arousal["ccc"] == 0
    assert valence["pearson"] is None
    # |0.25 - 0.5| twice, |0.25 + 0.5| twice; |-0.5 + 0.5| twice, |-0.5 - 0.5| twice.
    assert valence["mae"] == 0.5
    assert arousal["mae"] == 0.5
    assert valence["rmse"] == pytest.approx(((0.0625 + 0.5625) / 2) ** 0.5)
    assert arousal["r2"] == pytest.approx(1 - 0.5 / 0.25)
    assert metrics["songs"] == {"train": 4, "validation": 2, "test": 4}


def test_the_constant_baseline_is_the_mean_of_training_and_validation_songs(
    evaluated: Callable[..., Any], tmp_path: Path
) -> None:
    metrics = evaluated()
    # Sums of labels of the first six songs: 0.75 and 0.75.
    constant = [row for row in rows(tmp_path / "baselines.csv") if row[0] == "constant"]
    assert constant == [["constant", song, "0.125", "0.125"] for song in ("5", "20", "30", "2010")]
    assert metrics["baselines"]["constant"]["valence"]["mae"] == 0.5
    assert set(metrics["baselines"]) == {"constant", "ridge", "svr", "boosting"}


def test_six_songs_are_too_few_for_intervals_which_are_the_whole_range(evaluated: Callable[..., Any], tmp_path: Path) -> None:
    found = evaluated()["intervals"]
    assert found["level"] == 0.9
    for name, songs in (("stack", 6), ("model", 2)):
        valence = found[name]["valence"]
        assert (valence["half_width"], valence["held_out_songs"], valence["coverage"], valence["mean_width"]) == (
            None,
            songs,
            1,
            2,
        )
    ends = [row[8:] for row in rows(tmp_path / "predictions.csv")]
    assert ends == [["valence_lower", "valence_upper", "arousal_lower", "arousal_upper"], *[["-1.0", "1.0", "-1.0", "1.0"]] * 4]


def test_the_interval_of_a_prediction_is_its_own_and_its_coverage_that_of_the_table(
    evaluated: Callable[..., Any], tmp_path: Path
) -> None:
    def narrow(stack: Path) -> None:
        widths = HalfWidths(np.array([0.5, 0.25]), np.array([20, 20]))
        write_intervals({"stack": widths, "model": widths}, stack)

    metrics = evaluated(change_stack=narrow)
    table = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
    for axis, width in (("valence", 0.5), ("arousal", 0.25)):
        true, predicted, lower, upper = (
            np.array([float(row[f"{axis}_{name}"]) for row in table]) for name in ("true", "stack", "lower", "upper")
        )
        np.testing.assert_array_equal(lower, (predicted - width).clip(-1, 1))
        np.testing.assert_array_equal(upper, (predicted + width).clip(-1, 1))
        found = metrics["intervals"]["stack"][axis]
        assert found["coverage"] == np.mean((true >= lower) & (true <= upper))
    # The ViT predicts 0.25 and -0.5: valences ±0.5 are away by 0.25 or 0.75, arousals ±0.5 by 0 or 1. Two of four each.
    for axis in ("valence", "arousal"):
        assert metrics["intervals"]["model"][axis]["coverage"] == 0.5


def test_listeners_are_measured_where_there_are_deviations(evaluated: Callable[..., Any], tmp_path: Path) -> None:
    found = evaluated()["listeners"]["valence"]
    # E of 10, 10, 10 and 5 raters: 0.09 times 10/9 or 5/4; T = 0.25 less the mean of E / n.
    listener = 0.09 * (3 * 10 / 9 + 5 / 4) / 4
    shared = 0.25 - (3 * 0.01 + 0.0225) / 4
    others = 0.09 * (3 * 10 / 81 + 5 / 16) / 4
    assert found["single_listener_ccc"] == pytest.approx(2 * shared / (2 * shared + listener + others))
    assert found["listener_equivalents"]["model"]["value"] == 0  # a constant has a CCC of 0
    assert "listeners" not in evaluated(songs=write_features(tmp_path / "none", SONGS, lambda _: None))


def test_the_ceiling_counts_fewer_raters_for_full_songs(evaluated: Callable[..., Any]) -> None:
    ceiling = evaluated()["ceiling"]
    # Labels of ±0.5 vary by 0.25; deviations of 0.3 over 10, 10, 10 and 5 raters, divisor one less: 0.01, 0.01, 0.01, 0.0225.
    reliability = 1 - (0.01 * 3 + 0.0225) / 4 / 0.25
    for axis in ("valence", "arousal"):
        assert ceiling[axis]["r2"] == pytest.approx(reliability)
        assert ceiling[axis]["ccc"] == pytest.approx(reliability**0.5)


def test_labels_without_deviations_have_no_ceiling_and_the_metrics_say_so(evaluated: Callable[..., Any], tmp_path: Path) -> None:
    for name, deviation in (("one", lambda song: None if song == SONGS[TEST[0]][0] else 0.3), ("all", lambda _: None)):
        metrics = evaluated(songs=write_features(tmp_path / name, SONGS, deviation))
        assert metrics["ceiling"] is None
        assert metrics["no_ceiling"] == "none: not all test songs have standard deviations over raters"
    assert "no_ceiling" not in evaluated()


def test_deviations_that_are_all_0_are_none(evaluated: Callable[..., Any], tmp_path: Path) -> None:
    songs = write_features(tmp_path / "songs", SONGS, lambda _: 0.0)
    zeros = copy.copy(songs)
    zeros.songs = [replace(song, valence_sd=0.0) for song in songs.songs]
    assert evaluated(songs=zeros)["ceiling"] is None
    # Raters who agree about one of the dimensions were asked, nevertheless.
    assert evaluated(songs=songs)["ceiling"]["arousal"]["ccc"] == 1


def test_the_raters_that_a_dataset_names_count_in_the_ceiling(evaluated: Callable[..., Any], tmp_path: Path) -> None:
    of_two, of_a_hundred = (
        evaluated(songs=write_features(tmp_path / str(raters), SONGS, raters=raters))["ceiling"]["arousal"]["reliability"]
        for raters in (2, 100)
    )
    variance = float(np.var([SONGS[index][2] for index in TEST]))
    assert of_two == pytest.approx(1 - 0.3**2 / variance)
    assert of_a_hundred == pytest.approx(1 - 0.3**2 / 99 / variance)


def test_the_metrics_name_the_scale_of_the_ratings(evaluated: Callable[..., Any], tmp_path: Path) -> None:
    assert evaluated()["scale"].startswith("labels on -1..1, (x - 5) / 4 of DEAM's 1..9; ")
    for scale, text in (((0, 100), "(x - 50) / 50 of 0..100"), ((-7, 3), "(x + 2) / 5 of -7..3"), ((-1, 1), "x of -1..1")):
        songs = write_features(tmp_path / str(scale), SONGS, scale=scale)
        assert evaluated(songs=songs)["scale"].startswith(f"labels on -1..1, {text}; ")


def test_labels_that_do_not_vary_have_no_ceiling(evaluated: Callable[..., Any]) -> None:
    # Songs 9 and 7 have one valence, 9 and 8 one arousal.
    assert evaluated([9, 7])["ceiling"] is None
    assert evaluated([9, 8])["ceiling"] is None


def test_a_single_test_song_has_errors_but_no_ccc_and_no_ceiling(evaluated: Callable[..., Any]) -> None:
    metrics = evaluated([9])
    assert metrics["ceiling"] is None
    assert metrics["model"]["valence"]["ccc"] is None
    assert metrics["model"]["valence"]["mae"] == 0.25


def test_the_order_of_the_test_songs_changes_no_metric(evaluated: Callable[..., Any]) -> None:
    def numbers(metrics: Any) -> Any:
        return {name: value for name, value in metrics["model"]["valence"].items() if not name.endswith("_ci")}

    assert numbers(evaluated(TEST)) == numbers(evaluated(sorted(TEST)))


def test_labels_of_test_songs_do_not_change_any_prediction(evaluated: Callable[..., Any], tmp_path: Path) -> None:
    evaluated()
    before = (tmp_path / "baselines.csv").read_bytes(), rows(tmp_path / "predictions.csv")
    others = write_features(tmp_path / "others", [SONGS[i] if i < 6 else (SONGS[i][0], 0.1 * i, -0.1) for i in range(10)])
    evaluated(songs=others)
    after = rows(tmp_path / "predictions.csv")
    assert (tmp_path / "baselines.csv").read_bytes() == before[0]
    for column, changed in enumerate([False, False, True, False, True, *5 * [False]]):
        assert ([row[column] for row in after] != [row[column] for row in before[1]]) is changed, column


def test_it_checks_for_a_stop_before_each_forward_pass_and_song(evaluated: Callable[..., Any], tmp_path: Path) -> None:
    # One forward pass predicts the eight crops of the test songs.
    asked = []

    def stop_at_the_end() -> bool:
        asked.append(True)
        return len(asked) == predicted + pooled

    predicted, pooled = 1, len(TEST)
    with pytest.raises(Interrupted, match="evaluate: stopped"):
        evaluated(should_stop=stop_at_the_end)
    assert not (tmp_path / "metrics.json").exists()
    assert evaluated()


def test_predictions_read_back_from_csv_bit_by_bit(tmp_path: Path) -> None:
    odd = np.array([[0.1, 1 / 3], [np.float32(0.1), -1e-17]], np.float64)
    columns = {"true": odd, "pred": -odd, "stack": odd / 7, "lower": odd / 3, "upper": odd / 11}
    write_predictions(tmp_path / "p.csv", [1, 2], [0, 0], columns)
    read = np.array([[float(cell) for cell in row[2:]] for row in rows(tmp_path / "p.csv")[1:]])
    assert np.array_equal(read[:, [0, 2]], odd)
    assert np.array_equal(read[:, [1, 3]], -odd)
    assert np.array_equal(read[:, [4, 5]], odd / 7)
    assert np.array_equal(read[:, [6, 8]], odd / 3)
    assert np.array_equal(read[:, [7, 9]], odd / 11)


def test_a_model_that_has_seen_a_test_song_under_another_id_is_not_evaluated(
    evaluated: Callable[..., Any], constant_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(constant_model, model)
    write_seen(model, {"sound 20"})
    with pytest.raises(ModelError, match=r"leak: the model has seen .* ids: 20\."):
        evaluated(model=model)


def test_a_test_song_among_the_training_songs_of_the_baselines_is_refused(evaluated: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="leak: the baselines"):
        evaluated([9, TRAINING[0]])


def test_a_stack_that_has_seen_a_test_song_is_not_evaluated(evaluated: Callable[..., Any], features: Features) -> None:
    with pytest.raises(ModelError, match="leak: the stack has seen"):
        evaluated(stack_seen={features.songs[TEST[0]].sound_sha256})


def test_a_synthetic_clip_among_the_test_songs_is_refused(evaluated: Callable[..., Any], features: Features) -> None:
    planted = features.only(range(10))
    planted.songs[9] = replace(planted.songs[9], file_sha256="", sound_sha256="", group="synthetic:9")
    with pytest.raises(ModelError, match="is no song: a synthetic clip has no file digests"):
        evaluated(songs=planted)


def test_curves_are_scored_where_the_features_have_dynamic_annotations(evaluated: Callable[..., Any], tmp_path: Path) -> None:
    assert "dynamic" not in evaluated()
    songs = write_features(tmp_path / "songs", SONGS, frames=620)  # of 19.84 s
    # Songs 20 and 5 are test songs; 10 is not. The constant model says 0.25 and -0.5.
    said = [(20, 15.0, 0.5, -0.5), (20, 15.5, 0.0, 0.0), (5, 19.0, 0.25, -1.0), (5, 21.0, 1.0, 1.0), (10, 15.0, 0.9, 0.9)]
    write_dynamic(tmp_path / "songs", [DynamicPoint(*point) for point in said])
    found = evaluated(songs=songs)["dynamic"]
    assert (found["songs"], found["points"]) == (2, 3)
    for name in ("curve", "flat"):
        assert found[name]["valence"]["rmse"] == pytest.approx((2 * 0.25**2 / 3) ** 0.5)
        assert found[name]["arousal"]["song_rmse"] == pytest.approx(((0.5**2 / 2) ** 0.5 + 0.5) / 2)


# Predict


@pytest.mark.parametrize("seconds", [0.1, 1.1, 5.0])
def test_an_audio_file_of_any_length_gets_the_prediction_of_the_network(
    constant_model: Path, device: Device, tmp_path: Path, seconds: float
) -> None:
    audio = tmp_path / "tone.wav"
    samples = np.sin(2 * np.pi * 440 * np.arange(int(seconds * 22050)) / 22050)
    soundfile.write(audio, np.stack([samples, samples], axis=1), 22050)
    expected = Prediction(*BIAS, {})[:2]
    assert AudioPredictor(constant_model, device)(audio)[:2] == expected
    # A published run is accepted as well as its model/.
    assert AudioPredictor(constant_model.parent, device)(audio)[:2] == expected


def test_a_prediction_is_clipped_to_the_label_scale(device: Device, tmp_path: Path) -> None:
    preprocessing = preprocessing_for(VIT, MEL, Normalisation(np.zeros(32, np.float32), np.ones(32, np.float32)))
    far_away = np.array([30, -30], np.float32)
    save_model(create_network(VIT, preprocessing, far_away, 0), preprocessing, tmp_path)
    soundfile.write(tmp_path / "silence.wav", np.zeros(8000), 8000)
    found = AudioPredictor(tmp_path, device)(tmp_path / "silence.wav")
    assert (found.valence, found.arousal) == (1, -1)


def test_a_sound_that_is_too_long_to_predict_is_refused_without_naming_a_setting(
    constant_model: Path, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emotion.vit.predict.LONGEST_SECONDS", 1.0)
    soundfile.write(tmp_path / "long.wav", np.zeros(8001), 8000)
    with pytest.raises(DataError, match=r"long\.wav: lasts longer than 1 s\. Predict for parts of it\.$"):
        AudioPredictor(constant_model, device)(tmp_path / "long.wav")


def test_a_sound_that_may_be_cut_is_predicted_with_a_warning(constant_model: Path, device: Device, tmp_path: Path) -> None:
    audio = tmp_path / "cut.wav"
    soundfile.write(audio, np.random.default_rng(0).uniform(-0.3, 0.3, 48000), 8000)
    predict = AudioPredictor(constant_model, device)
    assert predict(audio).warnings == {}
    audio.write_bytes(audio.read_bytes()[:-1000])
    assert predict(audio).warnings == {"cut": "its header announces 1000 bytes of sound more than the file has"}


def test_a_missing_file_and_a_folder_without_a_model_are_named_in_the_error(
    constant_model: Path, device: Device, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"absent\.wav: no such audio file"):
        AudioPredictor(constant_model, device)(tmp_path / "absent.wav")
    with pytest.raises(DataError, match=r"no model\.safetensors"):
        AudioPredictor(tmp_path, device)
