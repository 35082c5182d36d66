"""The arguments of `predict` → local audio files, one after the other: files, folders, standard input, pipes, objects in S3."""

import os
import re
import select
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from emotion.data.songs import AUDIO_FILE, AUDIO_FORMATS
from emotion.errors import DataError, EmotionError, Interrupted, StorageError, printable
from emotion.files import errors_name
from job.config import StorageConfig
from job.results.manifest import MANIFEST, PREDICTION_FILES
from job.spec.location import S3, Local, StoredLocation, parse_location
from job.storage.open import open_storage
from job.storage.protocol import BLOCK_BYTES, STOP_CHECK_SECONDS

STANDARD_INPUT = "-"
SCHEME = re.compile("[A-Za-z][A-Za-z0-9+.-]+://")
MOST_PIPED_BYTES = 4 << 30  # a pipe may never end
ShouldStop = Callable[[], bool]


def sounds_of(arguments: Sequence[str], temporary: Path, should_stop: ShouldStop) -> Iterator[tuple[str, Path | EmotionError]]:
    """Name and local file of each sound, or why there is none. A folder or a prefix in S3 stands for all audio files below it.
    What is read from a pipe or fetched lies in `temporary`, a folder, until the next one is asked for."""
    for argument in arguments:
        try:
            yield from _sounds_of(argument, temporary, should_stop)
        except OSError as error:
            yield argument, StorageError.of(error, f"predict: {printable(argument)}: {error.strerror or error}")
        except EmotionError as error:
            yield argument, error


def fetched_model(argument: str, temporary: Path, should_stop: ShouldStop, also: Sequence[str] = ()) -> Path:
    """The folder of a published run or of its `model/`; one in S3 is fetched into `temporary`, without what predict needs not.
    also: more files of a run to fetch."""
    location = _location(argument)
    if isinstance(location, Local):
        return location.path
    storage = open_storage(location, StorageConfig(), should_stop)
    for entry in storage.entries():
        if entry.name == MANIFEST or {entry.name, f"model/{entry.name}"} & {*PREDICTION_FILES, *also}:
            target = temporary / "run" / entry.name
            target.parent.mkdir(parents=True, exist_ok=True)
            storage.get(entry.name, target, None, entry)
    if not (temporary / "run").exists():
        raise DataError(f"predict: {location} holds no model.safetensors. Name a published run or its folder model/.")
    return temporary / "run"


def _location(argument: str) -> StoredLocation:
    """A path is taken as it is, not made absolute, so that its name stays as the user wrote it."""
    if not SCHEME.match(argument):
        return Local(Path(argument))
    try:
        return parse_location(argument)
    except ValueError as error:
        raise DataError(f"predict: {printable(argument)}: {error}.") from None


def _sounds_of(argument: str, temporary: Path, should_stop: ShouldStop) -> Iterator[tuple[str, Path]]:
    name = "standard input" if argument == STANDARD_INPUT else printable(argument)
    location = _location("/dev/fd/0" if argument == STANDARD_INPUT else argument)
    if isinstance(location, S3):
        yield from _fetched(location, temporary, should_stop)
        return
    path = location.path
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            target = printable(path.readlink())
            raise DataError(f"predict: {name} is a link to {target}, which is not here. Fetch that file.") from None
        raise DataError(f"predict: there is no file {name}") from None
    if stat.S_ISREG(mode):
        yield argument, path
    elif stat.S_ISDIR(mode):
        yield from ((str(file), file) for file in _audio_below(path, name))
    elif stat.S_ISFIFO(mode):
        yield argument, _piped(path, name, temporary / "piped", should_stop)
    else:
        what = "a socket" if stat.S_ISSOCK(mode) else "a terminal or another device"
        raise DataError(f"predict: {name} is {what}; expected an audio file, a folder or a pipe.")


def _audio_below(folder: Path, name: str) -> list[Path]:
    """Sorted, without hidden folders and those behind links."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if AUDIO_FILE.fullmatch(name)]
    if not found:
        raise DataError(f"predict: {name} is a folder without audio files ({AUDIO_FORMATS}).")
    return sorted(found)


def _piped(path: Path, name: str, target: Path, should_stop: ShouldStop) -> Path:
    """A copy of what comes out of a pipe: a decoder must know where the end is."""
    copied = 0
    # Without O_NONBLOCK, opening a named pipe that nobody writes to waits for ever, and a signal would not end it.
    with (
        errors_name(target),
        os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as source,
        target.open("wb") as copy,
    ):
        while True:
            ready, _, _ = select.select([source], [], [], STOP_CHECK_SECONDS)
            if should_stop():
                raise Interrupted("predict: stopped")
            block = source.read(BLOCK_BYTES) if ready else None
            if block == b"":
                return target
            copied += copy.write(block or b"")
            if copied > MOST_PIPED_BYTES:
                raise DataError(f"predict: {name} gives more than {MOST_PIPED_BYTES >> 30} GiB, which is no song.")


def _fetched(location: S3, temporary: Path, should_stop: ShouldStop) -> Iterator[tuple[str, Path]]:
    is_file = bool(AUDIO_FILE.fullmatch(location.name))
    parent = location.parent if is_file else location
    storage = open_storage(parent, StorageConfig(), should_stop)
    entries = [storage.entry(location.name)] if is_file else list(storage.entries())
    entries = [entry for entry in entries if AUDIO_FILE.fullmatch(entry.name.rpartition("/")[2])]
    if not entries:
        raise DataError(f"predict: {location} has no audio files below it ({AUDIO_FORMATS}).")
    for entry in entries:
        # The name may decide how an mp3 is decoded.
        target = temporary / f"fetched{Path(entry.name).suffix}"
        storage.get(entry.name, target, None, entry)
        yield str(parent / entry.name), target
        target.unlink()
