"""Hangs are real here: threads that wait in C, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from job.run_folder.receipts import LOG
from tests.conftest import TINY, TinyRun
from tests.job.soak import promised_bytes

CHILD = """
import ctypes, logging, sys, time
from pathlib import Path
from emotion.threads import in_threads
from job.preemption import StopRequest
from job.storage.transfer import in_parallel
from job.unattended import watchdog
watchdog.REPORT_SECONDS = 0.5
handler = logging.StreamHandler()
logging.getLogger().addHandler(handler)

def hangs_here(*_, **__):
    ctypes.CDLL(None).sleep(1000)

def in_the_main_thread(should_stop):
    hangs_here()

def on_a_disk_that_hangs_as_well(should_stop):
    watchdog.faulthandler.dump_traceback = hangs_here
    hangs_here()

def in_a_thread_that_is_waited_for(should_stop):
    list(in_threads(hangs_here, [1], 1, should_stop))

def in_a_copy_of_a_file(should_stop):
    list(in_parallel([hangs_here], 2, should_stop))

def with_the_lock_of_the_log(should_stop):
    handler.acquire()
    hangs_here()

def nowhere(should_stop):
    for _ in range(2):
        should_stop()
        print("works", flush=True)
        for _ in range(30):  # a step that takes half of the limit
            time.sleep(0.05)

where, folder, seconds = sys.argv[1:]
with StopRequest() as should_stop, watchdog.watched(should_stop, float(seconds) / 60, Path(folder)):
    globals()[where](should_stop)
"""
PLANTED = """
import ctypes, sys
from pathlib import Path
from importlib import import_module
from job.entry import main
from job.pipeline import phase_functions

def planted(phase, at):
    run, once = getattr(phase_functions, "run_" + phase), Path(sys.argv.pop(1))
    def run_planted(context):
        module = import_module(f"emotion.{phase}.train")
        seed_step = module.seed_step
        def hangs_once(seed, phase, step):
            if step == at and not once.exists():
                once.touch()
                ctypes.CDLL(None).sleep(100_000)
            seed_step(seed, phase, step)
        module.seed_step = hangs_once
        run(context)
    setattr(phase_functions, "run_" + phase, run_planted)

planted("gan", 3)
planted("vit", 4)
main()
"""


Start = Callable[[str, float], subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(WHERE, SECONDS) is a process that hangs there and is watched with this limit."""
    processes = []

    def begin(where: str, seconds: float) -> subprocess.Popen[str]:
        (tmp_path / where).mkdir()
        command = [sys.executable, "-c", CHILD, where, str(tmp_path / where), str(seconds)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def test_a_process_that_hangs_outside_of_python_ends_with_75_and_says_where(start: Start, tmp_path: Path) -> None:
    names = [
        "in_the_main_thread",
        "in_a_thread_that_is_waited_for",
        "in_a_copy_of_a_file",
        "with_the_lock_of_the_log",
        "on_a_disk_that_hangs_as_well",
    ]
    hanging = {name: start(name, 0.6) for name in names}
    for name, process in hanging.items():
        _, said = process.communicate(timeout=60)
        assert process.returncode == 75, (name, said)
        if name == "on_a_disk_that_hangs_as_well":
            continue
        assert "hangs_here" in said
        assert "hangs_here" in (tmp_path / name / LOG).read_text()


@pytest.mark.full
def test_a_process_that_works_or_was_suspended_does_not_hang(start: Start) -> None:
    process = start("nowhere", 3)
    assert process.stdout is not None
    assert process.stdout.readline() == "works\n"
    time.sleep(1)  # so that the watchdog has looked since
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 0


@pytest.mark.full
def test_a_job_whose_trainings_hang_comes_back_and_ends_with_the_same_bytes(tiny_run: TinyRun, tmp_path: Path) -> None:
    work, settings = tmp_path / "work", ["checkpoint.every_seconds=0", "preemption.hang_minutes=0.2"]
    arguments = ["run", str(TINY), "--work", str(work), "--scratch", str(tiny_run.work / "scratch")]
    arguments += [text for setting in settings for text in ("--set", setting)]
    command = [sys.executable, "-c", PLANTED, str(tmp_path / "gan"), str(tmp_path / "vit"), *arguments]
    codes = []
    while not codes or (codes[-1] == 75 and len(codes) < 8):
        found = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": "."})
        codes.append(found.returncode)
    assert codes[-1] == 0, found.stderr
    (run_folder,) = work.glob("tiny-*")
    events = [json.loads(line) for line in (run_folder / "attempts.jsonl").read_text().splitlines()]
    hangs = [event for event in events if event.get("reason") == "Hung"]
    assert len(hangs) >= 2
    assert all(event["exit_code"] == 75 for event in hangs)
    assert "hangs_once" in (run_folder / LOG).read_text()
    assert promised_bytes(work / "published" / run_folder.name) == promised_bytes(tiny_run.published)
