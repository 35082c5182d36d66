"""Predictions of valence and arousal by a published model: from a log-mel, or from any audio file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from emotion.audio.decoding import TooLongError
from emotion.audio.extract import unfit_reasons
from emotion.audio.mel import LogMel
from emotion.audio.song_decoding import DecodedSong, decode_song
from emotion.config import DataConfig
from emotion.errors import DataError
from emotion.training.device import Device
from emotion.vit.crops import SongLogMel, predict_songs
from emotion.vit.network import Array, load_model

LONGEST_SECONDS = 4 * 3600.0  # a longer sound would take over a gigabyte of memory
DEFAULT_LIMITS = DataConfig(source="none")


class Prediction(NamedTuple):
    """Valence and arousal in [-1, 1]. warnings: why they may mean nothing."""

    valence: float
    arousal: float
    warnings: tuple[str, ...] = ()


class SongPredictor:
    """Predicts from the log-mels of whole songs. folder: a published run or its `model/`, else DataError is raised."""

    def __init__(self, folder: Path, device: Device) -> None:
        model = folder / "model" if (folder / "model").is_dir() else folder
        self.device = device
        self.network, self.preprocessing = load_model(model, device)

    def __call__(self, songs: Sequence[SongLogMel], check_stop: Callable[[], None] = lambda: None) -> Array:
        """songs: [frames, mels] in dB each, of any length. Returns [songs, 2], valence and arousal in [-1, 1].

        check_stop: called before each forward pass; its exceptions pass through.
        """
        return predict_songs(self.network, self.preprocessing, self.device, songs, check_stop=check_stop)


class AudioPredictor:
    """Predicts from an audio file, by the code that evaluates the model.

    limits: what a song of a dataset has to be. Anything else gets a warning, not an error.
    """

    def __init__(self, folder: Path, device: Device, limits: DataConfig = DEFAULT_LIMITS) -> None:
        self.predict = SongPredictor(folder, device)
        self.log_mel = LogMel(self.predict.preprocessing.mel)
        self.limits = limits

    def __call__(self, audio: Path) -> Prediction:
        """Predict for a whole file. Raises DataError where it has no sound that can be decoded, or one that is not in the file as
        a whole, or lasts longer than LONGEST_SECONDS."""
        try:
            decoded = decode_song(audio, self.log_mel, LONGEST_SECONDS)
        except TooLongError as error:
            raise DataError(f"{error}. Predict for parts of it.") from error
        # As features are stored, so that a test song gets the same numbers as in predictions.csv.
        ((valence, arousal),) = self.predict([decoded.log_mel]).tolist()
        return Prediction(valence, arousal, tuple(self._warnings(decoded)))

    def _warnings(self, decoded: DecodedSong) -> list[str]:
        """Why the numbers may mean nothing: what would be a fault in a dataset."""
        warnings = unfit_reasons(decoded, self.limits, name_settings=False)
        if decoded.seconds > self.limits.longest_seconds:
            warnings.append(f"lasts {decoded.seconds:.2f} s, expected at most {self.limits.longest_seconds:g}")
        return [*warnings, *filter(None, [decoded.remark])]
