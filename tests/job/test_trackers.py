"""Trackers, with their real libraries: event files that are read back, MLflow's store, runs of Weights & Biases."""

import json
import multiprocessing
import os
import pty
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from emotion.files import read_json_lines
from job.config import TrackConfig
from job.spec.load import load_spec
from job.spec.model import JobSpec, fingerprint
from job.unattended import trackers
from job.unattended.trackers import Feed, Place, Point, Trackers, after, tracked
from tests.conftest import TINY, TinyRun
from tests.stores.wandb_server import wandb_server

Curves = dict[str, list[tuple[int, float]]]


class Training:
    """A folder of a phase, which its trainings write as `Progress` does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def resume(self, first: int) -> None:
        """Cut the file back to this step."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= first))

    def steps(self, *steps: int) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            for step in steps:
                for record in ({"loss": 1 / step}, {"epoch": step // 2, "ccc": step / 10}):
                    if step % 2 == 0 or "loss" in record:
                        file.write(json.dumps({"time": time.time(), "phase": "vit", "step": step, **record}) + "\n")
            file.write(json.dumps({"time": 1.0, "phase": "vit", "step": steps[-1], "warning": "w", "text": "no curve"}) + "\n")


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return load_spec(TINY, [f"track.tensorboard={tmp_path / 'tb'}"])


def attempt(spec: JobSpec, training: Training, config: TrackConfig, first: int, last: int, *, killed: bool = False) -> None:
    """Steps first + 1 to last, seen by the trackers in two looks."""
    found = Trackers()
    found.watch("vit", training.folder)
    ((_, open_sink),) = trackers.openers_of(config, spec, training.folder.parent).items()
    feed = Feed(open_sink())
    training.resume(first)
    training.steps(*range(first + 1, last))
    feed.send_new(found.groups())
    training.steps(last)
    feed.send_new(found.groups())
    if not killed:
        feed.sink.close(succeeded=last == 9)


LOSS = [(step, 1 / step) for step in range(1, 10)]
CCC = [(step, step / 10) for step in (2, 4, 6, 8)]


def three_attempts(spec: JobSpec, folder: Path, config: TrackConfig) -> None:
    """The second resumes earlier than the first was killed, in the middle of what is tracked."""
    training = Training(folder / "vit-0123456789ab")
    attempt(spec, training, config, 0, 6, killed=True)
    attempt(spec, training, config, 3, 5)
    attempt(spec, training, config, 5, 9)


def test_tensorboard_has_one_curve_of_three_attempts(spec: JobSpec, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    three_attempts(spec, tmp_path, spec.track)
    (folder,) = (tmp_path / "tb").glob("tiny-*/vit")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert curves["loss"] == [(step, pytest.approx(value)) for step, value in LOSS]
    assert curves["ccc"] == [(step, pytest.approx(value)) for step, value in CCC]
    assert set(curves) == {"loss", "ccc", "epoch"}
    assert len(list(folder.iterdir())) == 1  # other readers than TensorBoard's know nothing of what it is to forget


def test_mlflow_has_one_run_with_one_curve_of_three_attempts(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database or a server would need more than its client
    three_attempts(spec, tmp_path, TrackConfig(mlflow="moods"))
    client = tracking.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("moods").experiment_id])
    assert run.data.tags["emotion.fingerprint"] == fingerprint(spec)
    assert (run.info.run_name, run.info.status) == (f"tiny-{fingerprint(spec)[:12]}", "FINISHED")
    assert run.data.params["gan.width"] == "4"
    for name, curve in (("loss", LOSS), ("ccc", CCC)):
        found = sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, f"vit/{name}"))
        assert found == [(step, pytest.approx(value)) for step, value in curve]


