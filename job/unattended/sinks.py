"""The supported trackers behind one interface. A tracker's library is imported only when it is opened."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from emotion.files import make_folder

FINGERPRINT_TAG = "emotion.fingerprint"
PLACE_TAG = "emotion.sent."  # followed by a group: how far its curves have been sent
BATCH = 900  # of MLflow's 1000 entities in a request


@dataclass(frozen=True)
class Place:
    """How far a curve has been sent: `count` records of `step`, and all records of earlier steps."""

    step: int = -1
    count: int = 0


class Point(NamedTuple):
    """The values of a record. time: in seconds since 1970."""

    step: int
    time: float
    values: dict[str, float]


class Sink(Protocol):
    """One tracker, opened for one run. Every method may raise anything, or never return.

    group: a phase, or one of several trainings of it. `place` returns how far the tracker has the curves of a group; it is called
    once per group. `send` sends the next points of a group, in the order of their steps, up to the given `place`.
    """

    def place(self, group: str) -> Place: ...

    def send(self, group: str, points: Sequence[Point], place: Place) -> None: ...

    def close(self, succeeded: bool) -> None: ...


class TensorBoard:
    """Event files in `folder`/GROUP. Each attempt writes the whole curves again, from metrics.jsonl, and removes the files of the
    previous attempt, so that no step appears twice. A running TensorBoard discards those that it has read."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._open = folder, SummaryWriter
        self._writers: dict[str, Any] = {}

    def place(self, group: str) -> Place:
        folder = self._folder / group
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
        self._writers[group] = self._open(str(folder), purge_step=0)
        return Place()

    def send(self, group: str, points: Sequence[Point], place: Place) -> None:  # noqa: ARG002 - the files are written again
        writer = self._writers[group]
        for point in points:
            for name, value in point.values.items():
                writer.add_scalar(name, value, point.step, walltime=point.time)
        writer.flush()

    def close(self, succeeded: bool) -> None:  # noqa: ARG002 - event files have no state
        for writer in self._writers.values():
            writer.close()


class MLflow:
    """A run of an experiment, found again by the fingerprint. The server is that of MLFLOW_TRACKING_URI. Tags, which are sent
    with the points, record how far the curves have been sent."""

    def __init__(self, experiment: str, run: str, fingerprint: str, settings: dict[str, str]) -> None:
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.tracking import MlflowClient

        self._metric, self._tag = Metric, RunTag
        self._client = client = MlflowClient()
        known = client.get_experiment_by_name(experiment)
        number = client.create_experiment(experiment) if known is None else known.experiment_id
        runs = client.search_runs([number], f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}'", max_results=1)
        if runs:
            self._run = runs[0].info.run_id
            client.update_run(self._run, status="RUNNING")
        else:
            self._run = client.create_run(number, tags={FINGERPRINT_TAG: fingerprint}, run_name=run).info.run_id
            params = [Param(name, value[:500]) for name, value in settings.items()]
            for first in range(0, len(params), 100):
                client.log_batch(self._run, params=params[first : first + 100])
        self._tags: dict[str, str] = client.get_run(self._run).data.tags

    def place(self, group: str) -> Place:
        step, _, count = self._tags.get(PLACE_TAG + _name(group), "").partition(" ")
        return Place(int(step), int(count)) if count else Place()

    def send(self, group: str, points: Sequence[Point], place: Place) -> None:
        metrics = [
            self._metric(f"{_name(group)}/{name}", value, round(1000 * point.time), point.step)
            for point in points
            for name, value in point.values.items()
        ]
        tag = self._tag(PLACE_TAG + _name(group), f"{place.step} {place.count}")
        for first in range(0, len(metrics), BATCH):
            is_last = first + BATCH >= len(metrics)
            self._client.log_batch(self._run, metrics[first : first + BATCH], tags=[tag] if is_last else [])

    def close(self, succeeded: bool) -> None:
        # A run that failed or was stopped may be resumed.
        self._client.set_terminated(self._run, "FINISHED" if succeeded else "KILLED")


class WeightsAndBiases:
    """A run of a project, whose id is the fingerprint. The server sends back a summary, the last value of each metric, which
    shows how far the curves have been sent. The summary may be one row ahead of the history, because an attempt's first request
    has the summary of a row that comes with the second. So the last row is sent again under its number; the client drops it if
    the history has it. Offline there is no server, and each attempt writes the whole curves again. Its files are below
    `folder`/wandb; those of the previous attempt are removed."""

    def __init__(self, project: str, run: str, fingerprint: str, settings: dict[str, Any], folder: Path) -> None:
        wandb = _imported_wandb(folder / "wandb")
        quiet = wandb.Settings(
            silent=True,  # and so it does not ask a terminal for a key
            console="off",
            disable_git=True,
            save_code=False,
            x_disable_meta=True,  # the command line, the host
            x_disable_stats=True,
            x_save_requirements=False,
            stop_fn=lambda: None,  # by default a button of the web page sends SIGINT to the job
        )
        wandb.setup(settings=quiet)
        self._run = wandb.init(
            project=project, id=fingerprint, name=run, config=settings, dir=str(folder), resume="allow", settings=quiet
        )
        for path in folder.glob(f"wandb/*run-*-{fingerprint}"):
            if path != Path(self._run.dir).parent:
                shutil.rmtree(path)
        self._known = dict(self._run.summary)
        self._row = max((int(value) for name, value in self._known.items() if name.endswith("/row")), default=0)
        self._places: dict[str, Place] = {}

    def place(self, group: str) -> Place:
        name = _name(group)
        self._run.define_metric(f"{name}/*", step_metric=f"{name}/step")
        step, count, row = (int(self._known.get(f"{name}/{key}", -1)) for key in ("step", "record", "row"))
        is_last = row == self._row
        self._places[group] = Place(step, count - is_last) if row >= 0 else Place()
        return self._places[group]

    def send(self, group: str, points: Sequence[Point], place: Place) -> None:  # noqa: ARG002 - each point says where it is
        name = _name(group)
        for point in points:
            before = self._places[group]
            count = before.count + 1 if point.step == before.step else 1
            self._places[group] = Place(point.step, count)
            values = {**point.values, "step": point.step, "record": count, "row": self._row}
            row = {f"{name}/{key}": value for key, value in values.items()}
            self._run.log({**row, "_timestamp": point.time}, step=self._row, commit=True)
            self._row += 1

    def close(self, succeeded: bool) -> None:
        # A run that failed or was stopped may be resumed.
        self._run.finish(exit_code=0 if succeeded else 1)


def _imported_wandb(folder: Path) -> Any:
    """The library wandb. Its import creates two temporary folders, for media and artifacts, which are not used here. It would
    remove them when Python exits, for which a job does not wait. So they are created in `folder` and removed at once."""
    make_folder(folder)
    before = tempfile.tempdir
    tempfile.tempdir = str(folder)  # temporary files of other threads also go to this run's folder meanwhile
    try:
        import wandb
    finally:
        tempfile.tempdir = before
    for path in folder.glob("tmp*wandb-*"):
        shutil.rmtree(path)
    return wandb


def _name(group: str) -> str:
    return group.replace(" ", "_")
