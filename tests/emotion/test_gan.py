from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emotion.audio.clips import RANGE
from emotion.audio.feature_store import Features
from emotion.config import GanConfig, InitConfig, MelConfig
from emotion.data.leaks import read_seen
from emotion.errors import Interrupted, ModelError
from emotion.files import read_json
from emotion.gan.losses import (
    GENERATORS_MATCHING,
    STEP,
    Batch,
    Terms,
    discriminator_backward,
    discriminator_loss,
    generator_backward,
    generator_loss,
    gradient_penalty,
)
from emotion.gan.networks import ChannelAttention, Discriminator, DownBlock, Generator, StyledBlock, _halved, modulated
from emotion.training.context import COLD_START, WarmStart, read_warm_start
from emotion.training.device import LossScaler, ResolvedPrecision
from tests.emotion.trainings import CPU, context, partition, run_gan, stop_at_question, write_songs

pytestmark = pytest.mark.usefixtures("one_thread")

MEL = MelConfig(sample_rate_hz=8000, window_samples=512, hop_samples=256, mels=16, fmax_hz=4000)
CONFIG = GanConfig(epochs=2, batch_size=4, clip_seconds=0.6, latent=3, width=4, penalty_every_steps=2)
UNSCALED = LossScaler("cpu", enabled=False)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Features:
    return write_songs(tmp_path_factory.mktemp("features"), MEL, 6, frames=40)


def trained(
    songs: Features, out: Path, config: GanConfig = CONFIG, warm_start: WarmStart = COLD_START
) -> dict[str, torch.Tensor]:
    run_gan(partition(songs), config, context(out), warm_start)
    return load_file(out / "generator.safetensors")


