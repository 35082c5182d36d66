import os
import re
from pathlib import Path

import pytest

from emotion import errors
from emotion.errors import printable


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    assert errors.__doc__ is not None
    written = re.findall(r"(\w+) +(\d\d) +(yes|no)\b", errors.__doc__)
    found = [
        (name, str(kind.exit_code), "yes" if kind.retry_helps else "no")
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.EmotionError | errors.Interrupted)
    ]
    assert sorted(written) == sorted(found)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Für Elise ☂ 𝄞.mp3", "Für Elise ☂ 𝄞.mp3"),
        ("a\tb\nc\rd", r"a\tb\nc\rd"),
        ("\x1b[2J\x07\x7f\x9b", r"\x1b[2J\x07\x7f\x9b"),
        ("line\u2028end\u202egnp.exe\u00a0\u200b", r"line\u2028end\u202egnp.exe\xa0\u200b"),
        (Path(os.fsdecode(b"caf\xe9.mp3")), r"caf\udce9.mp3"),
        ("", ""),
    ],
)
def test_what_does_not_print_is_escaped(text: object, shown: str) -> None:
    assert printable(text) == shown
