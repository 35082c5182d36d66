"""Ends a job that hangs, so that its scheduler or launcher restarts it: `preemption.hang_minutes`.

A job makes progress when it calls should_stop(), which every phase does at each step, song, batch, file and fit. Calls that are
made only while waiting for another thread do not count (emotion/threads.py), nor do those of the mirror's thread. So the longest
silence of a working job is one step, one song, one fit, one import, one page of a listing, or one download of weights.

The watchdog is a Python thread: C code that keeps the interpreter lock for ever stops it, too. Code that waits in the kernel, in
a file system, on a lock or for a GPU does not.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from emotion.errors import Interrupted
from job.preemption import StopRequest
from job.run_folder.receipts import LOG

LOOK_SECONDS = 1.0
REPORT_SECONDS = 30.0
"""Time limit for writing the stack traces, which may hang as well if the disk hangs."""


class Watchdog:
    """Within `watched(…) as watchdog:` the process exits with 75 after `limit_seconds` without progress.
    record_hang: called with the message; set once there is an attempt in which to record it."""

    def __init__(self, should_stop: StopRequest, limit_seconds: float, run_folder: Path) -> None:
        self.record_hang: Callable[[str], None] = lambda _: None
        self._should_stop, self._limit_seconds, self._log_file = should_stop, limit_seconds, run_folder / LOG

    def watch(self, ended: threading.Event) -> None:
        """Runs in a thread. Returns when `ended` is set."""
        look = min(LOOK_SECONDS, self._limit_seconds / 4)
        seen, silent, looked = self._should_stop.asked_at, 0.0, time.monotonic()
        while not ended.wait(look):
            now = time.monotonic()
            # If a check comes late, only this much counts: the process was suspended, and has not hung.
            silent += min(now - looked, 2 * look)
            looked = now
            if self._should_stop.asked_at != seen:
                seen, silent = self._should_stop.asked_at, 0.0
            elif silent >= self._limit_seconds:
                self._end()

    def _end(self) -> None:
        try:
            reporting = threading.Thread(target=self._report, name="hang", daemon=True)
            reporting.start()
            reporting.join(REPORT_SECONDS)
        finally:
            os._exit(Interrupted.exit_code)  # no other way ends a thread that is stuck outside of Python

    def _report(self) -> None:
        text = f"no progress for {self._limit_seconds / 60:g} minutes (preemption.hang_minutes)"
        with suppress(OSError):  # the record first: a job that always hangs has to end some day
            self.record_hang(f"{text}; where it hangs is in {self._log_file}")
        # Not through the logging module, whose lock the hanging thread may hold.
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = f"{now} ERROR {text}: exit code 75, the same command resumes. All threads, innermost call first:\n".encode()
        with suppress(OSError), self._log_file.open("ab", buffering=0) as file:
            file.write(line)
            faulthandler.dump_traceback(file=file)
        with suppress(OSError):
            os.write(2, line)
            faulthandler.dump_traceback(file=2)


@contextmanager
def watched(should_stop: StopRequest, hang_minutes: float | None, run_folder: Path) -> Iterator[Watchdog]:
    """Run a watchdog during the block. hang_minutes: None for no watchdog."""
    watchdog = Watchdog(should_stop, 60 * (hang_minutes or 0), run_folder)
    ended = threading.Event()
    if hang_minutes is not None:
        threading.Thread(target=watchdog.watch, args=(ended,), name="watchdog", daemon=True).start()
    try:
        yield watchdog
    finally:
        ended.set()
