"""Checks of the locations that a spec names: whether `run` can reach them, with which identity, and whether the clocks agree.
Nothing is written to object storage."""

from collections.abc import Iterator

from emotion.errors import AccessError, DataError, EmotionError, Interrupted, StorageError
from emotion.training.absent_weights import absent
from job.config import StorageConfig
from job.machine.check import Check, wrong
from job.machine.disk import check_disk
from job.spec.location import S3, Local, Location, StoredLocation
from job.spec.model import JobSpec
from job.storage.examine import examine_source
from job.storage.local_folder import refuse_folder
from job.storage.open import open_storage
from job.storage.protocol import AbsentError, Storage

PATIENCE_SECONDS, TIMEOUT_SECONDS = 2.0, 10.0  # of the doctor: a person waits for it
MOST_SKEW_SECONDS = 300.0  # S3 refuses requests from 15 minutes on


def check_stores(spec: JobSpec) -> Iterator[Check]:
    """A check for each location, then one of the clock if object storage has answered."""
    config = spec.storage.model_copy(
        update={"patience_seconds": PATIENCE_SECONDS, "timeout_seconds": min(TIMEOUT_SECONDS, spec.storage.timeout_seconds)}
    )
    yield _source(spec, config)
    if spec.destination is not None:
        yield _folder("artifacts.destination", spec.destination, config)
    if isinstance(spec.mirror, Local) and not spec.mirror.path.is_dir():
        error = StorageError(f"{spec.mirror}: there is no such folder. Create it once, or mount its disk.")
        yield wrong("checkpoint.mirror", error)
    elif spec.mirror is not None:
        yield _folder("checkpoint.mirror", spec.mirror, config)
    files = {"vit.weights": spec.weights_file, "vit.teacher": spec.teacher, "data.manifest": spec.dataset_manifest}
    files["init_from.run"] = spec.warm_start_run / "manifest.json" if spec.warm_start_run else None
    for name, location in files.items():
        if location is not None:
            yield _file(name, location, config)
    places = (spec.source, spec.destination, spec.mirror, *files.values())
    remote = next((place for place in places if isinstance(place, S3)), None)
    if remote is not None:
        yield from _clock(open_storage(remote, config, _never))


def _never() -> bool:
    return False


def _as_error(error: EmotionError | Interrupted) -> EmotionError:
    """Turn the interruption by expired credentials into an error: the doctor was not asked to stop."""
    return AccessError(str(error)) if isinstance(error, Interrupted) else error


def _named(location: Location, storage: Storage) -> str:
    """The beginning of a line: the location, and the identity with which it is used."""
    try:
        return f"{location} as {storage.identity()}: "
    except EmotionError:  # the settings are wrong; the request itself reports that
        return f"{location}: "


def _source(spec: JobSpec, config: StorageConfig) -> Check:
    name, source = "data.source", spec.source
    if isinstance(source, Local) and not source.path.is_dir():
        return wrong(name, DataError(f"there is no folder {source}. Name the folder that holds the songs, or mount it."))
    where = f"{source}: "
    try:
        if isinstance(source, S3):
            where = _named(source, open_storage(source, config, _never))
        found = examine_source(spec.data, config, split=spec.split)
    except (EmotionError, Interrupted) as error:
        return wrong(name, _as_error(error), where=where)
    if found.refusal is not None:
        return wrong(name, DataError(" ".join(found.refusal.split("\n"))), where=where)
    text = found.lines[0].removeprefix("data: ") if found.lines else f"{found.songs} songs that the job makes itself"
    return Check(name, "ok", f"{where}{text}")


def _folder(name: str, location: StoredLocation, config: StorageConfig) -> Check:
    if isinstance(location, Local):
        return check_disk(name, location.path)
    storage = open_storage(location, config, _never)
    where = _named(location, storage)
    try:
        problem = storage.problem()
    except (EmotionError, Interrupted) as error:
        problem = _as_error(error)
    if problem is not None:
        return wrong(name, problem, where=where)
    return Check(name, "ok", f"{where}it can be listed; whether it can be written to is only known at the first file")


def _file(name: str, location: StoredLocation, config: StorageConfig) -> Check:
    if isinstance(location, Local) and not location.path.exists():
        return wrong(name, absent(location.path, name))
    try:
        if isinstance(location, Local):
            refuse_folder(location.path, name)
    except DataError as error:
        return wrong(name, error)
    storage = open_storage(location.parent, config, _never)
    where = _named(location, storage)
    try:
        entry = storage.entry(location.name)
    except AbsentError as error:
        return wrong(name, DataError(str(error)), "Name a file that is there.")
    except (EmotionError, Interrupted) as error:
        return wrong(name, _as_error(error), where=where)
    return Check(name, "ok", f"{where}{entry.size / 1e6:.1f} MB")


def _clock(storage: Storage) -> Iterator[Check]:
    ahead = storage.clock_ahead_seconds()
    if ahead is None:
        return
    found = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} that of {storage.url}"
    if abs(ahead) <= MOST_SKEW_SECONDS:
        yield Check("clock", "ok", found)
    else:
        yield wrong("clock", StorageError(f"{found}. Set this machine's clock: S3 refuses requests from 15 minutes on."))