def records_of(path: Path) -> Iterator[Any]:
    """What Weights & Biases has recorded offline: protocol buffers in a log of LevelDB's format, whose blocks have 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, text = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + 7 : at + 7 + size]
        text = part if kind in (1, 2) else text + part
        if kind in (1, 4):
            yield Record.FromString(text)
        at += 7 + size


def history_in(path: Path) -> list[dict[str, Any]]:
    rows = (record.history.item for record in records_of(path) if record.HasField("history"))
    return [{".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def attempt_in_a_process(*arguments: Any, killed: bool) -> None:
    attempt(*arguments, killed=killed)
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)


def three_processes(spec: JobSpec, folder: Path) -> Iterator[None]:
    """The attempts of `three_attempts`, each in a process: what Weights & Biases starts ends with it."""
    training = Training(folder / "vit-0123456789ab")
    for first, last, killed in ((0, 6, True), (3, 5, False), (5, 9, False)):
        arguments = (spec, training, TrackConfig(wandb="moods"), first, last)
        process = multiprocessing.get_context("spawn").Process(
            target=attempt_in_a_process, args=arguments, kwargs={"killed": killed}
        )
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if killed else 0)
        yield


def curve_in(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["vit/step"], pytest.approx(row[f"vit/{name}"])) for row in rows if f"vit/{name}" in row]


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files of processes that a test starts. Its name is short: a socket is made in it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)


@pytest.fixture
def wandb_key(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("wandb")
    key = "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c"
    for name, value in {"API_KEY": key, "ERROR_REPORTING": "false", "CACHE_DIR": str(tmp_path / "caches")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    return key


def test_wandb_has_one_run_with_one_curve_of_three_attempts(
    spec: JobSpec,
    wandb_key: str,
    tmp_path: Path,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for _ in three_processes(spec, tmp_path):
        assert len(list(tmp_path.glob("wandb/*run-*"))) == 1
    (path,) = tmp_path.glob("wandb/*run-*/*.wandb")
    records = list(records_of(path))
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.run_id, run.project, run.display_name) == (fingerprint(spec), "moods", f"tiny-{fingerprint(spec)[:12]}")
    assert json.loads(next(field.value_json for field in run.config.update if field.key == "gan"))["width"] == 4
    rows = history_in(path)
    assert (curve_in(rows, "loss"), curve_in(rows, "ccc")) == (LOSS, CCC)
    (metric,) = (record.metric for record in records if record.HasField("metric"))
    assert (metric.glob_name, metric.step_metric) == ("vit/*", "vit/step")
    assert [path.name for path in (*temporary.iterdir(), *(tmp_path / "wandb").iterdir()) if path.name.startswith("tmp")] == []
    # A job's output is its own, and no file has the key.
    assert capfd.readouterr() == ("", "")
    assert [path for path in tmp_path.rglob("*") if path.is_file() and wandb_key.encode() in path.read_bytes()] == []


@pytest.mark.full
def test_wandb_continues_the_run_that_its_server_has(
    spec: JobSpec, wandb_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        for _ in three_processes(spec, tmp_path):
            pass  # mostly the server has a summary of the one that is killed, and no history
    assert server.names == {fingerprint(spec)}
    assert (curve_in(server.history, "loss"), curve_in(server.history, "ccc")) == (LOSS, CCC)
    assert [row["_step"] for row in server.history] == list(range(len(server.history)))
    assert capfd.readouterr() == ("", "")
    assert [path for path in tmp_path.rglob("*") if path.is_file() and wandb_key.encode() in path.read_bytes()] == []


def test_wandb_without_a_key_is_an_error_and_asks_nobody(tmp_path: Path) -> None:
    """At a terminal its library would ask, and wait for an answer."""
    pytest.importorskip("wandb")
    program = """
import pathlib, sys
from job.unattended.sinks import WeightsAndBiases
try:
    WeightsAndBiases("moods", "tiny", "f" * 64, {}, pathlib.Path(sys.argv[1]))
except Exception as error:
    print(error)
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    ours, theirs = pty.openpty()
    os.write(ours, b"3\n")  # so that a question is answered, and the test ends
    subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        env={**clean, "HOME": str(tmp_path)},  # and so without .netrc
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        check=True,
    )
    assert os.read(ours, 4096).decode().splitlines()[1:] == ["No API key configured. Use `wandb login` to log in."]
    os.close(ours)
    os.close(theirs)


def test_a_step_with_several_records_is_sent_once_though_they_come_one_after_another() -> None:
    points = [Point(step, 0.0, {"x": float(number)}) for number, step in enumerate((1, 2, 2, 2, 3))]
    sent, place = after(Place(), points[:2])
    more, place = after(place, points[:3])
    rest, end = after(place, points)
    assert [sent, more, rest] == [points[:2], points[2:3], points[3:]]
    assert after(end, points[:4]) == ([], end)  # it has resumed


