"""Who tried to bring a run forward, and how it ended: `attempts.jsonl` in the run folder."""

import contextlib
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from emotion.errors import EmotionError, Interrupted, ModelError, Stopped
from emotion.files import append_json_line, digest_of, read_json_lines
from job.run_folder.receipts import LOG, NAME

ATTEMPTS = "attempts.jsonl"
FRUITLESS_ATTEMPTS = 10
"""So many attempts in a row that were killed and left nothing new are enough."""
KEPT = (f"*/{NAME}", "*/checkpoints/step-*.json", "*/.songs.jsonl")
"""In a run folder: finished phases, saved steps, clips made so far."""
CLEAN = (Interrupted.__name__, Stopped.__name__)


@contextlib.contextmanager
def recorded(run_folder: Path, attempt: int, scratch: Path, mirrored: Callable[[], dict[str, int]]) -> Iterator[None]:
    """Record who tried, from when to when, and why it ended. A killed attempt has no end.

    `left` is a digest of what is there at the start: two attempts with the same one have nothing between them. mirrored: names
    and sizes of what is in the run's folder in a mirror, where what machines that are gone have left counts, too. Raises
    ModelError where FRUITLESS_ATTEMPTS in a row were killed and left nothing new.
    """

    def tell(**facts: Any) -> None:
        append_json_line(run_folder / ATTEMPTS, {"time": round(time.time(), 3), "attempt": attempt, **facts})

    def ended(reason: str, exit_code: int, **facts: str) -> None:
        # What ended the attempt is more worth telling than that it cannot be written down.
        with contextlib.suppress(OSError):
            tell(event="end", reason=reason, exit_code=exit_code, **facts)

    left = _left_so_far(run_folder, scratch, mirrored())
    fruitless = _fruitless(read_attempts(run_folder), left)
    tell(event="start", host=socket.gethostname(), pid=os.getpid(), left=left)
    try:
        if fruitless >= FRUITLESS_ATTEMPTS:
            raise ModelError(
                f"{run_folder}: the last {fruitless} attempts were killed before they left anything new: no saved step, no "
                f"staged file, no finished phase. Look at {run_folder / LOG} and at why they were killed (memory, time limit); "
                f"give the job more of it or save more often (checkpoint.every_seconds), then run it again."
            )
        yield
    except (EmotionError, Interrupted) as error:
        ended(type(error).__name__, error.exit_code, message=str(error))
        raise
    except BaseException as error:
        ended(type(error).__name__, 1)
        raise
    ended("done", 0)


def read_attempts(run_folder: Path) -> list[dict[str, Any]]:
    """The events so far, in order; a line that a dying node left half-written is passed over."""
    return read_json_lines(run_folder / ATTEMPTS)


def paired(events: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """[(start, end)] in the order of the starts, None for the end of an attempt that was killed.

    A machine that goes on from a copy of the run folder may count its attempts from 1 again: an end belongs to the last start
    of its number before it.
    """
    found: list[tuple[dict[str, Any], dict[str, Any] | None]] = []
    begun: dict[int, int] = {}
    for event in events:
        attempt = event.get("attempt", 0)
        if event.get("event") == "start":
            begun[attempt] = len(found)
            found.append((event, None))
        elif event.get("event") == "end" and attempt in begun:
            place = begun.pop(attempt)
            found[place] = (found[place][0], event)
    return found


def _left_so_far(run_folder: Path, scratch: Path, mirrored: dict[str, int]) -> str:
    """A digest of names and sizes of what attempts leave for the next one: receipts, checkpoints, files of unfinished scratch.

    No times: a step that is saved a second time is nothing new.
    """
    found = [(run_folder, path) for name in KEPT for path in run_folder.glob(name)]
    for folder in (*scratch.glob("stage-*"), *scratch.glob("features-*")):
        receipt = folder / NAME
        paths = [receipt] if receipt.exists() else [path for path in folder.rglob("*") if not _is_passing(path.name)]
        found += [(scratch, path) for path in paths]
    sizes = {name: size for name, size in mirrored.items() if any(PurePosixPath(name).match(kept) for kept in KEPT)}
    for place, path in found:
        # Another job may be working in the same scratch.
        with contextlib.suppress(FileNotFoundError):
            facts = path.stat()
            if stat.S_ISREG(facts.st_mode):
                sizes[path.relative_to(place).as_posix()] = facts.st_size
    return digest_of(sizes)


def _is_passing(name: str) -> bool:
    """Whether a file is a lease or half-written: those come and go without anything being done."""
    return name.startswith(".") and name.endswith((".part", ".json"))


def _fruitless(events: list[dict[str, Any]], left: str) -> int:
    """How many attempts in a row, counted from the last, were killed and left nothing new. Clean stops do not count."""
    count = 0
    for start, end in reversed(paired(events)):
        if end is None and start.get("left") == left:
            count += 1
        elif end is None or end.get("reason") not in CLEAN:
            break
    return count
