"""Capabilities of an output stream: redrawing a line, colours, width."""

import os
from typing import Protocol

COLUMNS = 80  # of a stream with unknown width
CLEAR_LINE = "\r\x1b[K"
SHOWN, SHOWN_FOR_NOW = "shown", "shown_for_now"
"""Attributes of a log record: text that a terminal shows instead of its message, for good or until the next line. See
job/console.py."""
STYLES = {"red": "31", "yellow": "33"}


class Stream(Protocol):
    """The methods of standard output and standard error that this module uses."""

    def isatty(self) -> bool: ...
    def fileno(self) -> int: ...


def is_live(stream: Stream | None) -> bool:
    """Whether the stream is a terminal that can redraw a line."""
    return stream is not None and stream.isatty() and os.getenv("TERM") != "dumb"


def has_colours(stream: Stream | None) -> bool:
    """Whether to use colours: on a live terminal, unless NO_COLOR is set and not empty (no-color.org)."""
    return is_live(stream) and not os.getenv("NO_COLOR")


def columns_of(stream: Stream) -> int:
    """Width of the stream in characters; COLUMNS if unknown."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or COLUMNS
    except (OSError, ValueError):
        return COLUMNS


def styled(text: str, style: str, stream: Stream | None) -> str:
    """The text in one of STYLES if the stream has colours. Escape control characters before this call, not after it."""
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if has_colours(stream) else text


def shown_as(text: str) -> dict[str, str]:
    """`extra` of a log record: a terminal shows this text. Without it a terminal shows warnings and errors only."""
    return {SHOWN: text}


def shown_for_now(text: str) -> dict[str, str]:
    """Like `shown_as`, but the text disappears at the next line or bar."""
    return {SHOWN_FOR_NOW: text}


def size_text(size: float | None) -> str:
    """Such as 612 MiB or 3.1 GiB; an empty text for None."""
    if size is None:
        return ""
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"
