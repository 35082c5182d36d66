"""A sweep's folder, WORK/sweeps/NAME-KEY12. Its files are readable JSON and YAML.

sweep.json                the tasks, where each is published, and the cluster file
specs/0003.yaml           the resolved spec of task 3
submissions/1.json        the jobs of the first submission; resubmit adds 2.json
submissions/1.cancelled   exists once submission 1 was cancelled: none of its jobs is started again
attempts/task-0003.jsonl  start and end of every attempt of task 3, with the outcome
submitit/                 scripts, pickled calls and logs of submitit
collected/                the tables of all runs
submitting                exists while a command submits tasks of the sweep
"""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from emotion.errors import SpecError
from emotion.files import append_json_line, make_folder, read_json, write_json
from job.spec.location import Local, parse_location
from slurm.cluster import ClusterConfig

JobKind = Literal["prepare", "task", "collect"]
SWEEP = "sweep.json"


@dataclass(frozen=True)
class TaskRecord:
    """A task of the sweep. run: NAME-KEY12, the name of its folder in WORK. published: folder or URL of its result."""

    index: int
    label: str
    setting: str
    seed: int
    fold: int | None
    run: str
    published: str

    @property
    def published_folder(self) -> Path | None:
        """The folder of the result; None if it is published to object storage, which a login node may not reach."""
        location = parse_location(self.published)
        return location.path if isinstance(location, Local) else None

    @property
    def is_published(self) -> bool:
        return self.published_folder is not None and (self.published_folder / "manifest.json").is_file()


@dataclass(frozen=True)
class JobRecord:
    """A SLURM job. index: index of its task; 0 for collect. job: its id, or ARRAY_INDEX."""

    kind: JobKind
    index: int
    job: str


@dataclass(frozen=True)
class Submission:
    number: int
    jobs: tuple[JobRecord, ...]


class SweepFolder:
    """The folder of a sweep. The constructor reads sweep.json, and raises SpecError if it is missing or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        try:
            record = read_json(self.path / SWEEP)
            if "cluster" not in record and "tasks" in record:
                raise SpecError(f"{path}: a sweep of emotion-slurm local has no jobs in SLURM; only local resumes it.")
            self.name: str = record["name"]
            self.cluster = ClusterConfig.model_validate_json(json.dumps(record["cluster"]))
            self.tasks = [TaskRecord(**task) for task in record["tasks"]]
        except FileNotFoundError:
            raise SpecError(f"{path}: expected the folder of a sweep, as submit prints it, found no {SWEEP}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise SpecError(f"{self.path / SWEEP}: damaged ({type(error).__name__}: {error})") from error

    def spec_path(self, index: int) -> Path:
        return self.path / "specs" / f"{index:04}.yaml"

    def run_folder(self, index: int) -> Path:
        return self.cluster.work_folder / self.tasks[index].run

    def submissions(self) -> list[Submission]:
        """All submissions, oldest first."""
        found = []
        for path in sorted((self.path / "submissions").glob("*.json"), key=lambda path: int(path.stem)):
            try:
                found.append(Submission(int(path.stem), tuple(JobRecord(**job) for job in read_json(path)["jobs"])))
            except (ValueError, KeyError, TypeError) as error:
                text = f"{path}: damaged, or of another version ({type(error).__name__}: {error})"
                raise SpecError(f"{text}. Use the emotion-slurm that submitted it.") from error
        return found

    def write_submission(self, submission: Submission) -> None:
        record = {"time": round(time.time(), 3), "jobs": [asdict(job) for job in submission.jobs]}
        write_json(self.path / "submissions" / f"{submission.number}.json", record)

    def cancelled_mark(self, number: int) -> Path:
        return self.path / "submissions" / f"{number}.cancelled"

    def attempts_path(self, kind: JobKind, index: int) -> Path:
        return self.path / "attempts" / f"{kind}-{index:04}.jsonl"

    def log_path(self, job: str) -> Path:
        """The file with the output of all attempts of a job."""
        return self.path / "submitit" / f"{job}_0_log.out"


@contextlib.contextmanager
def submitting(path: Path) -> Iterator[None]:
    """Hold the lock for submitting tasks of the sweep in `path`. Raises SpecError if the lock is already held."""
    mark = path / "submitting"
    make_folder(path)
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        raise SpecError(
            f"{mark}: somebody is submitting tasks of this sweep. If not, as after a crash, look at the queue, delete this file "
            f"and try again."
        ) from None
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


def append_event(path: Path, event: dict[str, Any]) -> None:
    make_folder(path.parent)
    append_json_line(path, {"time": round(time.time(), 3), **event})
