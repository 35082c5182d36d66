"""Tables of published runs that lie in object storage, fetched to be collected."""

from collections.abc import Callable, Sequence
from pathlib import Path

from emotion.config import StorageConfig
from emotion.files import make_folder, read_json, write_json
from job.spec.load import load_spec
from job.spec.location import S3
from job.storage.open import place_of
from job.storage.transfer import refuse_names

COLLECTED = ("manifest.json", "predictions.csv", "baselines.csv")
"""Files of a published run that `collect` reads."""
SWEEP = "sweep.json"
"""In a sweep's folder, which lists all runs that there are to be."""


def with_near_runs(runs: Sequence[str], folder: Path, should_stop: Callable[[], bool]) -> list[Path]:
    """Published runs, or places with such runs one level below: paths as they are, of those in a store the tables, in `folder`.

    Of a sweep whose tasks are published to a store, the same sweep with their tables near. A store is reached as the
    environment says, those of a sweep as its specs say. Raises StorageError, Interrupted.
    """
    near = []
    for number, run in enumerate(runs):
        if not run.startswith(S3):
            near.append(_sweep_near(Path(run), folder / str(number), should_stop))
            continue
        place, copy = place_of(run.rstrip("/"), StorageConfig(), should_stop), folder / str(number)
        make_folder(copy)
        near.append(copy)
        for entry in place.entries():
            parent, _, name = entry.name.rpartition("/")
            if name in COLLECTED and "/" not in parent:
                refuse_names([entry.name], run)
                make_folder((copy / entry.name).parent)
                place.get(entry.name, copy / entry.name, None, entry)
    return near


def _sweep_near(path: Path, copy: Path, should_stop: Callable[[], bool]) -> Path:
    """`path`, unless it is a sweep with tasks that are published to a store."""
    try:
        tasks = read_json(path / SWEEP)["tasks"]
        away = [task for task in tasks if task["published"].startswith(S3)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return path  # whoever reads it next says what is wrong with it
    if not away:
        return path
    for task in away:
        spec = load_spec(path / "specs" / f"{task['index']:04}.yaml")
        place = place_of(task["published"], spec.storage, should_stop)
        task["published"] = str(copy / "published" / task["run"])
        make_folder(Path(task["published"]))
        if place.read("manifest.json") is not None:
            for name in COLLECTED:
                place.get(name, Path(task["published"]) / name)
    write_json(copy / SWEEP, {"tasks": tasks})
    return copy
