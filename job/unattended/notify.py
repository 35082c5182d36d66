"""Sends a notification when a run is done, has failed, or is interrupted repeatedly: `notify.webhook`, `notify.command`.

Both get the same JSON: the URL, which an environment variable holds, by POST, and the command on its standard input.

    {"event": "done", "run": "deam-0123456789ab", "attempt": 3, "host": "node7", "exit_code": 0, "message": null,
     "text": "deam-0123456789ab: done: …", "published": "/runs/published/deam-0123456789ab", "ccc": {…}}

event: `done` when this attempt has published the run; `failed` after an error; `interrupted` at the start of an attempt, each
time that INTERRUPTIONS_REPORTED more attempts were stopped, killed or hung. text: one sentence. ccc, for a run that is done:
dimension → CCC of the stack and of the best baseline; null if it is not defined.

Each is sent in a thread, for NOTIFY_SECONDS at most. Failures are logged and do not affect the job.
"""

import json
import logging
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from emotion.errors import BusyError, Interrupted, as_failure, printable
from job.config import NotifyConfig
from job.machine.notifications import unusable
from job.results.scores import DIMENSIONS, best_baseline, newest_metrics
from job.run_folder.attempts import CLEAN_STOPS, HUNG, paired, read_attempts
from job.secrets import protect, scrubbed_json

log = logging.getLogger(__name__)

Event = Literal["done", "failed", "interrupted"]

INTERRUPTIONS_REPORTED = 5
NOTIFY_SECONDS = 30.0
TRY_SECONDS = 8.0
TRIES = 3


class Notifier:
    """Sends the notifications of one attempt at a run. published: place of the result, set when this attempt has published it."""

    def __init__(self, config: NotifyConfig, run_folder: Path) -> None:
        self.published: str | None = None
        self._config, self._run_folder = config, run_folder
        self._url = os.environ.get(config.webhook or "", "").strip()
        if config.webhook is not None:
            # Before anything is logged: the URL must not appear in the log or in published files.
            protect(config.webhook, self._url)

    def warn_if_unusable(self) -> None:
        """Log notifications that cannot be sent. Called at the start of an attempt, while the user may still be watching."""
        if found := unusable(self._config):
            text = "; ".join(f"notify.{name}: {problem}" for name, problem in found.items())
            log.warning("%s. The job continues, without a notification of its end.", text)

    def interrupted(self) -> None:
        """Report interruptions. Called at the start of an attempt, because a killed attempt cannot report its own end."""
        with _harmless():
            found = interruptions(read_attempts(self._run_folder))
            count = sum(found)
            # If the last attempt ended otherwise, this count was reported before.
            if found and found[-1] and count % INTERRUPTIONS_REPORTED == 0:
                text = f"{count} attempts were stopped, killed or hung; another one begins"
                self.tell("interrupted", Interrupted.exit_code, text)

    def done(self) -> None:
        if self.published is not None:
            scores = ccc_of(self._run_folder)
            shown = ", ".join(
                f"CCC of {name} {found['stack']:.2f}" for name, found in scores.items() if found["stack"] is not None
            )
            self.tell("done", 0, f"published in {self.published}; {shown}", published=self.published, ccc=scores)

    def failed(self, error: Exception) -> None:
        failure = as_failure(error)
        if not isinstance(failure, Interrupted | BusyError):
            self.tell("failed", failure.exit_code, str(failure))

    def tell(self, event: Event, exit_code: int, message: str, **fields: Any) -> None:
        """Send an event to all destinations. Returns when that is done, or after NOTIFY_SECONDS."""
        attempts = paired(read_attempts(self._run_folder))
        run = self._run_folder.name
        content = {
            **{"event": event, "run": run, "attempt": len(attempts), "host": socket.gethostname()},
            **{"exit_code": exit_code, "message": message, "text": f"{run}: {event}: {message}", **fields},
        }
        body = json.dumps(scrubbed_json(content), allow_nan=False).encode()
        deadline = time.monotonic() + NOTIFY_SECONDS
        hopeless = unusable(self._config)
        for name, problem in hopeless.items():
            log.warning("notify.%s: not sent: %s", name, problem)
        threads = [
            threading.Thread(target=_tried, args=(name, send, body), name=f"notify.{name}", daemon=True)
            for name, send in self._ways()
            if name not in hopeless
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning("%s: no end after %g s; the job does not wait for it", thread.name, NOTIFY_SECONDS)

    def _ways(self) -> Iterator[tuple[str, Callable[[bytes], str | None]]]:
        if self._config.command is not None:
            command = self._config.command
            yield "command", lambda body: run_command(command, body)
        if self._config.webhook is not None:
            yield "webhook", lambda body: post(self._url, body)


@contextmanager
def notified(config: NotifyConfig, run_folder: Path) -> Iterator[Notifier]:
    """Notify about the end of the block: an error, or a run that this attempt has published."""
    notifier = Notifier(config, run_folder)
    try:
        yield notifier
    except Exception as error:
        with _harmless():
            notifier.failed(error)
        raise
    with _harmless():
        notifier.done()


@contextmanager
def _harmless() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - nothing about a notification may harm the job
        log.warning("notify: %s", type(error).__name__)


def interruptions(events: list[dict[str, Any]]) -> list[bool]:
    """Of each attempt, whether it was stopped on request, killed, or hung."""
    return [end is None or end.get("reason") in (*CLEAN_STOPS, HUNG) for _, end in paired(events)]


def ccc_of(run_folder: Path) -> dict[str, dict[str, float | None]]:
    """Dimension → CCC of the stack and of the best baseline, from the newest metrics.json of a run; None for missing values."""
    metrics = newest_metrics(run_folder) or {"stack": {}, "baselines": {}}
    found: dict[str, dict[str, float | None]] = {}
    for dimension in DIMENSIONS:
        best = best_baseline(metrics, dimension)
        own = metrics["stack"].get(dimension, {}).get("ccc")
        found[dimension] = {"stack": own, "best_baseline": None if best is None else best[1]}
    return found


def post(url: str, body: bytes) -> None:
    """POST JSON to a URL that begins with https:// or http://."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", "User-Agent": "emotion-job"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=TRY_SECONDS) as answer:  # noqa: S310 - the scheme is one of two
        answer.read(1)


def run_command(command: tuple[str, ...], body: bytes) -> str | None:
    """Run a command with the JSON on its standard input. Returns the problem, None for success. Its output is discarded."""
    try:
        done = subprocess.run(
            command,
            input=body,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=TRY_SECONDS,
            start_new_session=True,  # signals to the job do not reach it
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{printable(command[0])} was ended after {TRY_SECONDS:g} s"
    return f"{printable(command[0])} ended with {done.returncode}" if done.returncode else None


def _tried(name: str, send: Callable[[bytes], str | None], body: bytes) -> None:
    """Send with a few retries. Runs in a thread."""
    problem = None
    for number in range(TRIES):
        if number:
            time.sleep(number)
        try:
            problem = send(body)
        except urllib.error.HTTPError as error:
            problem = f"the server answered {error.code}"
        except Exception as error:  # noqa: BLE001 - as above
            # Without the message, which may hold the URL.
            problem = f"{type(error).__name__}: {getattr(error, 'reason', None) or getattr(error, 'strerror', None) or ''}"
        if problem is None:
            log.info("notify.%s: sent", name)
            return
    log.warning("notify.%s: not sent after %d tries: %s", name, TRIES, problem)
