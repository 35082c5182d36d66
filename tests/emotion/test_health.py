import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from emotion.audio.feature_store import Features
from emotion.compat import timm
from emotion.config import GanConfig, MelConfig, VitConfig
from emotion.data.leaks import write_seen
from emotion.errors import ModelError
from emotion.gan.networks import Discriminator, Generator
from emotion.training import health
from tests.emotion.trainings import context, partition, run_gan, run_vit, write_songs

pytestmark = pytest.mark.usefixtures("one_thread")

MEL = MelConfig(sample_rate_hz=8000, window_samples=512, hop_samples=256, mels=32, fmax_hz=4000)
GAN = GanConfig(epochs=4, batch_size=4, clip_seconds=0.6, latent=3, width=4)
VIT = VitConfig(
    model="test_vit", weights="random", clip_seconds=1.1, epochs=6, batch_size=8, synthetic_share=0.0, learning_rate=1e-3
)


@pytest.mark.parametrize(
    ("accuracies", "ended", "setting"),
    [
        ([0.75] * 200, True, None),
        ([0.75] * 200, False, None),
        ([0.99] * 200, True, "lower gan.discriminator_learning_rate"),
        ([0.4] * 200, True, "raise gan.discriminator_learning_rate"),
        # Before the end only a lost game gives a warning, not a swing.
        ([0.12] * 200, False, None),
        ([1.0] * 49, False, None),
        ([1.0] * 50, False, "raise gan.penalty_weight"),
        ([0.0] * 50, False, "lower gan.penalty_weight"),
        # Only the end counts.
        ([1.0] * 150 + [0.75] * 50, True, None),
    ],
)
def test_an_accuracy_of_the_discriminator_out_of_its_range_gives_a_warning(
    accuracies: list[float], ended: bool, setting: str | None
) -> None:
    text = health.discriminator_accuracy(accuracies, ended)
    assert text is None if setting is None else setting in str(text)


def test_a_learning_rate_is_dead_after_ten_records_with_hardly_any_change() -> None:
    assert health.dead_learning_rate([1e-9] * 9, "x.y") is None
    assert "raise x.y" in str(health.dead_learning_rate([1e-3] + [1e-9] * 10, "x.y"))
    assert health.dead_learning_rate([1e-9] * 9 + [1e-5], "x.y") is None


def test_the_change_of_weights_is_relative() -> None:
    before = torch.tensor([3.0, 4.0])
    assert health.relative_change(before + torch.tensor([0.0, 0.05]), before) == pytest.approx(0.01, rel=1e-4)
    assert health.relative_change(torch.zeros(2), torch.zeros(2)) == 0


def test_overfitting_is_a_gap_in_three_epochs_in_a_row() -> None:
    assert health.overfitting([0.9, 0.9], [0.1, 0.1]) is None
    assert health.overfitting([0.9, 0.9, 0.9], [0.1, 0.65, 0.1]) is None
    assert "vit.head_dropout" in str(health.overfitting([0.1, 0.9, 0.9, 0.9], [0.1, 0.5, 0.5, 0.5]))
    assert health.overfitting([0.5] * 9, [0.4] * 9) is None


def test_not_learning_gives_a_warning_from_half_of_the_epochs_on() -> None:
    assert health.not_learning([0.0] * 4, 10) is None
    assert "vit.learning_rate" in str(health.not_learning([0.0] * 5, 10))
    assert health.not_learning([0.0] * 4 + [0.2], 10) is None


def test_overflow_is_a_loss_scale_below_one() -> None:
    assert health.fp16_overflow(1.0) is None
    assert "precision" in str(health.fp16_overflow(0.5))


def quality(copies: float, false_alarms: float, diversity: float) -> dict[str, Any]:
    rates = {"synthetic": {"value": copies}, "validation": {"value": false_alarms}}
    return {"copy_rate": rates, "diversity": {"value": diversity}}


def test_copies_and_collapse_are_measured_against_real_songs() -> None:
    assert health.generator_warnings(quality(0.05, 0.0, 0.9)) == {}
    assert health.generator_warnings(quality(0.5, 0.45, 0.9)) == {}
    assert list(health.generator_warnings(quality(0.5, 0.0, 0.9))) == ["copying"]
    assert "gan.latent" in health.generator_warnings(quality(0.0, 0.0, 0.1))["collapsed"]
    assert health.generator_warnings({"copy_rate": None, "diversity": None}) == {}


def test_a_training_without_a_better_epoch_gives_a_warning() -> None:
    text = health.no_better_epoch(0)
    assert text is not None
    assert "vit.learning_rate" in text
    assert health.no_better_epoch(1) is None


