"""The exceptions meant for users. The command line turns each into one line and an exit code (sysexits.h where it has one).

                         code  retry helps
EmotionError               70  no
├── SpecError              64  no           the spec or the command line is wrong
├── DataError              65  no           an input is missing or wrong: songs, an audio file, weights, a model, a run
├── StorageError           69  yes          a file, a disk, object storage or a hub is unavailable
│   └── AccessError        77  no           permission to read or write is denied
├── LimitError             70  no           a limit of the process or the machine: memory, threads, open files
├── ModelError             70  no           training or evaluation failed and would fail again
├── NodeError              71  yes          this machine's GPU or disk does not work; another machine's may
└── BusyError              73  yes          another job owns this run
Interrupted                75  yes          stopped on request; the same command resumes, or starts again
└── Stopped                76  no           stopped by a person; only a person should run it again
"""

import errno
import os
import re
import resource
import shutil
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SHOWN = 20  # items that a message names before it counts the rest


def first_of(items: Sequence[object], shown: int = SHOWN) -> str:
    """The first of the items, and how many more there are."""
    rest = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(map(str, items[:shown])) + rest


def counted(number: int, noun: str) -> str:
    """Such as 1 song or 20 songs."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def to_install(extra: str) -> str:
    """How to install the libraries of an extra of pyproject.toml. This package is on no package index."""
    return f"In a clone of the repository: pip install --constraint container/constraints.txt --editable '.[{extra}]'"


def system_reason(error: OSError) -> str:
    """The reason of an OSError without the file's name and, if a limit was reached, which limit."""
    if isinstance(error, shutil.Error):
        error = _first_failed_copy(error)
    reason = error.strerror or str(error)
    if error.errno == errno.ENOSPC and error.filename is not None and _has_no_inodes(os.fsdecode(error.filename)):
        return f"{reason}: there are bytes left, but no inodes; remove files"
    if error.errno == errno.EDQUOT:
        return f"{reason}: the quota of this user, group or folder; `quota` shows it"
    if error.errno == errno.EFBIG and (limit := resource.getrlimit(resource.RLIMIT_FSIZE)[0]) != resource.RLIM_INFINITY:
        return f"{reason}: this process may write files of {limit} bytes at most; see ulimit -f"
    if error.errno == errno.EMFILE:
        return f"{reason}: this process may open {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}; see ulimit -n"
    return reason


def _first_failed_copy(error: shutil.Error) -> OSError:
    """The first failure of shutil.copytree as an OSError. copytree collects its failures as [(source, target, text)]."""
    if not isinstance(error.args[0], list):
        return OSError(str(error))
    source, target, text = error.args[0][0]
    number = re.match(r"\[Errno (\d+)\]", str(text))
    if number is None:
        return OSError(f"{target}: {text}")
    return OSError(int(number[1]), os.strerror(int(number[1])), str(source), None, str(target))


def _has_no_inodes(name: str) -> bool:
    """Whether the file system of a file has space left, but no inodes. False for file systems that do not count inodes."""
    folder = Path(name)
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    return found.f_files > 0 and found.f_favail == 0 and found.f_bavail > 0


def printable(text: object) -> str:
    """The text on one line, for names and quotes in messages and tables.

    Unprintable characters are escaped as in Python source: control characters, line ends, invisible spaces, marks of reading
    direction, bytes that are not UTF-8.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class EmotionError(Exception):
    """Base of every error meant for users. Its text says what was expected, what was found, where, and what to do.

    retry_helps: whether the same command may succeed later with nothing changed. The launcher restarts only then.
    """

    exit_code = 70
    retry_helps = False


class SpecError(EmotionError):
    """The spec or the command line is wrong. `problems` holds every problem found, one line each."""

    exit_code = 64

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class DataError(EmotionError):
    """An input is missing or not as required: songs, an audio file, weights, a model, a published run."""

    exit_code = 65


class StorageError(EmotionError):
    """A file, folder, object storage or hub cannot be read or written."""

    exit_code = 69
    retry_helps = True

    @staticmethod
    def of(error: OSError, text: str | None = None) -> EmotionError:
        """The error to raise for an OSError: AccessError if permission was denied, LimitError for a limit, else StorageError.

        text: the message, if more is known than the file's name and the reason.
        """
        if isinstance(error, shutil.Error):
            error = _first_failed_copy(error)
        if limit := _limit_reached(error, str(error)):
            return LimitError(limit)
        if text is None:
            names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None]
            text = f"{' to '.join(names) or 'storage'}: {system_reason(error)}"
        if error.errno == errno.EMFILE:
            return LimitError(text)
        return AccessError(text) if isinstance(error, PermissionError) else StorageError(text)


class AccessError(StorageError):
    """Permission to read or write is denied."""

    exit_code = 77
    retry_helps = False


class LimitError(EmotionError):
    """A limit of the process or the machine is reached: memory, threads, open files."""


class ModelError(EmotionError):
    """Training or evaluation failed in a way that a retry would repeat."""


class NodeError(EmotionError):
    """This node, not the job: its GPU does not compute, or its disk does not write. Run the job on another node."""

    exit_code = 71
    retry_helps = True


class BusyError(EmotionError):
    """Another job owns this run folder."""

    exit_code = 73
    retry_helps = True


class Interrupted(Exception):  # noqa: N818 - not an error
    """Stopped on request: run and reproduce have saved what they need to resume, other commands start again."""

    exit_code = 75
    retry_helps = True


class Stopped(Interrupted):
    """A person asked the job to stop. It could resume, but must not be restarted automatically."""

    exit_code = 76
    retry_helps = False


@dataclass(frozen=True)
class ExitCode:
    """meaning: a sentence. retry_helps: whether the same command may succeed later."""

    meaning: str
    retry_helps: bool


def exit_codes() -> dict[int, ExitCode]:
    """Exit code → meaning: the first sentence of the exception's docstring; 0 is success, and 70 has several causes."""
    kinds: list[type[EmotionError] | type[Interrupted]]
    kinds = [SpecError, DataError, StorageError, NodeError, BusyError, Interrupted, Stopped, AccessError]
    several = "Training or evaluation failed, a limit of memory, threads or open files is reached, or the program has a bug."
    found = {0: ExitCode("Done.", False), EmotionError.exit_code: ExitCode(several, EmotionError.retry_helps)}
    for kind in kinds:
        sentence = re.split(r"(?<=\.)\s", " ".join(str(kind.__doc__).split()))[0]
        found[kind.exit_code] = ExitCode(sentence, kind.retry_helps)
    return dict(sorted(found.items()))


