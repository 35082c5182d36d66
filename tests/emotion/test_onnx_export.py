"""The ViT as an ONNX file, computed by onnxruntime."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from emotion.audio.clips import Normalisation
from emotion.config import MelConfig, VitConfig
from emotion.data.label_scale import DEAM_SCALE
from emotion.errors import ModelError
from emotion.training.device import Device
from emotion.vit import onnx_export
from emotion.vit.crops import predict_crops
from emotion.vit.network import Preprocessing, create_network, save_model

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")

CPU = Device(torch.device("cpu"), "fp32", threads=1, deterministic=True)
MEL = MelConfig(sample_rate_hz=8000, window_samples=512, hop_samples=256, mels=32, fmax_hz=4000)


def preprocessing_of(image_size: tuple[int, int] | None, channels: int) -> Preprocessing:
    rng = np.random.default_rng(0)
    mean, sd = rng.uniform(-60, -20, 32).astype(np.float32), rng.uniform(5, 15, 32).astype(np.float32)
    return Preprocessing(MEL, Normalisation(mean, sd), 48, image_size, channels, 3, DEAM_SCALE)


def saved(folder: Path, preprocessing: Preprocessing) -> nn.Module:
    config = VitConfig(model="test_vit", weights="random", image_size=preprocessing.image_size, channels=preprocessing.channels)
    network = create_network(config, preprocessing, np.zeros(2, np.float32), seed=1).eval()
    save_model(network, preprocessing, folder)
    return network


@pytest.mark.full  # importing torch's exporter takes five seconds
@pytest.mark.parametrize(("image_size", "channels"), [(None, 1), ((64, 64), 3)])
def test_onnxruntime_gives_the_outputs_of_predict_from_decibels(
    tmp_path: Path, image_size: tuple[int, int] | None, channels: int
) -> None:
    preprocessing = preprocessing_of(image_size, channels)
    network = saved(tmp_path / "model", preprocessing)
    difference = onnx_export.export_onnx(tmp_path / "model", tmp_path / "m.onnx", CPU)
    assert difference <= onnx_export.TOLERANCE
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    song = np.random.default_rng(2).uniform(-100, 20, (200, 32)).astype(np.float32)
    starts = [0, 76, 152]
    (found,) = session.run(None, {onnx_export.INPUT: np.stack([song[start : start + 48] for start in starts])})
    expected = predict_crops(network, preprocessing, CPU, [(song, start) for start in starts])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected) > 1e-3, "outputs that are all the same would hide a mistake"
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["mel"]) == MEL.model_dump()
    assert said["input"] == "log_mel: float32 [crops, 48 frames, 32 mels], dB"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["m.onnx"]


@pytest.mark.full
def test_a_file_that_computes_other_numbers_is_refused_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "model", preprocessing_of(None, 1))
    monkeypatch.setattr(onnx_export, "TOLERANCE", 0.0)
    with pytest.raises(ModelError, match=r"onnxruntime computes other numbers from the file, by up to .*e-0\d"):
        onnx_export.export_onnx(tmp_path / "model", tmp_path / "m.onnx", CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
