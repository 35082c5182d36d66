"""Predict valence and arousal with a published run: its ViT from log-mels, its stack from any audio file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from emotion.audio.decoding import TooLongError
from emotion.audio.extract import unfit_reasons
from emotion.audio.levels import FLAT_SAMPLES, Levels
from emotion.audio.mel import LogMel
from emotion.audio.song_decoding import DecodedSong, decode_song
from emotion.audio.song_vectors import song_vector
from emotion.audio.tonality import TONALITY_NUMBERS
from emotion.config import DataConfig
from emotion.errors import DataError
from emotion.evaluation.conformal import read_intervals
from emotion.evaluation.stack import read_stack
from emotion.training.device import Device
from emotion.vit.crops import SongLogMel, predict_songs
from emotion.vit.curve import Curve, curve_of, window_seconds
from emotion.vit.embedder import read_embedder
from emotion.vit.network import Array, load_model

LONGEST_SECONDS = 4 * 3600.0  # a longer sound would take over a gigabyte of memory
DEFAULT_LIMITS = DataConfig(source="none")
LOST_DB = 10.0  # channels that lose more when averaged cancel each other; uncorrelated ones lose 3
CLIPPED_SHARE = 0.001  # of the samples; loud masters and loud mp3 stay below
QUIETEST_MUSIC_DB, LOUDEST_MUSIC_DB = -45.0, -5.0  # RMS of full scale; a sine at full scale has -3, a square wave 0


class Prediction(NamedTuple):
    """Valence and arousal in [-1, 1]. warnings: reasons why they may be meaningless, kind → sentence. bounds: (lower, upper) ends
    of the interval of each; None if the model has no intervals. curve: over time, if requested."""

    valence: float
    arousal: float
    warnings: dict[str, str]
    bounds: tuple[tuple[float, float], tuple[float, float]] | None = None
    curve: Curve | None = None


class SongPredictor:
    """Predicts from the log-mels of whole songs. folder: a published run or its `model/`, else raises DataError."""

    def __init__(self, folder: Path, device: Device) -> None:
        self.folder = folder / "model" if (folder / "model").is_dir() else folder
        self.device = device
        self.network, self.preprocessing = load_model(self.folder, device)

    def __call__(self, songs: Sequence[SongLogMel], check_stop: Callable[[], None] = lambda: None) -> Array:
        """songs: [frames, mels] in dB each, of any length. Returns [songs, 2], valence and arousal in [-1, 1].

        check_stop: called before each forward pass; its exceptions propagate.
        """
        return predict_songs(self.network, self.preprocessing, self.device, songs, check_stop=check_stop)

    def curve(self, song: SongLogMel, check_stop: Callable[[], None] = lambda: None) -> Curve:
        """Predictions over time for one song, see emotion/vit/curve.py."""
        return curve_of(self.network, self.preprocessing, self.device, song, check_stop)


class AudioPredictor:
    """Predicts from an audio file, with the code that evaluates the run.

    folder: a published run, or its `model/`, which has no stack. The stack predicts if there is one and not `plain`, else the
    ViT. uses_stack: whether the stack predicts. widths: of the intervals, None if there are none. limits: requirements on the
    songs of a dataset; a file that violates them gets a warning, not an error.
    """

    def __init__(self, folder: Path, device: Device, limits: DataConfig = DEFAULT_LIMITS, *, plain: bool = False) -> None:
        self.predict = SongPredictor(folder, device)
        self.uses_stack = not plain and (folder / "stack").is_dir()
        self.stack = read_stack(folder / "stack") if self.uses_stack else None
        self.embed = read_embedder(self.predict.folder, device) if self.uses_stack else None
        self.widths = read_intervals(folder / "stack").get("stack" if self.uses_stack else "model")
        self.mel = self.predict.preprocessing.mel
        self.log_mel = LogMel(self.mel)
        if self.stack is not None:
            of_sound = len(song_vector(np.zeros((2, self.mel.mels)), self.mel, np.zeros(TONALITY_NUMBERS)))
            self.stack.require_numbers(of_sound + (0 if self.embed is None else self.embed.numbers))
        self.limits = limits

    def __call__(self, audio: Path, *, with_curve: bool = False, check_stop: Callable[[], None] = lambda: None) -> Prediction:
        """Predict for a whole file. Raises DataError if its sound cannot be decoded, is incomplete or exceeds LONGEST_SECONDS.

        with_curve: also predict over time. check_stop: called before each forward pass.
        """
        levels = Levels()
        try:
            decoded = decode_song(audio, self.log_mel, LONGEST_SECONDS, watch=levels.add)
        except TooLongError as error:
            raise DataError(f"{error}. Predict for parts of it.") from error
        # In the type of stored features, so that a test song gets the same numbers as in predictions.csv.
        predicted = self.predict([decoded.log_mel], check_stop).astype(np.float64)
        if self.stack is not None:
            vector = song_vector(decoded.log_mel, self.mel, decoded.tonality)
            if self.embed is not None:
                vector = np.concatenate([vector, self.embed([decoded.log_mel], check_stop)[0]])
            predicted = self.stack.predict(vector[None], predicted)
        ((valence, arousal),) = predicted.tolist()
        bounds = curve = None
        if self.widths is not None:
            lower, upper = (ends[0].tolist() for ends in self.widths.around(predicted))
            bounds = (lower[0], upper[0]), (lower[1], upper[1])
        if with_curve:
            curve = self.predict.curve(decoded.log_mel, check_stop)
        return Prediction(valence, arousal, self._warnings(decoded, levels), bounds, curve)

    def _warnings(self, decoded: DecodedSong, levels: Levels) -> dict[str, str]:
        """Reasons why a prediction may be meaningless: faults of a dataset's song, and differences from what a listener hears."""
        warnings = unfit_reasons(decoded, self.limits, name_settings=False)
        if len(decoded.log_mel) < self.predict.preprocessing.frames:
            window = window_seconds(self.predict.preprocessing)
            warnings["shorter_than_crop"] = (
                f"lasts {decoded.seconds:.2f} s, so that it is repeated to fill a crop of {window:.1f} s"
            )
        if decoded.seconds > self.limits.longest_seconds:
            warnings["long"] = f"lasts {decoded.seconds:.2f} s, expected at most {self.limits.longest_seconds:g}"
        if levels.lost_db > LOST_DB:
            warnings["antiphase"] = f"has channels that cancel each other: averaged, {levels.lost_db:.0f} dB are lost"
        if levels.clipped_share > CLIPPED_SHARE:
            share = f"{100 * levels.clipped_share:.2g} % of its samples"
            warnings["clipped"] = f"is clipped: {share} are in runs of {FLAT_SAMPLES} or more at full scale"
        if "silent" not in warnings and not QUIETEST_MUSIC_DB <= decoded.rms_db <= LOUDEST_MUSIC_DB:
            usual = f"music has {QUIETEST_MUSIC_DB:g} to {LOUDEST_MUSIC_DB:g}"
            warnings["level"] = f"has an RMS of {decoded.rms_db:.1f} dB, where {usual}"
        if decoded.remark:
            warnings["cut"] = decoded.remark
        return warnings
