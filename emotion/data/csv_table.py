"""CSV files: records that we write and read back, and tables as people and spreadsheets write them."""

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

from emotion.data.foreign_files import found_instead
from emotion.data.song_ids import SongId, song_id_of
from emotion.errors import DataError, StorageError, system_reason
from emotion.files import write_csv

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")

OPTIONAL: dict[Any, Any] = {int | None: int, float | None: float, SongId | None: SongId}
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

LINE_END = re.compile("\r\n|\r|\n")
SEPARATOR_LINE = re.compile(r'"?sep=([,;\t|])"?[ \t,;]*(\r\n|\r|\n)', re.IGNORECASE)  # a first line for Excel alone
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def write_records(path: Path, kind: type[Record], records: Sequence[Record]) -> None:
    """Write dataclass instances as CSV, a column per field. A field that has its default in all records gets none."""
    named = [
        field.name
        for field in fields(kind)
        if not _is_optional(field) or any(getattr(record, field.name) != field.default for record in records)
    ]
    write_csv(path, named, ([getattr(record, name) for name in named] for record in records))


def read_records(path: Path, kind: type[Record], name: str) -> list[Record]:
    """Read what `write_records` wrote, with the same bits. Raises DataError, which calls it `name`, for anything else."""
    reader = None
    try:
        reader = csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""), strict=True)
        header = next(reader, None) or []
        columns = [field for field in fields(kind) if field.name in header or not _is_optional(field)]
        if header != [field.name for field in columns]:
            raise ValueError(f"expected the columns {','.join(field.name for field in columns)}")
        converters = {field.name: _converter(field.type) for field in columns}
        records = []
        for cells in reader:
            pairs = zip(converters.items(), cells, strict=True)
            records.append(kind(**{column: convert(cell) for (column, convert), cell in pairs}))
        return records
    except (FileNotFoundError, ValueError, KeyError, csv.Error) as error:
        line = f"line {reader.line_num}: " if reader else ""
        raise DataError(f"{path}: not {name} ({line}{error}). Delete the folder to create it again.") from error


def _is_optional(field: "Field[Any]") -> bool:
    return field.default is not MISSING


def _converter(kind: Any) -> Callable[[str], Any]:
    """From a cell to a value of type str, int, float, SongId, one of these or None, or a Literal."""
    if get_origin(kind) is Literal:
        return {choice: choice for choice in get_args(kind)}.__getitem__
    if kind == SongId:
        return song_id_of
    if type(None) in get_args(kind):
        convert = _converter(OPTIONAL[kind])
        return lambda cell: convert(cell) if cell else None
    converter: Callable[[str], Any] = kind
    return converter


@dataclass(frozen=True)
class CsvTable:
    columns: list[str]  # names in lower case, without blanks
    rows: list[tuple[int, list[str]]]  # line number and stripped cells of every row that is not blank
    decimal_comma: bool  # semicolons or tabs separate the cells, and 3,1 is 3.1, as spreadsheets write it in many countries

    def with_points(self, cell: str) -> str:
        """The cell with a decimal point."""
        return cell.replace(",", ".") if self.decimal_comma else cell

    def number(self, cell: str) -> float:
        """The number in a cell in plain decimal spelling; NaN for anything else."""
        plain = self.with_points(cell)
        return float(plain) if NUMBER.fullmatch(plain) else math.nan


def parse_table(name: str, text: str) -> CsvTable:
    """Parse the text of a CSV file. Raises DataError, beginning with `name`, if it is no table or is empty."""
    if "\0" in text:
        raise DataError(f"{name}: NUL bytes, so it is damaged, or UTF-16 without a byte order mark. Save it as UTF-8.")
    separator = SEPARATOR_LINE.match(text)
    if separator:
        text = "\n" + text[separator.end() :]  # the line stays, so that lines keep their numbers
    header = LINE_END.split(text.lstrip("\r\n "), maxsplit=1)[0]
    delimiter = separator[1] if separator else next((sign for sign in ",;\t" if sign in header), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        rows = [(reader.line_num, cells) for cells in reader]
    except csv.Error as error:
        found = f"line {reader.line_num} is not a row of a CSV table ({error})"
        raise DataError(f"{name}: {found}. Download the file again.") from error
    for line, cells in rows:
        if any("\n" in cell or "\r" in cell for cell in cells):
            raise DataError(f"{name}: a quoted cell that ends in line {line} began in another. Close its quote.")
    filled = [(line, [cell.strip() for cell in cells]) for line, cells in rows if any(map(str.strip, cells))]
    if not filled:
        raise DataError(f"{name}: the file is empty. Expected a header and one row per song; download the file again.")
    columns = ["".join(column.split()).casefold() for column in filled[0][1]]
    # Spreadsheets fill rows up with empty cells.
    body = [(line, cells if any(cells[len(columns) :]) else cells[: len(columns)]) for line, cells in filled[1:]]
    return CsvTable(columns, body, decimal_comma=delimiter in ";\t")


def read_text(path: Path, name: str, *, allow_latin_1: bool = False) -> str:
    """The text of a UTF-8 file, of a UTF-16 file with a byte order mark, or else of a Latin-1 file if allowed.
    Raises StorageError, or DataError that names `name`."""
    try:
        content = path.read_bytes()
        if foreign := found_instead(content):
            raise DataError(f"{name}: expected text, found {foreign}.")
        return content.decode("utf-16" if content.startswith(UTF_16) else "utf-8-sig")
    except OSError as error:
        raise StorageError.of(error, f"{path}: cannot be read ({system_reason(error)}).") from error
    except UnicodeDecodeError as error:
        if allow_latin_1:
            return content.decode("latin-1")
        line = len(LINE_END.split(content[: error.start].decode("latin-1")))
        found = f"found byte 0x{content[error.start]:02x} in line {line}, as in Windows-1252 or another encoding"
        raise DataError(f"{name}: expected UTF-8 text, {found}. Save it as UTF-8.") from error
