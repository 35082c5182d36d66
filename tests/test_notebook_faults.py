"""The faults known in the notebook that this project replaces, each with tests that fail when it is put back into our code.

The number in a test's name is the fault's. What the tests share stands first: songs of 32 bands, nets of a few thousand weights,
and one run of the tiny job.
"""

import ast
import builtins
import csv
import dis
import importlib
import json
import os
import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import CodeType
from typing import Any, get_args

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from emotion.audio.clips import RANGE, Normalisation, normalisation_of
from emotion.audio.extract import extract_features
from emotion.audio.feature_store import Features, FeatureWriter
from emotion.audio.mel import LogMel
from emotion.audio.song_workers import Workers
from emotion.config import DataConfig, EvaluateConfig, GanConfig, MelConfig, QualityConfig, SplitConfig, SynthConfig, VitConfig
from emotion.data.leaks import read_seen, write_seen
from emotion.data.songs import Dataset, Song, SongLabels, read_songs
from emotion.data.splits import Split, assign_splits
from emotion.errors import DataError, ModelError
from emotion.evaluation.evaluate import TrainedModel, evaluate
from emotion.evaluation.metrics import DIMENSIONS, concordance
from emotion.files import read_json
from emotion.gan.losses import discriminator_loss, generator_loss
from emotion.gan.networks import Discriminator, Generator
from emotion.gan.quality import measure_quality
from emotion.gan.synth import synthesize
from emotion.proc import memory_bytes
from emotion.training.progress import Progress
from emotion.vit import objective
from emotion.vit.crops import predict_songs
from emotion.vit.layers import install_noise
from emotion.vit.network import Preprocessing, create_network, load_model, preprocessing_for
from emotion.vit.objective import batch_concordance
from emotion.vit.predict import AudioPredictor
from tests.conftest import TinyRun
from tests.emotion.trainings import CPU, clips_of, context, never, partition, run_gan, run_vit

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
PACKAGES = ("emotion", "job", "slurm")
MEL = MelConfig(sample_rate_hz=8000, window_samples=512, hop_samples=256, mels=32, fmax_hz=4000)
FRAMES = MEL.frames(1.0)
# Seven training songs, so that no batch and no micro-batch divides an epoch.
TRAINING, VALIDATION, TEST = range(7), [7, 8], [9, 10]
GAN = GanConfig(epochs=4, batch_size=4, clip_seconds=1.0, latent=3, width=4, penalty_every_steps=2)
VIT = VitConfig(
    model="test_vit",
    weights="random",
    clip_seconds=1.0,
    epochs=3,
    batch_size=4,
    learning_rate=1e-3,
    gradient_clip=1e6,
    max_crops=2,
)
PLAIN = {"mixup_alpha": 0.0, "time_masks": 0, "mel_masks": 0}
"""Settings of the ViT with which a clip reaches the network as it is."""


