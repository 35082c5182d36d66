"""What `predict` writes: a row per song on standard output, notes on standard error, and a file with curves over time."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from emotion.data.label_scale import rating_of
from emotion.errors import SpecError, StorageError, printable, system_reason

if TYPE_CHECKING:
    from emotion.vit.curve import Curve
    from emotion.vit.predict import AudioPredictor, Prediction

BOUNDS = ("valence_lower", "valence_upper", "arousal_lower", "arousal_upper")
HEADER = "\t".join(["valence", "arousal", "valence_1_9", "arousal_1_9", *BOUNDS, "file"])
CURVE_SUFFIXES = (".csv", ".jsonl")
AddCurve = Callable[[str, "Curve"], None]


def row_of(file: str, prediction: "Prediction", as_json: bool) -> str:
    """A line of what `predict` prints. The bounds are empty, or null, for a model without intervals."""
    valence, arousal = prediction.valence, prediction.arousal
    rated = [rating_of(value) for value in (valence, arousal)]
    bounds = [end for ends in prediction.bounds for end in ends] if prediction.bounds else None
    if not as_json:
        shown = [f"{end:+.3f}" for end in bounds] if bounds else [""] * len(BOUNDS)
        numbers = [f"{valence:+.3f}", f"{arousal:+.3f}", f"{rated[0]:.2f}", f"{rated[1]:.2f}"]
        return "\t".join([*numbers, *shown, printable(file)])
    row = {"file": _json_name(file), "valence": valence, "arousal": arousal, "valence_1_9": rated[0], "arousal_1_9": rated[1]}
    ends = dict(zip(BOUNDS, bounds, strict=True)) if bounds else dict.fromkeys(BOUNDS)
    return json.dumps({**row, **ends, "warnings": list(prediction.warnings)})


def notes_on(predictor: "AudioPredictor", curve: Path | None) -> list[str]:
    """What a user of the numbers has to know, once for all songs."""
    from emotion.evaluation.conformal import PERCENT
    from emotion.evaluation.metrics import DIMENSIONS
    from emotion.vit.curve import window_seconds

    notes = []
    if predictor.widths is not None:
        for dimension, width, songs in zip(DIMENSIONS, predictor.widths.width, predictor.widths.songs, strict=True):
            if width == float("inf"):
                few = f"{songs} held-out songs are too few for an interval of {PERCENT} %"
                notes.append(f"{dimension}: {few}, so it is the whole range.")
    if curve is not None:
        window = f"each value is for {window_seconds(predictor.predict.preprocessing):.1f} s of sound around its time"
        notes.append(f"{curve}: by the ViT alone; {window}.")
        if predictor.stack is not None:
            unused = [name for name, share in zip(DIMENSIONS, predictor.stack.model_share, strict=True) if share == 0]
            if unused:
                notes.append(f"{curve}: the stack gives the ViT no share in {' and '.join(unused)}: do not rely on that curve.")
    return notes


def check_curve_name(path: Path | None) -> None:
    """Raise SpecError for another ending than those of CURVE_SUFFIXES, which says how the file is written."""
    if path is not None and path.suffix.lower() not in CURVE_SUFFIXES:
        raise SpecError(f"--curve: {printable(path)} has to end in {' or '.join(CURVE_SUFFIXES)}.")


def curve_writer(path: Path, window: float) -> AddCurve:
    """A function that adds the curve of a song to a file: CSV with a row per point, or JSON Lines with a line per song.

    The file is overwritten now. window: seconds of sound behind each value. Both raise StorageError where it cannot be written.
    """
    from emotion.vit.curve import STEP_SECONDS

    is_csv = path.suffix.lower() == ".csv"
    _write(path, "w", "file,seconds,valence,arousal\n" if is_csv else "")

    def add(name: str, curve: "Curve") -> None:
        seconds = [round(time, 3) for time in curve.seconds.tolist()]
        valence, arousal = ([round(value, 4) for value in column] for column in curve.values.T.tolist())
        text = io.StringIO()
        if is_csv:
            rows = ([_json_name(name), *point] for point in zip(seconds, valence, arousal, strict=True))
            csv.writer(text, lineterminator="\n").writerows(rows)
        else:
            about = {"file": _json_name(name), "window_seconds": round(window, 3), "step_seconds": STEP_SECONDS}
            text.write(json.dumps({**about, "seconds": seconds, "valence": valence, "arousal": arousal}) + "\n")
        _write(path, "a", text.getvalue())

    return add


def _write(path: Path, mode: Literal["w", "a"], text: str) -> None:
    try:
        with path.open(mode, encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError as error:
        raise StorageError.of(error, f"--curve: cannot write {printable(path)}: {system_reason(error)}.") from error


def _json_name(file: str) -> str:
    """A name that is not UTF-8 has surrogates, which are neither JSON nor UTF-8."""
    return file.encode(errors="backslashreplace").decode()
