import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from job.preemption import STOP_SIGNALS, StopRequest

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

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
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
def test_the_first_signal_only_answers_the_question_and_the_process_ends_by_itself(
    child: Child, number: signal.Signals
) -> None:
    child.process.send_signal(number)
    assert child.asks() == "stop"
    assert child.asks() == "stop"
    assert child.finishes() == (75, "saved")


def test_a_second_signal_of_the_same_kind_leaves_at_once_with_75(child: Child) -> None:
    child.process.send_signal(signal.SIGTERM)
    assert child.asks() == "stop"
    child.process.send_signal(signal.SIGTERM)
    assert child.finishes() == (75, "")


def test_the_signals_of_a_cluster_that_follow_each_other_are_one_request(child: Child) -> None:
    """SLURM's warning, then its SIGTERM when the time is up: what is being saved must not be cut off."""
    child.process.send_signal(signal.SIGUSR1)
    assert child.asks() == "stop"
    child.process.send_signal(signal.SIGTERM)
    assert child.asks() == "stop"
    assert child.finishes() == (75, "saved")


def test_a_repeat_of_any_signal_leaves_at_once(child: Child) -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM):
        child.process.send_signal(number)
        assert child.asks() == "stop"
    child.process.send_signal(signal.SIGTERM)
    assert child.finishes() == (75, "")


def test_a_warning_after_sigterm_is_no_second_request(child: Child) -> None:
    child.process.send_signal(signal.SIGTERM)
    assert child.asks() == "stop"
    child.process.send_signal(signal.SIGUSR1)
    assert child.asks() == "stop"
    assert child.finishes() == (75, "saved")


def test_the_user_is_told_what_happens_next(child: Child) -> None:
    child.process.send_signal(signal.SIGINT)
    assert child.asks() == "stop"
    _, told = child.process.communicate(timeout=20)
    assert "the same command goes on" in told
    assert "Once more leaves at once" in told
    assert "Traceback" not in told


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


def test_old_handlers_come_back_after_the_block_and_after_an_error_in_it(own_handler: Callable[..., None]) -> None:
    before = handlers()
    with StopRequest():
        assert all(now != then for now, then in zip(handlers(), before, strict=True))
    assert handlers() == before
    with pytest.raises(ZeroDivisionError), StopRequest():
        _ = 1 / 0
    assert handlers() == before
    assert signal.getsignal(signal.SIGUSR1) is own_handler


def test_what_was_asked_is_known_after_the_block(own_handler: Callable[..., None]) -> None:
    with StopRequest() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGXCPU)
    assert should_stop()
    assert should_stop.reason == "received SIGUSR2"


def test_one_request_says_nothing_about_the_next() -> None:
    with StopRequest() as first:
        os.kill(os.getpid(), signal.SIGUSR1)
    with StopRequest() as second:
        assert first()
        assert not second()
