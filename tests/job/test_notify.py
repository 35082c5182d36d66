"""Notifications, to a real server on this machine and to real commands."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from emotion.errors import BusyError, Interrupted, SpecError
from job.config import NotifyConfig
from job.machine.notifications import check_notifications
from job.pipeline.folders import JobFolders
from job.pipeline.phases import PROGRESS_FILES
from job.pipeline.runner import run_job
from job.preemption import StopRequest
from job.run_folder.attempts import recorded_attempt
from job.spec.load import load_spec
from job.spec.model import fingerprint
from job.unattended import notify
from job.unattended.notify import Notifier, notified
from tests.conftest import SECRET, TINY, TinyRun

TOKEN = "T0k3nOfTheWebhook"


class Hook:
    """A server that keeps what is posted. answers: status codes, the last for ever; None: never answers."""

    def __init__(self, answers: list[int | None]) -> None:
        self.received: list[tuple[str, dict[str, Any]]] = []
        self.ended = threading.Event()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                hook.received.append((self.path, content))
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                if answer is None:
                    hook.ended.wait()
                else:
                    self.send_response(answer)
                    self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/{TOKEN}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Hook]]:
    """hook(500, 200) is a server whose URL is in the variable TEST_HOOK."""
    hooks = []

    def start(*answers: int | None) -> Hook:
        hooks.append(Hook([*answers]))
        monkeypatch.setenv("TEST_HOOK", hooks[-1].url)
        return hooks[-1]

    yield start
    for one in hooks:
        one.ended.set()
        one.server.shutdown()
        one.server.server_close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify.time, "sleep", lambda _: None)
    monkeypatch.setattr("job.secrets._protected", set())


def test_webhook_and_command_get_the_same_json_of_a_failure_without_secrets(
    hook: Callable[..., Hook], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = hook(500, 200)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    command = (sys.executable, "-c", f"import sys; open({str(tmp_path / 'got')!r}, 'w').write(sys.stdin.read())")
    with pytest.raises(PermissionError), notified(NotifyConfig(webhook="TEST_HOOK", command=command), tmp_path):
        raise PermissionError(13, f"denied for {SECRET} at {server.url}", "/data/DEAM")
    content = json.loads((tmp_path / "got").read_text())
    assert server.received == [(f"/{TOKEN}", content)] * 2  # a server that fails is asked again
    assert (content["event"], content["run"], content["exit_code"]) == ("failed", tmp_path.name, 77)
    assert "/data/DEAM" in content["message"]
    assert content["text"].startswith(f"{tmp_path.name}: failed: ")
    assert SECRET not in json.dumps(content)
    assert TOKEN not in json.dumps(content)


@pytest.mark.parametrize("error", [Interrupted("stopped"), BusyError("another job")])
def test_a_stop_and_another_owner_are_no_failures(hook: Callable[..., Hook], tmp_path: Path, error: Exception) -> None:
    server = hook(200)
    with pytest.raises(type(error)), notified(NotifyConfig(webhook="TEST_HOOK"), tmp_path):
        raise error
    with notified(NotifyConfig(webhook="TEST_HOOK"), tmp_path):
        pass  # nothing was published by this attempt
    assert server.received == []


def test_what_no_retry_changes_is_said_at_the_start_and_not_tried(
    hook: Callable[..., Hook], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = NotifyConfig(webhook="TEST_HOOK", command=("nosuchprog",))
    Notifier(config, tmp_path).warn_if_unusable()
    (start,) = [record.getMessage() for record in caplog.records]
    assert "notify.webhook: the environment variable TEST_HOOK is not set" in start
    assert "notify.command: there is no program nosuchprog" in start
    caplog.clear()
    with pytest.raises(ZeroDivisionError), notified(config, tmp_path):
        raise ZeroDivisionError
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(": ")[0] for line in said] == ["notify.webhook", "notify.command"]
    assert not any("tries" in line for line in said)
    warnings = [*check_notifications(config)]
    assert [(check.name, check.status) for check in warnings] == [("notify.webhook", "warn"), ("notify.command", "warn")]
    hook(200)
    caplog.clear()
    good = NotifyConfig(webhook="TEST_HOOK", command=(sys.executable,))
    Notifier(good, tmp_path).warn_if_unusable()
    assert (caplog.records, [*check_notifications(good)]) == ([], [])


def test_every_fifth_interruption_is_told(hook: Callable[..., Hook], tmp_path: Path) -> None:
    server = hook(200)
    (tmp_path / "scratch").mkdir()
    told = []
    for number in range(1, 12):
        Notifier(NotifyConfig(webhook="TEST_HOOK"), tmp_path).interrupted()
        told.append(len(server.received))
        with pytest.raises(Interrupted), recorded_attempt(tmp_path, number, tmp_path / "scratch", PROGRESS_FILES, dict):
            raise Interrupted("stopped")
    assert told == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2]
    assert server.received[0][1]["event"] == "interrupted"
    assert "5 attempts were stopped, killed or hung" in server.received[0][1]["message"]


def test_a_start_after_an_attempt_that_was_not_interrupted_tells_of_no_interruptions(
    hook: Callable[..., Hook], tmp_path: Path
) -> None:
    server = hook(200)
    (tmp_path / "scratch").mkdir()
    five = [Interrupted("stopped")] * 5
    told = []
    for number, ending in enumerate([*five, ZeroDivisionError(), None, ZeroDivisionError(), *five, None], 1):
        Notifier(NotifyConfig(webhook="TEST_HOOK"), tmp_path).interrupted()
        told += [number] * (len(server.received) - len(told))
        recorded = recorded_attempt(tmp_path, number, tmp_path / "scratch", PROGRESS_FILES, dict)
        with suppress(Interrupted, ZeroDivisionError), recorded:
            if ending is not None:
                raise ending
    assert told == [6, 14]


def test_a_notification_that_fails_or_hangs_changes_nothing_and_leaves_no_url_in_the_log(
    hook: Callable[..., Hook], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "TRY_SECONDS", 0.2)
    monkeypatch.setattr(notify, "NOTIFY_SECONDS", 2.0)
    answers = [404, None]
    urls = [hook(answer).url for answer in answers] + [
        f"http://127.0.0.1:9/{TOKEN}",
        f"ftp://a/{TOKEN}",
        f"http://127.0.0.1:9/a b{TOKEN}",
        "",
    ]
    for url in urls:
        monkeypatch.setenv("TEST_HOOK", url)
        with pytest.raises(ZeroDivisionError), notified(NotifyConfig(webhook="TEST_HOOK"), tmp_path):
            raise ZeroDivisionError
    slow = (sys.executable, "-c", "import time; time.sleep(1000)")
    for command in (slow, ("/no/such/program",), (sys.executable, "-c", "raise SystemExit(3)")):
        with pytest.raises(ZeroDivisionError), notified(NotifyConfig(command=command), tmp_path):
            raise ZeroDivisionError
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(urls) + 3
    assert all(line.startswith("notify.") for line in said)
    assert "not sent after 3 tries: the server answered 404" in said[0]
    assert "not sent after 3 tries: TimeoutError" in said[1]
    assert "ended with 3" in said[-1]
    assert TOKEN not in "".join(said)


def test_a_job_tells_what_it_has_published_and_nothing_it_leaves_holds_the_url(
    hook: Callable[..., Hook], tiny_run: TinyRun, tmp_path: Path
) -> None:
    server, work, destination = hook(200), tmp_path / "work", tmp_path / "published"
    shutil.copytree(tiny_run.run_folder, work / tiny_run.run_folder.name)
    settings = ("notify.webhook=TEST_HOOK", f"artifacts.destination={destination}")
    command = [sys.executable, "-m", "job", "run", str(TINY), "--work", str(work), "--scratch", str(tiny_run.work / "scratch")]
    command += [word for setting in settings for word in ("--set", setting)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert found.returncode == 0, found.stderr
    # All is done, and nothing is sent.
    run_job(load_spec(TINY, settings), JobFolders(work, tiny_run.work / "scratch"), "publish", False, StopRequest())
    ((path, content),) = server.received
    assert path == f"/{TOKEN}"
    assert (content["event"], content["published"]) == ("done", str(destination / tiny_run.run_folder.name))
    stack = json.loads((tiny_run.published / "metrics.json").read_text())["stack"]
    assert {name: found["stack"] for name, found in content["ccc"].items()} == {
        name: stack[name]["ccc"] for name in content["ccc"]
    }
    left = [file for file in (*work.rglob("*"), *destination.rglob("*")) if file.is_file()]
    assert (destination / tiny_run.run_folder.name / "manifest.json") in left
    assert not [file for file in left if TOKEN.encode() in file.read_bytes()]
    assert TOKEN not in found.stderr + found.stdout


def test_who_is_told_is_in_no_key_and_a_url_in_its_place_is_refused_and_not_repeated(tmp_path: Path) -> None:
    spec = load_spec(TINY, ["notify.webhook=MY_HOOK", "notify.command=[mail, me]"])
    assert spec.notify.command == ("mail", "me")
    assert fingerprint(spec) == fingerprint(load_spec(TINY, []))
    (tmp_path / "spec.yaml").write_text(f"{TINY.read_text()}notify: {{webhook: 'https://example.org/{TOKEN}'}}\n")
    with pytest.raises(SpecError, match=r"notify\.webhook: expected the name of an environment variable") as raised:
        load_spec(tmp_path / "spec.yaml", [])
    assert TOKEN not in str(raised.value)
