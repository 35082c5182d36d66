"""The weights that `vit.weights` names: random, of a file, or pretrained ones from the hub; and their digest.

Loading is strict: a tensor that is missing, surplus, of another shape or type, or not finite is an error. Exceptions: the
classifier head, which is replaced anyway, and the decoder of a masked autoencoder.
"""

import contextlib
import hashlib
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emotion.compat import before_each_load, timm
from emotion.config import MelConfig, VitConfig
from emotion.data.leaks import SEEN, TRAINED, read_seen
from emotion.errors import DataError, SpecError, StorageError, first_of
from emotion.files import read_json
from emotion.terminal import shown_for_now
from emotion.training.memory_backoff import is_out_of_memory
from emotion.training.weight_files import DECODING_ERRORS, NAMED, bad_values, misfit, read_weights_file
from emotion.vit.front_end import refuse_other_front_end
from emotion.vit.weight_names import with_timms_names

log = logging.getLogger(__name__)

WRAPPERS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model_state_dict", "model", "module")
"""Names under which training programs save the state dict of a network; averaged weights first."""
TO_DO = "Set vit.model to the model that it was saved from, or save only the tensors of that model."


def create_with_weights(config: VitConfig, mel: MelConfig, arguments: dict[str, Any]) -> nn.Module:
    """The timm model `config.model` with the weights `config.weights`, for log-mels as in `mel`. arguments: for
    timm.create_model.

    Raises DataError where a file holds no weights, SpecError where they are not of this model or were trained on other
    spectrograms, StorageError where the hub cannot be reached.
    """
    if config.weights_file:
        return _from_file(Path(config.weights_file), config, mel, arguments)
    if config.weights != "random":
        return _from_hub(config, arguments)
    network = timm.create_model(config.model, pretrained=False, **arguments)
    assert isinstance(network, nn.Module)
    return network


