import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from emotion.audio.clips import Normalisation
from emotion.audio.feature_store import Features
from emotion.compat import timm
from emotion.config import VitConfig
from emotion.errors import DataError, Interrupted
from emotion.training.clip_source import ClipSource, Stream
from emotion.vit.memory import predicted_memory
from emotion.vit.teacher import Pupil, SongRows, Teacher, embedding_loss, read_teacher, require_songs
from emotion.vit.train import step_numbers
from tests.emotion.trainings import (
    CPU,
    SMALL_MEL,
    SMALL_VIT,
    context,
    largest_difference,
    never,
    partition,
    run_vit,
    stop_at_question,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES = 32
FRAMES_PER_SECOND = SMALL_MEL.sample_rate_hz / SMALL_MEL.hop_samples
Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def file(real: Features, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of all songs: linear in the labels, in 5 dimensions."""
    path = tmp_path_factory.mktemp("teacher") / "embeddings.npz"
    embedding = real.labels @ np.random.default_rng(2).standard_normal((2, 5)) + 7
    np.savez(path, names=[str(song.song_id) for song in real.songs], embedding=embedding)
    return path


def config_of(file: Path | None, **values: Any) -> VitConfig:
    return VitConfig.model_validate(SMALL_VIT.model_dump() | {"teacher": str(file) if file else None} | values)


def refusal(path: Path) -> str:
    with pytest.raises(DataError, match=rf"^vit\.teacher: {path}[^\n]*$") as refused:
        read_teacher(path)
    return str(refused.value)


# The file


def test_both_forms_of_a_file_say_the_same(tmp_path: Path) -> None:
    parts = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.savez(tmp_path / "a.npz", names=["one/a b.wav", "7", "7", "7"], embedding=parts, seconds=[0, 2.5, 0.5, 1.5])
    save_file({"one/a b.wav": parts[0], "7": parts[[2, 3, 1]]}, tmp_path / "b.safetensors")
    found, other = read_teacher(tmp_path / "a.npz"), read_teacher(tmp_path / "b.safetensors")
    assert found.keys() == other.keys() == {"one/a b.wav", "7"}
    assert all(np.array_equal(found[name].rows, other[name].rows) for name in found)
    seconds = found["7"].seconds
    assert seconds is not None
    assert seconds.tolist() == [0.5, 1.5, 2.5]
    assert other["7"].seconds is None


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


ONE = np.ones((2, 3))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"names": ["1", "2"]}, "has names, but no embedding"),
        ({"embedding": ONE, "labels": ONE}, "has embedding, labels, but no names"),
        ({"names": ["1"], "embedding": ONE}, r"expected embedding [1, dimensions] of floats, found [2, 3] float64"),
        ({"names": ["1", "2"], "embedding": np.ones((2, 3), int)}, "found [2, 3] int64"),
        ({"names": ["1", "2"], "embedding": ONE[0]}, "found [3] float64"),
        ({"names": ["1", "1"], "embedding": ONE}, "names 1 more than once. Add seconds"),
        ({"names": ["1", "2"], "embedding": ONE, "seconds": [1.0]}, "expected seconds [2], finite, found [1]"),
        ({"names": ["1", "2"], "embedding": ONE, "seconds": [1.0, np.nan]}, "expected seconds [2], finite"),
        ({"names": ["1", "2"], "embedding": [[1.0], [np.inf]]}, "NaN or infinity in the embeddings of 2"),
        ({"names": np.array(["1", Evil()], object), "embedding": ONE}, "allow_pickle=False"),
    ],
)
def test_an_archive_that_holds_no_embeddings_is_refused(
    content: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "t.npz", **content)
    assert words in refusal(tmp_path / "t.npz")
    assert not Path("executed").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    assert "No such file" in refusal(path)
    assert "Is a directory" in refusal(tmp_path)
    save_file({"1": np.ones(3), "2": np.ones(4)}, path)
    assert "embeddings of 3, 4 dimensions" in refusal(path)
    save_file({"1": np.ones(3), "2": np.ones(3, int)}, path)
    assert "2 is [3] int64" in refusal(path)
    save_file({}, path)
    assert "embeddings of no dimensions" in refusal(path)
    for content in (b"", b"song,embedding\n", b"PK\x03\x04" + bytes(99), bytes(99)):
        path.write_bytes(content)
        assert "is not readable as a .npz or .safetensors file of embeddings" in refusal(path)


def test_damage_anywhere_is_read_or_refused_and_never_another_exception(tmp_path: Path) -> None:
    path, draws = tmp_path / "t.npz", np.random.default_rng(0)
    np.savez(path, names=["1", "2"], embedding=ONE, seconds=[0.5, 1.0])
    whole, refused = path.read_bytes(), 0
    for round_ in range(300):
        damaged = bytearray(whole)
        if round_ % 3:
            damaged[draws.integers(len(whole))] = draws.integers(256)
        else:
            del damaged[draws.integers(len(whole)) :]
        path.write_bytes(damaged)
        try:
            read_teacher(path)
        except DataError:
            refused += 1
    assert refused >= 100


def test_songs_without_an_embedding_are_listed(real: Features) -> None:
    found = {str(number): SongRows(np.ones((1, 3), np.float32), None) for number in (0, 1, 2, 3, 4, 6, 8)}
    with pytest.raises(DataError, match=r"3 of 10 training songs have no embedding: 5, 7, 9\. The file names 0, 1,"):
        require_songs(found, real.songs)


# Targets


def test_targets_are_standardised_by_the_training_songs_each_with_the_same_weight(real: Features, file: Path) -> None:
    teacher = Teacher(read_teacher(file), real.songs[:7], SMALL_MEL, FRAMES)
    labels = np.zeros((9, 2), np.float32)
    targets = teacher.beside(labels, np.arange(7), np.zeros(7, int))
    assert targets.shape == (9, 2 + 5 + 1)
    embedding = np.load(file)["embedding"][:7]
    expected = (embedding - embedding.mean(axis=0)) / embedding.std(axis=0)
    assert np.allclose(targets[:7, 2:-1], expected.clip(-3, 3), atol=1e-5)
    assert targets[:, -1].tolist() == [1] * 7 + [0] * 2
    assert not targets[7:].any()
    # A song in many parts counts as much as one in one.
    parts = {"0": SongRows(np.full((90, 1), 3, np.float32), None), "1": SongRows(np.full((1, 1), 1, np.float32), None)}
    both = Teacher(parts, real.songs[:2], SMALL_MEL, FRAMES).beside(labels[:2], np.arange(2), np.zeros(2, int))
    assert np.allclose(both[:, 2], [1, -1])


def test_a_dimension_that_is_constant_teaches_nothing_and_one_that_is_far_out_is_clipped(real: Features) -> None:
    found = {str(number): SongRows(np.array([[0.1, 1000.0 * (number == 4)]], np.float32), None) for number in range(10)}
    ten = np.zeros((20, 2), np.float32)
    songs = [*real.songs, *real.songs[:4], *real.songs[5:]]  # one of 19
    targets = Teacher(found, songs, SMALL_MEL, FRAMES).beside(ten[:19], np.arange(19), np.zeros(19, int))
    assert not targets[:, 2].any()
    assert targets[4, 3] == 3


def test_a_clip_is_to_predict_the_parts_that_are_in_it(real: Features) -> None:
    # Middles at the frames 5, 15, … 75 of 80, with the values 0 to 7.
    values = np.arange(8, dtype=np.float32)[:, None]
    seconds = (10 * values[:, 0] + 5) / FRAMES_PER_SECOND
    for song in (SongRows(values, None), SongRows(values, seconds.astype(np.float64))):

        def target(start: int, frames: int, song: SongRows = song) -> float:
            teacher = Teacher({"0": song}, real.songs[:1], SMALL_MEL, frames)
            found = teacher.beside(np.zeros((1, 2), np.float32), np.array([0]), np.array([start]))[0, 2]
            return float(found * values.std() + values.mean())

        assert target(0, 30) == pytest.approx(1)
        assert target(41, 30) == pytest.approx(5)
        assert target(6, 4) == pytest.approx(0)  # none in it; the nearest is at 5
        assert target(12, 2) == pytest.approx(1)
        assert target(0, 80) == target(0, 200) == pytest.approx(3.5)


@pytest.mark.parametrize("mixup_alpha", [0.0, 5.0])
def test_what_has_anything_synthetic_in_it_has_no_embedding_and_the_rest_is_mixed_alike(
    mixup_alpha: float, real: Features, synthetic: Features, file: Path
) -> None:
    config = config_of(file, mixup_alpha=mixup_alpha, mixup_bandwidth=10.0)
    streams = [Stream("vit", real, 6), Stream("vit-synthetic", synthetic, 4)]
    source = ClipSource(streams, FRAMES, Normalisation(np.zeros(32, np.float32), np.ones(32, np.float32)), CPU, on_device=False)
    teacher = Teacher(read_teacher(file), real.songs, SMALL_MEL, FRAMES)
    shape, linear = (SMALL_MEL.mels, FRAMES), np.linalg.lstsq(with_one(real.labels), standardised(file), rcond=None)[0]
    seen = set()
    for step in range(20):
        found = step_numbers(source, step, config=config, shape=shape, longest_mask=5, seed=0, teacher=teacher)
        alone = step_numbers(source, step, config=config, shape=shape, longest_mask=5, seed=0)
        labels = found.pop("labels")
        assert np.array_equal(labels[:, :2], alone.pop("labels"))
        assert all(np.array_equal(values, alone[name]) for name, values in found.items())
        partners = found.get("partners", np.arange(10))
        known = (np.arange(10) < 6) & (partners < 6)
        assert labels[:, -1].tolist() == known.tolist()
        # The embeddings are linear in the labels, so they are after mixing.
        assert np.allclose(labels[known, 2:-1], with_one(labels[known, :2]) @ linear, atol=1e-4)
        seen.add(int(known.sum()))
    assert seen == {6} if mixup_alpha == 0 else len(seen) > 2


def with_one(x: Array) -> Array:
    return np.column_stack([x, np.ones(len(x))])


def standardised(file: Path) -> Array:
    embedding = np.load(file)["embedding"]
    found: Array = (embedding - embedding.mean(axis=0)) / embedding.std(axis=0)
    assert np.abs(found).max() < 3
    return found


def test_the_loss_is_the_mean_square_over_the_clips_that_are_known() -> None:
    predicted, embedding = torch.tensor([[1.0, 1], [0, 0], [9, 9]]), torch.tensor([[0.0, 1], [2, 2], [0, 0]])
    assert embedding_loss(predicted, embedding, torch.tensor([1.0, 1, 0])).item() == pytest.approx((0.5 + 4) / 2)
    assert embedding_loss(predicted, embedding, torch.zeros(3)).item() == 0


# The pupil


@pytest.mark.parametrize(
    "model",
    [
        "test_vit",
        "deit_tiny_patch16_224",
        pytest.param("vit_small_patch14_reg4_dinov2", marks=pytest.mark.full),
        pytest.param("vit_relpos_small_patch16_224", marks=pytest.mark.full),
        pytest.param("eva02_tiny_patch14_224", marks=pytest.mark.full),
        pytest.param("beit_base_patch16_224", marks=pytest.mark.full),
    ],
)
def test_beside_the_embedding_a_pupil_says_what_its_network_does(model: str) -> None:
    network = timm.create_model(model, num_classes=2, in_chans=1, img_size=(28, 70) if "14" in model else (32, 80)).train()
    names = set(network.state_dict())
    pupil = Pupil(network, 5, seed=0)
    x = torch.randn(2, 1, *((28, 70) if "14" in model else (32, 80)))
    torch.manual_seed(0)
    expected = network(x)
    torch.manual_seed(0)
    found = pupil(x)
    assert found.shape == (2, 7)
    assert torch.equal(found[:, :2], expected)
    assert set(network.state_dict()) == names


def trained(
    out: Path, config: VitConfig, real: Features, synthetic: Features, should_stop: Callable[[], bool] = never
) -> dict[str, torch.Tensor]:
    run_vit(partition(real.only(range(7)), real.only([7, 8, 9])), synthetic, config, context(out, should_stop))
    return load_file(out / "model" / "model.safetensors")


def losses_in(out: Path) -> list[float]:
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def test_a_vit_learns_what_the_teacher_says_and_its_model_stays_a_plain_one(
    real: Features, synthetic: Features, file: Path, tmp_path: Path
) -> None:
    config = config_of(file, epochs=12, patience_epochs=12, frozen_epochs=0, mixup_alpha=0, time_masks=0, mel_masks=0)
    plain = trained(tmp_path / "plain", config.model_copy(update={"teacher": None}), real, synthetic)
    taught = trained(tmp_path / "taught", config, real, synthetic)
    assert {name: value.shape for name, value in taught.items()} == {name: value.shape for name, value in plain.items()}
    assert not torch.equal(taught["blocks.0.mlp.fc1.weight"], plain["blocks.0.mlp.fc1.weight"])
    # The embeddings are functions of the labels, which songs show by their loudness.
    of_embedding = np.array(losses_in(tmp_path / "taught")) - np.array(losses_in(tmp_path / "plain"))
    assert 0.5 < of_embedding[:2].mean() < 2
    assert of_embedding[-2:].mean() < 0.6 * of_embedding[:2].mean()


def test_a_taught_training_interrupted_and_resumed_leaves_the_same_bytes(
    real: Features, synthetic: Features, file: Path, tmp_path: Path
) -> None:
    config = config_of(file, epochs=4, patience_epochs=4)
    trained(tmp_path / "whole", config, real, synthetic)
    for question in (2, 4):
        out = tmp_path / str(question)
        with pytest.raises(Interrupted):
            trained(out, config, real, synthetic, stop_at_question(question))
        trained(out, config, real, synthetic)
        name = "model/model.safetensors"
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        # The layer that predicts the embeddings is in no model, but in the loss.
        assert losses_in(out) == losses_in(tmp_path / "whole")
        shutil.rmtree(out)


@pytest.mark.full
def test_the_micro_batch_does_not_change_what_is_taught_and_memory_is_predicted(
    real: Features, synthetic: Features, file: Path, tmp_path: Path
) -> None:
    trained(tmp_path / "whole", config_of(file), real, synthetic)
    songs, config = partition(real.only(range(7)), real.only([7, 8, 9])), config_of(file, micro_batch=4)
    account = run_vit(songs, synthetic, config, context(tmp_path / "parts"))
    assert largest_difference(tmp_path / "whole", tmp_path / "parts") < 1e-4
    assert account["measured"]["peak"] == pytest.approx(account["predicted"]["peak"], rel=2e-3)
    without = predicted_memory(config.model_copy(update={"teacher": None}), SMALL_MEL, CPU, 4)
    # Five dimensions of width 64 with a bias.
    assert account["measured"]["parameters"] - without["parameters"] == 4 * 5 * (64 + 1)


def test_training_songs_without_an_embedding_end_a_training_before_its_first_step(
    real: Features, synthetic: Features, tmp_path: Path
) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, names=[str(number) for number in (0, 1, 2, 4, 5, 6)], embedding=np.ones((6, 2)))
    with pytest.raises(DataError, match=r"1 of 7 training songs have no embedding: 3\."):
        trained(tmp_path / "out", config_of(path), real, synthetic)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.full
def test_memory_is_predicted_in_a_process_that_has_trained_nothing() -> None:
    code = """
from emotion.config import DeviceConfig, MelConfig, VitConfig
from emotion.training.device import resolve_device
from emotion.vit.memory import predicted_memory
config = VitConfig(model="test_vit", weights="random", teacher="file.npz", clip_seconds=1.1)
print(predicted_memory(config, MelConfig(mels=32), resolve_device(DeviceConfig(kind="cpu"), "fp32"), 4, 6)["peak"])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 0