class Broken:
    def __init__(self, why: Callable[[], object]) -> None:
        self.why = why

    def place(self, group: str) -> Place:
        self.why()
        return Place()

    def send(self, group: str, points: Sequence[Point], place: Place) -> None: ...

    def close(self, succeeded: bool) -> None: ...


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    monkeypatch.setattr(trackers, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(trackers, "LAST_SECONDS", 0.2)
    released = threading.Event()
    yield released
    released.set()


def test_a_tracker_that_fails_is_named_once_and_one_that_hangs_stops_nothing(
    quick: threading.Event, spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hush7QwErTyK9")

    def fails() -> None:
        raise ConnectionError("https://me:pw@example.org refused hush7QwErTyK9")

    training = Training(tmp_path / "vit-0123456789ab")
    opened: dict[str, Any] = {"mlflow": lambda: Broken(fails), "tensorboard": lambda: Broken(quick.wait)}
    monkeypatch.setattr(trackers, "openers_of", lambda *_: opened)
    with tracked(TrackConfig(tensorboard="/x"), spec, tmp_path) as found:
        found.watch("vit", training.folder)
        for step in range(1, 20):
            training.steps(step)
            time.sleep(0.01)
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith("track.mlflow is off for this attempt: ConnectionError: https://")
    assert "hush" not in said[0]
    assert "me:pw" not in said[0]
    assert said[1:] == ["track tensorboard: no answer for 0.2 s: the last records may be missing there"]


def test_what_a_job_of_seconds_has_recorded_is_sent_at_its_end(tmp_path: Path) -> None:
    """It ends while the tracker waits for the first record."""
    tracking, sent = Trackers(), list[tuple[str, int | bool]]()

    class Ends(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            tracking.watch("gan", tmp_path)
            return True

    class Sink:
        def place(self, group: str) -> Place:
            return Place()

        def send(self, group: str, points: Sequence[Point], place: Place) -> None:
            sent.extend((group, point.step) for point in points)

        def close(self, succeeded: bool) -> None:
            sent.append(("closed", succeeded))

    (tmp_path / "metrics.jsonl").write_text('{"time": 1.0, "phase": "gan", "step": 1, "d_loss": 0.5}\n')
    tracking.run("test", Sink, Ends())
    assert sent == [("gan", 1), ("closed", False)]


@pytest.mark.full
def test_a_job_sends_every_phase_and_its_scores(
    tiny_run: TinyRun, wandb_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from job.pipeline.folders import JobFolders
    from job.pipeline.runner import run_job
    from job.preemption import StopRequest

    monkeypatch.setenv("WANDB_MODE", "offline")
    spec = load_spec(TINY, [f"track.tensorboard={tmp_path / 'tb'}", "track.wandb=moods"])
    run_job(spec, JobFolders(tmp_path / "work", tiny_run.work / "scratch"), "publish", False, StopRequest())
    (folder,) = (tmp_path / "tb").iterdir()
    found = {path.name: accumulator.EventAccumulator(str(path)).Reload() for path in folder.iterdir()}
    assert {"gan", "vit", "test"} <= set(found)
    recorded = read_json_lines(tiny_run.phase("gan") / "metrics.jsonl")
    assert [(e.step, e.value) for e in found["gan"].Scalars("d_loss")] == [
        (record["step"], pytest.approx(record["d_loss"])) for record in recorded if "d_loss" in record
    ]
    metrics = json.loads((tiny_run.published / "metrics.json").read_text())
    (event,) = found["test"].Scalars("stack_valence_ccc")
    assert event.value == pytest.approx(metrics["stack"]["valence"]["ccc"])
    (path,) = (tmp_path / "work").glob("tiny-*/wandb/offline-run-*/*.wandb")
    rows = history_in(path)
    assert {name.partition("/")[0] for row in rows for name in row if "/" in name} >= {"gan", "vit", "test"}
    assert [row["test/stack_valence_ccc"] for row in rows if "test/step" in row] == [metrics["stack"]["valence"]["ccc"]]
