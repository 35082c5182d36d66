"""The output of `predict`: a row per song on standard output, and notes for all songs on standard error."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from emotion.data.circumplex import WORDS, fits_one_quadrant, quadrant_of
from emotion.data.label_scale import rating_of
from emotion.errors import printable
from job.results.curves import json_name

if TYPE_CHECKING:
    from emotion.vit.predict import AudioPredictor, Prediction

Form = Literal["table", "tsv", "csv", "csv-bom", "jsonl"]
BOUNDS = ("valence_lower", "valence_upper", "arousal_lower", "arousal_upper")
COLUMNS = ("valence", "arousal", "valence_1_9", "arousal_1_9", *BOUNDS, "quadrant", "words", "one_quadrant", "warnings", "file")
CELLS = "{:22}  {:22}  {:16}  {}"  # of a table for people: both intervals, words, the rest
UNSURE = "?"  # after the words of a table row if the intervals reach into another quadrant


def header_of(form: Form) -> str | None:
    """The header line; None for JSON Lines, where each line has the names."""
    if form == "jsonl":
        return None
    return CELLS.format("valence", "arousal", "words", "file") if form == "table" else _joined(COLUMNS, form)


def row_of(file: str, prediction: "Prediction", form: Form) -> str:
    """A line of what `predict` prints. Bounds are empty, or null, for a model without intervals."""
    if form == "table":
        return _for_people(file, prediction)
    valence, arousal, bounds = prediction.valence, prediction.arousal, prediction.bounds
    rated = [rating_of(value) for value in (valence, arousal)]
    ends = [end for pair in bounds for end in pair] if bounds else None
    quadrant = quadrant_of(valence, arousal)
    is_one = fits_one_quadrant(*bounds) if bounds else None
    if form == "jsonl":
        row = {"file": json_name(file), "valence": valence, "arousal": arousal, "valence_1_9": rated[0], "arousal_1_9": rated[1]}
        row |= dict(zip(BOUNDS, ends, strict=True)) if ends else dict.fromkeys(BOUNDS)
        row |= {"quadrant": quadrant or None, "words": list(WORDS[quadrant]), "one_quadrant": is_one}
        return json.dumps({**row, "warnings": [{"kind": kind, "text": text} for kind, text in prediction.warnings.items()]})
    shown = [f"{end:+.3f}" for end in ends] if ends else [""] * len(BOUNDS)
    numbers = [f"{valence:+.3f}", f"{arousal:+.3f}", f"{rated[0]:.2f}", f"{rated[1]:.2f}", *shown]
    sure = "" if is_one is None else "yes" if is_one else "no"
    words, kinds = ", ".join(WORDS[quadrant]), ", ".join(prediction.warnings)
    return _joined([*numbers, str(quadrant or ""), words, sure, kinds, printable(file)], form)


def _joined(cells: Sequence[str], form: Form) -> str:
    if form == "tsv":
        return "\t".join(cells)
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()


def _for_people(file: str, prediction: "Prediction") -> str:
    values = prediction.valence, prediction.arousal
    shown = [f"{value:+.2f}" for value in values]
    is_sure = prediction.bounds is None or fits_one_quadrant(*prediction.bounds)
    if prediction.bounds:
        shown = [f"{value} [{low:+.2f}, {high:+.2f}]" for value, (low, high) in zip(shown, prediction.bounds, strict=True)]
    words = ", ".join(WORDS[quadrant_of(*values)]) + ("" if is_sure else f" {UNSURE}")
    kinds = f"  ({', '.join(prediction.warnings)})" if prediction.warnings else ""
    return CELLS.format(*shown, words, printable(file) + kinds)


def notes_on(predictor: "AudioPredictor", curves: Sequence[Path], form: Form) -> list[str]:
    """Notes that apply to the numbers of all songs."""
    from emotion.evaluation.conformal import PERCENT
    from emotion.evaluation.metrics import DIMENSIONS
    from emotion.vit.curve import window_seconds

    notes = []
    if predictor.widths is not None:
        for dimension, width, songs in zip(DIMENSIONS, predictor.widths.width, predictor.widths.songs, strict=True):
            if width == float("inf"):
                few = f"{songs} held-out songs are too few for an interval of {PERCENT} %"
                notes.append(f"{dimension}: {few}, so it is the whole range.")
        if form == "table":
            notes.append(
                f"in brackets {PERCENT} % intervals; {UNSURE} behind words: an interval reaches into another quadrant, so "
                f"other words may fit."
            )
    if curves:
        names = ", ".join(map(printable, curves))
        window = f"each value is for {window_seconds(predictor.predict.preprocessing):.1f} s of sound around its time"
        notes.append(f"{names}: by the ViT alone; {window}.")
        if predictor.stack is not None:
            unused = [name for name, share in zip(DIMENSIONS, predictor.stack.blend.model_share, strict=True) if share == 0]
            if unused:
                notes.append(f"{names}: the stack gives the ViT no share in {' and '.join(unused)}: do not rely on that curve.")
    return notes
