"""Progress display: a bar on a terminal, a log line every LINE_SECONDS. No other module draws bars."""

import contextlib
import sys
import time
from collections.abc import Sequence
from typing import Self

from tqdm import tqdm

from emotion.proc import memory_bytes
from emotion.terminal import CLEAR_LINE, columns_of, has_colours, is_live, size_text

LINE_SECONDS = 10.0
DRAWN_SECONDS = 0.1  # shortest time between two redraws
NARROWEST_BAR = 5  # columns; the numbers beside it are dropped from the last on to make room
FORMAT = "{desc} {bar} {n_fmt}/{total_fmt} {rate_noinv_fmt} {remaining} left{postfix}"
WITHOUT_BAR = FORMAT.replace("{bar}", "")


class ProgressBar:
    """A context manager that draws a progress bar on a terminal and decides when a log line is due.

    last: the count at which this bar ends, if it is one of several that share the total. The bar is erased when the block ends.
    """

    def __init__(self, label: str, total: int, *, done: int = 0, last: int | None = None, in_bytes: bool = False) -> None:
        is_drawn = is_live(sys.stderr)
        if is_drawn:
            with contextlib.suppress(OSError):  # the terminal has gone
                sys.stderr.write(CLEAR_LINE)
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=label,
            unit="B" if in_bytes else "",
            unit_scale=in_bytes,
            bar_format=FORMAT,
            leave=False,
            dynamic_ncols=True,
            mininterval=0,  # advance_to limits the rate
            miniters=0,
            smoothing=0.1,
            colour="green" if has_colours(sys.stderr) else None,
            disable=not is_drawn,
        )
        self._last = total if last is None else last
        self._logged_at = time.monotonic()
        self._drawn_at = float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._bar.close()

    def advance_to(self, done: int, numbers: Sequence[str] = ()) -> bool:
        """Show that `done` are done, with numbers such as a loss, the most important first.

        Returns whether to log a line: every LINE_SECONDS, and at the end.
        """
        now = time.monotonic()
        if not self._bar.disable and (done >= self._last or now - self._drawn_at >= DRAWN_SECONDS):
            self._draw(done, numbers)
            self._drawn_at = now
        if done < self._last and now - self._logged_at < LINE_SECONDS:
            return False
        self._logged_at = now
        return True

    def _draw(self, done: int, numbers: Sequence[str]) -> None:
        bar, parts = self._bar, [text for text in (*numbers, size_text(bytes_in_use())) if text]
        room = columns_of(sys.stderr) - NARROWEST_BAR
        while True:
            bar.set_postfix_str(", ".join(parts), refresh=False)
            text = tqdm.format_meter(**{**bar.format_dict, "n": done, "ncols": None, "bar_format": WITHOUT_BAR})
            if not parts or len(text) <= room:
                break
            parts.pop()
        bar.update(done - bar.n)


def bytes_in_use() -> int | None:
    """GPU memory that torch has reserved if this process uses a GPU, else its physical memory; None if unknown."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        reserved: int = torch.cuda.memory_reserved()
        return reserved
    return memory_bytes("VmRSS")
