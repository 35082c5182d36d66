"""Embeddings of songs by a pretrained ViT as it was before training, for the regressors of the stack.

The trained ViT has learned the labels of its training songs, so what regressors make of its embeddings says nothing about other
songs. The pretrained one has seen no label: every song can be held out. Its lower half is enough, and is published beside the
trained ViT as `model/embedder.safetensors`; the upper blocks of a network that was trained on pictures know pictures.

Source: blocks below the last ones transfer better to other tasks, Chen et al. 2020 (iGPT), section 4.2.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from emotion.training.device import Device
from emotion.training.weight_files import load_strictly, safetensors_errors_as_os_errors
from emotion.vit.crops import SongLogMel, mean_over_crops
from emotion.vit.network import Array, Preprocessing, load_model

log = logging.getLogger(__name__)

EMBEDDER = "embedder.safetensors"


class LowerHalf(nn.Module):
    """The first half of the blocks. [batch, channels, height, width] → [batch, width of the network], a mean over the patches."""

    def __init__(self, network: nn.Module) -> None:
        """network: of timm; it is cut."""
        super().__init__()
        network.set_submodule(network.pretrained_cfg["classifier"], nn.Identity())  # type: ignore[index, arg-type]
        network.blocks = network.blocks[: kept_blocks(network)]  # type: ignore[index]
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.network.forward_features(x)  # type: ignore[operator]
        patches: int = self.network.patch_embed.num_patches  # type: ignore[assignment, union-attr]
        return tokens[:, -patches:].mean(dim=1)  # class and register tokens come first


class SongEmbedder:
    """Embeds the log-mels of whole songs by crops, as the ViT sees them. model: a published `model/` with an embedder."""

    def __init__(self, model: Path, device: Device) -> None:
        """Raises DataError where the files are damaged or do not belong together."""
        network, self.preprocessing = load_model(model, device)
        self.lower_half, self.device = LowerHalf(network), device
        load_strictly(self.lower_half.network, model / EMBEDDER, "model")

    def __call__(self, songs: Sequence[SongLogMel], check_stop: Callable[[], None] = lambda: None) -> Array:
        """songs: [frames, mels] in dB each, of any length. Returns [songs, numbers], the mean over the crops of each song."""
        return mean_over_crops(self.lower_half, self.preprocessing, self.device, songs, check_stop=check_stop)


def read_embedder(model: Path, device: Device) -> SongEmbedder | None:
    """None where the ViT began with random weights, or was published by an earlier version."""
    return SongEmbedder(model, device) if (model / EMBEDDER).exists() else None


def kept_blocks(network: nn.Module) -> int:
    return max(1, len(network.blocks) // 2)  # type: ignore[arg-type]


def lower_half_of(network: nn.Module) -> dict[str, Tensor]:
    """Copies on the host, in float16, of the weights that `LowerHalf` keeps of a network. The network stays whole."""
    blocks: nn.Sequential = network.blocks  # type: ignore[assignment]
    upper = [f"blocks.{number}." for number in range(kept_blocks(network), len(blocks))]
    left_out = (f"{network.pretrained_cfg['classifier']}.", *upper)  # type: ignore[index]
    weights = {name: value for name, value in network.state_dict().items() if not name.startswith(left_out)}
    return {name: value.to("cpu", torch.float16, copy=True) for name, value in weights.items()}


def write_embedder(weights: dict[str, Tensor], model: Path) -> None:
    """weights: see `lower_half_of`; model: the folder of the ViT."""
    with safetensors_errors_as_os_errors(model):
        save_file({name: value.contiguous() for name, value in weights.items()}, model / EMBEDDER)


def keep_embedder(earlier: Path, model: Path) -> None:
    """In a warm start: that of the earlier run, which has seen no label either. Both are folders of a ViT.

    Where its clips were of another length the position embeddings would not fit: there is none then, which is logged.
    """
    if not (earlier / EMBEDDER).exists():
        return
    sizes = [Preprocessing.load(folder / "preprocessing.json").input_size for folder in (earlier, model)]
    if sizes[0] != sizes[1]:
        log.warning("phase=vit the embedder of init_from is for inputs of %s, not %s: the stack is fitted without one", *sizes)
        return
    shutil.copyfile(earlier / EMBEDDER, model / EMBEDDER)
