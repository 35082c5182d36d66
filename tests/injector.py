"""Injects a fault at every system call by which a function changes files, one call per attempt.

    preload(folder)                            # once, first: restarts this program with tests/injector.c loaded
    outcome = attempt(run, folder, KILLED, 7)  # run(folder) in a child that dies at its seventh such call

Children are forked from a process that has imported everything, so that an attempt takes milliseconds.
"""

import ctypes
import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from emotion.errors import NodeError, StorageError

Operation = Callable[[Path], str | None]
"""Works in a folder. May return the message of an error that it does not raise."""

FORK = multiprocessing.get_context("fork")
LONGEST_SECONDS = 60


@dataclass(frozen=True)
class Injury:
    """What happens at the n-th call and, if lasting, at all later ones. `action`: an errno, or one of injector.c's actions."""

    name: str
    action: int
    lasting: bool = False

    @property
    def deadly(self) -> bool:
        return self.action < 0


KILLED = Injury("killed", -1)
TORN = Injury("torn write", -2)
DATA_LOST = Injury("power cut, data lost", -3)
NAMES_LOST = Injury("power cut, names lost", -4)
POWER_CUTS = (DATA_LOST, NAMES_LOST)
NO_SPACE = Injury("no space once", errno.ENOSPC)
FULL_DISK = Injury("full disk", errno.ENOSPC, lasting=True)
ERROR = Injury("error once", errno.EIO)
BROKEN_DISK = Injury("broken disk", errno.EIO, lasting=True)
ERRORS = (NO_SPACE, FULL_DISK, ERROR, BROKEN_DISK)


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    finished: the operation returned or raised. Then `calls` are its counted calls, of which number `n` had the fault, and
    `said` is its error or what it returned, None for a success.
    """

    n: int
    injury: Injury
    finished: bool
    calls: list[str]
    said: str | None

    @property
    def struck(self) -> bool:
        """Whether the operation reached the n-th call."""
        return not self.finished or len(self.calls) >= self.n

    @property
    def succeeded(self) -> bool:
        return self.finished and self.said is None


def preload(folder: Path) -> None:
    """Compile the injector into `folder` and restart this program with it. Returns at once where it is loaded already."""
    library = folder / "injector.so"
    if os.environ.get("LD_PRELOAD") == str(library):
        return
    source = Path(__file__).with_name("injector.c")
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = ["gcc", "-shared", "-fPIC", "-O1", "-std=gnu11", *warnings, "-o", str(library), str(source), "-ldl", "-pthread"]
    subprocess.run(command, check=True)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "LD_PRELOAD": str(library)})


def attempt(run: Operation, folder: Path, injury: Injury, n: int) -> Outcome:
    """run(folder) with a fault at its n-th counted call (0: none), in a child process where the fault ends it.

    OSError, StorageError and NodeError are results; any other exception is raised. A child that ends in another way, such as by a
    timeout, raises AssertionError. A power cut happens after the operation at the latest.
    """
    if not injury.deadly:
        return Outcome(n, injury, True, *_run_armed(run, folder, injury, n))
    kept = folder.with_name(f"{folder.name}.lost")
    if injury == NAMES_LOST:
        kept.mkdir()
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_report, args=(run, folder, injury, n, sender))
    child.start()
    sender.close()
    try:
        outcome = Outcome(n, injury, True, *receiver.recv())
    except EOFError:
        outcome = Outcome(n, injury, False, [], None)
    child.join()
    shutil.rmtree(kept, ignore_errors=True)
    assert child.exitcode in (0, -signal.SIGKILL), f"{injury.name} at call {n}: exit code {child.exitcode} {outcome}"
    return outcome


def attempts(run: Operation, fresh: Callable[[], Path], injury: Injury) -> Iterator[tuple[Path, Outcome]]:
    """One attempt per call, n = 1, 2, …, each in a fresh() folder; the last one is the first without a fault."""
    n = 1
    while True:
        folder = fresh()
        outcome = attempt(run, folder, injury, n)
        yield folder, outcome
        if not outcome.struck:
            return
        n += 1


def _report(run: Operation, folder: Path, injury: Injury, n: int, sender: Connection) -> None:
    signal.alarm(LONGEST_SECONDS)
    sender.send(_run_armed(run, folder, injury, n))
    if injury in POWER_CUTS:
        ctypes.CDLL(None).cut_power()


def _run_armed(run: Operation, folder: Path, injury: Injury, n: int) -> tuple[list[str], str | None]:
    library = ctypes.CDLL(None)
    library.counted.restype = ctypes.c_long
    library.call.restype = ctypes.c_char_p
    library.call.argtypes = [ctypes.c_long]
    library.inject.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_char_p]
    said = None
    library.inject(n, injury.action, injury.lasting, os.fsencode(folder.resolve()))
    try:
        said = run(folder)
    except (OSError, StorageError, NodeError) as error:
        said = f"{type(error).__name__}: {error}"
    finally:
        library.disarm()
    return [library.call(place).decode() for place in range(1, library.counted() + 1)], said
