"""Faults of a dataset: one record per fault, one report of all, and the decision to fail or to leave songs out."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emotion.data.csv_table import read_records, write_records
from emotion.data.song_ids import SongId
from emotion.errors import DataError, counted

if TYPE_CHECKING:
    from emotion.config import DataConfig  # processes that decode songs do without pydantic

log = logging.getLogger(__name__)

SHOWN_OF_A_KIND = 10


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong. The names of the fields are published, as columns of left_out.csv and in the manifest.

    song_id: the song that cannot be used because of it; None for a file or row that names no song. place: relative path and
    line; for decoded audio only SONG_ID and suffix. what: what was found and what was expected.
    """

    kind: str
    song_id: SongId | None
    place: str
    what: str

    def __str__(self) -> str:
        song = "" if self.song_id is None else f"song {self.song_id}, "
        return f"{self.kind}: {song}{self.place}: {self.what}"


def write_faults(path: Path, faults: Sequence[Fault]) -> None:
    write_records(path, Fault, faults)


def read_faults(path: Path) -> list[Fault]:
    """Raises DataError for anything but what `write_faults` wrote."""
    return read_records(path, Fault, "a table of faults")


def fail_or_leave_out(faults: Sequence[Fault], songs: int, config: "DataConfig", table: Path) -> None:
    """Raise DataError with all faults, unless `config.faults` is "drop" and few enough songs have any: then only warn.

    songs: number of usable and unusable songs; at most `config.drop_at_most` of them may be left out. table: CSV file that
    gets all faults; the message shows the first of each kind.
    """
    if not faults:
        table.unlink(missing_ok=True)
        return
    write_faults(table, faults)
    kinds = Counter(fault.kind for fault in faults)
    report = refusal(faults, songs, config, f"all in {table}")
    if report is not None:
        raise DataError(report)
    unusable = len({fault.song_id for fault in faults if fault.song_id is not None})
    counts = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
    log.warning("data: left out %d of %d songs (faults: %s), see %s", unusable, songs, counts, table)


def may_leave_out(songs: int, config: "DataConfig") -> int:
    """Number of songs that may be left out, of so many."""
    return int(config.drop_at_most * songs + 1e-9)  # 0.29 * 100 is 28.999999999999996


def refusal(faults: Sequence[Fault], songs: int, config: "DataConfig", where: str, advice: str | None = None) -> str | None:
    """The error for these faults, with the first of each kind; None if so few songs may be left out.
    where: which faults these are, for the message. advice: its last line, for a command without a spec."""
    unusable = len({fault.song_id for fault in faults if fault.song_id is not None})
    allowed = may_leave_out(songs, config)
    if not faults or (config.faults == "drop" and unusable <= allowed):
        return None
    lines = [f"data: {unusable} of {songs} songs cannot be used as they are; {counted(len(faults), 'fault')}, {where}"]
    for kind, count in Counter(fault.kind for fault in faults).items():
        lines += [f"  {fault}" for fault in faults if fault.kind == kind][:SHOWN_OF_A_KIND]
        if count > SHOWN_OF_A_KIND:
            lines.append(f"  {kind}: {count - SHOWN_OF_A_KIND} more")
    if advice is not None:
        lines.append(advice)
    elif config.faults == "drop":
        limit = f"data.drop_at_most {config.drop_at_most:g}"
        lines.append(f"{limit} allows {counted(allowed, 'song')} to be left out. Fix the others or raise it.")
    else:
        lines.append("Fix them, or set data.faults to drop: then up to data.drop_at_most of all songs are left out.")
    return "\n".join(lines)
