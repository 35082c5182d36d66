"""Where `emotion-job` and `python -m job` start. Stop signals wait while the rest is imported, for some tenths of a second."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
HELD_SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)
HOLDING_SIGNALS = ("run", "reproduce", "collect")
"""Commands whose StopRequest releases the signals. The others, while they are imported, end by a signal as any program does."""


def main() -> None:
    """Run the command line and exit."""
    if sys.argv[1:2] and sys.argv[1] in HOLDING_SIGNALS:
        # The kernel keeps one pending signal of each kind, also from before exec if the parent process blocked them.
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
    else:
        release_stop_signals()
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # It is closed. The next file to be opened, such as a checkpoint, would receive what is printed.
            os.open(os.devnull, os.O_RDWR)
    # By name, as in pyproject.toml: this module is below all others, and job.__main__ above them.
    try:
        command_line = import_module("job.__main__")
    except Exception as error:  # noqa: BLE001 - no memory, no more files, a library is missing: job.__main__ would report it
        print(f"emotion-job: cannot be loaded: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(70)
    command_line.main()


def release_stop_signals() -> None:
    """Unblock stop signals; pending ones are delivered now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)


@contextmanager
def stop_signals_held() -> Iterator[None]:
    """Block stop signals. A program started in the block never gets one, although a terminal or SLURM sends it to all processes
    of the job: the job alone decides. The job's own signals are delivered at the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
