"""Local audio files, one after the other, from the arguments of `predict`: files, folders, standard input, pipes, S3 objects."""

import os
import re
import select
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from emotion.data.songs import AUDIO_FILE, AUDIO_FORMATS
from emotion.errors import DataError, EmotionError, Interrupted, SpecError, StorageError, printable
from emotion.files import errors_name
from job.config import StorageConfig
from job.results.manifest import MANIFEST, PREDICTION_FILES, where_published
from job.spec.location import S3, Local, StoredLocation, parse_location
from job.storage.open import open_storage
from job.storage.protocol import BLOCK_BYTES, STOP_CHECK_SECONDS

STANDARD_INPUT = "-"
SCHEME = re.compile("[A-Za-z][A-Za-z0-9+.-]+://")
MOST_PIPED_BYTES = 4 << 30  # a pipe may never end
NAME_A_RUN = "Name a published run or its folder model/."
ShouldStop = Callable[[], bool]


class Sounds:
    """An iterable of (name, local file or error) of each sound. A folder or a prefix in S3 stands for all audio files below it.
    The constructor lists them, and finds arguments that are wrong. A sound from a pipe or from S3 is kept in `temporary`, a
    folder, only until the next sound is requested.

    count: number of sounds, including those with an error. refusals: the errors, if all arguments are wrong; else empty.
    """

    def __init__(self, arguments: Sequence[str], temporary: Path, should_stop: ShouldStop) -> None:
        self._listed: list[tuple[str, int, Iterable[tuple[str, Path]] | EmotionError]] = []
        for argument in arguments:
            try:
                count, sounds = _listed(argument, temporary, should_stop)
                self._listed.append((argument, count, sounds))
            except OSError as error:
                self._listed.append((argument, 1, _unreadable(argument, error)))
            except EmotionError as error:
                self._listed.append((argument, 1, error))
        self.count = sum(count for _, count, _ in self._listed)
        refusals = [sounds for _, _, sounds in self._listed if isinstance(sounds, EmotionError)]
        self.refusals = refusals if len(refusals) == len(self._listed) else []

    def __iter__(self) -> Iterator[tuple[str, Path | EmotionError]]:
        for argument, _, sounds in self._listed:
            if isinstance(sounds, EmotionError):
                yield argument, sounds
                continue
            try:
                yield from sounds
            except OSError as error:
                yield argument, _unreadable(argument, error)
            except EmotionError as error:
                yield argument, error


def _unreadable(argument: str, error: OSError) -> EmotionError:
    return StorageError.of(error, f"predict: {printable(argument)}: {error.strerror or error}")


def fetched_model(argument: str, temporary: Path, should_stop: ShouldStop, also: Sequence[str] = ()) -> Path:
    """The folder of a published run or of its `model/`. From S3, only the files that predict needs are fetched into `temporary`.
    also: more files of a run to fetch."""
    location = _location(argument, "model")
    if isinstance(location, Local):
        _require_model(location.path)
        return location.path
    storage = open_storage(location, StorageConfig(), should_stop)
    for entry in storage.entries():
        if entry.name == MANIFEST or {entry.name, f"model/{entry.name}"} & {*PREDICTION_FILES, *also}:
            target = temporary / "run" / entry.name
            target.parent.mkdir(parents=True, exist_ok=True)
            storage.get(entry.name, target, None, entry)
    if not (temporary / "run").exists():
        raise DataError(f"model: {location} holds no model.safetensors. {NAME_A_RUN}")
    return temporary / "run"


def refusals_of(argument: str) -> list[EmotionError]:
    """The reason why a local path is not a model, checked before anything is fetched or loaded; empty if it is a model."""
    location = _location(argument, "model")
    try:
        if isinstance(location, Local):
            _require_model(location.path)
    except DataError as error:
        return [error]
    return []


