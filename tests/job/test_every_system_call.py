"""What we write is never lost and never wrong, wherever a process dies or a disk fails.

Each operation is run once per system call by which it changes files, and once per injury, that call being the one that is
struck; what it left is then read by the real functions, and the operation repeated. tests/sweep_driver.py says what is checked.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.full

DRIVER = Path(__file__).parents[1] / "sweep_driver.py"
POWER_CUTS = {"power cut, data lost", "power cut, names lost"}
DEADLY = {"killed", "torn write", *POWER_CUTS}
ERRORS = {"no space once", "full disk", "error once", "broken disk"}
LEAST_CALLS = {
    "save a first checkpoint": 13,
    "save a checkpoint and leave": 14,
    "save a checkpoint and go on": 14,
    "save two checkpoints": 28,
    "save other checkpoints next": 14,
    "save where the newest is not finite": 14,
    "set a damaged checkpoint aside": 3,
    "write a receipt": 18,
    "write a receipt anew": 19,
    "discard what is damaged": 2,
    "write JSON": 5,
    "write a table": 5,
    "copy a file": 6,
    "make the folders of a job": 12,
    "publish a run": 36,
    "mirror a run": 55,
    "fetch a run": 40,
}
"""Fewer than these cannot make it durable: a temporary is opened, written, synced, renamed, and its folder synced."""

Sweep = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    """sweep("write JSON") is what tests/sweep_driver.py answers; one process for all, as it has to import torch."""
    command = [sys.executable, DRIVER, tmp_path_factory.mktemp("sweep")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None

        def ask(name: str) -> dict[str, Any]:
            driver.stdin.write(name + "\n")
            driver.stdin.flush()
            answer = driver.stdout.readline()
            assert answer, f"{name}: the driver ended; what was wrong stands above"
            return json.loads(answer)

        yield ask
        driver.kill()


@pytest.mark.parametrize("operation", LEAST_CALLS)
def test_a_crash_or_an_error_at_any_system_call_loses_and_corrupts_nothing(
    operation: str, sweep: Sweep, component: Callable[[str], str], record_property: Callable[[str, object], None]
) -> None:
    component("gcc")
    answer = sweep(operation)
    points = {injury: found["points"] for injury, found in answer.items()}
    print(f"{operation}: {points}")
    record_property("points", points)
    assert {injury: found["broken"] for injury, found in answer.items() if found["broken"]} == {}
    assert points
    assert all(points[injury] >= LEAST_CALLS[operation] for injury in points if injury != "torn write")


def test_publishing_again_changes_no_file(sweep: Sweep, component: Callable[[str], str]) -> None:
    component("gcc")
    assert {found["points"] for found in sweep("publish a run again").values()} == {0}


def test_the_sweep_detects_writing_in_place(sweep: Sweep, component: Callable[[str], str]) -> None:
    component("gcc")
    assert {injury for injury, found in sweep("write in place").items() if found["broken"]} == DEADLY | ERRORS


def test_the_sweep_detects_renaming_without_fsync(sweep: Sweep, component: Callable[[str], str]) -> None:
    component("gcc")
    broken = {injury for injury, found in sweep("rename what is not synced").items() if found["broken"]}
    assert broken & DEADLY == POWER_CUTS


def test_the_sweep_detects_folders_of_which_only_the_last_parent_is_synced(sweep: Sweep, component: Callable[[str], str]) -> None:
    component("gcc")
    broken = {injury for injury, found in sweep("make folders and sync the last").items() if found["broken"]}
    assert broken == {"power cut, names lost"}
