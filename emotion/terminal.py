"""What a stream can show: a bar that is drawn again, colours, and how wide its lines are."""

import os
from typing import Protocol

COLUMNS = 80  # of a terminal that does not say how wide it is
CLEAR_LINE = "\r\x1b[K"
SHOWN, SHOWN_FOR_NOW = "shown", "shown_for_now"
"""Attributes of a log record: what a terminal shows in the place of its line, and until the next line. See job/console.py."""
STYLES = {"red": "31", "yellow": "33"}


class Stream(Protocol):
    """What is asked of standard output and standard error."""

    def isatty(self) -> bool: ...
    def fileno(self) -> int: ...


def is_live(stream: Stream | None) -> bool:
    """Whether a line of the stream can be drawn again: it is a terminal, and one that moves its cursor."""
    return stream is not None and stream.isatty() and os.getenv("TERM") != "dumb"


def has_colours(stream: Stream | None) -> bool:
    """Whether to use colours: not where NO_COLOR has any value but an empty one (no-color.org)."""
    return is_live(stream) and not os.getenv("NO_COLOR")


def columns_of(stream: Stream) -> int:
    """Characters in a line."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or COLUMNS
    except (OSError, ValueError):
        return COLUMNS


def styled(text: str, style: str, stream: Stream | None) -> str:
    """The text in one of STYLES where the stream has colours. Call it after everything that escapes control characters."""
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if has_colours(stream) else text


def shown_as(text: str) -> dict[str, str]:
    """`extra` of a log record of which a terminal shows this text. Without it terminals show warnings and errors alone."""
    return {SHOWN: text}


def shown_for_now(text: str) -> dict[str, str]:
    """The same, until the next line or bar."""
    return {SHOWN_FOR_NOW: text}


def size_text(size: float | None) -> str:
    """Such as 612 MiB or 3.1 GiB; an empty text for None."""
    if size is None:
        return ""
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"
