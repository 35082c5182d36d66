"""Any ViT of timm as a regressor of (valence, arousal) on log-mel clips, and the one path from a song to a prediction.

The same `predict_song` validates, evaluates and serves, so training and use cannot drift apart.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from emotion.audio.clips import Normalisation, spread_starts
from emotion.audio.feature_store import cut_clip
from emotion.compat import DropPath, group_parameters, timm
from emotion.config import MelConfig, VitConfig
from emotion.errors import DataError, SpecError, StorageError
from emotion.files import read_json, write_json
from emotion.training.device import Device
from emotion.training.seeding import derive
from emotion.training.weight_files import system_errors

log = logging.getLogger(__name__)
Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Preprocessing:
    """All that lies between an audio file and the network's input, and between its output and a label."""

    mel: MelConfig
    normalisation: Normalisation
    frames: int
    image_size: tuple[int, int] | None
    channels: int
    max_crops: int

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of what the network sees: mels × frames where nothing is resized."""
        return self.image_size or (self.mel.mels, self.frames)

    def save(self, path: Path) -> None:
        write_json(
            path,
            {
                "mel": self.mel.model_dump(),
                "normalisation": self.normalisation.to_json(),
                "frames": self.frames,
                "image_size": self.image_size,
                "channels": self.channels,
                "max_crops": self.max_crops,
                "outputs": ["valence", "arousal"],
                "label_scale": {"from": [1, 9], "to": [-1, 1], "formula": "(x - 5) / 4"},
            },
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        try:
            value = read_json(path)
            return cls(
                mel=MelConfig.model_validate(value["mel"]),
                normalisation=Normalisation.from_json(value["normalisation"]),
                frames=value["frames"],
                image_size=tuple(value["image_size"]) if value["image_size"] else None,
                channels=value["channels"],
                max_crops=value["max_crops"],
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"model: {path} is not readable as a published model's preprocessing ({type(error).__name__}: {error}). "
                f"Name the folder model/ of a published run."
            ) from error


class BatchNoise:
    """Dropout and stochastic depth as functions of (seed of the step, layer, sample).

    A forward pass sees the samples `rows` of an effective batch of `batch`. Each layer draws for the whole batch and takes
    its rows, so the same sample meets the same noise whatever the micro-batch, and once more in a second forward pass.
    """

    def __init__(self) -> None:
        self.seed, self.batch, self.rows = 0, 0, slice(0, 0)

    def at(self, seed: int, batch: int, rows: slice) -> None:
        self.seed, self.batch, self.rows = seed, batch, rows

    def keep(self, layer: int, probability: float, like: Tensor, per_sample: bool) -> Tensor:
        """Factors of mean 1: 0 for what is dropped, 1 / probability for what is kept."""
        shape = (self.batch, *([1] * (like.dim() - 1) if per_sample else like.shape[1:]))
        draws = torch.rand(shape, generator=torch.Generator().manual_seed(derive(self.seed, "layer", layer)))
        return ((draws < probability) / probability)[self.rows].to(like.device, like.dtype)


class NoisyLayer(nn.Module):
    """Takes the place of timm's DropPath (per_sample) or nn.Dropout and draws from a BatchNoise."""

    def __init__(self, noise: BatchNoise, layer: int, probability: float, per_sample: bool) -> None:
        super().__init__()
        self.noise, self.layer, self.probability, self.per_sample = noise, layer, probability, per_sample

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * self.noise.keep(self.layer, self.probability, x, self.per_sample)


def install_noise(network: nn.Module) -> BatchNoise:
    """Replace every active dropout and stochastic-depth layer of a timm model by one that draws per sample."""
    noise = BatchNoise()
    for name, module in list(network.named_modules()):
        rate = module.drop_prob if isinstance(module, DropPath) else module.p if isinstance(module, nn.Dropout) else 0.0
        if rate:
            layer = NoisyLayer(noise, derive(0, name), 1 - rate, per_sample=isinstance(module, DropPath))
            network.set_submodule(name, layer)
    return noise


def patch_size_of(model: str) -> tuple[int, int]:
    """(height, width) of a patch of a timm ViT, without making its weights. SpecError for what is no ViT of timm."""
    if model not in timm.list_models(model):
        near = timm.list_models(f"{model.split('_')[0]}*")[:6]
        hint = f"; timm has {', '.join(near)} …" if near else ""
        raise SpecError(
            f"vit.model: timm {timm.__version__} knows no model {model!r}{hint}. Weights tags go into vit.weights."
        )
    with torch.device("meta"):
        network = timm.create_model(model, pretrained=False, num_classes=0)
    size = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if not isinstance(size, tuple) or not hasattr(network, "blocks"):
        raise SpecError(f"vit.model: {model!r} is not a vision transformer with patches; try vit_tiny_patch16_224.")
    return int(size[0]), int(size[1])


