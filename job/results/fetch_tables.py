"""Tables of published runs that lie in object storage, fetched to be collected."""

from collections.abc import Callable, Sequence
from pathlib import Path

from emotion.errors import SpecError
from emotion.files import make_folder, read_json, write_json
from job.config import StorageConfig
from job.spec.load import load_spec
from job.spec.location import Local, parse_location
from job.storage.open import open_storage
from job.storage.transfer import refuse_names

COLLECTED = ("manifest.json", "predictions.csv", "baselines.csv")
"""Files of a published run that `collect` reads."""
SWEEP = "sweep.json"
"""In a sweep's folder: the list of all its runs."""


def fetch_tables(runs: Sequence[str], folder: Path, should_stop: Callable[[], bool]) -> list[Path]:
    """Local paths of published runs, or of folders with such runs one level below.

    Of runs in object storage only the tables are fetched, into `folder`; of a sweep whose tasks are published there, too. The
    storage of a run is reached as the environment says, that of a sweep as its specs say. Raises SpecError, StorageError,
    Interrupted.
    """
    found = []
    for number, run in enumerate(runs):
        try:
            location = parse_location(run)
        except ValueError as error:
            raise SpecError(f"collect: {error}") from None
        copy = folder / str(number)
        if isinstance(location, Local):
            found.append(_fetched_sweep(Path(run), copy, should_stop))
            continue
        storage = open_storage(location, StorageConfig(), should_stop)
        make_folder(copy)
        found.append(copy)
        for entry in storage.entries():
            parent, _, name = entry.name.rpartition("/")
            if name in COLLECTED and "/" not in parent:
                refuse_names([entry.name], run)
                make_folder((copy / entry.name).parent)
                storage.get(entry.name, copy / entry.name, None, entry)
    return found


def _fetched_sweep(path: Path, copy: Path, should_stop: Callable[[], bool]) -> Path:
    """`path`, unless it is a sweep with tasks that are published to object storage: then a copy of it with their tables."""
    try:
        tasks = read_json(path / SWEEP)["tasks"]
        locations = [(task, parse_location(task["published"])) for task in tasks]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return path  # whoever reads it next says what is wrong with it
    if all(isinstance(location, Local) for _, location in locations):
        return path
    for task, location in locations:
        if isinstance(location, Local):
            continue
        spec = load_spec(path / "specs" / f"{task['index']:04}.yaml")
        storage = open_storage(location, spec.storage, should_stop)
        task["published"] = str(copy / "published" / task["run"])
        make_folder(Path(task["published"]))
        if storage.read("manifest.json") is not None:
            for name in COLLECTED:
                storage.get(name, Path(task["published"]) / name)
    write_json(copy / SWEEP, {"tasks": tasks})
    return copy
