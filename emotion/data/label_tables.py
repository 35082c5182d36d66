"""Tables of ratings of numbered songs: those of DEAM, EmoMusic and PMEmo → `Label`s. Nothing here looks for audio.

DEAM      static_annotations_averaged*.csv, static_annots*.csv: song_id, valence_mean, valence_std, arousal_mean, arousal_std;
          1..9
EmoMusic  static_annotations.csv: song_id, mean_arousal, std_arousal, mean_valence, std_valence; 1..9
PMEmo     static_annotations.csv: musicId, Arousal(mean), Valence(mean); static_annotations_std.csv: musicId, Arousal(std),
          Valence(std); 0..1

Sources: Soleymani et al. 2013, "1000 songs for emotional analysis of music"; Zhang et al. 2018, "The PMEmo dataset for music
emotion recognition"; for DEAM see deam.py.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from emotion.characters import quoted, with_names
from emotion.data.csv_table import CsvTable, parse_table, read_text
from emotion.data.faults import Fault
from emotion.data.label_scale import DEAM_SCALE, Scale
from emotion.errors import DataError, first_of

SONG_ID = re.compile(r"([0-9]{1,9})(\.0*)?")
PMEMO_DEVIATIONS = "static_annotations_std.csv"  # beside the table of means


@dataclass(frozen=True)
class LabelForm:
    """The columns of a table of ratings, in lower case, without blanks. deviations: (valence, arousal), None: in another file.
    name: of the dataset that has this form."""

    name: str
    song_id: str
    means: tuple[str, str]  # valence, arousal
    deviations: tuple[str, str] | None
    scale: Scale

    @property
    def columns(self) -> tuple[str, ...]:
        """All of them: id, then mean and deviation of valence, then of arousal."""
        valence, arousal = self.means
        if self.deviations is None:
            return self.song_id, valence, arousal
        return self.song_id, valence, self.deviations[0], arousal, self.deviations[1]


DEAM = LabelForm("DEAM", "song_id", ("valence_mean", "arousal_mean"), ("valence_std", "arousal_std"), DEAM_SCALE)
EMOMUSIC = LabelForm("EmoMusic", "song_id", ("mean_valence", "mean_arousal"), ("std_valence", "std_arousal"), DEAM_SCALE)
PMEMO = LabelForm("PMEmo", "musicid", ("valence(mean)", "arousal(mean)"), None, (0, 1))
PMEMO_COLUMNS = ("musicid", "valence(std)", "arousal(std)")  # of its table of deviations


@dataclass(frozen=True)
class Label:
    """One row of a label table: mean and standard deviation over raters, on `scale`; a deviation is None where it is unknown.
    found_at: relative path and line."""

    song_id: int
    valence: float
    valence_sd: float | None
    arousal: float
    arousal_sd: float | None
    found_at: str = field(compare=False)
    scale: Scale = DEAM_SCALE

    @property
    def numbers(self) -> str:
        valence, arousal = (_with_deviation(*pair) for pair in ((self.valence, self.valence_sd), (self.arousal, self.arousal_sd)))
        return f"valence {valence}, arousal {arousal}"


def _with_deviation(mean: float, deviation: float | None) -> str:
    return f"{mean:g}" if deviation is None else f"{mean:g} (SD {deviation:g})"


def form_of(table: CsvTable) -> LabelForm:
    """DEAM's where it is none of the others."""
    return next((form for form in (EMOMUSIC, PMEMO) if set(form.means) <= set(table.columns)), DEAM)


