"""Signals become one question: should_stop()."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

from emotion.errors import Interrupted

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class StopRequest:
    """Within `with StopRequest() as should_stop:` the first stop signal sets a flag and nothing else.

    The phases ask `should_stop()` at each step, file or batch, save, and leave with Interrupted: nothing is saved inside a
    handler, where half-done work may lie around. A second signal of the same kind leaves at once, with the last checkpoint.
    Old handlers come back at the end.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._seen: set[int] = set()
        self._old: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        return self.received is not None

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number in self._seen:
            os._exit(Interrupted.exit_code)
        self._seen.add(number)
        self.received = self.received or signal.Signals(number)
        # A plain write: logging takes locks that the interrupted code may hold.
        os.write(
            2, b"\nstop requested: saving, then leaving with 75; the same command goes on. Once more leaves at once.\n"
        )
