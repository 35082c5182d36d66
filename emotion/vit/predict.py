"""Predictions of valence and arousal by a published model: from a log-mel, or from any audio file."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from emotion.audio.decoding import decode_blocks
from emotion.audio.mel import LogMel
from emotion.errors import DataError
from emotion.training.device import Device
from emotion.vit.network import Array, load_model, predict_song


class Prediction(NamedTuple):
    """Valence and arousal in [-1, 1]."""

    valence: float
    arousal: float


class SongPredictor:
    """Predicts from the log-mel of a whole song. folder: a published run or its `model/`, else DataError is raised."""

    def __init__(self, folder: Path, device: Device) -> None:
        model = folder / "model" if (folder / "model").is_dir() else folder
        self.device = device
        self.network, self.preprocessing = load_model(model, device)

    def __call__(self, log_mel: Array) -> Array:
        """log_mel: [frames, mels] in dB, of any length. Returns [2], valence and arousal in [-1, 1]."""
        return predict_song(self.network, self.preprocessing, self.device, log_mel)


class AudioPredictor:
    """Predicts from an audio file, by the code that evaluates the model."""

    def __init__(self, folder: Path, device: Device) -> None:
        self.predict = SongPredictor(folder, device)
        self.log_mel = LogMel(self.predict.preprocessing.mel)

    def __call__(self, audio: Path) -> Prediction:
        """Predict for a whole file of any length. Raises DataError where it has no sound that can be decoded."""
        if not audio.is_file():
            raise DataError(f"predict: there is no file {audio}")
        log_mel = self.log_mel.of_blocks(decode_blocks(audio, self.log_mel.mel.sample_rate_hz))
        # Rounded as stored features are, so that a test song gets the same numbers as in predictions.csv.
        return Prediction(*self.predict(log_mel.astype(np.float16).astype(np.float32)).tolist())
