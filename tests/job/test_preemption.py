import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from emotion.errors import Interrupted, SpecError, Stopped
from job.config import PreemptionConfig
from job.preemption import EXIT_AT_SECOND, SAME_REQUEST_SECONDS, SPOT_POLL_SECONDS, STOP_SIGNALS, StopRequest
from job.spot import spot_notice
from tests.conftest import TINY, TinyRun

# Asks at every step, as the phases do, and answers each line it is sent with what it found.
CHILD = """
import sys
from job.preemption import StopRequest
with StopRequest() as should_stop:
    print("ready", flush=True)
    for line in sys.stdin:
        print("stop" if should_stop() else "go on", flush=True)
print("saved", flush=True)
sys.exit(75 if should_stop() else 0)
"""


class Child:
    """A process within its StopRequest."""

    def __init__(self, program: str = CHILD) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self.read() == "ready"

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def asks(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        return self.read()

    def finishes(self) -> tuple[int, str]:
        """Exit code and what it printed after its last answer."""
        printed, _ = self.process.communicate(timeout=20)
        return self.process.returncode, printed.strip()


@pytest.fixture
def child() -> Iterator[Child]:
    started = Child()
    yield started
    started.process.kill()
    started.process.communicate()


def test_without_a_signal_nothing_stops(child: Child) -> None:
    assert child.asks() == "go on"
    assert child.finishes() == (0, "saved")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_first_signal_only_sets_the_flag_and_the_process_ends_by_itself(child: Child, number: signal.Signals) -> None:
    child.process.send_signal(number)
    assert child.asks() == "stop"
    assert child.asks() == "stop"
    assert child.finishes() == (75, "saved")


@pytest.mark.parametrize("number", EXIT_AT_SECOND)
def test_a_second_signal_of_the_same_kind_exits_at_once_with_75(child: Child, number: signal.Signals) -> None:
    child.process.send_signal(number)
    assert child.asks() == "stop"
    time.sleep(SAME_REQUEST_SECONDS)
    child.process.send_signal(number)
    assert child.finishes() == (75, "")


def test_a_signal_that_is_delivered_twice_is_one_request(child: Child) -> None:
    """By a launcher and by the process group, for example."""
    for _ in range(2):
        child.process.send_signal(signal.SIGTERM)
        assert child.asks() == "stop"
    assert child.finishes() == (75, "saved")


@pytest.mark.parametrize("number", [signal.SIGXCPU, signal.SIGUSR1, signal.SIGUSR2])
def test_a_repeated_warning_is_still_a_warning(child: Child, number: signal.Signals) -> None:
    """The kernel sends SIGXCPU every second."""
    child.process.send_signal(number)
    assert child.asks() == "stop"
    time.sleep(SAME_REQUEST_SECONDS)
    child.process.send_signal(number)
    assert child.asks() == "stop"
    assert child.finishes() == (75, "saved")


def test_the_signals_of_a_cluster_that_follow_each_other_are_one_request(child: Child) -> None:
    """SLURM's warning, then its SIGTERM when the time is up: what is being saved must not be cut off."""
    child.process.send_signal(signal.SIGUSR1)
    assert child.asks() == "stop"
    child.process.send_signal(signal.SIGTERM)
    assert child.asks() == "stop"
    assert child.finishes() == (75, "saved")


def test_a_second_signal_exits_at_once_whichever_came_first(child: Child) -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM):
        child.process.send_signal(number)
        assert child.asks() == "stop"
    time.sleep(SAME_REQUEST_SECONDS)
    child.process.send_signal(signal.SIGTERM)
    assert child.finishes() == (75, "")


def test_a_warning_after_sigterm_is_no_second_request(child: Child) -> None:
    child.process.send_signal(signal.SIGTERM)
    assert child.asks() == "stop"
    child.process.send_signal(signal.SIGUSR1)
    assert child.asks() == "stop"
    assert child.finishes() == (75, "saved")


