"""The attempts of a run and how each ended: `attempts.jsonl` in the run folder."""

import contextlib
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any

from emotion.errors import EmotionError, Interrupted, ModelError, Stopped, as_failure
from emotion.files import append_json_line, digest_of, read_json_lines
from job.run_folder.receipts import LOG, RECEIPT
from job.secrets import scrubbed

ATTEMPTS = "attempts.jsonl"
MAX_ATTEMPTS_WITHOUT_PROGRESS = 10  # killed attempts in a row
MAX_HANGS_WITHOUT_PROGRESS = 3  # hung attempts in a row: each costs `preemption.hang_minutes`
HUNG = "Hung"  # the reason recorded for an attempt that the watchdog has ended
CLEAN_STOPS = (Interrupted.__name__, Stopped.__name__)

OPTIONAL_FIELDS = {"message": str} | dict.fromkeys(("seconds", "monotonic", "lived_seconds", "lost_seconds"), int | float)

ProgressFiles = Mapping[str, tuple[str, ...]]  # phase → globs, in its folder, of files with which the next attempt resumes


@contextlib.contextmanager
def recorded_attempt(
    run_folder: Path,
    attempt: int,
    scratch: Path,
    progress_files: ProgressFiles,
    sizes_in_mirror: Callable[[], dict[str, int]],
    cost_of_last: Mapping[str, float] | None = None,
) -> Iterator[Callable[[str], None]]:
    """Record the start and end of an attempt, and why it ended; a killed attempt has no end. `state` in a start is a digest of
    the progress so far: if two attempts have the same state, there was no progress between them. Durations are measured by the
    monotonic clock, as the system time may be changed: `monotonic` in a start, `seconds` since then in an end. cost_of_last: cost
    of the previous attempt (lost_work.py), recorded in the start. Yields the function that a watchdog calls before it ends the
    process. Raises ModelError after MAX_ATTEMPTS_WITHOUT_PROGRESS or MAX_HANGS_WITHOUT_PROGRESS."""

    def record(**fields: Any) -> None:
        append_json_line(run_folder / ATTEMPTS, {"time": round(time.time(), 3), "attempt": attempt, **fields})

    def record_end(reason: str, exit_code: int, **fields: str) -> None:
        # An error while recording must not hide the error that ended the attempt.
        with contextlib.suppress(OSError):
            seconds = round(time.monotonic() - began, 3)
            texts = {name: scrubbed(text) for name, text in fields.items()}
            record(event="end", reason=reason, exit_code=exit_code, seconds=seconds, **texts)

    began = time.monotonic()
    state = _progress_digest(run_folder, scratch, progress_files, sizes_in_mirror())
    killed, hung = _without_progress(read_attempts(run_folder), state)
    cost = cost_of_last or {}
    record(event="start", host=socket.gethostname(), pid=os.getpid(), state=state, monotonic=round(began, 3), **cost)
    try:
        if killed >= MAX_ATTEMPTS_WITHOUT_PROGRESS:
            raise ModelError(
                f"{run_folder}: the last {killed} attempts were killed before they made progress: no new checkpoint, no staged "
                f"file, no finished phase. Look at {run_folder / LOG} and at why they were killed (memory, time limit); "
                f"give the job more memory or time, or save more often (checkpoint.every_seconds), then run it again."
            )
        if hung >= MAX_HANGS_WITHOUT_PROGRESS:
            raise ModelError(
                f"{run_folder}: the last {hung} attempts hung before they made progress. {run_folder / LOG} says where: in a "
                f"disk, a driver or a library that does not answer. Fix that or, where a step really takes so long, raise "
                f"preemption.hang_minutes; then run it again."
            )
        yield lambda text: record_end(HUNG, Interrupted.exit_code, message=text)
    except (EmotionError, Interrupted) as error:
        record_end(type(error).__name__, error.exit_code, message=str(error))
        raise
    except Exception as error:
        failure = as_failure(error)
        record_end(type(error).__name__, failure.exit_code, message=str(failure))
        raise
    except BaseException as error:
        record_end(type(error).__name__, 1)
        raise
    record_end("done", 0)


def read_attempts(run_folder: Path) -> list[dict[str, Any]]:
    """The events so far, in order. A line that a failing node left incomplete or damaged is skipped."""
    return [event for event in read_json_lines(run_folder / ATTEMPTS) if _is_event(event)]


