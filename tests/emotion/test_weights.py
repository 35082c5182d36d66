import argparse
import json
import logging
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from emotion.audio.clips import Normalisation
from emotion.compat import timm
from emotion.config import MelConfig, VitConfig
from emotion.errors import DataError, EmotionError, SpecError, StorageError
from emotion.vit.network import check_model, create_network, preprocessing_for, save_model
from emotion.vit.weights import hub_weights_sha256, read_weights

pytestmark = pytest.mark.usefixtures("one_thread")

MEL = MelConfig(sample_rate_hz=8000, window_samples=512, hop_samples=256, mels=32, fmax_hz=4000)
NORMALISATION = Normalisation(np.zeros(32, np.float32), np.ones(32, np.float32))
State = dict[str, Tensor]


def config_of(weights: Path | str, **values: Any) -> VitConfig:
    return VitConfig.model_validate({"model": "test_vit", "clip_seconds": 1.1, "weights": str(weights), **values})


def network_of(config: VitConfig) -> nn.Module:
    return create_network(config, preprocessing_for(config, MEL, NORMALISATION), None, 0)


def refusal(path: Path) -> str:
    """The message before the first phase."""
    with pytest.raises(EmotionError) as refused:
        check_model(config_of(path), MEL)
    message = str(refused.value)
    assert refused.value.exit_code in (64, 65)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.fixture(scope="module")
def donor() -> State:
    torch.manual_seed(5)
    state: State = timm.create_model("test_vit").state_dict()
    return state


@pytest.fixture(scope="module")
def plain(donor: State, tmp_path_factory: pytest.TempPathFactory) -> State:
    """What a network is that was given the donor's plain state dict."""
    path = tmp_path_factory.mktemp("plain") / "w.pth"
    torch.save(donor, path)
    return network_of(config_of(path)).state_dict()


def vit(**values: Any) -> State:
    """test_vit, with one thing changed."""
    shape = {
        "img_size": 160,
        "dynamic_img_size": True,
        "patch_size": 16,
        "embed_dim": 64,
        "depth": 6,
        "num_heads": 2,
        "mlp_ratio": 3,
    }
    state: State = timm.models.VisionTransformer(**shape | values).state_dict()
    return state


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def body(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


# What is read


def test_the_weights_are_those_of_the_file_and_the_rest_is_converted(donor: State, tmp_path: Path) -> None:
    torch.save(donor, tmp_path / "w.pth")
    state = network_of(config_of(tmp_path / "w.pth")).state_dict()
    assert torch.allclose(state["patch_embed.proj.weight"], donor["patch_embed.proj.weight"].sum(dim=1, keepdim=True), atol=1e-6)
    assert state["pos_embed"].shape[1] == 1 + 2 * 2
    assert state["head.weight"].shape == (2, 64)
    resized = {"patch_embed.proj.weight", "pos_embed", "head.weight", "head.bias"}
    assert all(torch.equal(tensor, donor[name]) for name, tensor in state.items() if name not in resized)


def separated(state: State, names: tuple[str, str, str]) -> State:
    found = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            found |= {name.replace("qkv", part): third for part, third in zip(names, value.chunk(3), strict=True)}
        else:
            found[name] = value
    return found


def of_hugging_face(state: State, prefix: str) -> State:
    """By the names of transformers' ViTModel, in which a pooler may be left over."""
    found = {"pooler.dense.weight": torch.ones(64, 64), "pooler.dense.bias": torch.ones(64)}
    for name, value in separated(state, ("query", "key", "value")).items():
        renamed = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection").replace("blocks", "encoder.layer")
        for ours, theirs in HUGGING_FACE.items():
            renamed = renamed.replace(ours, theirs)
        found[renamed] = value
    return {name if name.startswith("classifier") else prefix + name: value for name, value in found.items()}


HUGGING_FACE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "attn": "attention.attention",
    "attention.attentionention": "attention",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "head.": "classifier.",
}


