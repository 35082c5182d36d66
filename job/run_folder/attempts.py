"""The attempts of a run and how each ended: `attempts.jsonl` in the run folder."""

import contextlib
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from emotion.errors import EmotionError, Interrupted, ModelError, Stopped, as_failure
from emotion.files import append_json_line, digest_of, read_json_lines
from job.run_folder.receipts import LOG, RECEIPT
from job.secrets import scrubbed

ATTEMPTS = "attempts.jsonl"
MAX_ATTEMPTS_WITHOUT_PROGRESS = 10  # in a row, and killed
MAX_HANGS_WITHOUT_PROGRESS = 3  # in a row: each has cost `preemption.hang_minutes`
HUNG = "Hung"  # the reason of an attempt that the watchdog has ended
CLEAN_STOPS = (Interrupted.__name__, Stopped.__name__)

ProgressFiles = Mapping[str, tuple[str, ...]]  # phase → globs, in its folder, of files for the next attempt


@contextlib.contextmanager
def recorded_attempt(
    run_folder: Path,
    attempt: int,
    scratch: Path,
    progress_files: ProgressFiles,
    sizes_in_mirror: Callable[[], dict[str, int]],
    cost_of_last: Mapping[str, float] | None = None,
) -> Iterator[Callable[[str], None]]:
    """Record start and end of an attempt, and why it ended; a killed one has no end. `state` of a start is a digest of the
    progress so far: attempts with equal ones made none in between. Durations are of the monotonic clock, as the other may be set
    meanwhile: `monotonic` at a start, `seconds` since then at an end. cost_of_last: of the attempt before (lost_work.py), kept in
    the start. Yields what a watchdog calls before it ends the process. Raises ModelError after
    MAX_ATTEMPTS_WITHOUT_PROGRESS, or MAX_HANGS_WITHOUT_PROGRESS."""

    def record(**fields: Any) -> None:
        append_json_line(run_folder / ATTEMPTS, {"time": round(time.time(), 3), "attempt": attempt, **fields})

    def record_end(reason: str, exit_code: int, **fields: str) -> None:
        # The error that ended the attempt must not be hidden by one of writing it down.
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
    """The events so far, in order; a line that a dying node left incomplete is skipped."""
    return read_json_lines(run_folder / ATTEMPTS)


def paired(events: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """[(start, end)] in the order of the starts, None for the end of an attempt that was killed. A machine that resumes from a
    copy of the run folder may count its attempts from 1 again: an end belongs to the last start of its number before it."""
    pairs: list[tuple[dict[str, Any], dict[str, Any] | None]] = []
    open_pairs: dict[int, int] = {}
    for event in events:
        attempt = event.get("attempt", 0)
        if event.get("event") == "start":
            open_pairs[attempt] = len(pairs)
            pairs.append((event, None))
        elif event.get("event") == "end" and attempt in open_pairs:
            index = open_pairs.pop(attempt)
            pairs[index] = (pairs[index][0], event)
    return pairs


def seconds_of_attempts(events: list[dict[str, Any]], now: float | None = None) -> list[float]:
    """How long each attempt took, in the order of their starts. Of a killed one, and of one that runs, it is what it has recorded
    last, 0 where that is nothing. now: of the monotonic clock, where the last attempt is this one."""
    seconds: list[float] = []
    of_attempt: dict[int, int] = {}
    monotonic = None
    for event in events:
        number = event.get("attempt", 0)
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
    Times do not count: a checkpoint that is saved a second time is no progress."""
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
    """Whether a file is a lease or incomplete: those come and go without progress."""
    return name.startswith(".") and name.endswith((".part", ".json"))


def _without_progress(events: list[dict[str, Any]], state: str) -> tuple[int, int]:
    """How many attempts in a row, counted from the last, were killed, and how many hung, and made no progress. Clean stops do not
    count."""
    killed = hung = 0
    for start, end in reversed(paired(events)):
        is_hung = end is not None and end.get("reason") == HUNG
        if (end is None or is_hung) and start.get("state") == state:
            killed, hung = killed + (not is_hung), hung + is_hung
        elif end is None or end.get("reason") not in CLEAN_STOPS:
            break
    return killed, hung