NO_MEMORY = ("failed to map segment", "annot allocate memory", "can't allocate memory", "bad_alloc", "out of memory")
NO_THREAD = ("can't start new thread", "Resource temporarily unavailable")
LIBRARY_VARIABLES = ("HF_", "TQDM_", "TORCH", "PYTORCH_")  # prefixes of variables that libraries read at import
LIBRARY = ("shared object", "undefined symbol", "shared library", "ELF", "GLIBC", "static TLS")


def as_failure(error: Exception) -> EmotionError | Interrupted:
    """The exception to report to the user.

    An exception meant for users is returned unchanged. An OSError becomes the result of `StorageError.of`, an exhausted limit a
    LimitError with the remedy, an environment variable that a library rejects a SpecError. Any other exception becomes an
    EmotionError with its type, file and line.
    """
    if isinstance(error, EmotionError | Interrupted):
        return error
    if isinstance(error, OSError):
        return StorageError.of(error)
    text = (str(error).strip().splitlines() or [""])[0]
    if limit := _limit_reached(error, text):
        return LimitError(limit)
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ValueError) and (variable := _refused_variable(text, frames)):
        return SpecError(f"{variable} in the environment is {os.environ[variable]!r}, which a library refuses: {text}. Unset it.")
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return EmotionError(
        f"an unexpected error, {type(error).__name__}{place}: {text}. This is a bug in this program. With EMOTION_TRACEBACK=1 "
        f"the traceback is printed here; that of a run is in its job.log, too."
    )


def _refused_variable(text: str, frames: traceback.StackSummary) -> str | None:
    """The environment variable whose value a library rejected at import, if the error message `text` contains that value.

    Examples: Hugging Face's timeouts, tqdm's defaults, torch's log settings. Tokens are excluded, as the caller shows the value.
    """
    if not any(frame.name == "<module>" for frame in frames):
        return None
    for name, value in os.environ.items():
        if not name.startswith(LIBRARY_VARIABLES) or "TOKEN" in name or not value:
            continue
        # Unquoted numbers and switches occur in many unrelated messages.
        is_telling = not re.fullmatch(r"[-+\d.]+|true|false|yes|no|on|off", value, re.IGNORECASE)
        if repr(value) in text or (is_telling and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text)):
            return name
    return None


def _limit_reached(error: Exception, text: str) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EAGAIN or any(said in text for said in NO_THREAD):
        processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        limit = "" if processes == resource.RLIM_INFINITY else f": the limit of this user is {processes} (ulimit -u)"
        remedy = _memory_remedy() or "Raise it or that of the container, or lower device.threads."
        return f"no more threads can be started{limit}. {remedy}"
    if number == errno.ENOMEM or isinstance(error, MemoryError) or any(said in text for said in NO_MEMORY):
        return f"out of memory: {text.rstrip('.') or type(error).__name__}. {_memory_remedy() or 'Give the job more memory.'}"
    # Errors of dlopen have no errno.
    if isinstance(error, ImportError) or (
        isinstance(error, OSError) and number is None and any(said in text for said in LIBRARY)
    ):
        return f"a library cannot be loaded: {text.rstrip('.')}. {_memory_remedy() or 'Install it again.'}"
    return None


def _memory_remedy() -> str:
    """How to raise the limit on the memory of this process; an empty text if there is none."""
    for option, kind in (("-v", resource.RLIMIT_AS), ("-d", resource.RLIMIT_DATA)):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            return f"The memory of this process is limited to {limit // 1024} KiB (ulimit {option}): raise or remove that limit."
    return ""
