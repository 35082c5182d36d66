"""Progress for people: a bar on a terminal, a log line every LINE_SECONDS elsewhere."""

import sys
import time
from typing import Self

from tqdm import tqdm

LINE_SECONDS = 10.0


class ProgressBar:
    """A context manager that shows how much of `total` is done: on a terminal by a bar, elsewhere by lines that callers log."""

    def __init__(self, label: str, total: int, unit: str, *, done: int = 0, unit_scale: bool = False) -> None:
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=label, unit=unit, unit_scale=unit_scale, disable=not is_terminal)
        self._total, self._done, self._logged_at = total, done, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._bar.close()

    def advance_to(self, done: int, numbers: str = "") -> bool:
        """Show that `done` are done. Returns whether to log a line: off a terminal every LINE_SECONDS, and at the end."""
        self._bar.set_postfix_str(numbers, refresh=False)
        self._bar.update(done - self._done)
        self._done = done
        now = time.monotonic()
        if not self._bar.disable or (done < self._total and now - self._logged_at < LINE_SECONDS):
            return False
        self._logged_at = now
        return True
