"""Leases of real processes: forked, killed, put to sleep, and raced."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count, cycle
from pathlib import Path

import pytest

from emotion.errors import BusyError, Interrupted
from job.preemption import StopRequest
from job.run_folder.lease import boot_id, leased

ROOT = Path(__file__).parents[2]
BEAT_SECONDS = 0.02
LONG_SECONDS = 60.0
"""Never reached; only a holder that does not live is watched for so long."""


class Process:
    """A forked process that runs `work(report, wait)`: `report` sends a line to the test, `wait` waits for the test."""

    def __init__(self, work: Callable[[Callable[[str], None], Callable[[], None]], None]) -> None:
        heard, telling = os.pipe()
        waiting, letting = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(heard)
            os.close(letting)
            try:
                work(lambda line: void(os.write(telling, line.encode() + b"\n")), lambda: void(os.read(waiting, 1)))
            finally:
                os._exit(0)
        os.close(telling)
        os.close(waiting)
        self._heard, self._letting = os.fdopen(heard), letting

    def says(self) -> str:
        return self._heard.readline().strip()

    def go_on(self) -> None:
        os.write(self._letting, b"x")

    def end(self) -> None:
        os.close(self._letting)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self._heard.close()


def void(_: object) -> None:
    pass


def own(folder: Path, watch_seconds: float = LONG_SECONDS) -> Callable[[Callable[[str], None], Callable[[], None]], None]:
    """Wait for a signal, own the folder until the next one, and report how that went."""

    def work(report: Callable[[str], None], wait: Callable[[], None]) -> None:
        wait()
        try:
            with leased(folder, StopRequest(), beat_seconds=BEAT_SECONDS, watch_seconds=watch_seconds) as attempt:
                report(f"owns {attempt}")
                wait()
                report("leaves")
        except BusyError as error:
            report(f"busy {error}")

    return work


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def starting(work: Callable[[Callable[[str], None], Callable[[], None]], None]) -> Process:
        started.append(Process(work))
        started[-1].go_on()
        return started[-1]

    yield starting
    for process in started:
        process.end()


def leave_lease(folder: Path, attempt: int, boot: str, beats: int = 3, released: bool = False) -> Path:
    """What an attempt of long ago has left."""
    path = folder / f".lease-{attempt}.json"
    facts = {"attempt": attempt, "host": "node7", "pid": 1, "boot_id": boot, "beats": beats, "released": released}
    path.write_text(json.dumps(facts))
    return path


def own_for_ever(folder: Path) -> Callable[[Callable[[str], None], Callable[[], None]], None]:
    """Wait for a signal, then own the folder for ever."""

    def work(report: Callable[[str], None], wait: Callable[[], None]) -> None:
        wait()
        with leased(folder, StopRequest(), beat_seconds=BEAT_SECONDS) as attempt:
            report(f"owns {attempt}")
            signal.pause()

    return work


def beat_for_ever(folder: Path) -> None:
    beats = 4
    while True:
        leave_lease(folder, 4, "another start of another machine", beats)
        beats += 1
        time.sleep(BEAT_SECONDS)


def says_while(waiting: Process, work: Callable[[Callable[[str], None], Callable[[], None]], None]) -> str:
    """What a process says while another one, which is killed then, does this work."""
    working = Process(work)
    said = waiting.says()
    os.kill(working.pid, signal.SIGKILL)
    working.end()
    return said


def owned_now(folder: Path, watch_seconds: float) -> tuple[int, float]:
    """The number of our attempt, and how long it took to get it."""
    began = time.monotonic()
    with leased(folder, StopRequest(), beat_seconds=BEAT_SECONDS, watch_seconds=watch_seconds) as attempt:
        return attempt, time.monotonic() - began


def test_attempts_are_numbered_from_one_and_old_lease_files_are_deleted(tmp_path: Path) -> None:
    assert [owned_now(tmp_path, LONG_SECONDS)[0] for _ in range(3)] == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == [".lease-3.json"]


def test_the_lease_of_a_process_killed_on_this_machine_is_taken_over_at_once(
    tmp_path: Path, start: Callable[..., Process]
) -> None:
    killed = start(own(tmp_path))
    assert killed.says() == "owns 1"
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.says() == ""
    # Watching would take a minute.
    assert owned_now(tmp_path, LONG_SECONDS) == (2, pytest.approx(0, abs=LONG_SECONDS / 2))


def test_a_living_owner_is_named_and_keeps_its_lease(tmp_path: Path, start: Callable[..., Process]) -> None:
    first = start(own(tmp_path))
    assert first.says() == "owns 1"
    with pytest.raises(BusyError, match=rf"process {first.pid} on {socket.gethostname()} \(attempt 1\)"):
        owned_now(tmp_path, LONG_SECONDS)
    first.go_on()
    assert first.says() == "leaves"


def test_a_lease_of_another_machine_is_taken_over_when_its_counter_stands_still(tmp_path: Path) -> None:
    leave_lease(tmp_path, 4, "another start of another machine")
    attempt, seconds = owned_now(tmp_path, watch_seconds=0.3)
    assert attempt == 5
    assert seconds >= 0.3


def test_an_owner_on_another_machine_whose_counter_moves_is_named(tmp_path: Path, start: Callable[..., Process]) -> None:
    leave_lease(tmp_path, 4, "another start of another machine")
    waiting = start(own(tmp_path))
    # No lock is held; only the number tells.
    said = says_while(waiting, lambda _tell, _wait: beat_for_ever(tmp_path))
    assert said.startswith(f"busy {tmp_path}: process 1 on node7 (attempt 4) is running this spec here")


def test_a_released_lease_is_taken_over_at_once_on_any_machine(tmp_path: Path) -> None:
    leave_lease(tmp_path, 4, "another start of another machine", released=True)
    assert owned_now(tmp_path, LONG_SECONDS) == (5, pytest.approx(0, abs=LONG_SECONDS / 2))


def test_a_lease_of_another_version_whose_content_changes_is_in_use(tmp_path: Path, start: Callable[..., Process]) -> None:
    def beat(_tell: object, _wait: object) -> None:
        for beats in count():
            (tmp_path / ".new").write_text(json.dumps({"version": 2, "beats": beats}))
            (tmp_path / ".new").rename(tmp_path / ".lease-4.json")
            time.sleep(BEAT_SECONDS)

    (tmp_path / ".lease-4.json").write_text("{}")
    said = says_while(start(own(tmp_path)), beat)
    assert said.startswith(f"busy {tmp_path}: another process is running this spec here")


class Lists:
    """os.listdir as a network file system may answer: with these lists of `folder`, again and again, None for the true one."""

    def __init__(self, folder: Path, *answers: list[str] | None) -> None:
        self.folder, self.answers, self.listdir = folder, cycle(answers), os.listdir

    def __call__(self, path: Path) -> list[str]:
        answer = next(self.answers) if path == self.folder else None
        return self.listdir(path) if answer is None else answer


def test_a_list_that_shows_an_old_state_now_and_then_is_no_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_lease(tmp_path, 3, "another machine, which had it before", beats=9)
    leave_lease(tmp_path, 4, "another start of another machine")
    monkeypatch.setattr(os, "listdir", Lists(tmp_path, None, [], [".lease-3.json"]))
    attempt, seconds = owned_now(tmp_path, watch_seconds=0.3)
    assert attempt == 5
    assert seconds >= 0.3


def test_a_new_number_in_a_list_that_was_out_of_date_is_no_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_lease(tmp_path, 3, "another machine, which had it before", beats=9)
    leave_lease(tmp_path, 4, "another start of another machine")
    monkeypatch.setattr(os, "listdir", Lists(tmp_path, [".lease-3.json"], None, None, None))
    assert owned_now(tmp_path, watch_seconds=0.3)[0] == 5


def test_an_owner_that_the_list_does_not_show_is_found_by_the_number_of_the_last_attempt(
    tmp_path: Path, start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_lease(tmp_path, 4, "another start of another machine")
    (tmp_path / "attempts.jsonl").write_text('{"event": "start", "time": 1, "attempt": 4, "host": "a", "pid": 1}\n')
    monkeypatch.setattr(os, "listdir", Lists(tmp_path, []))
    waiting = start(own(tmp_path))
    assert "(attempt 4) is running this spec here" in says_while(waiting, lambda _tell, _wait: beat_for_ever(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"attempt": 1}', "\0" * 1024, "[" * 1000])
def test_an_unreadable_lease_is_watched_like_any_other(tmp_path: Path, content: str) -> None:
    (tmp_path / ".lease-1.json").write_text(content)
    attempt, seconds = owned_now(tmp_path, watch_seconds=0.2)
    assert attempt == 2
    assert seconds >= 0.2


def test_a_folder_in_place_of_a_lease_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lease-1.json").mkdir()
    with pytest.raises(IsADirectoryError, match=r"\.lease-1\.json"):
        owned_now(tmp_path, watch_seconds=0.2)


def test_a_suspended_owner_loses_its_lease_and_exits_at_once_when_it_continues(
    tmp_path: Path, start: Callable[..., Process]
) -> None:
    asleep = start(own_for_ever(tmp_path))
    assert asleep.says() == "owns 1"
    os.kill(asleep.pid, signal.SIGSTOP)
    second = start(own(tmp_path, watch_seconds=0.5))
    assert second.says() == "owns 2"
    # The lock of the sleeper is still held; that of its successor keeps out a third, dead sleeper or not.
    third = start(own(tmp_path))
    assert third.says().startswith(f"busy {tmp_path}: process {second.pid} ")
    os.kill(asleep.pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(asleep.pid, 0)[1]) == BusyError.exit_code
    fourth = start(own(tmp_path))
    assert fourth.says().startswith(f"busy {tmp_path}: process {second.pid} ")
    second.go_on()
    assert second.says() == "leaves"


def test_a_process_asked_to_stop_while_it_waits_for_a_lease_raises_the_reason(tmp_path: Path) -> None:
    leave_lease(tmp_path, 4, "another start of another machine")
    should_stop = StopRequest()
    should_stop.request("received SIGTERM")
    with pytest.raises(Interrupted, match=r"waiting for .* \(received SIGTERM\)"), leased(tmp_path, should_stop):
        pass


def race(folder: Path, before: str) -> None:
    """Four want one folder at once: one gets it, and the others name that one."""
    folder.mkdir()
    if before == "killed":
        leave_lease(folder, 7, boot_id())
    elif before == "released":
        leave_lease(folder, 7, "another start of another machine", released=True)
    elif before == "another machine":
        leave_lease(folder, 7, "another start of another machine")
    racers = [Process(own(folder, 0.2 if before == "another machine" else LONG_SECONDS)) for _ in range(4)]
    for racer in racers:
        racer.go_on()
    said = {racer.pid: racer.says() for racer in racers}
    for racer in racers:
        racer.end()
    winners = [pid for pid, line in said.items() if line.startswith("owns ")]
    assert len(winners) == 1, said
    (winner,) = winners
    losers = [line for pid, line in said.items() if pid != winner]
    assert all(line.startswith(f"busy {folder}: process {winner} on ") for line in losers), said


BEFORE = ("nothing", "killed", "released", "another machine")


@pytest.mark.parametrize("before", BEFORE)
def test_of_many_processes_that_want_a_folder_one_gets_it(tmp_path: Path, before: str) -> None:
    for number in range(2):
        race(tmp_path / str(number), before)


def races(folder: Path, number: int) -> None:
    for position in range(number):
        # Another machine has to be watched, which takes time.
        race(folder / str(position), BEFORE[3] if position % 20 == 0 else BEFORE[position % 3])


@pytest.mark.full
def test_hundreds_of_races_have_one_winner_each(tmp_path: Path) -> None:
    """A fault that one race in a hundred shows is missed once in 20 runs, one that one in thirty shows once in 26,000.

    In a process without torch, which forks ten times as fast.
    """
    code = f"import pathlib; from tests.job.test_lease import races; races(pathlib.Path({str(tmp_path)!r}), 300)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert len(list(tmp_path.iterdir())) == 300
