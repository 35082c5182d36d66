"""The weights that `vit.weights` names: random, of a file, or pretrained ones from the hub; and their digest."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from emotion.compat import timm
from emotion.config import VitConfig
from emotion.errors import SpecError, StorageError


def create_with_weights(config: VitConfig, arguments: dict[str, Any]) -> nn.Module:
    """The timm model `config.model` with the weights `config.weights`. arguments: for timm.create_model.

    Raises StorageError where the weights are not available, SpecError where they are not of this model.
    """
    if config.weights != "random" and not config.weights_file:
        return _from_hub(config, arguments)
    overlay = None
    if config.weights_file:
        overlay = _pretrained_config(read_weights(Path(config.weights_file)), config)
    network = timm.create_model(config.model, pretrained=overlay is not None, pretrained_cfg_overlay=overlay, **arguments)
    assert isinstance(network, nn.Module)
    return network


def check_weights(config: VitConfig) -> None:
    """Raise what `create_with_weights` would because of the weights."""
    if config.weights_file:
        _pretrained_config(read_weights(Path(config.weights_file)), config)
    elif config.weights != "random":
        _from_hub(config, {"num_classes": 0})


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors or .pth file. Only tensors are unpickled."""
    if not path.is_file():
        raise StorageError(f"vit.weights: there is no file {path}. Name a .safetensors or .pth file, or a folder with one.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # torch's own message advises to switch the check off, which is not safe.
        raise StorageError(f"vit.weights: {path} holds more than tensors; convert it to .safetensors") from error
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise StorageError(f"vit.weights: {path} is not readable as weights: {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise StorageError(f"vit.weights: {path} is not a plain mapping of names to tensors; convert it to .safetensors")
    return dict(state)


def _pretrained_config(state: dict[str, Tensor], config: VitConfig) -> dict[str, Any]:
    """timm's pretrained_cfg_overlay for a state dict. Raises StorageError for one of another model."""
    with torch.device("meta"):
        expected = set(timm.create_model(config.model, pretrained=False).state_dict())
    pretrained = timm.get_pretrained_cfg(config.model, allow_unregistered=False)
    assert pretrained is not None
    classifier, stem = f"{pretrained.classifier}.weight", f"{pretrained.first_conv}.weight"
    missing = sorted(name for name in expected - set(state) if not name.startswith(f"{pretrained.classifier}."))
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
            f"vit.weights: the weights of {name} are not available from the hub ({str(error).splitlines()[0]}). Put them into a "
            f"folder and name it in vit.weights, or set vit.weights to random to train from scratch."
        ) from error
    except RuntimeError as error:
        raise SpecError(f"vit.weights: {error}. Known: {', '.join(timm.list_pretrained(config.model)) or 'none'}") from error
    assert isinstance(network, nn.Module)
    return network


def hub_weights_sha256(config: VitConfig) -> str | None:
    """Digest of weights from the hub without their classifier: names, types, shapes and values.

    None for random weights and for a file, which has a digest of its own.
    """
    if config.weights == "random" or config.weights_file:
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(_from_hub(config, {"num_classes": 0}).state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