def test_the_user_sees_what_happens_next(child: Child) -> None:
    child.process.send_signal(signal.SIGINT)
    assert child.asks() == "stop"
    _, printed = child.process.communicate(timeout=20)
    assert "the same command resumes" in printed
    assert "A second signal exits at once" in printed
    assert "Traceback" not in printed


def test_a_command_that_saves_nothing_does_not_promise_to_resume() -> None:
    child = Child(CHILD.replace("StopRequest()", "StopRequest(saves=False)"))
    child.process.send_signal(signal.SIGINT)
    assert child.asks() == "stop"
    _, printed = child.process.communicate()
    assert printed == "\nstop requested: nothing is saved; the same command starts again. A second signal exits at once.\n"


@pytest.mark.full
@pytest.mark.parametrize("number", EXIT_AT_SECOND)
def test_a_prediction_that_is_stopped_says_how_far_it_came_and_promises_no_resume(
    number: signal.Signals, tiny_run: TinyRun, tmp_path: Path
) -> None:
    song = next((tiny_run.published / "samples").glob("*.wav"))
    command = [sys.executable, "-m", "job", "predict", str(tiny_run.published), *[str(song)] * 300]
    errors = tmp_path / "errors"
    with errors.open("w") as stream, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True) as process:
        assert process.stdout is not None
        rows = [process.stdout.readline(), process.stdout.readline()]  # the header and a prediction
        process.send_signal(number)
        rows += process.stdout.readlines()
    said, done = errors.read_text(encoding="utf-8"), len(rows) - 1
    assert process.returncode == 75, said
    assert f"emotion-job: predict: stopped after {done} of 300 files; the same command starts again\n" in said
    assert "stop requested: nothing is saved; the same command starts again. A second signal exits at once." in said
    assert "resume" not in said


# In this process


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in STOP_SIGNALS]


@pytest.fixture
def own_handler() -> Iterator[Callable[..., None]]:
    def handler(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGUSR1, handler)
    yield handler
    signal.signal(signal.SIGUSR1, before)


def test_old_handlers_are_restored_after_the_block_and_after_an_error_in_it(own_handler: Callable[..., None]) -> None:
    before = handlers()
    with StopRequest():
        assert all(now != then for now, then in zip(handlers(), before, strict=True))
    assert handlers() == before
    with pytest.raises(ZeroDivisionError), StopRequest():
        _ = 1 / 0
    assert handlers() == before
    assert signal.getsignal(signal.SIGUSR1) is own_handler


def test_the_reason_is_known_after_the_block(own_handler: Callable[..., None]) -> None:
    with StopRequest() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGXCPU)
    assert should_stop()
    assert should_stop.reason == "received SIGUSR2"


def test_a_new_stop_request_does_not_know_the_one_before() -> None:
    with StopRequest() as first:
        os.kill(os.getpid(), signal.SIGUSR1)
    with StopRequest() as second:
        assert first()
        assert not second()


