"""The walkthroughs as scripts: what a reader pastes, word by word, and what the document says that it prints."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.conftest import TINY
from tests.documents import DOCUMENTS, ROOT

BLOCK = re.compile(r"^```sh follow\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
PARTS = ("[0-9a-f]{12}", r"[-+]?\d+\.\d+", r"\s+")
SPLIT = re.compile(f"({'|'.join(PARTS)})")
MARK = "@ step {} @"
PROGRAMS = {"emotion-job": "job", "emotion-slurm": "slurm"}


def section_of(title: str) -> str:
    text = DOCUMENTS["job/walkthroughs.md"].read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def demo_in(folder: Path, folds: int = 4) -> str:
    """The tiny job under the name of the demo, from which the document has its output."""
    path = folder / "demo.yaml"
    text = TINY.read_text(encoding="utf-8").replace("name: tiny", "name: demo").replace("folds: 4", f"folds: {folds}")
    path.write_text(text, encoding="utf-8")
    return str(path)


def pattern_of(line: str) -> re.Pattern[str]:
    """A line of the document. Numbers with a point stand for any, digests too, … for anything; other numbers are themselves."""
    parts = [next((pattern for pattern in PARTS if re.fullmatch(pattern, part)), re.escape(part)) for part in SPLIT.split(line)]
    return re.compile("".join(parts).replace("…", ".*"))


def follow(title: str, home: Path, here: Mapping[str, str] | None = None, **variables: str) -> None:
    """Paste all blocks of a walkthrough into one shell, whose standard output is a terminal and whose HOME is empty, and require
    every line that it is said to print. variables: those of the block that is the reader's, and the machine's.
    here: text → what stands in its place because the machine is a test."""
    section = section_of(title)
    for text, replacement in (here or {}).items():
        assert text in section
        section = section.replace(text, replacement)
    (block,) = re.findall(r"^```sh yours\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert {*re.findall(r"(\w+)=", block)} <= {*variables}
    steps = BLOCK.findall(section)
    assert steps
    bin_folder = home / "bin"
    bin_folder.mkdir(parents=True)
    for name, module in PROGRAMS.items():
        (bin_folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (bin_folder / name).chmod(0o755)
    marks = [f"echo '{MARK.format(number)}'; echo '{MARK.format(number)}' >&2\n" for number in range(len(steps))]
    script = "".join(mark + commands for mark, (commands, _) in zip(marks, steps, strict=True))
    path = f"{bin_folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, **variables, "HOME": str(home), "PATH": path, "PYTHONPATH": str(ROOT)}
    ours, theirs = pty.openpty()
    with (home / "printed").open("wb") as errors:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script], cwd=home, env=environment, stdout=theirs, stderr=errors
        )
        os.close(theirs)
        printed = b""
        while chunk := _read(ours):
            printed += chunk
        os.close(ours)
        code = process.wait()
    outputs = [text.replace("\r", "") for text in (printed.decode(), (home / "printed").read_text())]
    assert code == 0, "\n".join(outputs)[-5000:]
    missing = []
    for number, (commands, expected) in enumerate(steps):
        found = "".join(text.partition(MARK.format(number))[2].partition(MARK.format(number + 1))[0] for text in outputs)
        print(f"$ {commands}{found}")
        missing += [line for line in expected.splitlines() if not pattern_of(line).search(found)]
    assert missing == [], "\n".join(missing)


def _read(descriptor: int) -> bytes:
    """What a terminal shows; nothing at its end, which Linux reports as an error."""
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""