# In the loops


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Features:
    """With labels that are independent of the sound."""
    songs = write_songs(tmp_path_factory.mktemp("songs"), MEL, 12)
    songs.labels = np.random.default_rng(1).uniform(-1, 1, (12, 2)).astype(np.float32)
    write_seen(songs.folder, {"no song"})
    return songs


def warnings_of(folder: Path) -> dict[str, str]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [(record["warning"], record["text"]) for record in records if "warning" in record]
    assert len(dict(found)) == len(found), "one warning twice"
    return dict(found)


@pytest.fixture
def train_the_gan(songs: Features, tmp_path: Path) -> Callable[..., dict[str, str]]:
    def run(**values: Any) -> dict[str, str]:
        config = GanConfig.model_validate(GAN.model_dump() | values)
        run_gan(partition(songs), config, context(tmp_path))
        return warnings_of(tmp_path)

    return run


@pytest.fixture
def train_the_vit(songs: Features, tmp_path: Path) -> Callable[..., dict[str, str]]:
    def run(validation: int = 4, **values: Any) -> dict[str, str]:
        config = VitConfig.model_validate(VIT.model_dump() | values)
        split = partition(songs.only(range(12 - validation)), songs.only(range(12 - validation, 12)))
        run_vit(split, songs, config, context(tmp_path))
        return warnings_of(tmp_path)

    return run


@pytest.mark.full
def test_a_learning_rate_of_almost_0_gives_a_warning_in_both_loops(
    train_the_gan: Callable[..., dict[str, str]], train_the_vit: Callable[..., dict[str, str]]
) -> None:
    assert "gan.generator_learning_rate" in train_the_gan(generator_learning_rate=1e-12)["dead_learning_rate"]
    assert "vit.learning_rate" in train_the_vit(learning_rate=1e-12, epochs=15, patience_epochs=15)["dead_learning_rate"]


@pytest.mark.full
def test_overfitting_gives_a_warning(train_the_vit: Callable[..., dict[str, str]]) -> None:
    found = train_the_vit(epochs=80, patience_epochs=80, ema_decay=0.0, mixup_alpha=0.0, time_masks=0, mel_masks=0)
    assert "vit.weight_decay" in found["overfitting"]


@pytest.mark.parametrize("rate", ["generator_learning_rate", "discriminator_learning_rate"])
def test_weights_that_are_not_finite_end_the_gan_with_the_settings_to_change(
    train_the_gan: Callable[..., dict[str, str]], tmp_path: Path, rate: str
) -> None:
    with pytest.raises(ModelError, match=rf"gan: step .* Lower .*gan\.{rate}.* set precision to fp32"):
        train_the_gan(**{rate: 1e30})


def test_weights_that_are_not_finite_end_the_vit_with_the_settings_to_change(
    train_the_vit: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"vit: step .* Lower vit\.learning_rate, or set precision to fp32"):
        train_the_vit(learning_rate=1e38, warmup_fraction=0.0)


Inject = Callable[[type[nn.Module], range], None]


@pytest.fixture
def nan_from() -> Iterator[Inject]:
    """nan_from(kind, calls): the output of modules of this kind is NaN at these calls."""
    handles = []

    def inject(kind: type[nn.Module], calls: range) -> None:
        number = iter(range(10**9))

        def hook(module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor | None:
            # Passes of fake tensors, which predict memory, do not count.
            if not isinstance(module, kind) or isinstance(output, FakeTensor):
                return None
            return output * math.nan if next(number) in calls else None

        handles.append(nn.modules.module.register_module_forward_hook(hook))

    yield inject
    for handle in handles:
        handle.remove()


def test_nan_in_one_pass_of_the_gan_skips_one_update(
    train_the_gan: Callable[..., dict[str, str]], nan_from: Inject, tmp_path: Path
) -> None:
    nan_from(Discriminator, range(9, 10))
    found = train_the_gan()
    skipped = [text for name, text in found.items() if name.startswith("skipped_updates_")]
    assert len(skipped) == 1
    assert skipped[0].startswith("1 updates of the ")
    weights = load_file(tmp_path / "generator.safetensors")
    assert all(torch.isfinite(values).all() for values in weights.values())


def test_a_gan_whose_output_stays_nan_ends(train_the_gan: Callable[..., dict[str, str]], nan_from: Inject) -> None:
    nan_from(Generator, range(20, 10**9))
    with pytest.raises(ModelError, match="updates of the discriminator were skipped"):
        train_the_gan()


def test_nan_in_one_pass_of_the_vit_skips_one_update(
    train_the_vit: Callable[..., dict[str, str]], nan_from: Inject, tmp_path: Path
) -> None:
    # After the first pass four validation songs and four training songs are scored; the tenth pass is the second step.
    nan_from(timm.models.VisionTransformer, range(9, 10))
    found = train_the_vit()
    assert found["skipped_updates_network"].startswith("1 updates of the network were skipped")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.isfinite(values).all() for values in weights.values())