def test_a_forked_child_ignores_stop_signals_so_that_it_can_finish() -> None:
    hears, tells = os.pipe()
    with StopRequest() as should_stop:
        child = os.fork()
        if child == 0:
            os.read(hears, 1)
            os._exit(7 if not should_stop() else 75)
        for _ in range(2):
            os.kill(child, signal.SIGTERM)
            time.sleep(SAME_REQUEST_SECONDS)
        os.write(tells, b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert not should_stop()


# Sends the signal when the command line imports its first library.
STRUCK = """
import os, signal, sys
class Strike:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Strike())
"""
ENTRIES = {
    "python -m job": "import runpy; runpy.run_module('job', run_name='__main__', alter_sys=True)",
    "emotion-job": "from job.entry import main; main()",
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_signal_while_python_imports_the_command_line_stops_the_job(entry: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STRUCK + ENTRIES[entry], "run", str(TINY), "--work", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 75, found.stderr
    assert "received SIGTERM" in found.stderr
    assert not list(tmp_path.glob("scratch/*/receipt.json"))


def send_early(number: signal.Signals) -> Callable[[], None]:
    """For the child before exec: the signal waits, as when `env --block-signal` or the launcher has started the command."""

    def send() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [number])
        os.kill(os.getpid(), number)

    return send


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_before_python_has_started_stops_the_job_if_it_was_blocked(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "job", "run", str(TINY), "--work", str(tmp_path)]
    found = subprocess.run(command, preexec_fn=send_early(number), capture_output=True, text=True)
    assert found.returncode == 75, found.stderr
    assert f"received {number.name}" in found.stderr


def test_commands_that_cannot_resume_end_by_the_signal() -> None:
    command = [sys.executable, "-m", "job", "check", str(TINY)]
    assert subprocess.run(command, preexec_fn=send_early(signal.SIGTERM)).returncode == -signal.SIGTERM


ON_A_TERMINAL = """
import sys, time
from pathlib import Path
from job.__main__ import say
from job.preemption import StopRequest
from tqdm import tqdm
with StopRequest() as should_stop:
    bar = tqdm(total=1000)
    say("ready")
    for _ in range(20):
        time.sleep(0.05)
        bar.update()
        bar.refresh()
    bar.close()
    say("and more")
Path(sys.argv[1]).write_text(f"went on, {should_stop()}")
"""


@pytest.mark.parametrize("at_first", [signal.SIG_DFL, signal.SIG_IGN], ids=["plain", "under nohup"])
def test_a_terminal_that_is_closed_does_not_end_a_job(at_first: signal.Handlers, tmp_path: Path) -> None:
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, at_first)
        # -u: the program itself ends without the flush of Python, which would fail.
        os.execv(sys.executable, [sys.executable, "-u", "-c", ON_A_TERMINAL, str(tmp_path / "said")])
    printed = b""
    while b"ready" not in printed:
        printed += os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / "said").read_text() == "went on, False"


# A STOP file


def asked_by_now(should_stop: StopRequest) -> bool:
    """Asks like a loop, which is answered within a second or so."""
    return any(should_stop() or time.sleep(0.05) for _ in range(200))


def test_a_stop_file_stops_the_job_for_good_and_the_job_deletes_it(tmp_path: Path) -> None:
    work, run_folder = tmp_path, tmp_path / "run"
    run_folder.mkdir()
    with StopRequest() as should_stop:
        should_stop.watch([work, run_folder], PreemptionConfig())
        assert not should_stop()
        (run_folder / "STOP").touch()
        assert asked_by_now(should_stop)
        leaving = should_stop.as_requested(Interrupted("gan: stopped after step 3 of 9"))
        assert isinstance(leaving, Stopped)
        assert leaving.exit_code == 76
        assert str(leaving) == f"gan: stopped after step 3 of 9 (there is {run_folder / 'STOP'})"
        assert (run_folder / "STOP").exists()
    assert not (run_folder / "STOP").exists()


def test_a_job_stopped_for_another_reason_leaves_the_stop_file_for_the_next(tmp_path: Path) -> None:
    with StopRequest() as should_stop:
        should_stop.watch([tmp_path], PreemptionConfig())
        os.kill(os.getpid(), signal.SIGUSR1)
        (tmp_path / "STOP").touch()
        assert asked_by_now(should_stop)
        assert type(should_stop.as_requested(Interrupted("stopped"))) is Interrupted
    assert (tmp_path / "STOP").exists()


@pytest.mark.full
def test_a_stop_file_ends_the_command_with_76_and_the_next_run_resumes(
    emotion_job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "STOP").touch()
    arguments = ("run", TINY, "--work", tmp_path, "--until", "stage")
    stopped = emotion_job(*arguments)
    assert stopped.returncode == 76
    assert f"there is {tmp_path / 'STOP'}" in stopped.stderr
    assert emotion_job(*arguments).returncode == 0
    events = [json.loads(line) for line in next(tmp_path.glob("*/attempts.jsonl")).read_text().splitlines()]
    assert [(event["attempt"], event.get("reason"), event.get("exit_code")) for event in events] == [
        (1, None, None),
        (1, "Stopped", 76),
        (2, None, None),
        (2, "done", 0),
    ]


