"""Generator and discriminator of conditional log-mel clips of any length and any number of mel bands.

Both are convolutional in time and normalise per sample (no BatchNorm: the objective must not depend on the micro-batch). No
convolution runs at full resolution: 2 x 2 points become 4 channels at half resolution (pixel unshuffle, Shi et al. 2016). Clips
are [batch, 1, mels, frames] in [-RANGE, RANGE]; labels are [batch, 2] = (valence, arousal). Those of songs and those that synth
draws are in [-1, 1]. In training Gaussian noise is added to a song's label, and the sum is not clipped.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emotion.audio.clips import RANGE

LEVELS = 4
SCALE = 1 << LEVELS  # the coarsest map is 1/16 of a clip in both directions: 0.37 s a column at the default mel settings
BLOCKS = LEVELS - 1


def _widths(width: int) -> list[int]:
    """Channels of each level, from half resolution to the coarsest."""
    return [width * 2**level for level in range(LEVELS)]


class ChannelAttention(nn.Module):
    """Scale each channel by a gate computed from its mean and maximum over the clip. Source: Woo et al. 2018 (CBAM), eq. 2."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = max(4, channels // reduction)
        self.bottleneck = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.bottleneck(x.mean(dim=(2, 3))) + self.bottleneck(x.amax(dim=(2, 3))))
        gated: Tensor = x * gate[:, :, None, None]
        return gated


