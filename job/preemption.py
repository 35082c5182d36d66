"""Stop requests: signals, a STOP file, a time limit and notices of spot instances, all reported by should_stop()."""

import logging
import math
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from emotion.errors import Interrupted, SpecError, Stopped, system_reason
from emotion.threads import is_waiting
from job.config import PreemptionConfig
from job.entry import STOP_SIGNALS, release_stop_signals
from job.spot import METADATA, spot_notice

log = logging.getLogger(__name__)

EXIT_AT_SECOND = (signal.SIGINT, signal.SIGTERM)  # the second of the same kind; other signals are repeated, SIGXCPU every second
SAME_REQUEST_SECONDS = 0.5  # launcher and process group may both deliver a signal: within this time it is one request
RESUMES = b"stop requested: saving, then exit code 75; the same command resumes. A second signal exits at once."
STARTS_AGAIN = b"stop requested: nothing is saved; the same command starts again. A second signal exits at once."
STOP_FILE = "STOP"
STOP_FILE_SECONDS = 1.0  # between checks for the file
SPOT_POLL_SECONDS = 3.0
UNANSWERED_POLLS = 10  # a warning after this many polls in a row without an answer: notices may not arrive


class StopRequest:
    """Within `with StopRequest() as should_stop:` the first stop signal only sets a flag.
    The phases call `should_stop()` at each step, file or batch, save, and raise Interrupted. Nothing is saved inside a signal
    handler, which may have interrupted a write. A second SIGINT or SIGTERM exits at once; the last checkpoint remains. A terminal
    that is closed does not end a job. The old handlers are restored at the end; forked child processes ignore stop signals, so
    that they can finish. Signals count from the start of the process (job/entry.py), other requests after `watch`.

    saves: whether the command saves what it has done; decides what a signal prints.
    asked_at: monotonic time of the last call from code that is not merely waiting (emotion/threads.py). It is the sign of life
    by which job/unattended/watchdog.py distinguishes a working job from one that hangs."""

    def __init__(self, *, saves: bool = True) -> None:
        self.reason: str | None = None
        self._said = RESUMES if saves else STARTS_AGAIN
        self._exception_type: type[Interrupted] = Interrupted
        self._exception: Interrupted | None = None
        self._started = self.asked_at = time.monotonic()
        self._process = os.getpid()
        self._first_received: dict[int, float] = {}
        self._old_handlers: dict[signal.Signals, Any] = {}
        self._terminals: list[int] = []
        self._stop_files: list[Path] = []
        self._found_stop_file: Path | None = None
        self._looked = -STOP_FILE_SECONDS
        self._deadline: float | None = None
        self._ended = threading.Event()

    def __call__(self) -> bool:
        now = time.monotonic()
        if not is_waiting():
            self.asked_at = now
        if self.reason is None and self._deadline is not None and now >= self._deadline:
            self.request("the time limit is near")
        if self.reason is None and now - self._looked >= STOP_FILE_SECONDS:
            self._looked = now
            for path in self._stop_files:
                # pathlib's exists() raises an error for a folder that cannot be read for a moment.
                if os.path.exists(path):  # noqa: PTH110
                    self.request(f"there is {path}", Stopped)
                    self._found_stop_file = self._found_stop_file or path
        return self.reason is not None

    def request(self, reason: str, exception_type: type[Interrupted] = Interrupted) -> None:
        """Ask to stop. Only the first request counts: its reason, and its exception type, which decides the exit code."""
        if self.reason is None:
            self._exception_type = exception_type
            self.reason = reason

    def as_requested(self, interrupted: Interrupted) -> Interrupted:
        """The exception to raise in place of a phase's Interrupted: of the type of this request, with its reason."""
        if interrupted is not self._exception:
            # Without a reason: a phase that gave up waiting raises Interrupted without a stop request.
            self._exception = self._exception_type(f"{interrupted} ({self.reason})" if self.reason else str(interrupted))
        return self._exception

    def watch(self, folders: list[Path], config: PreemptionConfig, metadata: str = METADATA) -> None:
        """Also stop for a file STOP in one of `folders`, before the time limit of spec or SLURM, and for spot notices.
        metadata: HOST or HOST:PORT of the machine's metadata service. Raises SpecError for a time limit that is too short."""
        self._stop_files = [folder / STOP_FILE for folder in folders]
        self._deadline = self._stop_time(config, os.getenv("SLURM_JOB_END_TIME"))
        if config.spot is not None:
            threading.Thread(target=self._poll_spot_notices, args=(config.spot, metadata), name="spot", daemon=True).start()

    def __enter__(self) -> Self:
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for number in STOP_SIGNALS:
            self._old_handlers[number] = signal.signal(number, self._handle)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup the signal is ignored, and stays so
            self._old_handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._hang_up)
        release_stop_signals()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        if self._exception_type is Stopped and self._found_stop_file is not None:
            try:
                self._found_stop_file.unlink(missing_ok=True)
            except OSError as error:
                text = "%s cannot be deleted (%s): it will stop the next attempt, too"
                log.warning(text, self._found_stop_file, system_reason(error))

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        now = time.monotonic()
        first = self._first_received.setdefault(number, now)
        if number in EXIT_AT_SECOND and now - first > SAME_REQUEST_SECONDS:
            os._exit(Interrupted.exit_code)
        if self.reason is None:
            self.request(f"received {signal.Signals(number).name}")
            # Not logging, which takes locks that the interrupted code may hold.
            _print(self._said)

    def _hang_up(self, _number: int, _frame: FrameType | None) -> None:
        """Continue without the terminal, as every write to it would fail from now on. The log file has every line."""
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(null, descriptor)
        os.close(null)

    def _stop_time(self, config: PreemptionConfig, slurm_end: str | None) -> float | None:
        """When to stop, by the monotonic clock. slurm_end: seconds since 1970."""
        ends = {}
        if config.time_limit_minutes is not None:
            ends["preemption.time_limit_minutes"] = self._started + 60 * config.time_limit_minutes
        if slurm_end is not None:
            try:
                end = float(slurm_end)
            except ValueError:
                end = math.nan
            if not math.isfinite(end):
                raise SpecError(f"SLURM_JOB_END_TIME is {slurm_end!r}, expected seconds since 1970. Unset it.")
            ends["SLURM_JOB_END_TIME"] = time.monotonic() + end - time.time()
        if not ends:
            return None
        source, end = min(ends.items(), key=lambda item: item[1])
        remaining = end - time.monotonic()
        if remaining <= config.grace_seconds:
            raise SpecError(
                f"{source}: {max(remaining, 0):.0f} s are left, of which preemption.grace_seconds {config.grace_seconds:g} are "
                f"for saving and stopping. Give the job more time, or lower preemption.grace_seconds."
            )
        return end - config.grace_seconds

    def _poll_spot_notices(self, platform: str, metadata: str) -> None:
        """Poll the metadata service until it has a notice or the job ends. Runs in a thread."""
        unanswered = 0
        while self.reason is None and not self._ended.wait(SPOT_POLL_SECONDS):
            try:
                notice = spot_notice(platform, metadata)
                unanswered = 0
            except OSError as error:
                unanswered += 1
                if unanswered == UNANSWERED_POLLS:
                    text = "preemption.spot: the metadata service of %s did not answer %d times (%s): its notices may not arrive"
                    log.warning(text, platform, UNANSWERED_POLLS, error)
                continue
            if notice is not None:
                self.request(f"{platform} takes this machine away: {notice}")
                _print(f"stop requested: {self.reason}".encode())


def _print(line: bytes) -> None:
    try:
        os.write(2, b"\n" + line + b"\n")
    except OSError:
        return  # standard error is closed; the log file will have the reason