def read_labels(path: Path, name: str) -> tuple[list[Label], list[Fault]]:
    """The rows of one label file, in its order, and what is wrong with the others. `name` stands for the file in faults.

    Reads every spelling in circulation: blanks around and inside names (`valence_ max_mean`), `3` and `5.0`, CRLF, a byte order
    mark, further columns; semicolons, then with 3,1 for 3.1. Means must be on the scale, deviations finite and 0 or more.
    """
    try:
        table = parse_table(name, read_text(path, name))
        form = form_of(table)
        _require_columns(table, form.columns, name)
    except DataError as error:
        return [], [_file_fault(name, error)]
    faults: list[Fault] = []
    beside = path.with_name(PMEMO_DEVIATIONS)
    deviations: Mapping[int, tuple[float, float]] = {}
    if form.deviations is None and beside.exists():
        deviations, faults = _read_deviations(beside, name.removesuffix(path.name) + beside.name)
    unusable = {fault.song_id for fault in faults}
    labels = []
    for line, cells in table.rows:
        place = f"{name}, line {line}"
        song_id, numbers, fault = _read_row(table, cells, form, place)
        if fault is not None:
            faults.append(fault)
        elif song_id is not None and song_id not in unusable:
            valence, arousal = (numbers[column] for column in form.means)
            if form.deviations is None:
                valence_sd, arousal_sd = deviations.get(song_id, (None, None))
            else:
                valence_sd, arousal_sd = (numbers[column] for column in form.deviations)
            labels.append(Label(song_id, valence, valence_sd, arousal, arousal_sd, place, form.scale))
    return labels, faults


def _read_deviations(path: Path, name: str) -> tuple[dict[int, tuple[float, float]], list[Fault]]:
    """Song id → deviations of valence and arousal, and what is wrong with the other rows of PMEmo's second table."""
    form = LabelForm(PMEMO.name, PMEMO_COLUMNS[0], PMEMO_COLUMNS[1:], None, (0, math.inf))
    try:
        table = parse_table(name, read_text(path, name))
        _require_columns(table, form.columns, name)
    except DataError as error:
        return {}, [_file_fault(name, error)]
    deviations, faults = {}, []
    for line, cells in table.rows:
        song_id, numbers, fault = _read_row(table, cells, form, f"{name}, line {line}")
        if fault is not None:
            faults.append(fault)
        elif song_id is not None:
            deviations[song_id] = (numbers[form.means[0]], numbers[form.means[1]])
    return deviations, faults


def _file_fault(name: str, error: DataError) -> Fault:
    return Fault("label file", None, name, str(error).removeprefix(f"{name}: "))


def _require_columns(table: CsvTable, columns: tuple[str, ...], name: str) -> None:
    wrong = [column for column in columns if table.columns.count(column) != 1]
    if wrong:
        found = first_of(
            [with_names(column[:40], repr(column[:40])) for column in table.columns]
        )  # of no table, they may be long
        raise DataError(
            f"{name}: expected one column each of {', '.join(columns)}, found {found}; missing or repeated: {', '.join(wrong)}"
        )
    if not table.rows:
        raise DataError(f"{name}: a header without rows, expected one row per song")


def _read_row(
    table: CsvTable, cells: list[str], form: LabelForm, place: str
) -> tuple[int | None, dict[str, float], Fault | None]:
    """The id of a row, its numbers by column, and what is wrong with it."""
    cell = dict(zip(table.columns, cells, strict=False))
    numbers = {column: table.number(cell.get(column, "")) for column in form.columns[1:]}
    id_text = cell.get(form.song_id, "")
    match = SONG_ID.fullmatch(table.with_points(id_text))
    song_id = int(match[1]) if match else None
    problems = [
        _problem(column, value, cell.get(column, ""), form.scale if column in form.means else (0, math.inf))
        for column, value in numbers.items()
    ]
    if song_id is None:
        problems.append(f"{form.song_id} is {quoted(id_text)}, expected a whole number")
    if len(cells) != len(table.columns):
        problems = [f"{len(cells)} cells, expected {len(table.columns)} as in the header"]
        if table.columns[0] != form.song_id:
            song_id = None  # the cells are shifted, so this may be another column's number
    fault = Fault("label", song_id, place, "; ".join(filter(None, problems))) if any(problems) else None
    return song_id, numbers, fault


def _problem(column: str, value: float, text: str, scale: Scale) -> str | None:
    low, high = scale
    if low <= value <= high and value < math.inf:
        return None
    expected = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
    return f"{column} is {quoted(text)}, expected {expected}"
