"""A published model and any audio file → valence and arousal, by the code that trained it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emotion.audio.decoding import decode_blocks
from emotion.audio.mel import LogMel
from emotion.errors import DataError
from emotion.training.device import Device
from emotion.vit.network import load_model, predict_song


@dataclass(frozen=True)
class Prediction:
    """valence, arousal: on -1..1."""

    file: Path
    valence: float
    arousal: float


class Predictor:
    """`folder` is a published run or its `model/`. Raises DataError where it is neither."""

    def __init__(self, folder: Path, device: Device) -> None:
        model = folder / "model" if (folder / "model").is_dir() else folder
        self.device = device
        self.network, self.preprocessing = load_model(model, device)
        self.log_mel = LogMel(self.preprocessing.mel)

    def __call__(self, audio: Path) -> Prediction:
        """Predict for a whole file of any length. Raises DataError where it has no sound that can be decoded."""
        if not audio.is_file():
            raise DataError(f"predict: there is no file {audio}")
        log_mel = self.log_mel.of_blocks(decode_blocks(audio, self.preprocessing.mel.sample_rate_hz))
        # Rounded as stored features are, so that a song of the test set gets the numbers of predictions.csv.
        log_mel = log_mel.astype(np.float16).astype(np.float32)
        valence, arousal = predict_song(self.network, self.preprocessing, self.device, log_mel).tolist()
        return Prediction(audio, valence, arousal)