def seen_by_weights(config: VitConfig) -> tuple[set[str], set[str]]:
    """Identities of the songs that `config.weights` was trained on, and of all songs that it has seen, including those used for
    model selection. Empty unless a job published it with these lists."""
    folder = Path(config.weights_file).parent if config.weights_file else None
    if folder is None or not (folder / SEEN).is_file():
        return set(), set()
    return read_seen(folder, TRAINED), read_seen(folder)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, also if it is one entry of a training checkpoint."""
    content = read_weights_file(path, "vit.weights")
    names, found = _state_dict_in(content)
    if found is None:
        # Last, as many other entries contain tensors, too.
        names, found = _state_dict_in(content, beside_others=True)
    if found is None:
        entries = [f"{name} ({type(value).__name__})" for name, value in content.items()]
        raise DataError(
            f"vit.weights: {path} holds no tensors by name, alone or in {', '.join(WRAPPERS)}; it holds "
            f"{first_of(entries, NAMED) or 'nothing'}. Save only the state dict of the network."
        )
    if names:
        log.info("vit.weights: using %s of %s", "/".join(names), path)
    return _only_weights(found, path)


def _state_dict_in(content: Any, beside_others: bool = False) -> tuple[list[str], Mapping[Any, Any] | None]:
    """The state dict in a mapping, and the names that lead to it. beside_others: it may also have other entries."""
    if not isinstance(content, Mapping) or not content:
        return [], None
    are_tensors = [isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()]
    if all(are_tensors):
        return [], content
    for wrapper in WRAPPERS:
        names, state = _state_dict_in(content.get(wrapper), beside_others)
        if state is not None:
            return [wrapper, *names], state
    return [], content if beside_others and any(are_tensors) else None


def _only_weights(found: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """The tensors, without the counter of torch's AveragedModel. Raises DataError for an entry that may hold others, and for
    tensors without data."""
    others = {name: value for name, value in found.items() if not isinstance(name, str) or not isinstance(value, Tensor)}
    unknown = [f"{name} ({type(value).__name__})" for name, value in others.items() if not _is_plain(value)]
    if unknown:
        raise DataError(
            f"vit.weights: {path} holds, beside tensors by name, {first_of(unknown, NAMED)}. "
            f"Save only the state dict of the network."
        )
    counters = [name for name in found if name not in others and f".{name}".endswith(".n_averaged") and found[name].ndim == 0]
    if others or counters:
        log.info("vit.weights: %s holds, besides weights, %s: ignored", path, first_of([*map(str, others), *counters], NAMED))
    state = {name: value for name, value in found.items() if name not in others and name not in counters}
    absent = [name for name, tensor in state.items() if tensor.is_meta]
    if absent:
        raise DataError(
            f"vit.weights: {path}: {first_of(absent, NAMED)} "
            f"{'has' if len(absent) == 1 else 'have'} no data, as on torch's device meta. "
            f"Save the network after its weights were loaded."
        )
    return state


def _is_plain(value: Any) -> bool:
    """Whether a value is no tensor and holds none."""
    if isinstance(value, Mapping):
        return all(_is_plain(part) for part in (*value.keys(), *value.values()))
    if isinstance(value, list | tuple | set):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float | complex | str | bytes)


def _from_file(path: Path, config: VitConfig, mel: MelConfig, arguments: dict[str, Any]) -> nn.Module:
    source, state, model = f"vit.weights: {path}", read_weights(path), config.model
    with torch.device("meta"):
        plain = timm.create_model(model, pretrained=False)
    head, stem = _name(plain, "classifier"), f"{_name(plain, 'first_conv')}.weight"
    state = with_timms_names(state, plain.state_dict().keys(), stem, source)
    if config.weights_mel == "same":
        refuse_other_front_end(path, state, stem, mel)
    state, foreign = _without_prefix(state, stem, head)
    classes, channels = _classes(state, head, source), _channels(state, stem, plain, source)
    overlay = {"state_dict": state, "num_classes": classes, "input_size": (channels, *_size_beside(path))}
    try:
        with _strict(source, config, foreign):
            network = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    except DECODING_ERRORS as error:
        if is_out_of_memory(error):
            raise
        resampled = {name: list(state[name].shape) for name in (stem, "pos_embed") if name in state}
        aside = {stem, "pos_embed", f"{head}.weight", f"{head}.bias"}
        others = {name: value for name, value in state.items() if name not in aside}
        problem = misfit(plain, others, may_lack=aside) or f"timm cannot resample {resampled}"
        raise SpecError(f"{source} does not fit vit.model {model}: {problem} ({_first_line(error)}). {TO_DO}") from error
    assert isinstance(network, nn.Module)
    return network


@contextlib.contextmanager
def _strict(source: str, config: VitConfig, foreign: Collection[str] = ()) -> Iterator[None]:
    """Raise an error if a state dict that timm loads in the block does not fit its network, except for the head.

    With `config.depth`, the blocks from that number on are removed from the state dict. source: start of the messages. foreign:
    names outside of the network, unless timm's filter removes them.
    """
    loaded, model = False, config.model

    def inspect(network: nn.Module, state: dict[str, Any]) -> None:
        nonlocal loaded
        loaded = True
        blocks = 1 + max(map(_block_of, state), default=-1)
        if config.depth is not None:
            for name in [name for name in state if _block_of(name) >= config.depth]:
                del state[name]
        expected = set(network.state_dict())
        head = {name for name in expected if _is_of(_name(network, "classifier"), name)}
        # timm, too, leaves out the pooling of SigLIP in its variants that average.
        pooling = {name for name in state if "siglip" in model and name.startswith("attn_pool.")} - expected
        state = {name: value for name, value in state.items() if name not in pooling}
        # The head must be complete or absent.
        problem = misfit(network, state, may_lack=() if head & set(state) else head)
        if problem is not None and (left_over := [name for name in state if name in foreign]):
            problem = f"beside a network it has, left over, {first_of(left_over, NAMED)}"
        if problem is not None:
            fewer = 0 < blocks < len(network.blocks)  # type: ignore[arg-type]
            to_do = f"If it is of a run with vit.depth {blocks}, set that here, too. {TO_DO}" if fewer else TO_DO
            of_depth = "" if config.depth is None else f" with vit.depth {config.depth}"
            raise SpecError(f"{source} does not fit vit.model {model}{of_depth}: {problem}. {to_do}")
        problem = bad_values(network, state)
        if problem is not None:
            raise DataError(f"{source}: {problem}. Weights have to be finite, in float32, float64, float16 or bfloat16.")
        stem = f"{_name(network, 'first_conv')}.weight"
        if stem in state and not state[stem].any():
            raise DataError(f"{source}: {stem} is all zero, as in no trained network. Name the file of the trained weights.")

    with before_each_load(inspect):
        yield
    if not loaded:
        raise SpecError(f"{source}: timm reads it by a program of its own, which cannot be verified. Name a .safetensors file.")


def _name(network: nn.Module, what: str) -> str:
    """timm's name of the classifier head or of the first convolution."""
    return str(network.pretrained_cfg[what])  # type: ignore[index]


def _block_of(name: str) -> int:
    """The number of the block that a tensor is of, -1 for none."""
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _is_of(head: str, name: str) -> bool:
    """Whether a tensor is the weight or the bias of the head."""
    return name in (f"{head}.weight", f"{head}.bias")


