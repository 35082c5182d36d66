"""Signals, a STOP file, a time limit and the notices of spot instances become one question: should_stop()."""

import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from emotion.errors import Interrupted, SpecError, Stopped
from job.config import PreemptionConfig
from job.spot import METADATA, spot_notice

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
IMPATIENT = (signal.SIGINT, signal.SIGTERM)
"""Twice of these leaves at once. The others are warnings, which come again: SIGXCPU every second."""
ONE_REQUEST_SECONDS = 0.5
"""A launcher and a process group may both deliver a signal; what follows so soon is the same request."""
STOP_FILE = "STOP"
LOOK_SECONDS = 1.0
POLL_SECONDS = 3.0
DEAF_POLLS = 10
"""So many polls without an answer are told once: then nobody will tell of the end of this machine."""


class StopRequest:
    """Within `with StopRequest() as should_stop:` the first stop signal sets a flag and nothing else.

    The phases ask `should_stop()` at each step, file or batch, save, and leave with Interrupted: nothing is saved inside a
    handler, where half-done work may lie around. A second SIGINT or SIGTERM leaves at once, with the last checkpoint. A
    terminal that goes away does not end a job. Old handlers come back at the end; processes that libraries may fork off are
    not asked, so that what they do can be saved. Signals are heard from the beginning, the rest from `watch` on.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._leave_with: type[Interrupted] = Interrupted
        self._leaving: Interrupted | None = None
        self._born = time.monotonic()
        self._process = os.getpid()
        self._first: dict[int, float] = {}
        self._old: dict[signal.Signals, Any] = {}
        self._terminals: list[int] = []
        self._stop_files: list[Path] = []
        self._obeyed: Path | None = None
        self._looked = -LOOK_SECONDS
        self._deadline: float | None = None
        self._left = threading.Event()

    def __call__(self) -> bool:
        now = time.monotonic()
        if self.reason is None and self._deadline is not None and now >= self._deadline:
            self.request("the time limit is near")
        if self.reason is None and now - self._looked >= LOOK_SECONDS:
            self._looked = now
            for path in self._stop_files:
                if _is_there(path):
                    self.request(f"there is {path}", Stopped)
                    self._obeyed = self._obeyed or path
        return self.reason is not None

    def request(self, reason: str, leave_with: type[Interrupted] = Interrupted) -> None:
        """Ask to stop. The first reason counts, and which exception, so which exit code, the job is to leave with."""
        if self.reason is None:
            self._leave_with = leave_with
            self.reason = reason

    def leaving(self, interrupted: Interrupted) -> Interrupted:
        """What to raise for the Interrupted that a phase raised after should_stop() had said yes."""
        if interrupted is not self._leaving:
            # What waits for something that does not come leaves without being asked.
            self._leaving = self._leave_with(f"{interrupted} ({self.reason})" if self.reason else str(interrupted))
        return self._leaving

    def watch(self, places: list[Path], config: PreemptionConfig, metadata: str = METADATA) -> None:
        """Also stop for a file STOP in one of `places`, before the time limit of spec or SLURM, and for spot notices.

        metadata: HOST or HOST:PORT of the machine's metadata service. Raises SpecError where the time limit leaves no time.
        """
        self._stop_files = [place / STOP_FILE for place in places]
        self._deadline = self._end_of_time(config, os.getenv("SLURM_JOB_END_TIME"))
        if config.spot is not None:
            threading.Thread(target=self._listen, args=(config.spot, metadata), name="spot", daemon=True).start()

    def __enter__(self) -> Self:
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for number in STOP_SIGNALS:
            self._old[number] = signal.signal(number, self._handle)
        # nohup has the process ignore it; so may it stay.
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self._old[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._hang_up)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if self._leave_with is Stopped and self._obeyed is not None:
            try:
                self._obeyed.unlink(missing_ok=True)
            except OSError as error:
                log.warning(
                    "%s cannot be deleted (%s): the next attempt will obey it, too", self._obeyed, error.strerror
                )

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        now = time.monotonic()
        first = self._first.setdefault(number, now)
        if number in IMPATIENT and now - first > ONE_REQUEST_SECONDS:
            os._exit(Interrupted.exit_code)
        if self.reason is None:
            self.request(f"received {signal.Signals(number).name}")
            # A plain write: logging takes locks that the interrupted code may hold.
            _tell(b"stop requested: saving, then leaving with 75; the same command goes on. Once more leaves at once.")

    def _hang_up(self, _number: int, _frame: FrameType | None) -> None:
        """Go on without the terminal: every write to it would fail from now on. The log file has it all."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)

    def _end_of_time(self, config: PreemptionConfig, slurm_end: str | None) -> float | None:
        """When to stop, by the monotonic clock. slurm_end: seconds since 1970."""
        ends = {}
        if config.time_limit_minutes is not None:
            ends["preemption.time_limit_minutes"] = self._born + 60 * config.time_limit_minutes
        if slurm_end is not None:
            try:
                end = float(slurm_end)
            except ValueError:
                raise SpecError(
                    f"SLURM_JOB_END_TIME is {slurm_end!r}, expected seconds since 1970. Unset it."
                ) from None
            ends["SLURM_JOB_END_TIME"] = time.monotonic() + end - time.time()
        if not ends:
            return None
        source, end = min(ends.items(), key=lambda item: item[1])
        left = end - time.monotonic()
        if left <= config.grace_seconds:
            raise SpecError(
                f"{source}: {max(left, 0):.0f} s are left, and preemption.grace_seconds {config.grace_seconds:g} of them are "
                f"for saving and leaving. Give the job more time, or lower preemption.grace_seconds."
            )
        return end - config.grace_seconds

    def _listen(self, platform: str, metadata: str) -> None:
        """In a thread: ask the platform until it takes the machine away or the job ends."""
        unanswered = 0
        while self.reason is None and not self._left.wait(POLL_SECONDS):
            try:
                notice = spot_notice(platform, metadata)
                unanswered = 0
            except OSError as error:
                unanswered += 1
                if unanswered == DEAF_POLLS:
                    log.warning(
                        "preemption.spot: the metadata service of %s did not answer %d times (%s): its notices may not arrive",
                        platform,
                        DEAF_POLLS,
                        error,
                    )
                continue
            if notice is not None:
                self.request(f"{platform} takes this machine away: {notice}")
                _tell(f"stop requested: {self.reason}".encode())


def _is_there(path: Path) -> bool:
    """A folder that cannot be looked into for a moment is no reason to end."""
    try:
        path.stat()
    except OSError:
        return False
    return True


def _tell(line: bytes) -> None:
    try:
        os.write(2, b"\n" + line + b"\n")
    except OSError:
        # Nobody reads any more; the log file will have the reason.
        return