def _require_model(folder: Path) -> None:
    """Raise DataError if the folder is not a model. Called before libraries are imported, which takes seconds."""
    name, model = printable(folder), folder / "model" if (folder / "model").is_dir() else folder
    if (model / "model.safetensors").is_file():
        for needed in ("config.json", "preprocessing.json"):
            if not (model / needed).is_file():
                raise DataError(f"model: {printable(model)} lacks {needed}. Copy the run again.")
        return
    if not folder.exists():
        raise DataError(f"model: there is no folder {name}. {NAME_A_RUN}")
    if folder.is_dir():
        raise DataError(f"model: {name} holds no model.safetensors. {where_published(folder) or NAME_A_RUN}")
    hint = " The model comes before the audio." if AUDIO_FILE.fullmatch(folder.name) else ""
    raise DataError(f"model: {name} is a file. {NAME_A_RUN}{hint}")


def _location(argument: str, of: str) -> StoredLocation:
    """The location of an argument. A path is not made absolute, so that its name stays as the user wrote it. of: the argument or
    command that an error line begins with."""
    if not SCHEME.match(argument):
        return Local(Path(argument))
    try:
        return parse_location(argument)
    except ValueError as error:
        raise SpecError(f"{of}: {printable(argument)}: {error}.") from None


def _listed(argument: str, temporary: Path, should_stop: ShouldStop) -> tuple[int, Iterable[tuple[str, Path]]]:
    """The number of sounds that an argument names, and the sounds."""
    name = "standard input" if argument == STANDARD_INPUT else printable(argument)
    location = _location("/dev/fd/0" if argument == STANDARD_INPUT else argument, "predict")
    if isinstance(location, S3):
        return _in_storage(location, temporary, should_stop)
    path = location.path
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            target = printable(path.readlink())
            raise DataError(f"predict: {name} is a link to {target}, which is not here. Fetch that file.") from None
        raise DataError(f"predict: there is no file {name}") from None
    if stat.S_ISREG(mode):
        return 1, [(argument, path)]
    if stat.S_ISDIR(mode):
        files = _audio_below(path, name)
        return len(files), [(str(file), file) for file in files]
    if stat.S_ISFIFO(mode):
        return 1, ((argument, _piped(source, name, temporary / "piped", should_stop)) for source in [path])
    what = "a socket" if stat.S_ISSOCK(mode) else "a terminal or another device"
    raise DataError(f"predict: {name} is {what}; expected an audio file, a folder or a pipe.")


def _audio_below(folder: Path, name: str) -> list[Path]:
    """Audio files below a folder, sorted, without those in hidden or linked folders."""

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
    """Copy the content of a pipe to a file: a decoder must know where the end is."""
    copied = 0
    # Without O_NONBLOCK, opening a named pipe without a writer blocks forever, and a signal would not interrupt it.
    with (
        errors_name(target),
        os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as source,
        target.open("wb") as copy,
    ):
        while True:
            ready, _, _ = select.select([source], [], [], STOP_CHECK_SECONDS)
            if should_stop():
                raise Interrupted("predict: stopped; the same command starts again")
            block = source.read(BLOCK_BYTES) if ready else None
            if block == b"":
                if copied == 0:
                    raise DataError(f"predict: {name} is empty.")
                return target
            copied += copy.write(block or b"")
            if copied > MOST_PIPED_BYTES:
                raise DataError(f"predict: {name} gives more than {MOST_PIPED_BYTES >> 30} GiB, which is no song.")


def _in_storage(location: S3, temporary: Path, should_stop: ShouldStop) -> tuple[int, Iterable[tuple[str, Path]]]:
    is_file = bool(AUDIO_FILE.fullmatch(location.name))
    parent = location.parent if is_file else location
    storage = open_storage(parent, StorageConfig(), should_stop)
    entries = [storage.entry(location.name)] if is_file else list(storage.entries())
    entries = [entry for entry in entries if AUDIO_FILE.fullmatch(entry.name.rpartition("/")[2])]
    if not entries:
        raise DataError(f"predict: {location} has no audio files below it ({AUDIO_FORMATS}).")

    def fetched() -> Iterator[tuple[str, Path]]:
        for entry in entries:
            # The name may decide how an mp3 is decoded.
            target = temporary / f"fetched{Path(entry.name).suffix}"
            storage.get(entry.name, target, None, entry)
            yield str(parent / entry.name), target
            target.unlink()

    return len(entries), fetched()
