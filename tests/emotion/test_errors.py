import errno
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


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError(errno.EMFILE, "Too many open files", "x.mp3"), errors.LimitError, "ulimit -n"),
        (RuntimeError("can't start new thread"), errors.LimitError, "no more threads"),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), errors.LimitError, "no more threads"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), errors.LimitError, "out of memory"),
        (MemoryError(), errors.LimitError, "out of memory: MemoryError"),
        (RuntimeError("\nstd::bad_alloc"), errors.LimitError, "out of memory: std::bad_alloc"),
        (ImportError("libx.so: failed to map segment from shared object"), errors.LimitError, "out of memory: libx.so"),
        (
            ImportError("libx.so.1: cannot open shared object file: No such file"),
            errors.LimitError,
            "a library cannot be loaded: libx",
        ),
        (OSError("Could not find/load shared object file 'libllvmlite.so'"), errors.LimitError, "a library cannot be loaded"),
        (OSError(errno.ENOSPC, "No space left on device", "a.ckpt"), errors.StorageError, "a.ckpt: No space"),
        (PermissionError(errno.EACCES, "Permission denied", "a.ckpt"), errors.AccessError, "a.ckpt: Permission"),
        (KeyError("x"), errors.EmotionError, "an unexpected error, KeyError: 'x'"),
        (errors.DataError("as it is"), errors.DataError, "as it is"),
    ],
)
def test_what_the_user_is_told_of_an_exception(error: Exception, kind: type[Exception], said: str) -> None:
    failure = errors.as_failure(error)
    assert type(failure) is kind
    assert said in str(failure)
