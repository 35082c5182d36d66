"""Runs all CPU benchmarks, one after the other, and prints one table of their results.

    python -m tests.bench [NAME …] [--json FILE]

Each benchmark is a script in this folder that can also be run alone. Here it runs in a process of its own, and its output is
shown as it comes. It adds rows to the table with `tests.bench.rows.record`. If it fails, the table has a row that says so, and
the exit code is 1. To add a benchmark, add its name to BENCHMARKS. Run this on an idle machine.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.bench.rows import ROWS_FILE

BENCHMARKS = (
    "mel_pipeline",
    "attention",
    "memory",
    "validation",
    "survivors",
    "stopping",
    "retraining",
    "staging",
    "scaling",
    "spinning",
)
LIBRARIES = ("torch", "timm", "numpy", "scipy", "scikit-learn", "librosa", "soundfile")


def environment() -> dict[str, Any]:
    """The environment that the numbers depend on, besides the code."""
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return {
        "processor": processor[1] if processor else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
        "load_average": round(os.getloadavg()[0], 1),
    }


def rows_of(script: Path) -> list[dict[str, Any]]:
    """Run a benchmark and return its rows. A failure gives a row without a value."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file = Path(folder) / "rows.jsonl"
        code = subprocess.run([sys.executable, script], env={**os.environ, ROWS_FILE: str(file)}, check=False).returncode
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    if code:
        rows.append(
            {"benchmark": script.stem, "what": f"ended with exit code {code}", "value": None, "least": None, "most": None}
        )
    return rows


def table(found: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The environment and a table of the rows, in Markdown."""
    lines = [", ".join(f"{name} {value}" for name, value in found.items()), ""]
    lines += ["| benchmark | what | value | goal | |", "|---|---|---|---|---|"]
    for row in rows:
        value, least, most = row["value"], row["least"], row["most"]
        goals = ([f"at least {least:g}"] if least is not None else []) + ([f"at most {most:g}"] if most is not None else [])
        verdict = ("met" if is_met(row) else "missed") if goals or value is None else ""
        shown = "" if value is None else f"{value:.3g}"
        lines.append(f"| {row['benchmark']} | {row['what']} | {shown} | {' and '.join(goals)} | {verdict} |")
    return "\n".join(lines)


def is_met(row: dict[str, Any]) -> bool:
    """Whether the row has a value that is within its goal."""
    value, least, most = row["value"], row["least"], row["most"]
    return value is not None and (least is None or value >= least) and (most is None or value <= most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--json", type=Path, help="file for the table with all raw timings")
    given = parser.parse_args()
    names = given.names or BENCHMARKS
    found = environment()
    rows = []
    for name in names:
        print(f"\n== {name}\n", flush=True)
        rows += rows_of(Path(__file__).parent / f"{name}.py")
    print(f"\n== all\n\n{table(found, rows)}")
    if given.json:
        given.json.write_text(json.dumps({"environment": found, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(row["value"] is None for row in rows))


if __name__ == "__main__":
    main()