# A time limit


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    return monkeypatch


def test_the_job_stops_grace_seconds_before_the_time_limit(no_slurm: pytest.MonkeyPatch) -> None:
    should_stop = StopRequest()
    began = time.monotonic()
    should_stop.watch([], PreemptionConfig(time_limit_minutes=2 / 60, grace_seconds=1))
    assert not should_stop()
    assert asked_by_now(should_stop)
    assert time.monotonic() - began >= 0.9
    assert type(should_stop.as_requested(Interrupted("stopped"))) is Interrupted


@pytest.mark.parametrize("limit", ["spec", "slurm"])
def test_a_clock_that_is_set_to_yesterday_does_not_put_the_time_limit_off(no_slurm: pytest.MonkeyPatch, limit: str) -> None:
    now = time.time
    if limit == "slurm":
        no_slurm.setenv("SLURM_JOB_END_TIME", str(now() + 2))
    should_stop = StopRequest()
    should_stop.watch([], PreemptionConfig(time_limit_minutes=2 / 60 if limit == "spec" else None, grace_seconds=1))
    no_slurm.setattr(time, "time", lambda: now() - 86400)
    assert not should_stop()
    assert asked_by_now(should_stop)


def test_the_time_limit_of_slurm_counts_and_the_nearer_of_two_does(no_slurm: pytest.MonkeyPatch) -> None:
    no_slurm.setenv("SLURM_JOB_END_TIME", str(time.time() + 61))
    should_stop = StopRequest()
    should_stop.watch([], PreemptionConfig(time_limit_minutes=1000))
    assert not should_stop()
    assert asked_by_now(should_stop)
    assert should_stop.reason == "the time limit is near"


@pytest.mark.parametrize(
    ("minutes", "slurm", "expected"),
    [
        (0.5, None, "preemption.time_limit_minutes: 30 s are left, of which preemption.grace_seconds 60"),
        (None, -3600, "SLURM_JOB_END_TIME: 0 s are left"),
        (None, "tomorrow", "SLURM_JOB_END_TIME is 'tomorrow', expected seconds since 1970"),
        (None, "nan", "SLURM_JOB_END_TIME is 'nan', expected seconds since 1970"),
    ],
)
def test_a_time_limit_that_leaves_no_time_to_compute_is_refused(
    no_slurm: pytest.MonkeyPatch, minutes: float | None, slurm: str | int | None, expected: str
) -> None:
    if slurm is not None:
        no_slurm.setenv("SLURM_JOB_END_TIME", str(time.time() + slurm) if isinstance(slurm, int) else slurm)
    with pytest.raises(SpecError, match=expected):
        StopRequest().watch([], PreemptionConfig(time_limit_minutes=minutes))


# Notices of spot instances


