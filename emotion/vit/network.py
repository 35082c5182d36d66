"""Any ViT of timm as a regression model of (valence, arousal) for log-mel clips: create, check, save and load it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emotion.audio.clips import Normalisation
from emotion.compat import before_each_load, timm
from emotion.config import MelConfig, VitConfig
from emotion.data.label_scale import DEAM_SCALE, Scale, scale_json
from emotion.errors import DataError, SpecError
from emotion.files import read_json, write_json
from emotion.training.device import Device
from emotion.training.seeding import derive
from emotion.training.weight_files import DECODING_ERRORS, bad_values, misfit, safetensors_errors_as_os_errors
from emotion.vit.model_names import not_a_vit, require_known
from emotion.vit.weights import create_with_weights

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Preprocessing:
    """How a song becomes the input of the network. Published as preprocessing.json.

    frames: length of a clip. image_size: (height, width) that a clip is resized to, None for no resizing. max_crops: largest
    number of clips per song. scale: rating scale of the labels before they were mapped to [-1, 1].
    """

    mel: MelConfig
    normalisation: Normalisation
    frames: int
    image_size: tuple[int, int] | None
    channels: int
    max_crops: int
    scale: Scale = DEAM_SCALE

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the network's input: (mels, frames) without resizing."""
        return self.image_size or (self.mel.mels, self.frames)

    def save(self, path: Path) -> None:
        clips = {name: getattr(self, name) for name in ("frames", "image_size", "channels", "max_crops")}
        sound = {"mel": self.mel.model_dump(), "normalisation": self.normalisation.to_json()}
        write_json(path, {**sound, **clips, "outputs": ["valence", "arousal"], "label_scale": scale_json(self.scale)})

    @classmethod
    def load(cls, path: Path) -> Self:
        try:
            value = read_json(path)
            low, high = value["label_scale"]["from"]
            return cls(
                mel=MelConfig.model_validate(value["mel"]),
                normalisation=Normalisation.from_json(value["normalisation"]),
                frames=value["frames"],
                image_size=tuple(value["image_size"]) if value["image_size"] else None,
                channels=value["channels"],
                max_crops=value["max_crops"],
                scale=(low, high),
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"model: {path} is not readable as a published model's preprocessing ({type(error).__name__}: {error}). "
                f"Name the folder model/ of a published run."
            ) from error


@dataclass(frozen=True)
class Architecture:
    """patch_size: (height, width); blocks: number of transformer blocks."""

    patch_size: tuple[int, int]
    blocks: int


def architecture_of(model: str) -> Architecture:
    """The architecture of a timm ViT. Allocates no weights. Raises SpecError for other models."""
    require_known(model, timm.list_models())
    with torch.device("meta"):
        network = timm.create_model(model, pretrained=False, num_classes=0)
    size = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if not isinstance(size, tuple) or not hasattr(network, "blocks"):
        raise not_a_vit(model)
    return Architecture((int(size[0]), int(size[1])), len(network.blocks))  # type: ignore[arg-type]


def preprocessing_for(
    config: VitConfig, mel: MelConfig, normalisation: Normalisation, scale: Scale = DEAM_SCALE
) -> Preprocessing:
    """The preprocessing for a config. Rounds clips down to whole patches. Raises SpecError if mel bands do not fill patches,
    or the model lacks blocks."""
    architecture = architecture_of(config.model)
    if config.depth is not None and config.depth > architecture.blocks:
        raise SpecError(f"vit.depth: expected at most {architecture.blocks}, the blocks of {config.model}, found {config.depth}.")
    height, width = architecture.patch_size
    frames = mel.frames(config.clip_seconds)
    if config.image_size is None:
        frames = frames // width * width
        if frames == 0:
            raise SpecError(f"vit.clip_seconds: {config.clip_seconds:g} s is shorter than one patch of {width} frames.")
    rows, columns = config.image_size or (mel.mels, frames)
    if rows % height or columns % width:
        raise SpecError(
            f"vit: an input of {rows} x {columns} is not made of whole patches of {height} x {width} ({config.model}). "
            f"Set {'vit.image_size' if config.image_size else 'mel.mels'} to a multiple."
        )
    return Preprocessing(mel, normalisation, frames, config.image_size, config.channels, config.max_crops, scale)


def create_network(config: VitConfig, preprocessing: Preprocessing, label_mean: Array | None, seed: int) -> nn.Module:
    """The timm model with two linear outputs and the weights that `config.weights` names.

    label_mean: [2], the initial bias of the head; None keeps the bias of a trained head. timm sums input channels and resamples
    position embeddings to fit. Raises the errors of `create_with_weights`.
    """
    torch.manual_seed(derive(seed, "vit", "weights"))
    network = create_with_weights(config, preprocessing.mel, _arguments(config, preprocessing))
    if label_mean is not None:
        with torch.no_grad():
            head = network.get_classifier()  # type: ignore[operator]
            head.bias.copy_(torch.from_numpy(label_mean))
    _sum_rows_alone(network)
    return network


def pooled(network: nn.Module, x: Tensor) -> Tensor:
    """The input of the last layer of a ViT of timm: [batch, channels, height, width] → [batch, features]."""
    found: Tensor = network.forward_head(network.forward_features(x), pre_logits=True)  # type: ignore[operator]
    return found