@pytest.fixture(scope="module")
def whole(features: Features, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted training on all songs."""
    out = tmp_path_factory.mktemp("whole")
    trained(features, out)
    return out


@pytest.mark.parametrize(("mels", "frames"), [(128, 1292), (80, 33), (17, 16), (16, 1)])
def test_any_clip_length_and_mel_count_fits(mels: int, frames: int) -> None:
    generator, discriminator = Generator(mels, 4, 4), Discriminator(mels, 4)
    clips = generator(torch.zeros(2, 2), torch.randn(2, 4, 1 + Generator.columns(frames)), frames)
    assert clips.shape == (2, 1, mels, frames)
    assert clips.abs().max() <= RANGE
    assert discriminator(clips, torch.zeros(2, 2)).shape == (2,)


def test_an_untrained_generator_makes_no_checkerboard() -> None:
    clips = Generator(16, 4, 4)(torch.zeros(2, 2), torch.randn(2, 4, 3), 32)
    assert torch.allclose(clips[:, :, ::2, ::2], clips[:, :, 1::2, 1::2])
    assert clips.std() > 0


def test_no_layer_has_tens_of_millions_of_weights_and_none_normalises_over_the_batch() -> None:
    for network in (Generator(128, 64, 32), Discriminator(128, 32)):
        assert sum(parameter.numel() for parameter in network.parameters()) < 10_000_000
        assert max(parameter.numel() for parameter in network.parameters()) < 2_000_000
        assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def test_channel_attention_gates_a_channel_as_a_whole() -> None:
    attention = ChannelAttention(16)
    x = torch.rand(2, 16, 5, 7) + 0.1
    gates = attention(x) / x
    assert torch.allclose(gates, gates[:, :, :1, :1].expand_as(gates), atol=1e-6)
    assert ((gates > 0) & (gates < 1)).all()


def test_labels_reach_generator_and_discriminator() -> None:
    generator, discriminator = Generator(16, 4, 4), Discriminator(16, 4)
    noise = torch.randn(1, 4, 3)
    calm, wild = torch.tensor([[-0.9, -0.9]]), torch.tensor([[0.9, 0.9]])
    assert not torch.allclose(generator(calm, noise, 20), generator(wild, noise, 20), atol=1e-4)
    clip = torch.randn(1, 1, 16, 20)
    assert not torch.allclose(discriminator(clip, calm), discriminator(clip, wild), atol=1e-6)


def test_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0])
    # softplus(-2) = 0.126928, softplus(0) = ln 2.
    assert discriminator_loss(real, fake).item() == pytest.approx((0.126928 + 0.693147) / 2, abs=1e-6)
    assert generator_loss(real, fake).item() == pytest.approx((2.126928 + 0.693147) / 2, abs=1e-6)


class Matcher(Discriminator):
    """Scores a clip by its mean times the valence of its label."""

    def __init__(self, slope: float) -> None:
        super().__init__(16, 4)
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, clips: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.slope * clips.mean(dim=(1, 2, 3)) * labels[..., 0]


def test_matching_by_hand_whatever_the_micro_batch() -> None:
    """At a slope of 0 each pair of logits has a gradient of ½ times the difference of valences times the mean of the clip."""
    G, matcher = Generator(16, 3, 4), Matcher(0.0)
    clips = torch.tensor([1.0, 2.0, 5.0])[:, None, None, None].expand(3, 1, 16, 16)
    labels = torch.tensor([[0.5, 0.0], [-0.5, 0.0], [0.0, 0.0]])
    batch = Batch(clips, labels, torch.randn(2, 3, 3, 2))
    for parts in ([slice(0, 3)], [slice(0, 2), slice(2, 3)]):
        slopes = []
        for weight in (0.0, 2.0):
            discriminator_backward(G, matcher, batch, parts, terms=Terms(matching=weight), device=CPU, scaler=UNSCALED)
            assert matcher.slope.grad is not None
            slopes.append(matcher.slope.grad.item())
        # Each clip is also seen with the valence of the clip before it: differences of -0.5, 1 and -0.5.
        expected = 2 * 0.5 * (1 * -0.5 + 2 * 1 + 5 * -0.5) / 3
        assert slopes[1] - slopes[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize("parts", [[slice(0, 4)], [slice(0, 3), slice(3, 4)]])
def test_the_gradients_are_those_of_the_whole_objective(weight: float, parts: list[slice]) -> None:
    torch.manual_seed(3)
    G, D = Generator(16, 3, 4), Discriminator(16, 4)
    batch = Batch(torch.randn(4, 1, 16, 20), torch.rand(4, 2) * 2 - 1, torch.randn(2, 4, 3, 3))
    right, wrong = batch.labels, batch.labels[[3, 0, 1, 2]]
    softplus = nn.functional.softplus

    fake = G(right, batch.noise[0], 20).detach()
    real_logits = D(batch.clips, right)
    of_d = softplus(D(fake, right) - real_logits).mean() + weight * softplus(D(batch.clips, wrong) - real_logits).mean()
    fake = G(right, batch.noise[1], 20)
    fake_logits = D(fake, right)
    of_g = softplus(real_logits.detach() - fake_logits).mean()
    of_g = of_g + weight * GENERATORS_MATCHING * softplus(D(fake, wrong) - fake_logits).mean()
    expected = [*torch.autograd.grad(of_d, list(D.parameters())), *torch.autograd.grad(of_g, list(G.parameters()))]

    terms = Terms(matching=weight)
    d_loss, _ = discriminator_backward(G, D, batch, parts, terms=terms, device=CPU, scaler=UNSCALED)
    g_loss = generator_backward(G, D, batch, parts, terms=terms, device=CPU, scaler=UNSCALED)
    assert [d_loss.item(), g_loss.item()] == pytest.approx([of_d.item(), of_g.item()], rel=1e-5)
    for parameter, gradient in zip([*D.parameters(), *G.parameters()], expected, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_clips_with_equal_labels_teach_no_matching() -> None:
    G, D = Generator(16, 3, 4), Discriminator(16, 4)
    batch = Batch(torch.randn(3, 1, 16, 20), torch.full((3, 2), 0.3), torch.randn(2, 3, 3, 3))
    gradients = []
    for weight in (0.0, 5.0):
        discriminator_backward(G, D, batch, [slice(0, 3)], terms=Terms(matching=weight), device=CPU, scaler=UNSCALED)
        gradients.append([parameter.grad for parameter in D.parameters() if parameter.grad is not None])
    for plain, with_term in zip(*gradients, strict=True):
        assert torch.allclose(plain, with_term, atol=1e-7)


def test_clips_are_penalised_with_their_own_labels_alone() -> None:
    torch.manual_seed(4)
    G, D = Generator(16, 3, 4), Discriminator(16, 4)
    batch = Batch(torch.randn(4, 1, 16, 32), torch.rand(4, 2) * 2 - 1, torch.randn(2, 4, 3, 3))

    def gradient(penalty: float, matching: float) -> torch.Tensor:
        terms = Terms(penalty, matching)
        discriminator_backward(G, D, batch, [slice(0, 4)], terms=terms, device=CPU, scaler=UNSCALED)
        return torch.cat([parameter.grad.flatten() for parameter in D.parameters() if parameter.grad is not None])

    of_penalty = gradient(1e5, 0.0) - gradient(0.0, 0.0)
    assert of_penalty.abs().max() > 0.01
    assert torch.allclose(gradient(1e5, 0.7) - gradient(0.0, 0.7), of_penalty, rtol=1e-3, atol=1e-4)


def test_one_clip_with_several_labels_scores_as_with_each_alone() -> None:
    D, clips, labels = Discriminator(16, 4), torch.randn(2, 1, 16, 20), torch.randn(3, 2, 2)
    together = D(clips, labels)
    assert together.shape == (3, 2)
    for logits, alone in zip(together, labels, strict=True):
        assert torch.allclose(logits, D(clips, alone), atol=1e-6)


def penalty_of(D: Discriminator, clips: torch.Tensor, scaler: LossScaler = UNSCALED) -> torch.Tensor:
    clips, labels = clips.clone().requires_grad_(), torch.zeros(len(clips), 2)
    return gradient_penalty(D, clips, labels, D(clips, labels), scaler=scaler)


class Plane(Discriminator):
    def __init__(self, slope: float) -> None:
        super().__init__(16, 4)
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, clips: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (self.slope * clips.sum(dim=(1, 2, 3))).expand(labels.shape[:-1])


def slope_gradient(plane: Plane) -> float:
    assert plane.slope.grad is not None
    return plane.slope.grad.item()


class Bowl(Plane):
    def forward(self, clips: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (self.slope * clips.square().sum(dim=(1, 2, 3)) / 2).expand(labels.shape[:-1])


def test_the_penalty_is_half_the_squared_gradient_wherever_the_discriminator_is_a_plane() -> None:
    plane = Plane(3.0)
    found = penalty_of(plane, torch.randn(5, 1, 2, 3))
    found.backward()
    # d logit / d clip is 3 at each of 6 points: 0.5 · 6 · 9 = 27, and its derivative by the slope is 6 · 3 = 18.
    assert found.item() == pytest.approx(27, rel=1e-4)
    assert slope_gradient(plane) == pytest.approx(18, rel=1e-4)


def test_the_penalty_looks_ahead_by_the_step_along_the_gradient() -> None:
    bowl = Bowl(1.5)
    clips = torch.randn(4, 1, 4, 8).sign()
    found = penalty_of(bowl, clips)
    found.backward()
    # A clip of 1 and -1 is √32 long; so is the gradient, times 1.5. The step makes it 1 + STEP / 2 times as long in the mean.
    length = 32**0.5 * (1 + STEP / 2)
    assert found.item() == pytest.approx(0.5 * (1.5 * length) ** 2, rel=1e-4)
    assert slope_gradient(bowl) == pytest.approx(1.5 * length**2, rel=1e-4)
    assert found.item() == pytest.approx(0.5 * 1.5**2 * 32, rel=0.03)
    scaled = penalty_of(bowl, clips, LossScaler("cpu", init_scale=2.0**16, enabled=True))
    assert scaled.item() == found.item()


def test_a_discriminator_without_slope_has_no_penalty() -> None:
    flat = Plane(0.0)
    found = penalty_of(flat, torch.randn(2, 1, 3, 4))
    found.backward()
    assert found.item() == 0
    assert slope_gradient(flat) == 0


def test_real_and_synthetic_clips_are_penalised_whatever_the_micro_batch() -> None:
    G, plane = Generator(16, 3, 4), Plane(3.0)
    batch = Batch(torch.randn(3, 1, 16, 16), torch.zeros(3, 2), torch.randn(2, 3, 3, 2))
    slopes = []
    for gamma in (0.0, 0.5):
        parts = [slice(0, 2), slice(2, 3)]
        discriminator_backward(G, plane, batch, parts, terms=Terms(penalty=gamma), device=CPU, scaler=UNSCALED)
        slopes.append(slope_gradient(plane))
    # Twice, of 256 points, 0.5 · 256 · 3.
    assert slopes[1] - slopes[0] == pytest.approx(2 * 0.5 * 256 * 3, rel=1e-3)


def test_rounding_to_bf16_changes_the_penalty_by_less_than_a_tenth() -> None:
    torch.manual_seed(2)
    D = Discriminator(64, 8)
    clips, labels = torch.randn(8, 1, 64, 64).bfloat16(), torch.zeros(8, 2)
    exact_clips = clips.float().requires_grad_()
    (gradient,) = torch.autograd.grad(D(exact_clips, labels).sum(), exact_clips)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = penalty_of(D, clips)
    assert found.item() == pytest.approx(0.5 * gradient.square().sum(dim=(1, 2, 3)).mean().item(), rel=0.1)


def test_no_convolution_of_a_step_has_a_kernel_as_large_as_a_clip() -> None:
    """The second derivative of a convolution has: GPUs have no fast kernels for it."""
    G, D = Generator(32, 3, 4), Discriminator(32, 4)
    batch = Batch(torch.randn(2, 1, 32, 48), torch.zeros(2, 2), torch.randn(2, 2, 3, 4))
    with Kernels() as kernels:
        discriminator_backward(G, D, batch, [slice(0, 2)], terms=Terms(penalty=1.0), device=CPU, scaler=UNSCALED)
        generator_backward(G, D, batch, [slice(0, 2)], terms=Terms(), device=CPU, scaler=UNSCALED)
    assert len(kernels.sizes) > 50
    assert max(kernels.sizes) == 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_map_of_the_discriminator_has_its_channels_last_in_memory(precision: ResolvedPrecision) -> None:
    """Otherwise its layout would be converted before the next convolution."""
    D, labels = Discriminator(44, 8), torch.zeros(3, 2)
    clips = torch.randn(3, 1, 44, 96, requires_grad=True)
    with Layouts((8, 16, 32, 64)) as layouts:
        with replace(CPU, precision=precision).autocast():
            loss = D(clips, labels).sum()
        loss.backward()
    assert layouts.maps > 20
    assert layouts.others == []
    plain = nn.functional.pixel_unshuffle(clips, 2)
    assert torch.equal(_halved(clips), plain)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_map_of_the_generator_has_its_channels_last_in_memory(precision: ResolvedPrecision) -> None:
    """Of the last block, which takes most of the time."""
    G = Generator(96, 3, 8)
    with Layouts((8,)) as layouts:
        with replace(CPU, precision=precision).autocast():
            loss = G(torch.zeros(3, 2), torch.randn(3, 3, 9), 128).sum()
        loss.backward()
    assert layouts.maps > 12
    assert layouts.others == []


class Layouts(TorchDispatchMode):
    """Counts the maps with these numbers of channels that operators return. others: the operators where channels are not last."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.channels, self.maps = channels, 0
        self.others: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.dim() == 4 and x.shape[1] in self.channels and min(x.shape[2:]) > 5:
                self.maps += 1
                if not x.is_contiguous(memory_format=torch.channels_last):
                    self.others.append(function._schema.name)
        return result


class Kernels(TorchDispatchMode):
    """Records the heights and widths of the kernels of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name in ("aten::convolution", "aten::convolution_backward"):
            weight = args[1 if function._schema.name == "aten::convolution" else 2]
            self.sizes.extend(weight.shape[2:])
        return function(*args, **(kwargs or {}))


def test_the_discriminator_learns_a_separable_toy() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(16, 4)
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-3)
    labels = torch.zeros(8, 2)
    losses = []
    for _ in range(30):
        loss = discriminator_loss(
            discriminator(torch.randn(8, 1, 16, 16) + 1, labels), discriminator(torch.randn(8, 1, 16, 16) - 1, labels)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


@pytest.mark.full
def test_the_generators_step_leaves_no_gradient_in_the_discriminator(
    features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    original = torch.optim.Adam.step

    def watched(self: torch.optim.Adam, *args: object, **kwargs: object) -> object:
        """At the generator's step: how far D's gradients have moved since D's own step."""
        gradients = [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append(sum(g.abs().sum().item() for g in gradients))
        return original(self, *args, **kwargs)

    networks: list[Discriminator] = []
    built = Discriminator.__init__

    def remember(self: Discriminator, mels: int, width: int) -> None:
        built(self, mels, width)
        networks.append(self)

    monkeypatch.setattr(Discriminator, "__init__", remember)
    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    run_gan(partition(features), CONFIG, context(tmp_path))
    *_, discriminator = networks  # before it one without numbers, to predict the memory
    after_generator = sum(p.grad.abs().sum().item() for p in discriminator.parameters() if p.grad is not None)
    discriminators_last, generators_last = seen[-2:]
    assert after_generator == pytest.approx(discriminators_last)
    assert generators_last > 0


def test_the_micro_batch_does_not_change_the_objective() -> None:
    """Compared are gradients: Adam makes a whole step of a gradient that is nothing but rounding."""
    torch.manual_seed(0)
    G, D = Generator(16, 3, 4), Discriminator(16, 4)
    batch = Batch(torch.randn(5, 1, 16, 40), torch.rand(5, 2), torch.randn(2, 5, 3, 4))
    found = []
    for parts in ([slice(0, 5)], [slice(0, 3), slice(3, 5)]):
        terms = Terms(1.0, 0.5)
        discriminator_backward(G, D, batch, parts, terms=terms, device=CPU, scaler=UNSCALED)
        of_discriminator = gradient_of(D)
        generator_backward(G, D, batch, parts, terms=terms, device=CPU, scaler=UNSCALED)
        found.append((of_discriminator, gradient_of(G)))
    for whole, in_parts in zip(*found, strict=True):
        assert (whole - in_parts).norm() < 1e-5 * whole.norm()


def gradient_of(network: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("frames", [48, 37])
def test_resolutions_are_changed_within_convolutions_as_if_before_or_after_them(frames: int) -> None:
    """A block of the discriminator convolves, then takes means over 2 x 2 points; one of the generator repeats points, then
    normalises and convolves."""
    torch.manual_seed(0)
    down, up = DownBlock(8, 16), StyledBlock(16, 8, 4)
    x = torch.randn(3, 8, 6, 2 * frames)
    y = down.conv2(nn.functional.leaky_relu(down.conv1(nn.functional.leaky_relu(x, 0.2)), 0.2))
    expected = nn.functional.avg_pool2d(down.skip(x) + y, 2) / 2**0.5
    torch.testing.assert_close(down(x), expected)
    x, style = torch.randn(3, 16, 3, frames), torch.randn(3, 4)
    factors = [value[:, :, None, None] for value in up.modulation(style).split(up.sizes, dim=1)]
    repeated = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
    y = repeated
    for convolution, groups, (scale, shift) in ((up.conv1, 2, factors[:2]), (up.conv2, 1, factors[2:])):
        y = convolution(nn.functional.leaky_relu(nn.functional.group_norm(y, groups) * (1 + scale) + shift, 0.2))
    torch.testing.assert_close(up(x, style), up.skip(repeated) + y, atol=1e-5, rtol=1e-4)


def test_a_modulation_normalises_each_sample_by_groups_in_bf16_too() -> None:
    torch.manual_seed(0)
    x, scale, shift = 3 + torch.randn(2, 16, 4, 50), torch.randn(2, 16), torch.randn(2, 16)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        given = x.to(dtype)
        expected = nn.functional.group_norm(given.float(), 2) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        found = modulated(given.to(memory_format=torch.channels_last), scale, shift)
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=0)


def test_the_gradient_of_a_modulation_is_that_of_a_group_norm() -> None:
    torch.manual_seed(0)
    given = [value.requires_grad_() for value in (3 + torch.randn(2, 16, 4, 50), torch.randn(2, 16), torch.randn(2, 16))]
    x, scale, shift = given
    weight = torch.randn(2, 16, 4, 50)
    expected = nn.functional.group_norm(x, 2) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    for one, other in zip(
        torch.autograd.grad((weight * modulated(x, scale, shift)).sum(), given),
        torch.autograd.grad((weight * expected).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_training_interrupted_after_any_step_and_resumed_leaves_the_same_files(
    features: Features, whole: Path, tmp_path: Path
) -> None:
    for stop_at in (1, 2, 3):
        out = tmp_path / str(stop_at)
        with pytest.raises(Interrupted):
            run_gan(partition(features), CONFIG, context(out, stop_at_question(stop_at)))
        trained(features, out)
        for name in ("generator.safetensors", "discriminator.safetensors", "config.json"):
            assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_held_out_song_among_the_training_songs_is_refused_by_its_content(features: Features, tmp_path: Path) -> None:
    renamed = features.only([4])
    renamed.songs = [replace(renamed.songs[0], song_id=99, file_sha256="other tags")]
    for songs in (partition(features, validation=renamed), partition(features, test=renamed)):
        with pytest.raises(ModelError, match=r"leak: the GAN .* ids: 99"):
            run_gan(songs, CONFIG, context(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_synthetic_clips_are_refused_as_training_songs(features: Features, tmp_path: Path) -> None:
    clips = features.only(range(6))
    clips.songs = [replace(song, file_sha256="", sound_sha256="") for song in clips.songs]
    with pytest.raises(ModelError, match="is no song: a synthetic clip has no file digests"):
        run_gan(partition(clips), CONFIG, context(tmp_path))


def test_the_generator_comes_with_the_list_of_the_songs_it_has_seen(features: Features, tmp_path: Path) -> None:
    trained(features.only([1, 3, 4]), tmp_path)
    assert read_seen(tmp_path) == {"file 1", "file 3", "file 4", "sound 1", "sound 3", "sound 4"}


# Warm start


@pytest.fixture(scope="module")
def earlier(features: Features, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained on songs 0 to 2."""
    run = tmp_path_factory.mktemp("earlier")
    trained(features.only([0, 1, 2]), run / "gan")
    return run


@pytest.fixture(scope="module")
def warm_start(earlier: Path) -> WarmStart:
    return read_warm_start("gan", InitConfig(run=str(earlier)))


def test_with_a_learning_rate_of_almost_0_the_earlier_networks_stay_as_they_are(
    features: Features, earlier: Path, warm_start: WarmStart, tmp_path: Path
) -> None:
    still = {"generator_learning_rate": 1e-12, "discriminator_learning_rate": 1e-12, "clip_seconds": 1.0}
    trained(features.only([3, 4, 5]), tmp_path, CONFIG.model_copy(update=still), warm_start)
    for name in ("generator.safetensors", "discriminator.safetensors"):
        before, after = load_file(earlier / "gan" / name), load_file(tmp_path / name)
        assert all(torch.allclose(value, after[key], atol=1e-7) for key, value in before.items())
    config, before_config = (read_json(folder / "config.json") for folder in (tmp_path, earlier / "gan"))
    assert config["normalisation"] == before_config["normalisation"]
    assert config["frames"] == MEL.frames(1.0)


def test_a_new_normalisation_comes_from_the_training_songs(features: Features, warm_start: WarmStart, tmp_path: Path) -> None:
    trained(features.only([3, 4, 5]), tmp_path / "warm", warm_start=replace(warm_start, normalisation=None))
    trained(features.only([3, 4, 5]), tmp_path / "cold")
    warm, cold = (read_json(tmp_path / folder / "config.json") for folder in ("warm", "cold"))
    assert warm["normalisation"] == cold["normalisation"]


@pytest.mark.full
def test_a_warm_start_interrupted_after_any_step_and_resumed_leaves_the_same_files(
    features: Features, whole: Path, warm_start: WarmStart, tmp_path: Path
) -> None:
    warm = trained(features, tmp_path / "warm", warm_start=warm_start)
    for stop_at in (1, 2, 3):
        out = tmp_path / str(stop_at)
        with pytest.raises(Interrupted):
            run_gan(partition(features), CONFIG, context(out, stop_at_question(stop_at)), warm_start)
        trained(features, out, warm_start=warm_start)
        for path in (tmp_path / "warm").glob("*.safetensors"):
            assert (out / path.name).read_bytes() == path.read_bytes()
    assert not torch.equal(warm["out.weight"], load_file(whole / "generator.safetensors")["out.weight"])


def test_a_warm_start_knows_the_songs_behind_the_weights(features: Features, warm_start: WarmStart, tmp_path: Path) -> None:
    trained(features.only([3, 4]), tmp_path, warm_start=warm_start)
    assert read_seen(tmp_path) == {f"{kind} {song}" for kind in ("file", "sound") for song in range(5)}
    with pytest.raises(ModelError, match=r"leak: the GAN .* ids: 2\."):
        run_gan(partition(features.only([3, 4]), features.only([2, 5])), CONFIG, context(tmp_path), warm_start)
