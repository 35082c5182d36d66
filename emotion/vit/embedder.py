"""Embeddings of songs by a pretrained ViT as it was before training, for the regressors of the stack.

The trained ViT has learned the labels of its training songs, so what regressors make of its embeddings says nothing about other
songs. The pretrained one has seen no label of these songs: each of them can be held out. The first half of its blocks is used, as
the later ones are specialised in the task of the pretraining; it is published as `model/embedder.safetensors`.

Source: features of the middle blocks are better than those of the last, Chen et al. 2020, Generative Pretraining from Pixels.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from emotion.compat import timm
from emotion.training.device import Device
from emotion.training.weight_files import load_strictly, read_weights_file, safetensors_errors_as_os_errors
from emotion.vit.crops import SongLogMel, mean_over_crops
from emotion.vit.network import Array, Preprocessing

EMBEDDER = "embedder.safetensors"


class LowerHalf(nn.Module):
    """The first half of the blocks. [batch, channels, height, width] → [batch, width of the network], a mean over the patches."""

    def __init__(self, network: nn.Module) -> None:
        """network: of timm; its head and its other blocks are removed from it."""
        super().__init__()
        network.set_submodule(network.pretrained_cfg["classifier"], nn.Identity())  # type: ignore[index, arg-type]
        network.blocks = network.blocks[: kept_blocks(network)]  # type: ignore[index]
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.network.forward_features(x)  # type: ignore[operator]
        patches: int = self.network.patch_embed.num_patches  # type: ignore[assignment, union-attr]
        return tokens[:, -patches:].mean(dim=1)  # class and register tokens come first


class SongEmbedder:
    """Embeds the log-mels of whole songs by crops, as the ViT sees them. model: a published `model/` with an embedder.

    numbers: of an embedding.
    """

    def __init__(self, model: Path, device: Device) -> None:
        """Raises DataError where the embedder is damaged or of another model. The model itself is expected to be intact."""
        self.preprocessing, self.device = Preprocessing.load(model / "preprocessing.json"), device
        lower_half = LowerHalf(timm.create_model(f"local-dir:{model}", pretrained=False))
        load_strictly(lower_half.network, model / EMBEDDER, "model")
        self.lower_half = lower_half.to(device.device).eval()
        self.numbers: int = lower_half.network.num_features  # type: ignore[assignment]

    def __call__(self, songs: Sequence[SongLogMel], check_stop: Callable[[], None] = lambda: None) -> Array:
        """songs: [frames, mels] in dB each, of any length. Returns [songs, numbers], the mean over the crops of each song."""
        return mean_over_crops(self.lower_half, self.preprocessing, self.device, songs, check_stop=check_stop)


def read_embedder(model: Path, device: Device) -> SongEmbedder | None:
    """None for a model without: its ViT began with random weights or with those of another job, or an earlier version made it."""
    return SongEmbedder(model, device) if (model / EMBEDDER).exists() else None


def kept_blocks(network: nn.Module) -> int:
    return max(1, len(network.blocks) // 2)  # type: ignore[arg-type]


def lower_half_of(network: nn.Module) -> dict[str, Tensor]:
    """Copies on the host, in float16 where they fit, of the weights that `LowerHalf` keeps of a network. It stays whole."""
    blocks: nn.Sequential = network.blocks  # type: ignore[assignment]
    upper = [f"blocks.{number}." for number in range(kept_blocks(network), len(blocks))]
    left_out = (f"{network.pretrained_cfg['classifier']}.", *upper)  # type: ignore[index]
    weights = {name: value for name, value in network.state_dict().items() if not name.startswith(left_out)}
    return {name: _half(value) for name, value in weights.items()}


def _half(value: Tensor) -> Tensor:
    half = value.to("cpu", torch.float16, copy=True).contiguous()
    return half if value.is_floating_point() and half.isfinite().all() else value.to("cpu", copy=True).contiguous()


def inherited(earlier: Path, preprocessing: Preprocessing) -> tuple[dict[str, Tensor] | None, str | None]:
    """In a warm start: the embedder of the earlier run, as `lower_half_of` gives it, and a warning where it cannot be used, as
    the position embeddings are for crops of another length. earlier: the folder of its ViT. None, None: it has no embedder."""
    if not (earlier / EMBEDDER).exists():
        return None, None
    theirs, ours = Preprocessing.load(earlier / "preprocessing.json").input_size, preprocessing.input_size
    if theirs != ours:
        return None, f"the embedder of init_from is for inputs of {theirs}, not {ours}: the stack is fitted without embeddings"
    return dict(read_weights_file(earlier / EMBEDDER, "init_from")), None


def write_embedder(weights: dict[str, Tensor], model: Path) -> None:
    """weights: see `lower_half_of`; model: the folder of the ViT."""
    with safetensors_errors_as_os_errors(model):
        save_file(weights, model / EMBEDDER)
