"""Check that weights trained on spectrograms were trained with the front end of the spec.

A ViT trained on spectrograms depends on its front end: sample rate, mel bands, hop, scale, and which axis is time. With another
front end its inputs are out of distribution, but nothing fails. So such weights are refused unless their front end is known to
equal `mel`, or the spec accepts the difference. Weights trained on images are not checked.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from emotion.config import MelConfig
from emotion.errors import SpecError
from emotion.files import read_json

KALDI = "16 kHz, 128 Kaldi mel bands, a frame each 10 ms, natural logarithm"
KNOWN = {513: f"as AudioMAE: {KALDI}, 1024 frames, time first", 1214: f"as AST: {KALDI}, 1024 frames"}
"""Number of position embeddings → the probable network. This guess is used in the message only."""
ALL_THE_SAME = "Or set vit.weights_mel to other, to begin with these weights on other spectrograms all the same"


def refuse_other_front_end(path: Path, state: Mapping[str, Tensor], stem: str, mel: MelConfig) -> None:
    """Raise SpecError for weights that were trained on spectrograms other than those of `mel`, or on unknown ones.

    Weights of this program have a preprocessing.json in their folder. Others are recognised by a first convolution with one input
    channel, by an audio model's preprocessor_config.json, or by one input channel in timm's config.json. stem: name of the weight
    of the first convolution.
    """
    source = f"vit.weights: {path}"
    ours = _json_beside(path, "preprocessing.json").get("mel")
    if isinstance(ours, dict):
        here = mel.model_dump()
        differences = [f"mel.{key} is {here[key]} here, {ours.get(key)} there" for key in here if here[key] != ours.get(key)]
        if differences:
            raise SpecError(
                f"{source} was trained on other log-mels: {'; '.join(differences)}. Take its settings. {ALL_THE_SAME}."
            )
        return
    found = _audio_model(path) or _one_channel(state, stem)
    if found:
        raise SpecError(
            f"{source} was trained on spectrograms ({found}), and nothing says that they are those of mel "
            f"({mel.sample_rate_hz} Hz, {mel.mels} Slaney mel bands, hop {mel.hop_samples}, dB, frequency first). If this job "
            f"published it, put its preprocessing.json beside it. {ALL_THE_SAME}."
        )


def _audio_model(path: Path) -> str:
    """Front end of an audio model, from a library's configuration in the folder; empty for images or without one."""
    theirs = _json_beside(path, "preprocessor_config.json")
    if "sampling_rate" in theirs:
        keys = ("sampling_rate", "num_mel_bins", "max_length", "mean", "std")
        return "preprocessor_config.json: " + ", ".join(f"{key} {theirs[key]}" for key in keys if key in theirs)
    size = _json_beside(path, "config.json").get("pretrained_cfg", {})
    size = size.get("input_size") if isinstance(size, dict) else None
    return f"config.json: input_size {size}" if isinstance(size, list) and size[:1] == [1] else ""


def _one_channel(state: Mapping[str, Tensor], stem: str) -> str:
    """Evidence of spectrograms in the shapes of the weights; empty if the first convolution has more than one channel."""
    weights = [value for name, value in state.items() if name == stem or name.endswith(f".{stem}")]
    if not any(value.ndim == 4 and value.shape[1] == 1 for value in weights):
        return ""
    positions = [value.shape[1] for name, value in state.items() if f".{name}".endswith(".pos_embed") and value.ndim == 3]
    guess = "; ".join(KNOWN[count] for count in positions if count in KNOWN)
    return f"{stem} has one channel{f'; {guess}' if guess else ''}"


def _json_beside(path: Path, name: str) -> dict[str, Any]:
    """The content of a JSON file in the folder of the weights; empty if it is missing or unreadable."""
    with contextlib.suppress(OSError, ValueError):
        found = read_json(path.with_name(name))
        return found if isinstance(found, dict) else {}
    return {}
