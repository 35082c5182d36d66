"""Sends the curves of a run to trackers: `track.tensorboard`, `track.mlflow`, `track.wandb`.

For each tracker, a thread reads what the phases append to their `metrics.jsonl` and sends it on; the phases know nothing of it.
A tracker identifies the run by its fingerprint, so all attempts form one curve: a record that it already has is not sent again,
even if an attempt resumes at an earlier step. If a tracker fails, this is logged once, and the tracker is off for the rest of
the attempt. If it hangs, only its own thread waits.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emotion.errors import printable, to_install
from emotion.files import read_json
from emotion.training.progress import read_records
from job.config import TrackConfig
from job.results.manifest import dotted
from job.results.scores import DIMENSIONS
from job.run_folder.receipts import METRICS
from job.secrets import scrubbed
from job.spec.model import JobSpec, fingerprint, run_name
from job.unattended.sinks import MLflow, Place, Point, Sink, TensorBoard, WeightsAndBiases

log = logging.getLogger(__name__)

POLL_SECONDS = 5.0
LAST_SECONDS = 15.0
"""How long a job waits at its end until its last records are sent."""
NO_CURVES = {"time", "phase", "step", "training", "training_step"}
SCORES = "test"  # group name of the scores on the test songs


class Trackers:
    """Within `tracked(…) as trackers:`, one thread per tracker sends the curves of the phases that were passed to `watch`."""

    def __init__(self) -> None:
        self.succeeded = False
        self._folders: dict[str, Path] = {}
        self._lock = threading.Lock()

    def watch(self, phase: str, folder: Path) -> None:
        """Send what this phase has recorded and will record in its folder."""
        with self._lock:
            self._folders[phase] = folder

    def groups(self) -> dict[str, list[Point]]:
        """Group → its points so far."""
        with self._lock:
            folders = dict(self._folders)
        return {group: points for phase, folder in folders.items() for group, points in points_of(phase, folder).items()}

    def run(self, name: str, open_sink: Callable[[], Sink], ended: threading.Event) -> None:
        """Feed one tracker. Runs in a thread until `ended` is set and the last records are sent, or until the tracker fails."""
        try:
            while not self.groups():  # before there is anything to send, its library need not be imported
                if ended.wait(POLL_SECONDS) and not self.groups():
                    return
            feed = Feed(open_sink())
            feed.send_new(self.groups())
            while not ended.wait(POLL_SECONDS):
                feed.send_new(self.groups())
            feed.send_new(self.groups())
            feed.sink.close(self.succeeded)
        except Exception as error:  # noqa: BLE001 - a tracker may raise anything, and must not harm the job
            text = printable(scrubbed(f"{type(error).__name__}: {error}"))[:300]
            if isinstance(error, ModuleNotFoundError):
                text = f"{error.name} is not installed here. {to_install('track')}"
            log.warning("track.%s is off for this attempt: %s", name, text)


class Feed:
    """Sends each point to one tracker once."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self._places: dict[str, Place] = {}

    def send_new(self, groups: dict[str, list[Point]]) -> None:
        for group, points in groups.items():
            if group not in self._places:
                self._places[group] = self.sink.place(group)
            fresh, place = after(self._places[group], points)
            if fresh:
                self.sink.send(group, fresh, place)
                self._places[group] = place


def points_of(phase: str, folder: Path) -> dict[str, list[Point]]:
    """Group → its points so far, in order."""
    groups: dict[str, list[Point]] = {}
    try:
        for record in read_records(folder / METRICS):
            values = {name: value for name, value in record.items() if name not in NO_CURVES and isinstance(value, int | float)}
            if values:
                group = f"{phase} {record['training']}" if "training" in record else phase
                groups.setdefault(group, []).append(Point(record["step"], record["time"], values))
        if phase == "evaluate" and (folder / "metrics.json").exists():
            written = (folder / "metrics.json").stat().st_mtime
            groups[SCORES] = [Point(0, written, scores_in(read_json(folder / "metrics.json")))]
    except (OSError, KeyError, ValueError):
        return {}  # the file is being written or moved: the next poll finds it
    return groups


def scores_in(metrics: dict[str, Any]) -> dict[str, float]:
    """Scores such as `stack_valence_ccc`, for every predictor in metrics.json."""
    predictors = {"stack": metrics["stack"], "model": metrics["model"], **metrics["baselines"]}
    found = {
        f"{name}_{dimension}_ccc": scores[dimension]["ccc"] for name, scores in predictors.items() for dimension in DIMENSIONS
    }
    return {name: value for name, value in found.items() if value is not None}


def after(place: Place, points: Sequence[Point]) -> tuple[list[Point], Place]:
    """The points after a place, and the place after these points. A step may have several points, one after another."""
    count, fresh = 0, []
    for point in points:
        if point.step < place.step:
            continue
        if point.step == place.step:
            count += 1
            if count <= place.count:
                continue
        fresh.append(point)
    if not fresh:
        return [], place
    last = fresh[-1].step
    return fresh, Place(last, sum(point.step == last for point in points))


@contextmanager
def tracked(config: TrackConfig, spec: JobSpec, run_folder: Path) -> Iterator[Trackers]:
    """Track the phases in the block. Its end waits at most LAST_SECONDS for the last records."""
    trackers, ended = Trackers(), threading.Event()
    threads = [
        threading.Thread(target=trackers.run, args=(name, open_sink, ended), name=f"track {name}", daemon=True)
        for name, open_sink in openers_of(config, spec, run_folder).items()
    ]
    for thread in threads:
        thread.start()
    try:
        yield trackers
        trackers.succeeded = True
    finally:
        ended.set()
        deadline = time.monotonic() + LAST_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning("%s: no answer for %g s: the last records may be missing there", thread.name, LAST_SECONDS)


def openers_of(config: TrackConfig, spec: JobSpec, run_folder: Path) -> dict[str, Callable[[], Sink]]:
    """Key of the section → function that opens the tracker, and imports its library."""
    found: dict[str, Callable[[], Sink]] = {}
    run, mark = run_name(spec), fingerprint(spec)
    folder, experiment, project = config.tensorboard, config.mlflow, config.wandb
    if folder is not None:
        found["tensorboard"] = lambda: TensorBoard(Path(folder) / run)
    if experiment is not None:
        settings = {name: str(value) for name, value in dotted(spec.result_fields()).items()}
        found["mlflow"] = lambda: MLflow(experiment, run, mark, settings)
    if project is not None:
        found["wandb"] = lambda: WeightsAndBiases(project, run, mark, spec.result_fields(), run_folder)
    return found
