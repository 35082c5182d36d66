import re
import sys
from collections.abc import Callable, Iterator

import pytest

from emotion.progress_bar import ProgressBar
from tests.terminals import Terminal

OfWidth = Callable[[int], Terminal]
MEMORY = r"((?:\d{3}|10[012]\d) MiB|\d\.\d GiB)"  # of this process


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[OfWidth]:
    """terminal(80) makes standard error a terminal of 80 columns."""
    opened = []
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def of_width(columns: int) -> Terminal:
        opened.append(Terminal(columns))
        monkeypatch.setattr(sys, "stderr", opened[-1].stream)
        return opened[-1]

    yield of_width
    for one in opened:
        one.close()


def draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """90 of 200 steps in 12 s."""
    now = 1000.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    with ProgressBar("gan", 200) as bar:
        now = 1012.0
        bar.advance_to(90, ["loss D 0.668 G 0.725", "D acc 64%"])


def test_a_log_line_is_due_every_ten_seconds_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    due = []
    with ProgressBar("work", 6) as bar:
        for done, now in enumerate((1.0, 9.9, 10.0, 19.9, 20.1, 20.2), 1):  # noqa: B007 - the clock reads it
            due.append(bar.advance_to(done))
    assert due == [False, False, True, False, True, True]
    assert capsys.readouterr().err == ""


def test_a_part_of_the_total_ends_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("vit", 10, last=5) as bar:
        assert [bar.advance_to(done) for done in (4, 5)] == [False, True]


def test_at_80_columns_a_bar_says_rate_time_to_go_losses_accuracy_and_memory(
    terminal: OfWidth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    of_80 = terminal(80)
    draw(monkeypatch)
    *_, line = of_80.pictures()
    assert re.fullmatch(rf"gan \S+ * 90/200  7\.50/s 00:14 left, loss D 0\.668 G 0\.725, D acc 64%, {MEMORY}", line), line
    assert len(line) <= 80


@pytest.mark.parametrize(
    ("columns", "ends"), [(200, f"D acc 64%, {MEMORY}"), (72, "D acc 64%"), (60, r"G 0\.725"), (40, " left"), (20, "")]
)
def test_what_does_not_fit_is_left_out_whole_from_the_end(
    columns: int, ends: str, terminal: OfWidth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    of_width = terminal(columns)
    draw(monkeypatch)
    *_, line = of_width.pictures()
    assert re.search(f"{ends}$", line), line
    assert len(line) <= columns


@pytest.mark.parametrize(("no_color", "coloured"), [(None, True), ("", True), ("1", False), ("0", False)])
def test_no_color_turns_colours_off_unless_it_is_empty(
    no_color: str | None, coloured: bool, terminal: OfWidth, monkeypatch: pytest.MonkeyPatch
) -> None:
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    of_80 = terminal(80)
    draw(monkeypatch)
    assert ("\x1b[32m" in of_80.written()) == coloured


def test_a_terminal_that_cannot_move_its_cursor_gets_no_bar(terminal: OfWidth, monkeypatch: pytest.MonkeyPatch) -> None:
    of_80 = terminal(80)
    monkeypatch.setenv("TERM", "dumb")
    draw(monkeypatch)
    assert of_80.written() == ""
