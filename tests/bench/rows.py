"""Rows that a benchmark adds to the table of `python -m tests.bench`: one for each number that can be compared."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROWS_FILE = "BENCH_ROWS"
"""Environment variable with the file to which rows are appended. It is not set if a benchmark is run on its own."""


def record(
    what: str,
    value: float,
    *,
    least: float | None = None,
    most: float | None = None,
    raw: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Add a row. what: the number and what it is compared with, such as "CPU time / librosa's"; least, most: the goal; raw: the
    timings behind the value."""
    path = os.environ.get(ROWS_FILE)
    if path is None:
        return
    row = {"benchmark": Path(sys.argv[0]).stem, "what": what, "value": value, "least": least, "most": most, "raw": raw or {}}
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