def _is_event(record: dict[str, Any]) -> bool:
    """Whether an event has its fields. If its end is skipped, an attempt counts as killed; if its start is, it is not counted."""
    kinds: dict[str, type | UnionType] = {"event": str, "time": int | float, "attempt": int}
    if record.get("event") == "start":
        kinds |= {"host": str, "pid": int}
    elif record.get("event") == "end":
        kinds |= {"reason": str, "exit_code": int}
    elif "phase" in record:
        kinds |= {"total": int | float}
    kinds |= {name: kind for name, kind in OPTIONAL_FIELDS.items() if name in record}
    return all(isinstance(record.get(name), kind) for name, kind in kinds.items())


def paired(events: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """[(start, end)] in the order of the starts; the end of a killed attempt is None. A machine that resumes from a copy of the
    run folder may count attempts from 1 again: an end belongs to the last start before it that has the same number."""
    pairs: list[tuple[dict[str, Any], dict[str, Any] | None]] = []
    open_pairs: dict[int, int] = {}
    for event in events:
        attempt = event["attempt"]
        if event.get("event") == "start":
            open_pairs[attempt] = len(pairs)
            pairs.append((event, None))
        elif event.get("event") == "end" and attempt in open_pairs:
            index = open_pairs.pop(attempt)
            pairs[index] = (pairs[index][0], event)
    return pairs


def seconds_of_attempts(events: list[dict[str, Any]], now: float | None = None) -> list[float]:
    """The duration of each attempt, in the order of their starts. For a killed or running attempt, it is the last duration that
    it recorded, or 0. now: time of the monotonic clock, if the last attempt is this one."""
    seconds: list[float] = []
    of_attempt: dict[int, int] = {}
    monotonic = None
    for event in events:
        number = event["attempt"]
        if event.get("event") == "start":
            of_attempt[number] = len(seconds)
            seconds.append(0.0)
            monotonic = event.get("monotonic")
        elif number in of_attempt and "seconds" in event:
            seconds[of_attempt[number]] = event["seconds"]
    if now is not None and monotonic is not None:
        seconds[-1] = now - monotonic
    return seconds


def _progress_digest(run_folder: Path, scratch: Path, progress_files: ProgressFiles, sizes: dict[str, int]) -> str:
    """A digest of names and sizes of receipts and progress files. sizes: of all files of this run in the mirror.
    Times are not included: saving the same checkpoint again is no progress."""
    sizes = {name: size for name, size in sizes.items() if _is_progress(PurePosixPath(name), progress_files)}
    for parent in (run_folder, scratch):
        for path in progress_paths(parent, progress_files):
            with contextlib.suppress(FileNotFoundError):  # another job may be working in the same scratch
                found = path.stat()
                if stat.S_ISREG(found.st_mode):
                    sizes[path.relative_to(parent).as_posix()] = found.st_size
    return digest_of(sizes)


def _is_progress(path: PurePosixPath, progress_files: ProgressFiles) -> bool:
    return any(path.match(f"{phase}-*/{name}") for phase, names in progress_files.items() for name in (RECEIPT, *names))


def progress_paths(parent: Path, progress_files: ProgressFiles) -> Iterator[Path]:
    for phase, patterns in progress_files.items():
        for folder in parent.glob(f"{phase}-*"):
            if (folder / RECEIPT).exists():
                yield folder / RECEIPT
                continue
            for pattern in patterns:
                yield from (path for path in folder.glob(pattern) if not _is_temporary(path.name))


def _is_temporary(name: str) -> bool:
    """Whether a file is a lease or incomplete: such files come and go without progress."""
    return name.startswith(".") and name.endswith((".part", ".json"))


def _without_progress(events: list[dict[str, Any]], state: str) -> tuple[int, int]:
    """(killed, hung): how many attempts in a row, counted backwards from the last, were killed or hung without progress. Clean
    stops are skipped."""
    killed = hung = 0
    for start, end in reversed(paired(events)):
        is_hung = end is not None and end.get("reason") == HUNG
        if (end is None or is_hung) and start.get("state") == state:
            killed, hung = killed + (not is_hung), hung + is_hung
        elif end is None or end.get("reason") not in CLEAN_STOPS:
            break
    return killed, hung