def _without_prefix(state: dict[str, Tensor], stem: str, head: str) -> tuple[dict[str, Tensor], list[str]]:
    """Remove the prefix of all names of the network, such as `module.` or `model.backbone.`; the head may lack it.

    If other names lack the prefix, the state is returned unchanged, with these names: timm's filters handle some of these files,
    and `_strict` refuses the others.
    """
    prefixes = {name.removesuffix(stem) for name in state if name.endswith(f".{stem}")}
    if stem in state or len(prefixes) != 1:
        return state, []
    (prefix,) = prefixes
    outside = [name for name in state if not name.startswith(prefix)]
    foreign = [name for name in outside if not _is_of(head, name)]
    if foreign:
        return state, foreign
    return {name.removeprefix(prefix): value for name, value in state.items() if name not in outside}, []


def _classes(state: dict[str, Tensor], head: str, source: str) -> int:
    """The number of outputs of the head in a file, -1 for none. Raises SpecError for one that is no linear layer."""
    shapes = {name: list(state[name].shape) for name in (f"{head}.weight", f"{head}.bias") if name in state}
    weight, bias = shapes.get(f"{head}.weight", []), shapes.get(f"{head}.bias", [])
    if shapes and (len(weight) != 2 or weight[:1] != bias):
        raise SpecError(f"{source}: its head is {shapes}, expected a weight [classes, width] and a bias [classes]. {TO_DO}")
    return weight[0] if shapes else -1


def _channels(state: dict[str, Tensor], stem: str, network: nn.Module, source: str) -> int:
    """The input channels of the first convolution in a file; 3 where it has another name before timm's filters."""
    if stem not in state:
        return 3
    weight, expected = state[stem], network.get_parameter(stem)
    if weight.ndim == 2:  # flattened patches
        return weight.shape[1] // expected[0, 0].numel()
    if weight.ndim != expected.ndim:
        raise SpecError(f"{source}: its {stem} is {list(weight.shape)}, expected [width, channels, height, width]. {TO_DO}")
    return weight.shape[1]


def _size_beside(path: Path) -> tuple[int, int]:
    """(height, width) of the input of a published model, whose position embeddings are not square.

    (224, 224) for other files. timm assumes a square if the number of positions contradicts this size.
    """
    if path.name == "model.safetensors":
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            made = read_json(path.with_name("preprocessing.json"))
            height, width = made["image_size"] or (made["mel"]["mels"], made["frames"])
            return int(height), int(width)
    return 224, 224


def _from_hub(config: VitConfig, arguments: dict[str, Any]) -> nn.Module:
    name = config.model if config.weights == "pretrained" else config.weights
    if name.split(".")[0] != config.model:
        raise SpecError(
            f"vit.weights: {config.weights!r} is not a weights tag of vit.model {config.model!r}. Known tags: "
            f"{', '.join(timm.list_pretrained(config.model)) or 'none'}; or a path, pretrained or random."
        )
    try:
        log.info("vit.weights: asking the hub for %s, where it is not here", name, extra=shown_for_now(f"fetches {name} …"))
        with _strict(f"vit.weights: {name} from the hub", config), _without_log("huggingface_hub"):
            network = timm.create_model(name, pretrained=True, **arguments)
    except OSError as error:
        raise StorageError(
            f"vit.weights: the weights of {name} are not available from the hub ({_first_line(error)}). Put them into a "
            f"folder and name it in vit.weights, or set vit.weights to random to train from scratch."
        ) from error
    except DECODING_ERRORS as error:
        if is_out_of_memory(error):
            raise
        known = ", ".join(timm.list_pretrained(config.model)) or "none"
        raise SpecError(
            f"vit.weights: {name}: {_first_line(error)}. Known: {known}. If it is one of them, its copy below HF_HOME is "
            f"damaged: delete it."
        ) from error
    assert isinstance(network, nn.Module)
    return network


@contextlib.contextmanager
def _without_log(library: str) -> Iterator[None]:
    """Suppress a library's log lines about its retries. It raises the last failure, which is reported."""
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def hub_weights_sha256(config: VitConfig) -> str | None:
    """Digest of weights from the hub, of all blocks, without their classifier: names, types, shapes and values.

    None for random weights and for a file, which has a digest of its own.
    """
    if config.weights == "random" or config.weights_file:
        return None
    digest = hashlib.sha256()
    whole = config.model_copy(update={"depth": None})
    for name, tensor in sorted(_from_hub(whole, {"num_classes": 0}).state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