ENVELOPES: dict[str, Callable[[State], object]] = {
    "nn.Parameter": lambda state: {name: nn.Parameter(tensor) for name, tensor in state.items()},
    "without head": body,
    "deit": lambda state: {"model": state},
    "training program": lambda state: {"epoch": 3, "arch": "x", "state_dict": state, "optimizer": {"state": {0: torch.ones(1)}}},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.1},
    "nested": lambda state: {"model": {"state_dict": {"module": state}}},
    "averaged first": lambda state: {"state_dict": {"a": torch.ones(1)}, "state_dict_ema": state},
    "model_ema": lambda state: {"model": {"a": torch.ones(1)}, "model_ema": state},
    "ema of decay": lambda state: {"ema": 0.999, "state_dict": state},
    "ema absent": lambda state: {"state_dict_ema": None, "state_dict": state},
    "ema nested": lambda state: {"model": {"a": torch.ones(1)}, "ema": {"decay": 0.9, "module": prefixed(state, "module.")}},
    "data parallel": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "compiled and parallel": lambda state: prefixed(state, "module._orig_mod."),
    "lightning": lambda state: {"state_dict": prefixed(state, "model.net."), "pytorch-lightning_version": "2"},
    "backbone with a head outside": lambda state: (
        prefixed(body(state), "backbone.") | {"head.weight": torch.ones(7, 64), "head.bias": torch.ones(7)}
    ),
    "encoder": lambda state: prefixed(body(state), "encoder."),
    "dino": lambda state: body(state) | {"mask_token": torch.zeros(1, 64)},
    "open_clip": lambda state: (
        prefixed(body(state), "visual.trunk.") | {"text.weight": torch.ones(3), "logit_scale": torch.ones(1)}
    ),
    "beside plain values": lambda state: {**state, "epoch": 3, "model": "vit", "args": {"lr": [0.1, None], 1: (True,)}, 0: "x"},
    "wrapped beside plain values": lambda state: {"ema": {"decay": 0.9}, "state_dict": {**state, "epoch": 3}},
    "averaged by torch": lambda state: prefixed(state, "module.") | {"n_averaged": torch.tensor(7)},
    "averaged by torch, without prefix": lambda state: {"n_averaged": torch.tensor(7), **state},
    "averaged by torch, parallel": lambda state: prefixed(
        {"n_averaged": torch.tensor(7), **prefixed(state, "module.")}, "module."
    ),
    "mae": lambda state: {
        "model": body(state)
        | {
            name: torch.ones(1)
            for name in ("mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.attn.qkv.bias")
        }
    },
    "mae, parallel": lambda state: prefixed(
        body(state) | {"decoder_pred.weight": torch.ones(1), "decoder_norm.bias": torch.ones(1)}, "module."
    ),
    "simmim": lambda state: prefixed(body(state), "module.encoder.") | {"module.decoder.0.weight": torch.ones(1)},
    "separate queries, keys and values": lambda state: separated(state, ("q_proj", "k_proj", "v_proj")),
    "separate and parallel": lambda state: prefixed(separated(state, ("q", "k", "v")), "module."),
    "hugging face": lambda state: of_hugging_face(state, "vit."),
    "hugging face, without head": lambda state: of_hugging_face(body(state), ""),
    "hugging face, mae": lambda state: (
        of_hugging_face(body(state), "vit.")
        | {"decoder.decoder_layers.0.layernorm_before.bias": torch.ones(1), "decoder.mask_token": torch.ones(1)}
    ),
    "flattened patches": lambda state: state | {"patch_embed.proj.weight": state["patch_embed.proj.weight"].flatten(1)},
}


@pytest.mark.parametrize("envelope", ENVELOPES)
def test_what_training_programs_put_around_a_network_is_taken_off(
    envelope: str, donor: State, plain: State, tmp_path: Path
) -> None:
    torch.save(ENVELOPES[envelope](donor), tmp_path / "w.ckpt")
    found = network_of(config_of(tmp_path / "w.ckpt")).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


def test_which_of_several_networks_is_used_is_logged(donor: State, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"state_dict": donor, "state_dict_ema": donor}, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "emotion"):
        read_weights(tmp_path / "w.pth")
    assert f"using state_dict_ema of {tmp_path / 'w.pth'}" in caplog.text


