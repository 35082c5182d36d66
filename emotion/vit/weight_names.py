"""Translate other programs' names of ViT tensors to timm's.

Handles formats that timm's own filters do not: Hugging Face's ViT, DINOv2 and MAE, Google's .npz, attention with separate
queries, keys and values, and decoders of masked autoencoders. Unknown names stay unchanged; emotion/vit/weights.py refuses them.
"""

import logging
import re
from collections.abc import Collection

import torch
from torch import Tensor

from emotion.errors import first_of

log = logging.getLogger(__name__)

State = dict[str, Tensor]
Rules = tuple[tuple[str, str], ...]

HUGGING_FACE_STEM = "embeddings.patch_embeddings.projection.weight"
HUGGING_FACE: Rules = (
    (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.", r"blocks.\1.attn.\2."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (r"encoder\.layer\.(\d+)\.output\.dense\.", r"blocks.\1.mlp.fc2."),
    (r"encoder\.layer\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"encoder\.layer\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"layernorm\.", "norm."),
    (r"classifier\.", "head."),
    (r"pooler\.dense\.", "pre_logits."),
)
GOOGLE_PREFIXES = ("", "opt/target/", "params/")
GOOGLE: Rules = (
    (r"cls$", "cls_token"),
    (r"(Transformer/posembed_input/)?pos_embedding$", "pos_embed"),
    (r"embedding/", "patch_embed.proj."),
    (r"Transformer/encoderblock_(\d+)/LayerNorm_0/", r"blocks.\1.norm1."),
    (r"Transformer/encoderblock_(\d+)/LayerNorm_[12]/", r"blocks.\1.norm2."),
    (r"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_[01]/out/", r"blocks.\1.attn.proj."),
    (r"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_[01]/(query|key|value)/", r"blocks.\1.attn.\2."),
    (r"Transformer/encoderblock_(\d+)/MlpBlock_[03]/Dense_0/", r"blocks.\1.mlp.fc1."),
    (r"Transformer/encoderblock_(\d+)/MlpBlock_[03]/Dense_1/", r"blocks.\1.mlp.fc2."),
    (r"Transformer/encoder_norm/", "norm."),
    (r"(head|pre_logits)/", r"\1."),
)
DECODER = r"decoder(\.|_pos_embed$|_(embed|blocks|norm|pred)\.)"  # of MAE, AudioMAE and SimMIM
ATTENTIONS = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q", "k", "v"))


def with_timms_names(state: State, expected: Collection[str], stem: str, source: str) -> State:
    """The same tensors by timm's names, without decoders. expected: the names of the network. stem: of its first convolution.
    source: for the log."""
    state = _without_decoder(_of_google(_of_hugging_face(state)), stem, source)
    return joined(state) if any(name.endswith(".attn.qkv.weight") for name in expected) else state


def _renamed(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        found, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return found
    return name


def _of_hugging_face(state: State) -> State:
    """Translate Hugging Face names. Classifier, pooler and decoder have no network prefix such as `vit.`."""
    prefixes = {name.removesuffix(HUGGING_FACE_STEM) for name in state if name.endswith(HUGGING_FACE_STEM)}
    if len(prefixes) != 1:
        return state
    (prefix,) = prefixes
    return {_renamed(name.removeprefix(prefix), HUGGING_FACE): value for name, value in state.items()}


def _of_google(state: State) -> State:
    """Translate Google names. Kernels have the input axis first; those of attention have an axis of heads."""
    found = [prefix for prefix in GOOGLE_PREFIXES if f"{prefix}embedding/kernel" in state]
    if not found:
        return state
    converted = {}
    for name, value in state.items():
        renamed = _renamed(name.removeprefix(found[0]), GOOGLE)
        if renamed.endswith(".kernel"):
            value = _google_kernel(renamed, value)
        elif ".attn." in renamed and renamed.endswith(".bias"):
            value = value.flatten()
        converted[re.sub(r"\.(kernel|scale)$", ".weight", renamed)] = value
    return converted


def _google_kernel(name: str, value: Tensor) -> Tensor:
    if value.ndim == 4:  # height, width, inputs, outputs
        return value.permute(3, 2, 0, 1).contiguous()
    if value.ndim == 3:  # inputs, heads, outputs of a head; or heads, inputs of a head, outputs
        value = value.flatten(0, 1) if ".attn.proj." in name else value.flatten(1)
    return value.T.contiguous() if value.ndim == 2 else value


def joined(state: State) -> State:
    """Merge separate query, key and value tensors of a layer into one. A missing bias of the keys becomes 0."""
    state = dict(state)
    for names in ATTENTIONS:
        for weight in [name for name in state if name.endswith(f".attn.{names[0]}.weight")]:
            layer = weight.removesuffix(f"{names[0]}.weight")
            for kind in ("weight", "bias"):
                parts = {name: state.get(f"{layer}{name}.{kind}") for name in names}
                if kind == "bias" and parts[names[1]] is None and parts[names[0]] is not None:
                    parts[names[1]] = torch.zeros_like(state[f"{layer}{names[0]}.bias"])
                tensors = [part for part in parts.values() if part is not None]
                if len(tensors) == 3 and len({part.shape[1:] for part in tensors}) == 1:
                    state[f"{layer}qkv.{kind}"] = torch.cat(tensors)
                    for name in names:
                        state.pop(f"{layer}{name}.{kind}", None)
    return state


def _without_decoder(state: State, stem: str, source: str) -> State:
    """Remove the tensors of a decoder with the prefix of the network or its parent prefix."""
    prefixes = [name.removesuffix(stem) for name in state if name == stem or name.endswith(f".{stem}")]
    if len(prefixes) != 1:
        return state
    (prefix,) = prefixes
    outer = re.sub(r"[^.]*\.$", "", prefix)
    pattern = re.compile(f"({re.escape(prefix)}|{re.escape(outer)}){DECODER}")
    left_out = [name for name in state if pattern.match(name)]
    if left_out:
        log.info("%s: leaves out the decoder, %s", source, first_of(left_out, 3))
    return {name: value for name, value in state.items() if name not in left_out}