class StyledBlock(nn.Module):
    """Doubles the resolution; the style (valence, arousal, latent) scales and shifts each channel.

    The convolutions double the resolution, because the layers before them would give the same value for each 2 x 2 points.
    """

    def __init__(self, inputs: int, outputs: int, style: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1)
        self.modulation = nn.Linear(style, 2 * (inputs + outputs))
        self.sizes = [inputs, inputs, outputs, outputs]

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale1, shift1, scale2, shift2 = self.modulation(style).split(self.sizes, dim=1)
        y = _doubled(F.leaky_relu(modulated(x, scale1, shift1), 0.2, inplace=True), self.conv1)
        y = self.conv2(F.leaky_relu(modulated(y, scale2, shift2), 0.2, inplace=True))
        weight = self.skip.weight.transpose(0, 1).expand(-1, -1, 2, 2)
        blended: Tensor = y + F.conv_transpose2d(x, weight, self.skip.bias, stride=2)
        return blended


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(1 + scale) y + shift, where y is x, [batch, channels, rows, columns], with mean 0 and variance 1 in each group of
    channels of a sample. scale, shift: [batch, channels]. Source: Wu & He 2018 (Group Normalization), eq. 1-2.

    On a GPU nn.GroupNorm followed by scale and shift takes several passes in float32 and changes the memory layout. This
    keeps the precision and layout of x.
    """
    with torch.autocast(x.device.type, enabled=False):
        modulated: Tensor = _Modulation.apply(x, scale.float(), shift.float())  # type: ignore[no-untyped-call]
    return modulated


class _Modulation(torch.autograd.Function):
    """Forward and backward each need two sums over x and one linear function of it, factor * x + offset."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        sums = x.sum(dim=(2, 3), dtype=torch.float32)
        squares = torch.linalg.vector_norm(x, dim=(2, 3), dtype=torch.float32).square()
        mean = _mean_of_group(sums, x)
        deviation = (_mean_of_group(squares, x) - mean.square()).clamp(min=0).add(1e-5).sqrt()
        ctx.save_for_backward(x, scale, mean, deviation)
        factor = ((1 + scale) / deviation).to(x.dtype)
        # The rounded factor, so that the mean of the result is exact.
        return torch.addcmul(_at_each_point(shift - mean * factor.float(), x), x, _at_each_point(factor, x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (gradient,) = gradients
        x, scale, mean, deviation = ctx.saved_tensors
        of_shift = gradient.sum(dim=(2, 3), dtype=torch.float32)
        of_scale = ((gradient * x).sum(dim=(2, 3), dtype=torch.float32) - mean * of_shift) / deviation
        slope = -_mean_of_group((1 + scale) * of_scale, x) / deviation.square()
        offset = -_mean_of_group((1 + scale) * of_shift, x) / deviation - slope * mean
        of_x = torch.addcmul(_at_each_point(offset, x), x, _at_each_point(slope, x))
        return of_x.addcmul_(gradient, _at_each_point((1 + scale) / deviation, x)), of_scale, of_shift


def _mean_of_group(sums: Tensor, x: Tensor) -> Tensor:
    """[batch, channels] sums over the points of x → [batch, channels] means over all points of the channel's group."""
    batch, channels = sums.shape
    group = channels // _groups(channels)
    means = sums.view(batch, -1, group).mean(dim=2, keepdim=True) / (x.shape[2] * x.shape[3])
    return means.expand(-1, -1, group).reshape(batch, channels)


def _at_each_point(values: Tensor, x: Tensor) -> Tensor:
    return values[:, :, None, None].to(x.dtype)


def _doubled(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """Nearest-neighbour upsampling by 2, then the convolution, as one transposed convolution: 4 products per weight, not 9."""
    kernel = _boxed(convolution.weight.flip(2, 3)).transpose(0, 1)
    return F.conv_transpose2d(x, kernel, convolution.bias, stride=2, padding=1)


def _boxed(kernel: Tensor) -> Tensor:
    """Convolve a kernel with a 2 x 2 box: […, 3, 3] → […, 4, 4]. As in ProGAN (Karras et al. 2018)."""
    kernel = F.pad(kernel, (1, 1, 1, 1))
    kernel = kernel[..., 1:, :] + kernel[..., :-1, :]
    return kernel[..., 1:] + kernel[..., :-1]


class Generator(nn.Module):
    """Labels [batch, 2] and noise → clips [batch, 1, mels, frames].

    latent: [batch, latent, 1 + columns], one global vector and one per coarse column; columns = ceil(frames / 16).
    """

    STYLE = 128

    def __init__(self, mels: int, latent: int, width: int) -> None:
        super().__init__()
        self.mels, self.latent = mels, latent
        widths = _widths(width)
        self.rows = -(-mels // SCALE)
        self.label = nn.Sequential(nn.Linear(2, self.STYLE), nn.LeakyReLU(0.2), nn.Linear(self.STYLE, self.STYLE))
        self.style = nn.Sequential(nn.Linear(self.STYLE + latent, self.STYLE), nn.LeakyReLU(0.2))
        self.base = nn.Conv1d(self.STYLE + latent, widths[-1] * self.rows, 3, padding=1)
        self.blocks = nn.ModuleList(StyledBlock(widths[level + 1], widths[level], self.STYLE) for level in range(BLOCKS)[::-1])
        self.attention = ChannelAttention(widths[1])
        # Equal initial weights for the 4 points of a position avoid a checkerboard pattern (Aitken et al. 2017).
        self.out = nn.Conv2d(widths[0], 4, 3, padding=1, bias=False)
        with torch.no_grad():
            self.out.weight.copy_(self.out.weight[:1].expand_as(self.out.weight))

    @staticmethod
    def columns(frames: int) -> int:
        return -(-frames // SCALE)

    @staticmethod
    def whole(frames: int) -> int:
        """frames rounded up to whole columns. A partly padded last column made the discriminator unstable on few songs."""
        return SCALE * Generator.columns(frames)

    def forward(self, labels: Tensor, latent: Tensor, frames: int) -> Tensor:
        style = self.style(torch.cat([self.label(labels), latent[:, :, 0]], dim=1))
        columns = latent[:, :, 1:]
        base = torch.cat([style[:, :, None].expand(-1, -1, columns.shape[2]), columns], dim=1)
        x = self.base(base).unflatten(1, (-1, self.rows)).contiguous(memory_format=torch.channels_last)
        for position, block in enumerate(self.blocks):
            x = block(x, style)
            if position == BLOCKS - 2:
                x = self.attention(x)
        x = F.pixel_shuffle(self.out(F.leaky_relu(x, 0.2)), 2)[:, :, : self.mels, :frames]
        return RANGE * torch.tanh(x / RANGE)


class DownBlock(nn.Module):
    """Halves the resolution; rows and columns must be even.

    The second convolution and the following mean over 2 x 2 points are merged into one convolution with stride 2.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, padding=1)
        self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.conv1(F.leaky_relu(x, 0.2)), 0.2)
        share = 0.25 * 2**-0.5  # 1/4 for the mean over 4 points, 1/√2 for the sum of two branches
        assert self.conv2.bias is not None
        y = F.conv2d(y, share * _boxed(self.conv2.weight), 2**-0.5 * self.conv2.bias, stride=2, padding=1)
        return y + F.conv2d(x, share * self.skip.weight.expand(-1, -1, 2, 2), stride=2)


class Discriminator(nn.Module):
    """Clips and labels → [batch] float32 logits: how real a clip is, and how well it matches its label.

    labels: [batch, 2], or n labels per clip: [n, batch, 2] → [n, batch] at almost no extra cost. The label is a projection
    (Miyato & Koyama 2018). Features are the mean and the standard deviation over time; the frequency axis is kept.
    """

    FEATURES = 128

    def __init__(self, mels: int, width: int) -> None:
        super().__init__()
        widths = _widths(width)
        rows = -(-mels // SCALE)
        self.stem = nn.Conv2d(4, widths[0], 3, padding=1)
        self.blocks = nn.Sequential(*(DownBlock(widths[level], widths[level + 1]) for level in range(BLOCKS)))
        self.features = nn.Linear(2 * widths[-1] * rows, self.FEATURES)
        self.score = nn.Linear(self.FEATURES, 1)
        self.label = nn.Sequential(nn.Linear(2, self.FEATURES), nn.LeakyReLU(0.2), nn.Linear(self.FEATURES, self.FEATURES))

    def forward(self, clips: Tensor, labels: Tensor) -> Tensor:
        assert labels.shape[-2:] == (len(clips), 2), f"{len(clips)} clips and labels {labels.shape}"
        whole = F.pad(clips, (0, -clips.shape[3] % SCALE, 0, -clips.shape[2] % SCALE))
        x = F.leaky_relu(self.blocks(self.stem(_halved(whole))), 0.2)
        # In fp32: gradient penalties use small differences between logits, which half precision would round away.
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            mean = x.mean(dim=3)
            sd = (x.var(dim=3, unbiased=False) + 1e-6).sqrt()
            features = F.leaky_relu(self.features(torch.cat([mean, sd], dim=1).flatten(1)), 0.2)
            match = (self.label(labels) * features).sum(dim=-1) / self.FEATURES**0.5
            logits: Tensor = self.score(features).squeeze(1) + match
        return logits


def _halved(clips: Tensor) -> Tensor:
    """[batch, 1, 2 rows, 2 columns] → [batch, 4, rows, columns]: `pixel_unshuffle` with channels last in memory.

    Convolutions are fastest in this layout, and each layer keeps the layout of its input.
    """
    squares = clips.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))
    halved: Tensor = squares.permute(0, 2, 4, 1, 3, 5).flatten(3).movedim(3, 1)
    return halved


def _groups(channels: int) -> int:
    """Number of groups of GroupNorm: 8 channels per group, or one group if 8 does not divide the channels."""
    return channels // 8 if channels % 8 == 0 else 1
