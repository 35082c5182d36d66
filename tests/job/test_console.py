"""What a person sees while a job runs, on a terminal of 80 columns."""

import io
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from emotion.progress_bar import ProgressBar
from emotion.terminal import shown_as, shown_for_now
from job.console import logging_to, said_if_slow
from tests.terminals import Terminal

log = logging.getLogger("job")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Terminal]]:
    """terminal() makes standard error one. Not before the test: pytest sets standard error when a test begins."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    found = Terminal()

    def use() -> Terminal:
        monkeypatch.setattr(sys, "stderr", found.stream)
        return found

    yield use
    found.close()


def test_a_terminal_shows_short_lines_and_warnings_and_the_log_has_everything(
    terminal: Callable[[], Terminal], tmp_path: Path
) -> None:
    shown = terminal()
    with logging_to(tmp_path / "job.log"):
        log.info("phase=gan begins folder=/x", extra=shown_for_now("gan …"))
        log.info("phase=gan step=1/2")
        log.warning("phase=gan step=%d it overfits", 1)
        log.info("phase=gan ends seconds=1.0", extra=shown_as("gan   1.0 s"))
        log.info("phase=vit begins folder=/x", extra=shown_for_now("vit …"))
    assert shown.screen() == ["warning: phase=gan step=1 it overfits", "gan   1.0 s"]
    logged = [line.split(" ", 1)[1] for line in (tmp_path / "job.log").read_text().splitlines()]
    assert logged == [
        "INFO phase=gan begins folder=/x",
        "INFO phase=gan step=1/2",
        "WARNING phase=gan step=1 it overfits",
        "INFO phase=gan ends seconds=1.0",
        "INFO phase=vit begins folder=/x",
    ]


def test_a_line_stands_above_the_bar_and_the_bar_goes_when_it_has_ended(terminal: Callable[[], Terminal], tmp_path: Path) -> None:
    shown = terminal()
    with logging_to(tmp_path / "job.log"):
        with ProgressBar("gan", 3) as bar:
            bar.advance_to(1)
            log.warning("look")
            assert shown.pictures()[-1].startswith("gan ")
            bar.advance_to(2)
            log.warning("look again")
        log.info("x", extra=shown_as("gan done"))
    assert shown.screen() == ["warning: look again", "gan done"]


def test_what_is_shown_has_no_secret_and_no_control_character(
    terminal: Callable[[], Terminal], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-hush")
    shown = terminal()
    with logging_to(tmp_path / "job.log"):
        log.info("x", extra=shown_as("a hush-hush-hush \x1b[2J\nnext line"))
        log.warning("\x1b[2J hush-hush-hush")
    assert shown.screen() == ["a [AWS_SECRET_ACCESS_KEY] \\x1b[2J", "next line", "warning: \\x1b[2J [AWS_SECRET_ACCESS_KEY]"]


def test_elsewhere_standard_error_gets_the_lines_of_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to(tmp_path / "job.log"):
        log.info("phase=gan ends", extra=shown_as("gan   1.0 s"))
        log.info("phase=vit begins", extra=shown_for_now("vit …"))
    assert capsys.readouterr().err == (tmp_path / "job.log").read_text()
    assert "INFO phase=vit begins\n" in (tmp_path / "job.log").read_text()


def test_long_lines_are_broken_at_blanks_and_paths_stay_whole(terminal: Callable[[], Terminal], tmp_path: Path) -> None:
    shown = terminal()
    path = "/a-folder-of-several-words/" + 70 * "x"
    with logging_to(tmp_path / "job.log"):
        log.warning("%s is %s", path, " ".join(["long"] * 20))
        log.info("x", extra=shown_as(f"first\nreport {path}"))
    screen = shown.screen()
    assert screen[:2] == ["warning:", f"  {path}"]
    assert " ".join(line.strip() for line in screen[2:4]) == "is " + " ".join(["long"] * 20)
    assert [line for line in screen if len(line) > 80] == [f"  {path}", f"  {path}"]


def test_a_terminal_gets_colours_unless_no_color_is_set(
    terminal: Callable[[], Terminal], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = terminal()
    written = []
    for value in ("1", ""):
        monkeypatch.setenv("NO_COLOR", value)
        with logging_to(tmp_path / "job.log"):
            log.warning("look")
        written.append(shown.written())
    assert ["\x1b[33mwarning\x1b[0m: look" in text for text in written] == [False, True]
    assert "\x1b[3" not in written[0]


def test_a_command_that_takes_long_says_once_what_it_does() -> None:
    said, quick = io.StringIO(), io.StringIO()
    with said_if_slow("looks …", said, after=0):
        while not said.getvalue():
            time.sleep(0.01)
    assert said.getvalue() == "looks …\n"
    with said_if_slow("looks …", quick, after=3600):
        pass
    assert quick.getvalue() == ""