def preprocessing_for(config: VitConfig, mel: MelConfig, normalisation: Normalisation) -> Preprocessing:
    """The clip's length is rounded down to whole patches. SpecError where the bands do not fill whole patches."""
    height, width = patch_size_of(config.model)
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
    return Preprocessing(mel, normalisation, frames, config.image_size, config.channels, config.max_crops)


def create_network(config: VitConfig, preprocessing: Preprocessing, label_mean: Array | None, seed: int) -> nn.Module:
    """The timm model with two linear outputs, its weights as `config.weights` says, its head's bias at the mean label.

    label_mean: None leaves the bias as it is, of a head that has learnt the labels.
    Weights made for other sizes are fitted by timm: input channels are summed, position embeddings resampled to the grid.
    Raises StorageError where weights cannot be had: random ones are used only when asked for.
    """
    torch.manual_seed(derive(seed, "vit", "weights"))
    arguments = _arguments(config, preprocessing)
    if config.weights == "random":
        network = timm.create_model(config.model, pretrained=False, **arguments)
    elif config.weights_path:
        overlay = _described(read_weights(config.weights_path), config)
        network = timm.create_model(config.model, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    else:
        network = _from_hub(config, arguments)
    assert isinstance(network, nn.Module)
    if label_mean is not None:
        with torch.no_grad():
            head = network.get_classifier()  # type: ignore[operator]
            head.bias.copy_(torch.from_numpy(label_mean))
    return network


def _arguments(config: VitConfig, preprocessing: Preprocessing) -> dict[str, Any]:
    """What timm is told when it makes the network."""
    return {
        "in_chans": config.channels,
        "num_classes": 2,
        "img_size": preprocessing.input_size,
        "drop_path_rate": config.drop_path,
        "drop_rate": config.head_dropout,
    }


def no_normalisation(mel: MelConfig) -> Normalisation:
    """Where only shapes count."""
    nothing = np.zeros(mel.mels, np.float32)
    return Normalisation(nothing, nothing + 1)


def shape_of_network(config: VitConfig, preprocessing: Preprocessing) -> nn.Module:
    """The network without its weights, on the device meta."""
    with torch.device("meta"):
        network = timm.create_model(config.model, pretrained=False, **_arguments(config, preprocessing))
    assert isinstance(network, nn.Module)
    return network


def check_model(config: VitConfig, mel: MelConfig) -> None:
    """Raise what `create_network` would, before hours of other work: an unknown model, a size that does not fit, no weights."""
    preprocessing = preprocessing_for(config, mel, no_normalisation(mel))
    network = shape_of_network(config, preprocessing)
    if not isinstance(network.get_classifier(), nn.Linear):  # type: ignore[operator]
        raise SpecError(f"vit.model: {config.model!r} does not end in one linear layer; try vit_tiny_patch16_224.")
    if config.weights_path:
        _described(read_weights(config.weights_path), config)
    elif config.weights != "random":
        _from_hub(config, {"num_classes": 0})


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors or .pth file. Nothing is unpickled."""
    if not path.is_file():
        raise StorageError(
            f"vit.weights: there is no file {path}. Name a .safetensors or .pth file, or a folder with one."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # torch's own message advises to switch the check off, which nobody should.
        raise StorageError(f"vit.weights: {path} holds more than tensors; convert it to .safetensors") from error
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise StorageError(f"vit.weights: {path} is not readable as weights: {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise StorageError(
            f"vit.weights: {path} is not a plain mapping of names to tensors; convert it to .safetensors"
        )
    return dict(state)


def _described(state: dict[str, Tensor], config: VitConfig) -> dict[str, Any]:
    """What timm has to know of a state dict of ours: classes and channels it was made for. Refuses one of another model."""
    with torch.device("meta"):
        expected = set(timm.create_model(config.model, pretrained=False).state_dict())
    facts = timm.get_pretrained_cfg(config.model, allow_unregistered=False)
    assert facts is not None
    classifier, stem = f"{facts.classifier}.weight", f"{facts.first_conv}.weight"
    missing = sorted(name for name in expected - set(state) if not name.startswith(f"{facts.classifier}."))
    if missing:
        raise StorageError(
            f"vit.weights: {config.weights} lacks {len(missing)} of the weights of {config.model}, {missing[0]} among them: "
            f"it belongs to another model. Set vit.model to the model it was saved from."
        )
    classes = state[classifier].shape[0] if classifier in state else -1
    return {"state_dict": state, "num_classes": classes, "input_size": (state[stem].shape[1], 224, 224)}


def _from_hub(config: VitConfig, arguments: dict[str, Any]) -> nn.Module:
    name = config.model if config.weights == "pretrained" else config.weights
    if name.split(".")[0] != config.model:
        raise SpecError(
            f"vit.weights: {config.weights!r} is not a weights tag of vit.model {config.model!r}. Known tags: "
            f"{', '.join(timm.list_pretrained(config.model)) or 'none'}; or a path, pretrained or random."
        )
    try:
        network = timm.create_model(name, pretrained=True, **arguments)
    except OSError as error:
        raise StorageError(
            f"vit.weights: the weights of {name} cannot be had from the hub ({str(error).splitlines()[0]}). Put them into a "
            f"folder and name it in vit.weights, or set vit.weights to random to train from scratch."
        ) from error
    except RuntimeError as error:
        raise SpecError(
            f"vit.weights: {error}. Known: {', '.join(timm.list_pretrained(config.model)) or 'none'}"
        ) from error
    assert isinstance(network, nn.Module)
    return network


def hub_weights_sha256(config: VitConfig) -> str | None:
    """A digest of what the hub gives for these weights, without their classifier: names, types, shapes and numbers.

    None where the weights are random or from a file, which has a digest of its own.
    """
    if config.weights == "random" or config.weights_path:
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(_from_hub(config, {"num_classes": 0}).state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def layer_numbers(network: nn.Module) -> dict[str, int]:
    """Parameter name → layer, 0 for the patch embedding, the highest for the head with the last norm."""
    numbers: dict[str, int] = group_parameters(network, network.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    top = max(numbers.values())
    return {name: top if name.startswith(("norm.", "fc_norm.")) else number for name, number in numbers.items()}


def network_input(clips: Tensor, preprocessing: Preprocessing) -> Tensor:
    """[batch, 1, mels, frames] normalised → [batch, channels, height, width]."""
    if preprocessing.image_size is not None:
        clips = F.interpolate(clips, size=preprocessing.image_size, mode="bilinear", align_corners=False)
    return clips.expand(-1, preprocessing.channels, -1, -1)


@torch.no_grad()
def predict_song(network: nn.Module, preprocessing: Preprocessing, device: Device, log_mel: Array) -> Array:
    """log_mel [frames, mels] in dB → [2] valence and arousal in [-1, 1]: the mean over crops spread over the whole song."""
    starts = spread_starts(len(log_mel), preprocessing.frames, preprocessing.max_crops)
    crops = np.stack([cut_clip(log_mel, start, preprocessing.frames) for start in starts])
    clips = torch.from_numpy(preprocessing.normalisation.apply(crops)).transpose(1, 2).unsqueeze(1).contiguous()
    with device.autocast():
        outputs: Tensor = network(network_input(device.send(clips), preprocessing))
    return outputs.float().mean(dim=0).clamp(-1, 1).cpu().numpy()


def save_model(network: nn.Module, preprocessing: Preprocessing, folder: Path) -> None:
    """model.safetensors and config.json as timm writes them, which plain `timm.create_model` opens, and preprocessing.json."""
    height, width = preprocessing.input_size
    with system_errors():
        timm.models.save_for_hf(
            network,
            str(folder),
            safe_serialization=True,
            model_config={"label_names": ["valence", "arousal"]},
            data_config={
                "input_size": (preprocessing.channels, height, width),
                "mean": (0.0,),
                "std": (1.0,),
                "crop_pct": 1.0,
            },
        )
    preprocessing.save(folder / "preprocessing.json")


def load_model(folder: Path, device: Device) -> tuple[nn.Module, Preprocessing]:
    """A published `model/` as timm opens it. DataError where the folder is not one."""
    if not (folder / "model.safetensors").is_file():
        raise DataError(f"model: {folder} holds no model.safetensors. Name a published run or its folder model/.")
    preprocessing = Preprocessing.load(folder / "preprocessing.json")
    try:
        network = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise DataError(f"model: {folder} does not open as a timm model: {error}") from error
    assert isinstance(network, nn.Module)
    return network.to(device.device).eval(), preprocessing