class RowwiseHead(nn.Linear):
    """A linear last layer that computes each row separately in evaluation mode.

    In a matrix product with two columns, MKL's order of summation for a row depends on the position of the row in the batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        return (x[:, None] * self.weight).sum(dim=2) + self.bias


def _sum_rows_alone(network: nn.Module) -> None:
    """Make the last layer a RowwiseHead with the same weights."""
    head: nn.Linear = network.get_classifier()  # type: ignore[operator]
    rowwise = RowwiseHead(head.in_features, head.out_features, device="meta")
    rowwise.weight, rowwise.bias = head.weight, head.bias
    network.set_submodule(network.pretrained_cfg["classifier"], rowwise)  # type: ignore[index, arg-type]


def _arguments(config: VitConfig, preprocessing: Preprocessing) -> dict[str, Any]:
    """Arguments for timm.create_model."""
    return {
        "in_chans": config.channels,
        "num_classes": 2,
        "img_size": preprocessing.input_size,
        "drop_path_rate": config.drop_path,
        "drop_rate": config.head_dropout,
        **({} if config.depth is None else {"depth": config.depth}),
    }


def identity_normalisation(mel: MelConfig) -> Normalisation:
    """Mean 0 and standard deviation 1, for uses in which only shapes matter."""
    return Normalisation(np.zeros(mel.mels, np.float32), np.ones(mel.mels, np.float32))


def network_on_meta(config: VitConfig, preprocessing: Preprocessing) -> nn.Module:
    """The network on torch's meta device: shapes without memory."""
    with torch.device("meta"):
        network = timm.create_model(config.model, pretrained=False, **_arguments(config, preprocessing))
    assert isinstance(network, nn.Module)
    return network


def check_model(config: VitConfig, mel: MelConfig) -> None:
    """Raise the errors of `create_network` before other phases take hours: unknown model, wrong size, missing weights."""
    preprocessing = preprocessing_for(config, mel, identity_normalisation(mel))
    try:
        network = network_on_meta(config.model_copy(update={"depth": None}), preprocessing)
    except (AssertionError, RuntimeError, ValueError) as error:
        rows, columns = preprocessing.input_size
        raise SpecError(
            f"vit.model: timm's {config.model} takes no input of {rows} x {columns}. {str(error).strip()} "
            f"Set vit.image_size, for example to [224, 224]."
        ) from error
    if config.depth is not None:
        try:
            network_on_meta(config, preprocessing)
        except AssertionError as error:
            raise SpecError(f"vit.depth: timm's {config.model} takes no other depth ({error}). Leave vit.depth out.") from error
    if not isinstance(network.get_classifier(), nn.Linear):  # type: ignore[operator]
        raise SpecError(f"vit.model: {config.model!r} does not end in one linear layer; try vit_tiny_patch16_224.")
    if config.weights != "random":
        create_with_weights(config, mel, _arguments(config, preprocessing))


def network_input(clips: Tensor, preprocessing: Preprocessing) -> Tensor:
    """[batch, 1, mels, frames] normalised → [batch, channels, height, width]."""
    if preprocessing.image_size is not None:
        clips = F.interpolate(clips, size=preprocessing.image_size, mode="bilinear", align_corners=False)
    return clips.expand(-1, preprocessing.channels, -1, -1)


def save_model(network: nn.Module, preprocessing: Preprocessing, folder: Path) -> None:
    """Write model.safetensors and config.json, which plain `timm.create_model` opens, and preprocessing.json."""
    height, width = preprocessing.input_size
    with safetensors_errors_as_os_errors(folder):
        timm.models.save_for_hf(
            network,
            str(folder),
            safe_serialization=True,
            model_config={"label_names": ["valence", "arousal"]},
            data_config={"input_size": (preprocessing.channels, height, width), "mean": (0.0,), "std": (1.0,), "crop_pct": 1.0},
        )
    preprocessing.save(folder / "preprocessing.json")


def load_model(folder: Path, device: Device) -> tuple[nn.Module, Preprocessing]:
    """Open a published `model/` with timm. Raises DataError if the folder is not one."""
    if not (folder / "model.safetensors").is_file():
        raise DataError(f"model: {folder} holds no model.safetensors. Name a published run or its folder model/.")
    preprocessing = Preprocessing.load(folder / "preprocessing.json")

    def refuse_misfit(network: nn.Module, state: Mapping[str, Any]) -> None:
        problem = misfit(network, state) or bad_values(network, state)
        if problem is not None:
            raise DataError(f"model: {folder}: model.safetensors does not fit config.json: {problem}. Copy the run again.")

    try:
        with before_each_load(refuse_misfit):
            network = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except (OSError, *DECODING_ERRORS) as error:
        raise DataError(f"model: {folder} does not open as a timm model: {str(error) or type(error).__name__}") from error
    assert isinstance(network, nn.Module)
    expected = (preprocessing.channels, *preprocessing.input_size)
    found = (network.pretrained_cfg["input_size"][0], *network.patch_embed.img_size)  # type: ignore[index, union-attr, misc]
    if found != expected or network.num_classes != 2:
        raise DataError(
            f"model: {folder}: config.json is for inputs of {found} and {network.num_classes} outputs, preprocessing.json for "
            f"{expected} and 2. Copy the run again."
        )
    _sum_rows_alone(network)
    return network.to(device.device).eval(), preprocessing
