"""Fetches the tables of published runs in object storage, for `collect`."""

from collections.abc import Callable, Sequence
from pathlib import Path

from emotion.errors import SpecError
from emotion.files import make_folder, read_json, write_json
from job.config import StorageConfig
from job.results.manifest import MANIFEST
from job.spec.load import load_spec
from job.spec.location import Local, parse_location
from job.storage.open import open_storage
from job.storage.transfer import refuse_names

TABLES = ("predictions.csv", "baselines.csv")  # files of a published run that `collect` reads, besides the manifest
SWEEP = "sweep.json"  # in the folder of a sweep: the list of its tasks


def fetch_tables(runs: Sequence[str], folder: Path, should_stop: Callable[[], bool]) -> list[Path]:
    """Local paths of the runs: published runs, folders with such runs one level below, or sweeps.

    Manifests and tables of runs in object storage are fetched into `folder`, also those of the tasks of a local sweep. Object
    storage is configured by the environment or, for a sweep, by its specs. Raises SpecError, StorageError, Interrupted.
    """
    paths = []
    for number, run in enumerate(runs):
        try:
            location = parse_location(run)
        except ValueError as error:
            raise SpecError(f"collect: {error}") from None
        copy = folder / str(number)
        if isinstance(location, Local):
            paths.append(_fetched_sweep(Path(run), copy, should_stop))
            continue
        storage = open_storage(location, StorageConfig(), should_stop)
        make_folder(copy)
        paths.append(copy)
        for entry in storage.entries():
            parent, _, name = entry.name.rpartition("/")
            if name in (MANIFEST, *TABLES) and "/" not in parent:
                refuse_names([entry.name], run)
                make_folder((copy / entry.name).parent)
                storage.get(entry.name, copy / entry.name, None, entry)
    return paths


def _fetched_sweep(path: Path, copy: Path, should_stop: Callable[[], bool]) -> Path:
    """`path`, or a copy of the sweep in `path` with the tables of its tasks, where those are published to object storage."""
    try:
        tasks = read_json(path / SWEEP)["tasks"]
        locations = [(task, parse_location(task["published"])) for task in tasks]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return path  # no sweep, or a damaged one, which collect_runs reports
    if all(isinstance(location, Local) for _, location in locations):
        return path
    for task, location in locations:
        if isinstance(location, Local):
            continue
        spec = load_spec(path / "specs" / f"{task['index']:04}.yaml")
        storage = open_storage(location, spec.storage, should_stop)
        task["published"] = str(copy / "published" / task["run"])
        make_folder(Path(task["published"]))
        if storage.read(MANIFEST) is not None:
            for name in (MANIFEST, *TABLES):
                storage.get(name, Path(task["published"]) / name)
    write_json(copy / SWEEP, {"tasks": tasks})
    return copy