class Metadata(ThreadingHTTPServer):
    """A machine's metadata service: what `answers` says by path, or status 500 where it says nothing."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.answers: dict[str, tuple[int, str]] = {}
        self.required: dict[str, str] = {}
        self.asked: list[str] = []
        self.place = f"127.0.0.1:{self.server_address[1]}"


class Request(BaseHTTPRequestHandler):
    server: Metadata

    def answer(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        status, body = self.server.answers.get(self.path.split("?")[0], (500, "out of order"))
        if self.command == "GET" and any(self.headers.get(name) != value for name, value in self.server.required.items()):
            status, body = 401, "who are you?"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_GET = do_PUT = answer  # noqa: N815 - the names of http.server

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


AWS_ACTION, AWS_TOKEN = "/latest/meta-data/spot/instance-action", "/latest/api/token"
GCP_PREEMPTED = "/computeMetadata/v1/instance/preempted"
AZURE_EVENTS, AZURE_NAME = "/metadata/scheduledevents", "/metadata/instance/compute/name"


def test_aws_is_asked_with_a_token_and_gives_notice_two_minutes_before(metadata: Metadata) -> None:
    metadata.required = {"X-aws-ec2-metadata-token": "open sesame"}
    metadata.answers = {AWS_TOKEN: (200, "open sesame"), AWS_ACTION: (404, "not found")}
    assert spot_notice("aws", metadata.place) is None
    metadata.answers[AWS_ACTION] = (200, '{"action": "terminate", "time": "2026-11-22T08:22:00Z"}')
    assert spot_notice("aws", metadata.place) == "terminate at 2026-11-22T08:22:00Z"
    assert metadata.asked == [f"PUT {AWS_TOKEN}", f"GET {AWS_ACTION}"] * 2


def test_gcp_gives_notice_by_one_word(metadata: Metadata) -> None:
    metadata.required = {"Metadata-Flavor": "Google"}
    metadata.answers = {GCP_PREEMPTED: (200, "FALSE")}
    assert spot_notice("gcp", metadata.place) is None
    metadata.answers = {GCP_PREEMPTED: (200, "TRUE")}
    assert spot_notice("gcp", metadata.place) == "preempted"


def azure_events(kind: str, machine: str) -> tuple[int, str]:
    event = {"EventId": "A1", "EventType": kind, "Resources": [machine], "NotBefore": "Mon, 19 Sep 2016 18:29:47 GMT"}
    return 200, json.dumps({"DocumentIncarnation": 1, "Events": [event]})


def test_azure_also_lists_events_of_other_machines_which_are_ignored(metadata: Metadata) -> None:
    metadata.required = {"Metadata": "true"}
    metadata.answers = {AZURE_NAME: (200, "worker_3"), AZURE_EVENTS: (200, '{"DocumentIncarnation": 1, "Events": []}')}
    assert spot_notice("azure", metadata.place) is None
    for kind, machine in (("Reboot", "worker_3"), ("Preempt", "worker_4")):
        metadata.answers[AZURE_EVENTS] = azure_events(kind, machine)
        assert spot_notice("azure", metadata.place) is None
    metadata.answers[AZURE_EVENTS] = azure_events("Preempt", "worker_3")
    assert spot_notice("azure", metadata.place) == "Preempt not before Mon, 19 Sep 2016 18:29:47 GMT"


@pytest.mark.full
def test_a_notice_after_failed_polls_is_received(metadata: Metadata, no_slurm: pytest.MonkeyPatch) -> None:
    # A proxy of the environment must not be asked for it.
    no_slurm.setenv("http_proxy", "http://127.0.0.1:1")
    with StopRequest() as should_stop:
        should_stop.watch([], PreemptionConfig(spot="gcp"), metadata.place)
        while not metadata.asked:
            assert not should_stop()
            time.sleep(0.05)
        metadata.answers = {GCP_PREEMPTED: (200, "TRUE")}
        assert any(should_stop() or time.sleep(0.05) for _ in range(1000))
        assert should_stop.reason == "gcp takes this machine away: preempted"
    assert len(metadata.asked) == 2


def test_without_preemption_spot_no_service_is_polled(metadata: Metadata, no_slurm: pytest.MonkeyPatch) -> None:
    with StopRequest() as should_stop:
        should_stop.watch([], PreemptionConfig(), metadata.place)
        time.sleep(SPOT_POLL_SECONDS / 10)
        assert not [thread for thread in threading.enumerate() if thread.name == "spot"]
    assert metadata.asked == []


@pytest.mark.parametrize("answer", [(200, "[]"), (200, "null"), (200, '{"Events": [{}]}'), (200, "<html>"), (403, "")])
@pytest.mark.parametrize("platform", ["aws", "gcp", "azure"])
def test_an_answer_that_cannot_be_read_is_no_notice(metadata: Metadata, platform: str, answer: tuple[int, str]) -> None:
    metadata.answers = dict.fromkeys((AWS_TOKEN, AWS_ACTION, GCP_PREEMPTED, AZURE_EVENTS, AZURE_NAME), answer)
    try:
        assert spot_notice(platform, metadata.place) is None
    except OSError:
        return
