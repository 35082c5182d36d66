"""Export the ViT of a published run as one ONNX file, for programs without Python or torch.

The input of the graph is the log-mel in dB; normalisation, resizing and channels are part of the graph. The metadata of the file
describe the steps before (sound to log-mel) and after (mean over the crops of a song). Ridge, SVR and trees of the stack are not
exported.
"""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emotion.audio.clips import RANGE
from emotion.audio.mel import SILENCE_POWER
from emotion.errors import ModelError
from emotion.files import written_atomically
from emotion.training.device import Device
from emotion.vit.network import Array, Preprocessing, load_model, network_input

INPUT, OUTPUT = "log_mel", "valence_arousal"
OPSET = 18
TOLERANCE = 1e-4  # largest difference of an output, on -1..1: 0.0004 on 1..9
MOST_BYTES = 2_000_000_000  # of the weights: protobuf messages are limited to 2 GiB


class LogMelRegressor(nn.Module):
    """[crops, frames, mels] in dB → [crops, 2] = (valence, arousal), about -1..1."""

    mean_db: Tensor
    sd_db: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network, self.preprocessing = network, preprocessing
        self.register_buffer("mean_db", torch.from_numpy(preprocessing.normalisation.mean_db))
        self.register_buffer("sd_db", torch.from_numpy(preprocessing.normalisation.sd_db))

    def forward(self, log_mel: Tensor) -> Tensor:
        values = ((log_mel - self.mean_db) / self.sd_db).clamp(-RANGE, RANGE)
        found: Tensor = self.network(network_input(values.transpose(1, 2).unsqueeze(1), self.preprocessing))
        return found


def export_onnx(model: Path, path: Path, device: Device) -> float:
    """Write the ViT of `model`, a published `model/`, to `path` after verifying it with onnxruntime. Returns the largest
    difference of an output from torch's.

    Raises DataError if the folder is not a model, ModelError if the network cannot be exported or an output differs by more than
    TOLERANCE, OSError. Needs onnx and onnxscript, which torch's exporter uses, and onnxruntime.
    """
    network, preprocessing = load_model(model, device)
    size = sum(weight.numel() * weight.element_size() for weight in network.state_dict().values())
    if size > MOST_BYTES:
        raise ModelError(
            f"export: the weights take {size / 1e9:.1f} GB, and a file of ONNX has at most 2. Use model.safetensors."
        )
    regressor = LogMelRegressor(network, preprocessing).eval()
    with written_atomically(path) as file:
        temporary = Path(file.name)
        program = _exported(regressor, preprocessing)
        program.model.metadata_props.update(metadata(preprocessing))
        program.save(temporary)
        difference = largest_difference(temporary, regressor, preprocessing)
        if not difference <= TOLERANCE:
            raise ModelError(
                f"export: onnxruntime computes other numbers from the file, by up to {difference:.2g} where {TOLERANCE:g} is "
                f"allowed. Nothing was written. Use model.safetensors with timm."
            )
    return difference


def metadata(preprocessing: Preprocessing) -> dict[str, str]:
    """How to compute inputs and use outputs, as text: the `metadata_props` of the file."""
    mel = preprocessing.mel
    how = {
        "sound": f"mono (channels averaged), {mel.sample_rate_hz} Hz, full scale 1",
        "librosa": f"power_to_db(feature.melspectrogram(y=sound, sr={mel.sample_rate_hz}, n_fft={mel.window_samples}, "
        f"hop_length={mel.hop_samples}, n_mels={mel.mels}, fmin={mel.fmin_hz:g}, fmax={mel.fmax_hz:g}), ref=1.0, "
        f"amin={SILENCE_POWER:g}, top_db=None).T",
        "crops": f"{preprocessing.frames} frames each, as many as cover the song, at most {preprocessing.max_crops}, spread "
        "evenly from its begin to its end; a shorter song is repeated",
        "song": "the mean over its crops, cut at -1 and 1",
    }
    return {
        "input": f"{INPUT}: float32 [crops, {preprocessing.frames} frames, {mel.mels} mels], dB",
        "output": f"{OUTPUT}: float32 [crops, 2], valence and arousal, -1 to 1",
        "front_end": json.dumps(how),
        "mel": json.dumps(mel.model_dump()),
        "max_crops": str(preprocessing.max_crops),
    }


def _exported(regressor: LogMelRegressor, preprocessing: Preprocessing) -> Any:
    crops = torch.from_numpy(_some_crops(preprocessing, 2))
    # Silence the exporter: it logs each operator that it could not simplify.
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                regressor,
                (crops,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("crops", min=1)},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"export: torch cannot write this network as ONNX: {first}") from error
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def largest_difference(path: Path, regressor: LogMelRegressor, preprocessing: Preprocessing) -> float:
    """Largest difference between outputs of onnxruntime and torch, for one and for three crops of noise with levels of music."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    differences = []
    for count in (1, 3):
        crops = _some_crops(preprocessing, count)
        (found,) = session.run([OUTPUT], {INPUT: crops})
        with torch.no_grad():
            expected = regressor(torch.from_numpy(crops)).numpy()
        differences.append(np.abs(found - expected).max())
    return float(np.max(differences))


def _some_crops(preprocessing: Preprocessing, count: int) -> Array:
    """Random crops [count, frames, mels] in dB with twice the standard deviation of the training songs."""
    constants, rng = preprocessing.normalisation, np.random.default_rng(count)
    noise = rng.normal(0, 2, (count, preprocessing.frames, preprocessing.mel.mels))
    crops: Array = (constants.mean_db + constants.sd_db * noise).astype(np.float32)
    return crops
