"""What can go wrong, as types. The command line turns each into one line and an exit code (sysexits.h where it has one).

EmotionError
├── SpecError     64  the spec or the command line is wrong
├── DataError     65  the data is wrong
├── StorageError  69  a file, a disk, a store or a hub cannot be had
│   └── AccessError  77  the same, as permission is denied
├── ModelError    70  it failed and would fail again as it is
└── BusyError     73  another job owns this run
Interrupted       75  stopped on request; the same command goes on
└── Stopped       76  the same, but by a person: nothing should start it again by itself
"""

from collections.abc import Sequence

SHOWN = 20
"""Things that a message names before it counts the rest."""


def first_of(items: Sequence[object]) -> str:
    """The first of many, and how many more there are."""
    rest = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(map(str, items[:SHOWN])) + rest


class EmotionError(Exception):
    """Base of every error meant for the user: its text says what was expected, what was found, where, what to do."""

    exit_code = 70


class SpecError(EmotionError):
    """The spec or the command line is wrong. `problems` holds every one of them, a line each."""

    exit_code = 64

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class DataError(EmotionError):
    """The dataset or an audio file is not what it has to be."""

    exit_code = 65


class StorageError(EmotionError):
    """A file, folder, store or hub cannot be read or written."""

    exit_code = 69

    @staticmethod
    def of(error: OSError, text: str | None = None) -> "StorageError":
        """What to raise for an error of the system: AccessError where permission was denied, else StorageError.

        text: what to say, where more is known than what the system says of which file.
        """
        text = text or f"{error.filename or 'storage'}: {error.strerror or error}"
        return AccessError(text) if isinstance(error, PermissionError) else StorageError(text)


class AccessError(StorageError):
    """Permission to read or write a file, folder, store or hub is denied. Waiting does not help."""

    exit_code = 77


class ModelError(EmotionError):
    """Training or evaluation failed in a way that a second attempt would repeat."""

    exit_code = 70


class BusyError(EmotionError):
    """Another job owns this run folder."""

    exit_code = 73


class Interrupted(Exception):  # noqa: N818 - it is no error
    """A phase was asked to stop and has saved what it needs to go on. Not an error."""

    exit_code = 75


class Stopped(Interrupted):
    """A person has asked the job to stop. It could go on, but what starts jobs again after 75 must leave it alone."""

    exit_code = 76