def test_what_is_ignored_beside_the_weights_is_logged_by_name(
    donor: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({**donor, "epoch": 3, "n_averaged": torch.tensor(7)}, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "emotion"):
        assert read_weights(tmp_path / "w.pth").keys() == donor.keys()
    assert f"{tmp_path / 'w.pth'} holds, besides weights, epoch, n_averaged: ignored" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_are_converted(dtype: torch.dtype, donor: State, tmp_path: Path) -> None:
    save_file({name: tensor.to(dtype) for name, tensor in donor.items()}, tmp_path / "w.safetensors")
    state = network_of(config_of(tmp_path / "w.safetensors")).state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert torch.equal(state["norm.bias"], donor["norm.bias"].to(dtype).float())
    assert torch.equal(state["blocks.3.mlp.fc1.weight"], donor["blocks.3.mlp.fc1.weight"].to(dtype).float())


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12])
def test_any_number_of_input_channels_is_summed_into_one(channels: int, tmp_path: Path) -> None:
    state = vit(in_chans=channels)
    torch.save(state, tmp_path / "w.pth")
    config = config_of(tmp_path / "w.pth", weights_mel="other")
    found = network_of(config).state_dict()["patch_embed.proj.weight"]
    assert torch.allclose(found, state["patch_embed.proj.weight"].sum(dim=1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize(
    "model",
    [
        "vit_tiny_patch16_224",
        pytest.param("vit_small_patch14_reg4_dinov2", marks=pytest.mark.full),
        pytest.param("vit_relpos_small_patch16_224", marks=pytest.mark.full),
        pytest.param("deit3_small_patch16_224", marks=pytest.mark.full),
        pytest.param("eva02_tiny_patch14_224", marks=pytest.mark.full),
        pytest.param("beit_base_patch16_224", marks=pytest.mark.full),
        pytest.param("vit_tiny_r_s16_p8_224", marks=pytest.mark.full),
        pytest.param("vit_base_patch16_siglip_224", marks=pytest.mark.full),
    ],
)
def test_weights_of_each_family_of_timm_fit_their_model_in_another_shape(model: str, tmp_path: Path) -> None:
    state = timm.create_model(model).state_dict()
    torch.save(state, tmp_path / "w.pth")
    found = network_of(
        config_of(tmp_path / "w.pth", model=model, image_size=(112, 224) if "14" in model else (128, 256))
    ).state_dict()
    assert sum(torch.equal(tensor, state[name]) for name, tensor in found.items() if name in state) > 0.8 * len(found)


@pytest.mark.full
def test_siglip_is_read_without_its_pooling_where_the_model_averages(tmp_path: Path) -> None:
    torch.save(timm.create_model("vit_base_patch16_siglip_224").state_dict(), tmp_path / "w.pth")
    check_model(config_of(tmp_path / "w.pth", model="vit_base_patch16_siglip_gap_224", image_size=(224, 224)), MEL)


def test_a_published_model_with_a_grid_that_is_no_square_is_resampled_by_its_own_grid(tmp_path: Path) -> None:
    # 2 x 8 positions could be taken for 4 x 4. They hold their row, which stays what it is with half as many columns.
    long, short = (config_of("random", clip_seconds=seconds) for seconds in (4.2, 2.2))
    preprocessing = preprocessing_for(long, MEL, NORMALISATION)
    assert preprocessing.input_size == (32, 128)
    network = create_network(long, preprocessing, None, 0)
    rows = torch.arange(2.0).repeat_interleave(8)
    with torch.no_grad():
        network.get_parameter("pos_embed")[:, 1:] = rows[None, :, None]
    save_model(network, preprocessing, tmp_path)
    found = network_of(short.model_copy(update={"weights": str(tmp_path)})).state_dict()["pos_embed"]
    assert torch.allclose(found[0, 1:, 5], torch.arange(2.0).repeat_interleave(4), atol=1e-5)


def test_patches_of_another_size_are_resampled_and_positions_with_them(donor: State, tmp_path: Path) -> None:
    """As timm does, by the least squares of FlexiViT: a patch that is constant stays so, with the same response to an image."""
    constant = donor | {
        "patch_embed.proj.weight": donor["patch_embed.proj.weight"].mean(dim=(2, 3), keepdim=True).expand(-1, -1, 16, 16)
    }
    torch.save(constant, tmp_path / "w.pth")
    config = config_of(tmp_path / "w.pth", model="vit_tiny_patch16_224", image_size=(32, 32))
    with pytest.raises(SpecError, match=r"\[1, 1, 64\] for \[1, 1, 192\]"):
        check_model(config, MEL)
    state = timm.models.VisionTransformer(
        img_size=160, patch_size=8, embed_dim=64, depth=6, num_heads=2, mlp_ratio=3, num_classes=0
    ).state_dict()
    weight = torch.randn(64, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    state["patch_embed.proj.weight"] = weight.expand(-1, -1, 8, 8).clone()
    torch.save(state, tmp_path / "w8.pth")
    found = network_of(config_of(tmp_path / "w8.pth")).state_dict()
    resampled = found["patch_embed.proj.weight"]
    assert resampled.shape == (64, 1, 16, 16)
    # Of an image of ones: 8 · 8 times the weight, before and after.
    assert torch.allclose(resampled.sum(dim=(2, 3)), 64 * weight[:, :, 0, 0].sum(dim=1, keepdim=True), rtol=0.02, atol=0.1)
    assert found["pos_embed"].shape == (1, 1 + 2 * 2, 64)
    assert torch.equal(found["blocks.3.mlp.fc1.weight"], state["blocks.3.mlp.fc1.weight"])


def google_archive(prefix: str, old: bool) -> dict[str, np.ndarray]:
    """A made checkpoint of test_vit in the layout of Google's JAX programs: the first ones, or the later ones."""
    draws = np.random.default_rng(3)

    def of(*shape: int) -> np.ndarray:
        return draws.standard_normal(shape).astype(np.float32)

    found = {"cls": of(1, 1, 64), "embedding/kernel": of(16, 16, 3, 64), "embedding/bias": of(64)}
    found["Transformer/posembed_input/pos_embedding" if old else "pos_embedding"] = of(1, 101, 64)
    attention, mlp, second = (1, 3, 2) if old else (0, 0, 1)
    for block in range(6):
        layer = f"Transformer/encoderblock_{block}/"
        for norm in (0, second):
            found |= {f"{layer}LayerNorm_{norm}/{name}": of(64) for name in ("scale", "bias")}
        for name in ("query", "key", "value"):
            inner = f"{layer}MultiHeadDotProductAttention_{attention}/{name}/"
            found |= {f"{inner}kernel": of(64, 2, 32), f"{inner}bias": of(2, 32)}
        out = f"{layer}MultiHeadDotProductAttention_{attention}/out/"
        found |= {f"{out}kernel": of(2, 32, 64), f"{out}bias": of(64)}
        dense = f"{layer}MlpBlock_{mlp}/Dense_"
        found |= {
            f"{dense}0/kernel": of(64, 192),
            f"{dense}0/bias": of(192),
            f"{dense}1/kernel": of(192, 64),
            f"{dense}1/bias": of(64),
        }
    found |= {f"Transformer/encoder_norm/{name}": of(64) for name in ("scale", "bias")}
    found |= {"head/kernel": of(64, 7), "head/bias": of(7), "pre_logits/kernel": of(64, 64), "pre_logits/bias": of(64)}
    return {prefix + name: value for name, value in found.items()}


@pytest.mark.parametrize(("prefix", "old"), [("", True), ("opt/target/", True), ("params/", False)])
def test_googles_archives_are_read_as_timm_reads_them(prefix: str, old: bool, tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **google_archive(prefix, old))
    theirs = timm.create_model("test_vit", num_classes=7)
    theirs.load_pretrained(str(tmp_path / "w.npz"))
    found = network_of(config_of(tmp_path / "w.npz")).state_dict()
    resized = {"patch_embed.proj.weight", "pos_embed", "head.weight", "head.bias"}
    assert all(torch.equal(found[name], value) for name, value in theirs.state_dict().items() if name not in resized)
    expected = theirs.state_dict()["patch_embed.proj.weight"].sum(dim=1, keepdim=True)
    assert torch.allclose(found["patch_embed.proj.weight"], expected, atol=1e-5)


def test_an_archive_of_google_that_has_more_or_less_is_refused_by_name(tmp_path: Path) -> None:
    whole = google_archive("", old=True)
    np.savez(tmp_path / "more.npz", **whole, **{"MAPHead_0/probe": np.ones(3, np.float32)})
    assert "left over, MAPHead_0/probe" in refusal(tmp_path / "more.npz")
    del whole["Transformer/encoderblock_2/MultiHeadDotProductAttention_1/key/kernel"]
    np.savez(tmp_path / "less.npz", **whole)
    assert "lacks blocks.2.attn.qkv.weight" in refusal(tmp_path / "less.npz")


def test_what_is_left_out_of_a_masked_autoencoder_is_logged(
    donor: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({**body(donor), "decoder_embed.weight": torch.ones(1)}, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "emotion"):
        check_model(config_of(tmp_path / "w.pth"), MEL)
    assert f"{tmp_path / 'w.pth'}: leaves out the decoder, decoder_embed.weight" in caplog.text


# Spectrograms


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `model/` as the job publishes it."""
    config, out = config_of("random"), tmp_path_factory.mktemp("published") / "model"
    preprocessing = preprocessing_for(config, MEL, NORMALISATION)
    out.mkdir()
    save_model(create_network(config, preprocessing, None, 0), preprocessing, out)
    return out


def test_a_published_model_begins_another_with_the_same_log_mels_alone(published: Path) -> None:
    check_model(config_of(published), MEL)
    other = MEL.model_copy(update={"hop_samples": 128, "fmax_hz": 3000.0})
    with pytest.raises(
        SpecError, match=r"other log-mels: mel\.hop_samples is 128 here, 256 there; mel\.fmax_hz is 3000\.0 here, 4000"
    ):
        check_model(config_of(published), other)
    check_model(config_of(published, weights_mel="other"), other)


def test_a_depth_keeps_the_first_blocks(donor: State, tmp_path: Path) -> None:
    torch.save(donor, tmp_path / "w.pth")
    config = config_of(tmp_path / "w.pth", depth=2)
    preprocessing = preprocessing_for(config, MEL, NORMALISATION)
    network = create_network(config, preprocessing, None, 0)
    state = network.state_dict()
    assert {name.split(".")[1] for name in state if name.startswith("blocks.")} == {"0", "1"}
    for name in ("blocks.1.mlp.fc2.weight", "norm.weight"):
        assert torch.equal(state[name], donor[name])

    published = tmp_path / "model"
    published.mkdir()
    save_model(network, preprocessing, published)
    opened = timm.create_model(f"local-dir:{published}", pretrained=True).eval()
    clips = torch.randn(2, 1, *preprocessing.input_size)
    torch.testing.assert_close(opened(clips), network.eval()(clips))
    check_model(config_of(published, depth=2), MEL)
    for depth in (3, None):
        with pytest.raises(SpecError, match=r"lacks blocks\.2\..* If it is of a run with vit\.depth 2, set that here, too\."):
            check_model(config_of(published, depth=depth), MEL)
    torch.save(donor | {"blocks": torch.ones(1)}, tmp_path / "odd.pth")
    with pytest.raises(SpecError, match=r"test_vit with vit\.depth 2: .*left over, blocks\. "):
        check_model(config_of(tmp_path / "odd.pth", depth=2), MEL)


def test_a_depth_that_the_model_cannot_have_is_refused() -> None:
    check_model(config_of("random", depth=6), MEL)
    with pytest.raises(SpecError, match=r"vit\.depth: expected at most 6, the blocks of test_vit, found 7"):
        check_model(config_of("random", depth=7), MEL)
    with pytest.raises(SpecError, match=r"vit\.depth: timm's vit_base_patch16_sapiens2 takes no other depth"):
        check_model(config_of("random", model="vit_base_patch16_sapiens2", depth=6), MEL)


def test_weights_of_unknown_spectrograms_are_refused_unless_the_spec_says_that_they_are_wanted(
    published: Path, donor: State, tmp_path: Path
) -> None:
    file = Path(shutil.copyfile(published / "model.safetensors", tmp_path / "w.safetensors"))
    assert re.search(
        r"has one channel\), .* 8000 Hz, 32 Slaney mel bands, hop 256.* preprocessing\.json .* vit\.weights_mel to other",
        refusal(file).replace("(8000", " 8000"),
    )
    check_model(config_of(file, weights_mel="other"), MEL)
    # AudioMAE and AST as their authors save them.
    audiomae = {**body(vit(in_chans=1)), "pos_embed": torch.zeros(1, 513, 64), "decoder_pos_embed": torch.zeros(1)}
    torch.save({"model": audiomae}, tmp_path / "audiomae.pth")
    assert "as AudioMAE: 16 kHz, 128 Kaldi mel bands" in refusal(tmp_path / "audiomae.pth")
    ast = prefixed(body(vit(in_chans=1)) | {"pos_embed": torch.zeros(1, 1214, 64)}, "module.v.") | {
        "module.mlp_head.0.weight": torch.ones(1)
    }
    torch.save(ast, tmp_path / "ast.pth")
    assert "as AST: 16 kHz" in refusal(tmp_path / "ast.pth")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "preprocessor_config.json",
            {"feature_extractor_type": "ASTFeatureExtractor", "sampling_rate": 16000, "num_mel_bins": 128},
            "sampling_rate 16000, num_mel_bins 128",
        ),
        (
            "config.json",
            {"architecture": "vit", "pretrained_cfg": {"input_size": [1, 1024, 128]}},
            r"input_size \[1, 1024, 128\]",
        ),
    ],
)
def test_the_configuration_of_an_audio_model_beside_its_weights_is_read(
    name: str, content: dict[str, Any], words: str, donor: State, tmp_path: Path
) -> None:
    save_file(donor, tmp_path / "model.safetensors")
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(SpecError, match=rf"was trained on spectrograms \({name}: .*{words}"):
        check_model(config_of(tmp_path), MEL)
    # That of a model of images is none.
    (tmp_path / name).write_text(json.dumps({"image_mean": [0.5], "pretrained_cfg": {"input_size": [3, 160, 160]}}))
    check_model(config_of(tmp_path), MEL)


# What is refused


@pytest.mark.parametrize(
    ("changed", "tensors"),
    [
        ({"init_values": 1e-5}, "left over, blocks.0.ls1.gamma"),
        ({"init_values": 1e-5, "num_classes": 2}, "left over, blocks.0.ls1.gamma"),
        ({"depth": 8}, "left over, blocks.6.norm1.weight"),
        ({"depth": 5}, "lacks blocks.5.norm1.weight"),
        ({"qk_norm": True}, "left over, blocks.0.attn.q_norm.weight"),
        ({"pre_norm": True}, "left over, norm_pre.weight"),
        ({"reg_tokens": 4}, "left over, reg_token"),
        ({"embed_dim": 96, "num_heads": 3}, "cls_token [1, 1, 96] for [1, 1, 64]"),
        ({"mlp_ratio": 4}, "blocks.0.mlp.fc1.weight [256, 64] for [192, 64]"),
        ({"class_token": False, "global_pool": "avg"}, "cls_token"),
        ({"qkv_bias": False}, "lacks blocks.0.attn.qkv.bias"),
        ({"fc_norm": True, "global_pool": "avg"}, "fc_norm.weight"),
    ],
)
def test_another_architecture_is_refused_by_the_names_of_its_tensors(
    changed: dict[str, Any], tensors: str, tmp_path: Path
) -> None:
    torch.save(vit(**changed), tmp_path / "w.pth")
    assert tensors in refusal(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("name", "change", "error", "words"),
    [
        ("norm.weight", lambda value: value * torch.nan, DataError, "norm.weight holds NaN or infinity"),
        ("blocks.5.mlp.fc2.bias", lambda value: value.double() + 1e300, DataError, "fc2.bias holds NaN or infinity"),
        ("cls_token", lambda value: value.to(torch.int8), DataError, "cls_token is int8"),
        ("norm.bias", lambda value: value.to(torch.complex64), DataError, "norm.bias is complex64"),
        ("head.weight", lambda value: value[None], SpecError, "'head.weight': [1, 1000, 64]"),
        ("head.weight", lambda value: None, SpecError, "'head.bias': [1000]"),
        ("head.extra", lambda value: torch.ones(1), SpecError, "left over, head.extra"),
        ("criterion.weight", lambda value: torch.ones(2), SpecError, "left over, criterion.weight"),
        ("xdecoder.0.weight", lambda value: torch.ones(2), SpecError, "left over, xdecoder.0.weight"),
        ("blocks.0.attn.k_proj.weight", lambda value: torch.ones(64, 64), SpecError, "left over, blocks.0.attn.k_proj.weight"),
        ("blocks.0.decoder.bias", lambda value: torch.ones(64), SpecError, "left over, blocks.0.decoder.bias"),
        ("patch_embed.proj.weight", lambda value: value[:, :, None], SpecError, "[64, 3, 1, 16, 16]"),
        ("patch_embed.proj.weight", lambda value: value.flatten(1)[:, 1:], SpecError, "[64, 767]"),
        ("patch_embed.proj.weight", lambda value: None, SpecError, "lacks patch_embed.proj.weight"),
        ("pos_embed", lambda value: value[:, 1:], SpecError, "'pos_embed': [1, 100, 64]"),
        ("pos_embed", lambda value: torch.zeros(1, 201, 64), SpecError, "'pos_embed': [1, 201, 64]"),
        ("pos_embed", lambda value: torch.zeros(1, 129, 64), SpecError, "'pos_embed': [1, 129, 64]"),
        ("pos_embed", lambda value: value[0], SpecError, "'pos_embed': [101, 64]"),
        ("norm.bias", lambda value: value.to("meta"), DataError, "norm.bias has no data"),
        ("optimizer", lambda value: {"state": [torch.ones(1)]}, DataError, "beside tensors by name, optimizer (dict). Save only"),
        ("patch_embed.proj.weight", lambda value: 0 * value, DataError, "patch_embed.proj.weight is all zero"),
    ],
)
def test_one_tensor_that_is_wrong_is_refused_by_its_name(
    name: str, change: Callable[[Any], Any], error: type[EmotionError], words: str, donor: State, tmp_path: Path
) -> None:
    changed = {**donor, name: change(donor.get(name))}
    torch.save({key: value for key, value in changed.items() if value is not None}, tmp_path / "w.pth")
    with pytest.raises(error, match=re.escape(words)):
        check_model(config_of(tmp_path / "w.pth"), MEL)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda state: {}, "it holds nothing"),
        (lambda state: {"weights": state, "epoch": 3}, "it holds weights (OrderedDict), epoch (int)"),
        (lambda state: {0: torch.ones(1)}, "it holds 0 (Tensor)"),
        (lambda state: {"state_dict": None, "model": 3}, "it holds state_dict (NoneType), model (int)"),
        (
            lambda state: prefixed(state, "net.") | {"criterion.weight": torch.ones(2)},
            "beside a network it has, left over, criterion.weight. Set",
        ),
        (lambda state: {name: tensor.to("meta") for name, tensor in state.items()}, "more have no data, as on"),
        (lambda state: prefixed(state, "student.") | prefixed(state, "teacher."), "left over, student."),
        (lambda state: {"model": state, "args": argparse.Namespace()}, "argparse.Namespace"),
    ],
)
def test_what_holds_no_network_or_two_is_refused(
    content: Callable[[State], object], words: str, donor: State, tmp_path: Path
) -> None:
    torch.save(content(donor), tmp_path / "w.pth")
    assert words in refusal(tmp_path / "w.pth")


def test_a_folder_without_weights_names_what_is_in_it(donor: State, tmp_path: Path) -> None:
    torch.save(donor, tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"no file .*In its folder are pytorch_model\.bin: name one of them"):
        check_model(config_of(tmp_path), MEL)
    check_model(config_of(tmp_path / "pytorch_model.bin"), MEL)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "best")
    check_model(config_of(tmp_path / "best"), MEL)


# From the hub


@pytest.fixture
def in_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[State], Path]:
    """Puts weights of test_vit where huggingface_hub keeps what it has fetched."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(state: State) -> Path:
        repository = tmp_path / "models--timm--test_vit.r160_in1k"
        for folder in ("refs", "snapshots/0"):
            (repository / folder).mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text("0")
        save_file(state, repository / "snapshots" / "0" / "model.safetensors")
        return repository / "snapshots" / "0" / "model.safetensors"

    return put


def test_weights_from_the_hub_are_loaded_as_strictly(in_hub: Callable[[State], Path], donor: State) -> None:
    file = in_hub(donor)
    state = network_of(config_of("pretrained")).state_dict()
    assert torch.equal(state["blocks.2.attn.proj.weight"], donor["blocks.2.attn.proj.weight"])
    assert hub_weights_sha256(config_of("pretrained"))
    assert len(network_of(config_of("pretrained", depth=1)).blocks) == 1  # type: ignore[arg-type]
    assert hub_weights_sha256(config_of("pretrained", depth=1)) == hub_weights_sha256(config_of("pretrained"))
    for changed, error, words in [
        (donor | {"blocks.0.ls1.gamma": torch.ones(64)}, SpecError, r"test_vit from the hub .*left over, blocks\.0\.ls1\.gamma"),
        (donor | {"norm.bias": torch.full((64,), torch.nan)}, DataError, r"test_vit from the hub: norm\.bias holds NaN"),
    ]:
        in_hub(changed)
        with pytest.raises(error, match=words):
            check_model(config_of("pretrained"), MEL)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(SpecError, match="its copy below HF_HOME is damaged: delete it"):
        check_model(config_of("pretrained"), MEL)


def test_a_hub_that_is_not_reached_is_one_error_without_the_log_of_its_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody listens at the address, which is tried again and again. Without the pauses between the tries: 50 s in all."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{bound.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        with pytest.raises(StorageError, match=r"^vit\.weights: the weights of test_vit are not available from the hub \("):
            check_model(config_of("pretrained"), MEL)
    assert capfd.readouterr().err == ""
