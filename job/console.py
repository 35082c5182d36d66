"""The log of a running job: on standard error, in short form on a terminal, and complete in the run's job.log."""

import contextlib
import logging
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from emotion.characters import terminal_text
from emotion.errors import printable
from emotion.terminal import CLEAR_LINE, SHOWN, SHOWN_FOR_NOW, columns_of, is_live, styled
from job.secrets import ScrubbingFormatter, scrubbed

SLOW_SECONDS = 1.5  # after this long, a command without a progress bar prints what it does


class TerminalHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Prints short log lines for a person, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        text, end = getattr(record, SHOWN, None), "\n"
        if text is None and record.levelno >= logging.WARNING:
            text = self.format(record)
        if text is None:
            text, end = getattr(record, SHOWN_FOR_NOW, None), ""
        if text is None:
            return
        text = self._wrapped(terminal_text(scrubbed(text)), record.levelno)
        try:
            with tqdm.external_write_mode(file=self.stream):
                self.stream.write(f"{CLEAR_LINE}{text}{end}")
                self.stream.flush()
        except OSError:
            self.handleError(record)

    def _wrapped(self, text: str, level: int) -> str:
        """The text, wrapped at spaces to the width of the terminal. A warning or an error begins with its level."""
        name = logging.getLevelName(level).lower() if level >= logging.WARNING else ""
        columns = columns_of(self.stream)
        wrapped = "\n".join(
            textwrap.fill(line, columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
            for line in (f"{name}: {text}" if name else text).split("\n")
        )
        style = "yellow" if level == logging.WARNING else "red"
        return styled(name, style, self.stream) + wrapped.removeprefix(name) if name else wrapped

    def close(self) -> None:
        """Clear the temporary line, if one is shown."""
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(CLEAR_LINE)
            self.stream.flush()
        super().close()


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[logging.Handler]:
    """Write log lines of emotion and job to standard error and to the run's log file, whose handler this yields."""
    logging.raiseExceptions = False  # on a full disk, logging would print a traceback for every line
    formatter = ScrubbingFormatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    log_file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    on_screen: logging.Handler = logging.StreamHandler()
    log_file.setFormatter(formatter)
    on_screen.setFormatter(formatter)
    if is_live(sys.stderr):
        on_screen = TerminalHandler()
        on_screen.setFormatter(ScrubbingFormatter("%(message)s"))
    handlers = (on_screen, log_file)
    loggers = [logging.getLogger(name) for name in ("emotion", "job")]
    for handler in handlers:
        handler.addFilter(_on_one_line)
        for logger in loggers:
            logger.setLevel(logging.INFO)
            logger.addHandler(handler)
    try:
        yield log_file
    finally:
        for handler in handlers:
            for logger in loggers:
                logger.removeHandler(handler)
            handler.close()


@contextlib.contextmanager
def said_if_slow(text: str, stream: TextIO | None = None, after: float = SLOW_SECONDS) -> Iterator[None]:
    """Print the text once if the block takes longer than `after` seconds. stream: standard error by default."""

    def say() -> None:
        with contextlib.suppress(OSError, ValueError):  # it is closed
            print(terminal_text(text), file=stream or sys.stderr, flush=True)

    timer = threading.Timer(after, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _on_one_line(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(scrubbed(record.getMessage())), ()
    return True
