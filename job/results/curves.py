"""The files of `predict --curve`: a table of curves over time, or their picture."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from emotion.errors import EmotionError, SpecError, StorageError, printable, system_reason

if TYPE_CHECKING:
    from emotion.vit.curve import Curve

PICTURE = ".png"
CURVE_SUFFIXES = (".csv", ".jsonl", PICTURE)  # the suffix of a file decides its format
CSV_HEADER = "file,seconds,valence,arousal\n"
PICTURE_TITLE = "emotion-job: curves"  # in the metadata of a picture
BEGINNING_BYTES = 1 << 15  # enough for the longest file name, escaped, and the key after it
AddCurve = Callable[[str, "Curve"], None]


def check_curve_names(paths: Sequence[Path]) -> None:
    """Raise SpecError for a suffix that is not in CURVE_SUFFIXES, and for an existing file that no earlier `--curve` wrote, such
    as a table of labels; StorageError if the file cannot be read."""
    for path in paths:
        if path.suffix.lower() not in CURVE_SUFFIXES:
            raise SpecError(f"--curve: {printable(path)} has to end in {', '.join(CURVE_SUFFIXES[:-1])} or {PICTURE}.")
        try:
            is_other = path.is_file() and not _begins_as_curves(path)
        except OSError as error:
            raise StorageError.of(error, f"--curve: cannot read {printable(path)}: {system_reason(error)}.") from error
        if is_other:
            raise SpecError(f"--curve: {printable(path)} exists and holds no curves. Name another file, or remove it.")


def _begins_as_curves(path: Path) -> bool:
    """Whether a file begins like one of `--curve`. Such a file may be empty, if the command was stopped before the first song."""
    with path.open("rb") as file:
        beginning = file.read(BEGINNING_BYTES)
    suffix = path.suffix.lower()
    if not beginning:
        return True
    if suffix == PICTURE:
        return PICTURE_TITLE.encode() in beginning
    if suffix == ".csv":
        return beginning.startswith(CSV_HEADER.encode())
    return beginning.startswith(b'{"file": ') and b'"window_seconds": ' in beginning


def curve_writer(path: Path, window: float) -> AddCurve:
    """A function that adds the curve of a song to a file: CSV with a row per point, or JSON Lines with a line per song.

    The call overwrites the file. window: seconds of sound behind each value. Call and function raise StorageError.
    """
    from emotion.vit.curve import STEP_SECONDS

    is_csv = path.suffix.lower() == ".csv"
    _write(path, "w", CSV_HEADER if is_csv else "")

    def add(name: str, curve: "Curve") -> None:
        seconds = [round(time, 3) for time in curve.seconds.tolist()]
        valence, arousal = ([round(value, 4) for value in column] for column in curve.values.T.tolist())
        text = io.StringIO()
        if is_csv:
            rows = ([json_name(name), *point] for point in zip(seconds, valence, arousal, strict=True))
            csv.writer(text, lineterminator="\n").writerows(rows)
        else:
            about = {"file": json_name(name), "window_seconds": round(window, 3), "step_seconds": STEP_SECONDS}
            text.write(json.dumps({**about, "seconds": seconds, "valence": valence, "arousal": arousal}) + "\n")
        _write(path, "a", text.getvalue())

    return add


class CurveFiles:
    """All files of `--curve`. Tables grow with each song; `draw` draws pictures of the first songs.

    window: seconds of sound behind each value. The constructor overwrites the files. All methods raise StorageError.
    """

    def __init__(self, paths: Sequence[Path], window: float) -> None:
        self._window = window
        self._pictures = [path for path in paths if path.suffix.lower() == PICTURE]
        self._tables = [curve_writer(path, window) for path in paths if path not in self._pictures]
        self._songs: list[tuple[str, Curve]] = []
        for path in self._pictures:
            _write(path, "w", "")

    def add(self, name: str, curve: "Curve") -> None:
        for write in self._tables:
            write(name, curve)
        if self._pictures:
            self._songs.append((name, curve))

    def draw(self) -> None:
        """Draw the pictures, if there was a song."""
        if not self._songs:
            return
        from emotion.evaluation.curve_plot import curves_png

        drawn = curves_png([(name, *curve) for name, curve in self._songs], self._window, PICTURE_TITLE)
        for path in self._pictures:
            try:
                path.write_bytes(drawn)
            except OSError as error:
                raise _refused(path, error) from error


def json_name(file: str) -> str:
    """The name with surrogates escaped: a name that is not UTF-8 has them, and they are neither JSON nor UTF-8."""
    return file.encode(errors="backslashreplace").decode()


def _write(path: Path, mode: Literal["w", "a"], text: str) -> None:
    try:
        with path.open(mode, encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> EmotionError:
    return StorageError.of(error, f"--curve: cannot write {printable(path)}: {system_reason(error)}.")
