import pytest

from emotion import progress_bar
from emotion.progress_bar import ProgressBar


def test_off_a_terminal_a_log_line_is_due_every_ten_seconds_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    due = []
    with ProgressBar("work", 6, "song") as bar:
        for done, now in enumerate((1.0, 9.9, 10.0, 19.9, 20.1, 20.2), 1):  # noqa: B007 - the clock reads it
            due.append(bar.advance_to(done))
    assert due == [False, False, True, False, True, True]
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_bar_is_drawn_and_no_log_line_is_due(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_bar.sys.stderr, "isatty", lambda: True)
    with ProgressBar("work", 2, "song", done=1) as bar:
        assert not bar.advance_to(2, "loss=1")
    assert "work: 100%" in capsys.readouterr().err