def write_songs(out: Path, songs: int, frames: int = 80, synthetic: bool = False) -> Features:
    """Songs as loud as they are arousing, each with one click far above everything else."""
    rng = np.random.default_rng(songs)
    with FeatureWriter(out, MEL) as writer:
        for song in range(songs):
            valence, arousal = rng.uniform(-1, 1, 2)
            log_mel = -50 + 10 * arousal + 2 * rng.standard_normal((frames, 32))
            log_mel[frames // 2] += 60
            digests = {} if synthetic else {"file_sha256": f"file {song}", "sound_sha256": f"sound {song}"}
            labels = SongLabels(song, valence, arousal, 0.3, 0.3, f"artist {song}")
            writer.append(labels, log_mel.astype(np.float32), **digests)
    return Features(out)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Features:
    return write_songs(tmp_path_factory.mktemp("real"), 11)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Features:
    out = tmp_path_factory.mktemp("synthetic")
    write_seen(out, {"file 0", "sound 0"})
    return write_songs(out, 7, FRAMES, synthetic=True)


def gan_of(out: Path, training: Features, config: GanConfig = GAN, test: Features | None = None) -> None:
    run_gan(partition(training, test=test), config, context(out))


def vit_of(
    out: Path,
    training: Features,
    validation: Features,
    synthetic: Features,
    config: VitConfig = VIT,
    test: Features | None = None,
) -> None:
    run_vit(partition(training, validation, test), synthetic, config, context(out))


def changed(config: Any, **values: object) -> Any:
    return type(config).model_validate(config.model_dump() | values)


@contextmanager
def watching(
    forward: Callable[[nn.Module, tuple[Any, ...], Any], None] = lambda *_: None, step: Callable[..., None] = lambda *_: None
) -> Iterator[None]:
    """Call `forward` after every forward pass of any module, and `step` before every step of any optimizer.

    Passes without numbers, which only predict what memory they take, do not count.
    """

    def real_forward(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
        if not any(isinstance(argument, FakeTensor) for argument in arguments):
            forward(module, arguments, result)

    handles = [register_module_forward_hook(real_forward), register_optimizer_step_pre_hook(step)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Ear(nn.Module):
    """In the place of a network: keeps what it is given."""

    def forward(self, clips: Tensor) -> Tensor:
        self.heard = clips
        return torch.zeros(len(clips), 2)


# 1. What is judged has not been learnt from


def evaluate_with(real: Features, model_has_seen: set[str], test: Features, training: Features, out: Path) -> None:
    write_seen(out, model_has_seen)
    songs = partition(training, real.only(VALIDATION), test)
    model = TrainedModel(out, out, lambda songs, _: np.zeros((len(songs), 2)), lambda *_: (np.zeros(0), np.zeros((0, 2))))
    evaluate(songs, model=model, fold=0, config=EvaluateConfig(), seed=0, out=out, should_stop=never)


def synth_with(training: Features, gan_has_seen: set[str], held_out: Features, out: Path) -> None:
    write_seen(out, gan_has_seen)
    synthesize(partition(training, held_out), gan=out, config=SynthConfig(songs=4), context=context(out))


def quality_with(training: Features, validation: Features, synthetic: Features, out: Path) -> None:
    songs = partition(training, validation, training.only([]))
    measure_quality(songs, synthetic=synthetic, config=QualityConfig(), seed=0, out=out, threads=1, should_stop=never)


LEAKS: dict[str, Callable[[Features, Features, Path], None]] = {
    "a test song trains the GAN and makes its constants": lambda real, _, out: gan_of(
        out, real.only([*TRAINING, 9]), test=real.only(TEST)
    ),
    "a synthetic clip trains the GAN": lambda _, made, out: gan_of(out, made),
    "the GAN behind the clips has seen a validation song": lambda real, _, out: synth_with(
        real.only(TRAINING), {"sound 7"}, real.only(VALIDATION), out
    ),
    "a test song is in the density of labels": lambda real, _, out: synth_with(
        real.only([*TRAINING, 9]), {"sound 0"}, real.only(TEST), out
    ),
    "a validation song is in what quality measures by": lambda real, made, out: quality_with(
        real.only([*TRAINING, 7]), real.only(VALIDATION), made, out
    ),
    "the clips that quality measures were made from a validation song": lambda real, made, out: quality_with(
        real.only([1, 2, 3]), real.only([0, 7]), made, out
    ),
    "a synthetic clip validates the GAN": lambda real, made, out: quality_with(real.only(TRAINING), made, made, out),
    "a test song trains the ViT": lambda real, made, out: vit_of(
        out, real.only([*TRAINING, 9]), real.only(VALIDATION), made, test=real.only(TEST)
    ),
    "a test song stops the ViT": lambda real, made, out: vit_of(
        out, real.only(TRAINING), real.only([7, 9]), made, test=real.only(TEST)
    ),
    "a validation song trains the ViT": lambda real, made, out: vit_of(
        out, real.only([*TRAINING, 7]), real.only(VALIDATION), made
    ),
    "a clip made from a test song trains the ViT": lambda real, made, out: vit_of(
        out, real.only([1, 2, 3]), real.only(VALIDATION), made, test=real.only([0, 9])
    ),
    "a synthetic clip validates the ViT": lambda real, made, out: vit_of(out, real.only(TRAINING), made, made),
    "a synthetic clip tests the ViT": lambda real, made, out: evaluate_with(real, {"file 0"}, made, real.only(TRAINING), out),
    "the model has seen a test song": lambda real, _, out: evaluate_with(
        real, {"file 9"}, real.only(TEST), real.only(TRAINING), out
    ),
    "a test song fits the baselines": lambda real, _, out: evaluate_with(
        real, {"file 0"}, real.only(TEST), real.only([*TRAINING, 9]), out
    ),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_01_a_planted_leak_is_refused(leak: str, real: Features, synthetic: Features, tmp_path: Path) -> None:
    """The GAN was trained on validation and test songs, and synthetic clips were among those that validate and test."""
    with pytest.raises(ModelError, match=r"^leak: "):
        LEAKS[leak](real, synthetic, tmp_path)


def test_01_songs_are_split_before_anything_is_made_from_them(tiny_run: TinyRun) -> None:
    """Real and synthetic samples were mixed first and split afterwards; constants came from all of them."""
    songs = read_json(tiny_run.published / "metrics.json")["songs"]
    gan, clips = read_seen(tiny_run.phase("gan")), read_seen(tiny_run.phase("synth"))
    model = read_seen(tiny_run.published / "model")
    assert clips == gan < model
    # A song has two digests, one of its file and one of its sound.
    assert [len(gan), len(model)] == [2 * songs["train"], 2 * (songs["train"] + songs["validation"])]

    features = Features(tiny_run.phase("features"))
    training = np.concatenate([features.song(i) for i, song in enumerate(features.songs) if song.file_sha256 in gan])
    stored = read_json(tiny_run.published / "model" / "preprocessing.json")["normalisation"]
    assert np.allclose(stored["mean_db"], training.mean(axis=0, dtype=np.float64), atol=1e-3)
    assert np.allclose(stored["sd_db"], np.maximum(training.std(axis=0, dtype=np.float64), 1), atol=1e-3)


# 2. Real and synthetic clips in one range of values


def test_02_real_and_synthetic_clips_end_at_the_same_value_for_every_network(
    real: Features, synthetic: Features, tmp_path: Path
) -> None:
    """Real clips were z-scored and went as far as they liked; synthetic ones came from a tanh and ended at ±1."""
    torch.manual_seed(0)
    generator = Generator(32, 3, 4)
    generator.load_state_dict({name: 5 * value for name, value in generator.state_dict().items()})
    furthest = generator(torch.zeros(2, 2), torch.randn(2, 3, 3), FRAMES).abs().max().item()
    assert 0.99 * RANGE < furthest <= RANGE

    seen: dict[str, list[float]] = {"Discriminator": [], "VisionTransformer": []}

    def forward(module: nn.Module, arguments: tuple[Any, ...], _: Any) -> None:
        if type(module).__name__ in seen:
            seen[type(module).__name__].append(arguments[0].abs().max().item())

    with watching(forward):
        # Penalties also look a small step away from each clip.
        gan_of(tmp_path / "gan", real.only(TRAINING), changed(GAN, penalty_weight=0.0))
        vit_of(tmp_path / "vit", real.only(TRAINING), real.only(VALIDATION), synthetic, changed(VIT, **PLAIN))
    # The clicks lie beyond the range and are cut to its end.
    assert {name: max(values) for name, values in seen.items()} == {"Discriminator": RANGE, "VisionTransformer": RANGE}


def test_02_one_set_of_constants_for_generator_discriminator_and_vit(tiny_run: TinyRun) -> None:
    """Every clip was scaled by numbers of its own, real and synthetic ones by different formulas."""
    gan = read_json(tiny_run.published / "gan" / "config.json")
    assert gan["normalisation"] == read_json(tiny_run.published / "model" / "preprocessing.json")["normalisation"]
    assert gan["normalisation"]["range"] == RANGE


def test_02_a_synthetic_clip_reaches_the_vit_as_the_generator_made_it(real: Features, tmp_path: Path) -> None:
    """Clips were scaled anew before the ViT, so that real and synthetic ones looked alike only to the eye."""
    training = real.only(TRAINING)
    gan_of(tmp_path, training)
    made: list[Tensor] = []

    def forward(module: nn.Module, _: Any, clips: Any) -> None:
        if isinstance(module, Generator):
            made.append(clips)

    out, config = tmp_path / "synthetic", SynthConfig(songs=4, samples=())
    with watching(forward):
        synthesize(partition(training), gan=tmp_path, config=config, context=context(out))
    given = clips_of(Features(out), range(4), [0] * 4, FRAMES, normalisation_of(training))
    # Stored in float16: 0.03 dB, of standard deviations of several dB.
    assert torch.allclose(given, made[0], atol=0.01)
    assert made[0].std() > 0.1


def test_02_a_louder_song_is_louder_for_the_networks(tmp_path: Path) -> None:
    """Each clip was set against its own maximum, then z-scored, then min-max scaled: three times rid of its loudness."""
    quiet = 0.1 * np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    log_mel = LogMel(MEL)
    with FeatureWriter(tmp_path, MEL) as writer:
        for song, samples in enumerate((quiet, 2 * quiet)):
            writer.append(SongLabels(song, 0, 0, 0, 0, ""), log_mel(samples))
    features = Features(tmp_path)
    sd = np.full(32, 10, np.float32)
    constants = Normalisation(features.song(0).mean(axis=0), sd)
    trained_on = clips_of(features, [0, 1], [0, 0], FRAMES, constants)
    assert torch.allclose(trained_on[1] - trained_on[0], torch.tensor(0.602), atol=0.01)
    ear = Ear()
    for song in (0, 1):
        predict_songs(ear, Preprocessing(MEL, constants, FRAMES, None, 1, 1), CPU, [features.stored(song)])
        # A pass is filled with copies.
        assert torch.equal(ear.heard.unique(dim=0), trained_on[song : song + 1])


# 3. Each network learns from its own loss


def test_03_no_gradient_of_the_generator_reaches_the_discriminators_step(real: Features, tmp_path: Path) -> None:
    """The generator's backward pass left its opposite gradient in the discriminator, to be added to that of its next loss."""
    given: list[tuple[Discriminator, Tensor, Tensor]] = []
    steps: list[bool] = []

    def forward(module: nn.Module, arguments: tuple[Any, ...], _: Any) -> None:
        if isinstance(module, Discriminator):
            given.append((module, arguments[0].detach(), arguments[1].flatten(0, -2)))

    def step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        discriminator, clips, labels = given[-1]  # real clips, then synthetic ones
        weights = list(discriminator.parameters())
        if optimizer.param_groups[0]["params"][0] is not weights[0]:
            return
        # By forward(), which calls no hook.
        of_real, of_made = discriminator.forward(clips, labels).chunk(2)
        alone = torch.autograd.grad(F.softplus(of_made - of_real).mean(), weights)
        pairs = zip(weights, alone, strict=True)
        steps.append(all(torch.allclose(weight.grad, found, rtol=1e-3, atol=1e-6) for weight, found in pairs))

    with watching(forward, step):
        gan_of(tmp_path, real.only(TRAINING), changed(GAN, penalty_weight=0.0))
    assert steps == [True] * 7


# 4. The effective batch


def gradients_at_each_step(train: Callable[[], None]) -> list[list[Tensor]]:
    """The gradients that each step of any optimizer used."""
    found: list[list[Tensor]] = []

    def step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        found.append([weight.grad.clone() for weight in weights])

    with watching(step=step):
        train()
    return found


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """|a - b| / |b|"""
    one, other = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (a, b))
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.full
def test_04_a_micro_batch_that_does_not_divide_the_batch_changes_no_gradient_of_the_gan(real: Features, tmp_path: Path) -> None:
    """Steps only on even batches, whatever the repeat count, and a loss halved even where three backward passes were added."""
    training = real.only(TRAINING)
    whole = gradients_at_each_step(lambda: gan_of(tmp_path / "whole", training))
    parts = gradients_at_each_step(lambda: gan_of(tmp_path / "parts", training, changed(GAN, micro_batch=3)))
    # Seven songs, four epochs, batches of four: seven steps of the discriminator and seven of the generator.
    assert len(whole) == len(parts) == 2 * 7
    assert all(len(a) == len(b) for a, b in zip(whole, parts, strict=True))
    # Of each network's first step only: Adam turns rounding into steps of full length.
    assert distance(parts[0], whole[0]) < 1e-4
    assert distance(parts[1], whole[1]) < 1e-3


@pytest.mark.full
def test_04_a_micro_batch_that_does_not_divide_the_batch_changes_no_gradient_of_the_vit(
    real: Features, synthetic: Features, tmp_path: Path
) -> None:
    """As above; and the loss of a part stood for that of the batch, which no concordance does."""
    songs = real.only(TRAINING), real.only(VALIDATION), synthetic
    config = changed(VIT, drop_path=0.3, head_dropout=0.3)
    whole = gradients_at_each_step(lambda: vit_of(tmp_path / "whole", *songs, config))
    parts = gradients_at_each_step(lambda: vit_of(tmp_path / "parts", *songs, changed(config, micro_batch=3)))
    # Seven songs, three epochs, three real songs a batch.
    assert len(whole) == len(parts) == 7
    assert distance(parts[0], whole[0]) < 1e-3


class CountedFeatures(Features):
    """Counts how often a clip of each song is drawn."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.drawn: Counter[int] = Counter()

    def stored_clip(self, index: int, start: int, frames: int) -> Any:
        self.drawn[self.songs[index].song_id] += 1
        return super().stored_clip(index, start, frames)


@pytest.mark.full
def test_04_every_song_is_used_equally_often_and_no_last_batch_is_thrown_away(
    real: Features, synthetic: Features, tmp_path: Path
) -> None:
    """The last batch of an epoch was thrown away, and its songs with it."""
    for_gan, for_vit, made = (CountedFeatures(features.folder) for features in (real, real, synthetic))
    gan_of(tmp_path / "gan", for_gan.only(TRAINING), changed(GAN, micro_batch=3))
    assert for_gan.drawn == dict.fromkeys(TRAINING, 4)
    vit_of(tmp_path / "vit", for_vit.only(TRAINING), real.only(VALIDATION), made, changed(VIT, micro_batch=3))
    assert for_vit.drawn == dict.fromkeys(TRAINING, 3)
    assert made.drawn == dict.fromkeys(range(7), 1)


# 5. Looking changes nothing


def test_05_a_look_in_training_mode_leaves_every_network_as_it_was() -> None:
    """Reading the discriminator's accuracy moved BatchNorm's averages and the vectors of spectral norm in both networks."""
    nothing = np.zeros(32, np.float32)
    vit = create_network(VIT, preprocessing_for(VIT, MEL, Normalisation(nothing, nothing + 1)), nothing[:2], 0)
    noise = install_noise(vit)
    noise.draw(0, 3, CPU)
    noise.rows = slice(0, 3)
    labels, clips = torch.zeros(3, 2), torch.randn(3, 1, 32, FRAMES)
    looks: list[tuple[nn.Module, tuple[Any, ...]]] = [
        (Generator(32, 3, 4), (labels, torch.randn(3, 3, 3), FRAMES)),
        (Discriminator(32, 4), (clips, labels)),
        (vit, (clips,)),
    ]
    for network, arguments in looks:
        before = {name: value.clone() for name, value in network.state_dict().items()}
        network.train()(*arguments)
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.full
def test_05_reading_losses_and_accuracy_at_every_step_or_never_gives_the_same_weights(
    real: Features, synthetic: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above: what was printed decided what was learnt."""
    weights: list[dict[str, Tensor]] = []
    for told in (True, False):
        monkeypatch.setattr(Progress, "due", lambda *_, told=told: told)
        gan, vit = tmp_path / f"gan {told}", tmp_path / f"vit {told}"
        gan_of(gan, real.only(TRAINING))
        vit_of(vit, real.only(TRAINING), real.only(VALIDATION), synthetic)
        assert ("d_accuracy" in (gan / "metrics.jsonl").read_text()) is told
        weights.append(load_file(gan / "generator.safetensors") | load_file(vit / "model" / "model.safetensors"))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


# 6. A clip and its own label

MISMATCHES: dict[str, Callable[[], object]] = {
    "the discriminator's loss of a column and a row": lambda: discriminator_loss(torch.zeros(4, 1), torch.zeros(4)),
    "the discriminator's loss of many and one": lambda: discriminator_loss(torch.zeros(4), torch.zeros(1)),
    "the generator's loss of a column and a row": lambda: generator_loss(torch.zeros(4, 1), torch.zeros(4)),
    "the generator's loss of many and one": lambda: generator_loss(torch.zeros(4), torch.zeros(1)),
    "the discriminator with half the labels": lambda: Discriminator(32, 4)(torch.zeros(4, 1, 32, 32), torch.zeros(2, 2)),
    "the discriminator with one label": lambda: Discriminator(32, 4)(torch.zeros(4, 1, 32, 32), torch.zeros(1, 2)),
    "the discriminator with one clip": lambda: Discriminator(32, 4)(torch.zeros(1, 1, 32, 32), torch.zeros(4, 2)),
    "the generator with half the labels": lambda: Generator(32, 3, 4)(torch.zeros(2, 2), torch.zeros(4, 3, 3), 32),
    "the generator with one label": lambda: Generator(32, 3, 4)(torch.zeros(1, 2), torch.zeros(4, 3, 3), 32),
    "the ViT's objective with half the labels": lambda: batch_concordance(torch.zeros(4, 2), torch.zeros(2, 2)),
    "the ViT's objective with one label": lambda: batch_concordance(torch.zeros(4, 2), torch.zeros(1, 2)),
    "the ViT's objective with one number per song": lambda: batch_concordance(torch.zeros(4, 2), torch.zeros(4, 1)),
    "the ViT's objective in the wrong order": lambda: batch_concordance(torch.zeros(2, 2), torch.zeros(2)),
    "the CCC of many and one": lambda: concordance(np.arange(4.0), np.arange(1.0)),
    "the CCC of a column and a row": lambda: concordance(np.arange(4.0)[:, None], np.arange(4.0)),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_06_arrays_that_do_not_pair_song_by_song_are_refused(mismatch: str) -> None:
    """Labels (N, 1) were reshaped to (N/2, 2), which paired the labels of different songs and said nothing."""
    with pytest.raises((AssertionError, ValueError, RuntimeError, DataError)):
        MISMATCHES[mismatch]()


def test_06_every_clip_goes_with_the_label_of_its_own_song(
    real: Features, synthetic: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same: the emotions that the discriminator got were those of other songs."""
    real_labels: list[Tensor] = []
    levels: list[Tensor] = []

    def forward(module: nn.Module, arguments: tuple[Any, ...], _: Any) -> None:
        if isinstance(module, Discriminator):
            levels.append(arguments[0].detach().mean(dim=(1, 2, 3)))
            real_labels.append(arguments[1].flatten(0, -2))  # one for each clip
        elif type(module).__name__ == "VisionTransformer" and module.training:
            levels.append(arguments[0].mean(dim=(1, 2, 3)))

    with watching(forward):
        gan_of(tmp_path / "gan", real.only(TRAINING), changed(GAN, penalty_weight=0.0))
    # Each step asks D three times: for real and synthetic clips at once, then for the generator's loss real ones, synthetic ones.
    both = [labels.chunk(2) for labels in real_labels[::3]]
    assert all(torch.equal(*pair) for pair in [*both, *zip(real_labels[1::3], real_labels[2::3], strict=True)])
    # The songs are as loud as they are arousing; the labels are spread by the kernel, so r is not 1.
    loudness = torch.cat([found.chunk(2)[0] for found in levels[::3]])
    assert np.corrcoef(loudness, torch.cat([real for real, _ in both])[:, 1])[0, 1] > 0.6

    levels.clear()
    vit_labels: list[Tensor] = []

    def watched(predicted: Tensor, labels: Tensor) -> Tensor:
        if not isinstance(labels, FakeTensor):
            vit_labels.append(labels)
        return batch_concordance(predicted, labels)

    monkeypatch.setattr(objective, "batch_concordance", watched)
    with watching(forward):
        vit_of(tmp_path / "vit", real.only(TRAINING), real.only(VALIDATION), synthetic, changed(VIT, **PLAIN))
    assert np.corrcoef(torch.cat(levels), torch.cat(vit_labels)[:, 1])[0, 1] > 0.9


# 7. Unfreezing


def test_07_unfreezing_only_ever_adds_weights_and_forgets_nothing_of_the_others(
    real: Features, synthetic: Features, tmp_path: Path
) -> None:
    """The backbone began unfrozen and each "unfreezing" first froze everything, never let the last norm go, threw away the
    optimizer's state and began the cosine anew."""
    learning: list[set[str]] = []
    rates: list[float] = []
    steps_of: Counter[str] = Counter()
    networks: dict[str, nn.Module] = {}

    def forward(module: nn.Module, *_: Any) -> None:
        if type(module).__name__ == "VisionTransformer" and module.training:
            networks["learning"] = module

    def step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        named = {name: weight for name, weight in networks["learning"].named_parameters() if weight.grad is not None}
        known = {name: int(optimizer.state.get(weight, {}).get("step", 0)) for name, weight in named.items()}
        assert known == {name: steps_of[name] for name in named}
        steps_of.update(named.keys())
        learning.append(set(named))
        rates.append(max(float(group["lr"]) for group in optimizer.param_groups))

    config = changed(VIT, epochs=6, frozen_epochs=1, unfreeze_epochs=3, warmup_fraction=0.2)
    with watching(forward, step):
        vit_of(tmp_path, real.only(TRAINING), real.only(VALIDATION), synthetic, config)
    everything = {name for name, _ in networks["learning"].named_parameters()}
    assert learning[0] == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert all(earlier <= later for earlier, later in pairwise(learning))
    assert len({len(names) for names in learning}) > 3
    assert learning[-1] == everything
    peak = rates.index(max(rates))
    assert 0 < peak < len(rates) - 1
    assert all(later < earlier for earlier, later in pairwise(rates[peak:]))


# 8. One path from sound to network


def test_08_training_and_prediction_show_the_network_the_same_clip(synthetic: Features, tmp_path: Path) -> None:
    """The inference package scaled by minimum and maximum, to 8 bits, and resized with PIL; training did neither."""
    # Songs of one clip each, so that there is one crop to take.
    songs = write_songs(tmp_path, 8, FRAMES)
    inputs: dict[str, set[bytes]] = {"trained": set(), "served": set()}
    now = "trained"

    def forward(module: nn.Module, arguments: tuple[Any, ...], _: Any) -> None:
        if type(module).__name__ == "VisionTransformer" and module.training is (now == "trained"):
            inputs[now] |= {row.numpy().tobytes() for row in arguments[0].contiguous()}

    config = changed(VIT, **PLAIN, synthetic_share=0.0, image_size=(48, 64), channels=3)
    with watching(forward):
        vit_of(tmp_path / "vit", songs.only(range(5)), songs.only([5, 6, 7]), synthetic, config)
        now = "served"
        network, preprocessing = load_model(tmp_path / "vit" / "model", CPU)
        for song in range(5):
            predict_songs(network, preprocessing, CPU, [songs.stored(song)])
    assert inputs["served"] == inputs["trained"]
    assert len(inputs["served"]) == 5


def test_08_predict_gives_every_test_song_the_number_of_the_evaluation(tiny_run: TinyRun) -> None:
    """A third path had clips and filters of its own and compared predictions on -1..1 with labels on 1..9."""
    by_stack, by_model = (AudioPredictor(tiny_run.published, CPU, plain=plain) for plain in (False, True))
    labels = {str(song.song_id): (song.valence, song.arousal) for song in read_songs(tiny_run.phase("stage") / "songs.csv")}
    for row in tiny_run.predictions:
        song = next(tiny_run.phase("stage").rglob(f"{row['song_id']}.mp3"))
        stacked, said, true = (tuple(float(row[f"{axis}_{of}"]) for axis in DIMENSIONS) for of in ("stack", "pred", "true"))
        assert by_stack(song)[:2] == stacked
        assert by_model(song)[:2] == said
        assert true == pytest.approx(labels[row["song_id"]], abs=1e-6)
        assert max(map(abs, true)) <= 1


# 9. It runs


def test_09_the_job_runs_from_end_to_end(tiny_run: TinyRun) -> None:
    """Classes, functions and data that the cells needed were defined nowhere; `train_count` was looked for as `train`."""
    assert read_json(tiny_run.published / "manifest.json")["artifacts"].keys() >= {
        "model/model.safetensors",
        "gan/generator.safetensors",
        "metrics.json",
        "quality.json",
        "predictions.csv",
        "report.html",
    }
    # What one phase names, the next one finds: a count that the report looks for under another name would be no number.
    page = (tiny_run.published / "report.html").read_text(encoding="utf-8")
    counts = re.search(r"(\d+) for training, (\d+) for validation, (\d+) for test", page)
    assert counts is not None
    assert sum(map(int, counts.groups())) == 24


def global_names(code: CodeType) -> set[str]:
    """What a function and the functions in it look up outside themselves."""
    found = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return found.union(*(global_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def test_09_every_name_that_a_function_asks_for_is_defined_also_where_no_test_comes_by() -> None:
    """As above: a name that is never defined shows only when its line is reached."""
    undefined: dict[str, set[str]] = {}
    for package in map(importlib.import_module, PACKAGES):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            code = compile(Path(module.__file__).read_text(encoding="utf-8"), module.__file__, "exec")
            if missing := global_names(code) - vars(module).keys() - vars(builtins).keys():
                undefined[info.name] = missing
    assert undefined == {}


# 10. Memory


def test_10_a_batch_from_two_gigabytes_of_features_takes_a_twentieth_of_their_memory(tmp_path: Path) -> None:
    """All spectrograms were one array, and then once more together with the synthetic ones."""
    songs, frames = 2000, 4000
    mel = MelConfig()
    with FeatureWriter(tmp_path, mel) as writer:
        writer.append(SongLabels(0, 0.0, 0.0, 0.0, 0.0, "artist"), np.zeros((frames, mel.mels), np.float32))
    header, row = (tmp_path / "songs.csv").read_text().splitlines()
    names = header.split(",")
    cells = dict(zip(names, row.split(","), strict=True))
    rows = (cells | {"song_id": str(song), "first_frame": str(song * frames)} for song in range(songs))
    (tmp_path / "songs.csv").write_text("\n".join([header, *(",".join(row.values()) for row in rows)]) + "\n")
    (tmp_path / "mel.json").write_text(json.dumps(read_json(tmp_path / "mel.json") | {"frames": songs * frames}))
    # Only its end is written: the file has holes and takes no space.
    os.truncate(tmp_path / "features.f16", 2 * songs * frames * mel.mels)
    constants = Normalisation(np.zeros(mel.mels, np.float32), np.ones(mel.mels, np.float32))

    before = memory_bytes("VmHWM")
    assert before is not None
    real, synthetic = Features(tmp_path), Features(tmp_path)
    for features in (real.only(range(songs)), synthetic):
        for step in range(4):
            clips_of(features, range(step, songs, 100), [500] * (songs // 100), 400, constants)
    assert memory_bytes("VmHWM") - before < 2 * songs * frames * mel.mels / 20


def test_10_a_table_that_names_fewer_songs_than_there_are_spectrograms_is_refused(tmp_path: Path) -> None:
    """Where memory was short the array was cut to 2,000 songs, and the list of names was not."""
    write_songs(tmp_path, 3)
    lines = (tmp_path / "songs.csv").read_text().splitlines(keepends=True)
    (tmp_path / "songs.csv").write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match="240 frames"):
        Features(tmp_path)


def test_10_no_step_clears_the_cache_unless_asked_to(
    real: Features, synthetic: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's cache was cleared every five batches, which costs time and frees nothing that could not be used again."""
    cleared: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cleared.append(True))
    vit_of(tmp_path / "vit", real.only(TRAINING), real.only(VALIDATION), synthetic)
    gan_of(tmp_path / "gan", real.only(TRAINING))
    assert len(cleared) == 0
    gan_of(tmp_path / "asked", real.only(TRAINING), changed(GAN, clear_cache_every_steps=3))
    assert len(cleared) == 2


# 11. Nothing is swallowed


def test_11_a_song_that_cannot_be_decoded_is_counted_and_named(tmp_path: Path) -> None:
    """A bare `except: continue` dropped such songs, and nobody knew how many there were."""
    sound = 0.1 * np.random.default_rng(0).standard_normal((3, 2 * 8000))
    songs = [Song(number, 0.0, 0.0, 0.3, 0.3, f"artist {number}", f"{number}.wav") for number in (1, 2, 3)]
    for song, samples in zip(songs, sound, strict=True):
        soundfile.write(tmp_path / song.audio, samples, 8000)
    (tmp_path / "2.wav").write_bytes(b"<html>404</html>")
    data = DataConfig(source=str(tmp_path), shortest_seconds=1, faults="drop", drop_at_most=0.5)

    def extract(data: DataConfig) -> Any:
        paths = {"out": tmp_path / "features", "faults_table": tmp_path / "faults.csv"}
        return extract_features(Dataset(tmp_path, songs, []), data, MEL, **paths, workers=Workers(1), should_stop=never)

    (fault,) = extract(data)
    assert (fault.song_id, fault.place) == (2, "2.wav")
    assert [song.song_id for song in Features(tmp_path / "features").songs] == [1, 3]
    (row,) = csv.DictReader((tmp_path / "faults.csv").read_text().splitlines())
    assert row["song_id"] == "2"
    with pytest.raises(DataError, match=r"1 of 3 songs cannot be used[^\n]*\n.*song 2, 2\.wav"):
        extract(changed(data, faults="fail"))


def catches_everything(caught: ast.expr | None) -> bool:
    if caught is None:
        return True
    kinds = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException") for kind in kinds)


def reports(handler: ast.ExceptHandler) -> bool:
    """Whether the last resort of a command line uses the error that it has caught."""
    names = {node.id for statement in handler.body for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return handler.name in names


def test_11_nothing_that_catches_every_error_keeps_it_to_itself() -> None:
    """Bare `except` stood around decoding, plots and evaluation."""
    swallowed = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                is_kept = (
                    isinstance(node, ast.ExceptHandler)
                    and catches_everything(node.type)
                    and not isinstance(node.body[-1], ast.Raise)
                    and not reports(node)
                )
                is_suppressed = (
                    isinstance(node, ast.Call)
                    and ast.unparse(node.func).endswith("suppress")
                    and any(map(catches_everything, node.args))
                )
                if is_kept or is_suppressed:
                    swallowed.append(f"{path}:{node.lineno}")
    assert swallowed == []


# 12. Songs are split, not segments


def test_12_segments_of_one_song_under_ids_of_their_own_are_never_on_both_sides(
    real: Features, synthetic: Features, tmp_path: Path
) -> None:
    """18,373 segments of five seconds were split at random, so that pieces of one song trained and tested."""
    segments = real.only(range(11))
    first, second = (
        replace(real.songs[1], song_id=100 + half, group=f"artist {100 + half}", sound_sha256=f"sound of half {half}")
        for half in (0, 1)
    )
    segments.songs[1:3] = [replace(first, frames=40), replace(second, first_frame=first.first_frame + 40, frames=40)]
    segments.songs[7], segments.songs[2] = segments.songs[2], segments.songs[7]
    training, validation = segments.only(TRAINING), segments.only(VALIDATION)
    with pytest.raises(ModelError, match=r"leak: .* ids: 101"):
        gan_of(tmp_path / "gan", training, test=validation)
    with pytest.raises(ModelError, match=r"leak: .* ids: 101"):
        vit_of(tmp_path / "vit", training, validation, synthetic)
    with pytest.raises(ModelError, match=r"leak: .* ids: 101"):
        evaluate_with(real, {"file 0"}, validation, training, tmp_path)


def test_12_a_split_takes_every_song_once_and_divides_no_group() -> None:
    """As above; and artists and albums were on both sides, too."""
    songs = list(range(60))
    groups = [f"artist {song % 17}" for song in songs]
    tested: Counter[int] = Counter()
    for fold in range(5):
        splits = assign_splits(songs, groups, SplitConfig(fold=fold))
        sides = set(zip(groups, splits, strict=True))
        assert len(sides) == len(set(groups))
        assert set(splits) == set(get_args(Split))
        tested.update(song for song, split in zip(songs, splits, strict=True) if split == "test")
    assert tested == dict.fromkeys(songs, 1)
    with pytest.raises(DataError, match="every song needs its own id"):
        assign_splits([1, 1, 2, 2, 3, 3], list("aabbcc"), SplitConfig(folds=2))


def test_12_a_whole_song_gets_one_prediction() -> None:
    """Segments were scored one by one, a song with many of them many times."""
    rising = np.repeat(np.arange(100, dtype=np.float32)[:, None], 32, axis=1)
    constants = Normalisation(np.full(32, 50, np.float32), np.full(32, 50, np.float32))
    ear = Ear()
    predicted = predict_songs(ear, Preprocessing(MEL, constants, FRAMES, None, 1, 4), CPU, [rising])
    assert predicted.shape == (1, 2)
    heard = 50 * ear.heard[:, 0].numpy() + 50
    assert set(np.rint(heard).ravel()) == set(range(100))


def test_12_the_job_tests_on_whole_songs_that_nothing_was_made_from(tiny_run: TinyRun) -> None:
    """As above."""
    songs = {str(song.song_id): song for song in Features(tiny_run.phase("features")).songs}
    tested = [row["song_id"] for row in tiny_run.predictions]
    counts = read_json(tiny_run.published / "metrics.json")["songs"]
    assert len(tested) == len(set(tested)) == counts["test"]
    assert len(songs) == sum(counts.values()) == len(list(tiny_run.phase("stage").rglob("*.mp3")))
    seen = read_seen(tiny_run.published / "model")
    digests = {song: {songs[song].file_sha256, songs[song].sound_sha256} for song in songs}
    assert {song for song in songs if not digests[song] & seen} == set(tested)
