"""Characters that deceive the eye or the terminal."""

import pytest

from emotion.characters import is_deceptive, name_of, quoted, terminal_text


@pytest.mark.parametrize(
    ("sign", "name"),
    [
        ("\u00a0", "U+00A0 (NO-BREAK SPACE)"),
        ("\ufeff", "U+FEFF (ZERO WIDTH NO-BREAK SPACE)"),
        ("\u202e", "U+202E (RIGHT-TO-LEFT OVERRIDE)"),
        ("\u2028", "U+2028 (LINE SEPARATOR)"),
        ("\t", "U+0009 (TAB)"),
        ("\x07", "U+0007 (a control character)"),
        ("\U000e0001", "U+E0001 (LANGUAGE TAG)"),
        ("\udcff", "U+DCFF"),
    ],
)
def test_an_invisible_character_has_a_code_point_and_a_name(sign: str, name: str) -> None:
    assert is_deceptive(sign)
    assert name_of(sign) == name


@pytest.mark.parametrize("sign", ["a", " ", "-", ":", '"', "\u00e9", "\u00df", "\u97f3", "\u0430", "\U0001f3b5"])
def test_letters_signs_and_pictures_are_what_they_seem(sign: str) -> None:
    assert not is_deceptive(sign)


def test_text_is_quoted_on_one_short_line() -> None:
    assert quoted("3.1\u200b") == "'3.1\\u200b' with U+200B (ZERO WIDTH SPACE)"
    assert quoted("x\r\n" * 1000).isprintable()
    assert len(quoted("x" * 100_000)) < 100


def test_no_control_byte_reaches_a_terminal_and_lines_stay_lines() -> None:
    shown = terminal_text("a\tb\nc\x1b]0;title\x07\x9b31m\r\u202e\udcff\u00e9")
    assert shown == "a\tb\nc\\x1b]0;title\\x07\\x9b31m\\r\\u202e\\udcff\u00e9"
