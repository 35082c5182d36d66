"""Song embeddings from the pretrained ViT before its training, for the regressors of the stack.

The trained ViT has fitted the labels of its training songs, so its embeddings of these songs are biased inputs for regressors.
The pretrained ViT has not seen the labels, so any song can be held out. Only the first half of the blocks is used, as later
blocks are specialised in the pretraining task; of a ViT with a smaller `vit.depth`, all blocks. It is published as
`model/embedder.safetensors`.

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
from emotion.vit.network import Array, Preprocessing, architecture_of

EMBEDDER = "embedder.safetensors"


class LowerHalf(nn.Module):
    """The first half of the blocks: [batch, channels, height, width] → [batch, features], the mean over the patches."""

    def __init__(self, network: nn.Module) -> None:
        """network: a ViT of timm. It is modified: its head and the other blocks are removed."""
        super().__init__()
        network.set_submodule(network.pretrained_cfg["classifier"], nn.Identity())  # type: ignore[index, arg-type]
        network.blocks = network.blocks[: kept_blocks(network)]  # type: ignore[index]
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.network.forward_features(x)  # type: ignore[operator]
        patches: int = self.network.patch_embed.num_patches  # type: ignore[assignment, union-attr]
        return tokens[:, -patches:].mean(dim=1)  # class and register tokens come first


class SongEmbedder:
    """Embeds whole songs as the mean over crops. model: a published `model/` with an embedder.

    numbers: dimension of an embedding.
    """

    def __init__(self, model: Path, device: Device) -> None:
        """Raises DataError if the embedder is damaged or does not fit the model. The model itself must be verified already."""
        self.preprocessing, self.device = Preprocessing.load(model / "preprocessing.json"), device
        lower_half = LowerHalf(timm.create_model(f"local-dir:{model}", pretrained=False))
        load_strictly(lower_half.network, model / EMBEDDER, "model")
        self.lower_half = lower_half.to(device.device).eval()
        self.numbers: int = lower_half.network.num_features  # type: ignore[assignment]

    def __call__(self, songs: Sequence[SongLogMel], check_stop: Callable[[], None] = lambda: None) -> Array:
        """songs: [frames, mels] in dB each, of any length. Returns [songs, numbers], the mean over the crops of each song."""
        return mean_over_crops(self.lower_half, self.preprocessing, self.device, songs, check_stop=check_stop)


def read_embedder(model: Path, device: Device) -> SongEmbedder | None:
    """The embedder of a model; None if its ViT started from random weights or another job's, or is of an earlier version."""
    return SongEmbedder(model, device) if (model / EMBEDDER).exists() else None


def kept_blocks(network: nn.Module) -> int:
    """Half of the blocks of the network's architecture, or all that the network has (`vit.depth`), if that is fewer."""
    whole = architecture_of(network.pretrained_cfg["architecture"]).blocks  # type: ignore[index, arg-type]
    return min(max(1, whole // 2), len(network.blocks))  # type: ignore[arg-type]


def lower_half_of(network: nn.Module) -> dict[str, Tensor]:
    """Host copies of the weights that `LowerHalf` keeps of a network, as float16 if that is finite. The network is unchanged."""
    blocks: nn.Sequential = network.blocks  # type: ignore[assignment]
    upper = [f"blocks.{number}." for number in range(kept_blocks(network), len(blocks))]
    left_out = (f"{network.pretrained_cfg['classifier']}.", *upper)  # type: ignore[index]
    weights = {name: value for name, value in network.state_dict().items() if not name.startswith(left_out)}
    return {name: _half(value) for name, value in weights.items()}


def _half(value: Tensor) -> Tensor:
    half = value.to("cpu", torch.float16, copy=True).contiguous()
    return half if value.is_floating_point() and half.isfinite().all() else value.to("cpu", copy=True).contiguous()


def inherited(earlier: Path, preprocessing: Preprocessing) -> tuple[dict[str, Tensor] | None, str | None]:
    """For a warm start: the weights of the earlier run's embedder, as from `lower_half_of`, and None; or None and a warning if
    its position embeddings are for another input size; or None, None if it has no embedder. earlier: the folder of its ViT."""
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
