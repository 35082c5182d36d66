"""Runs operations that write files, with a fault injected at every system call, and checks what is left.

    python tests/sweep_driver.py FOLDER      # then names of operations on standard input, a line each

Answers each name with one line of JSON: {injury: {"points": calls that could be struck, "broken": [where, and what is wrong]}}.
"""

import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from injector import BROKEN_DISK, ERRORS, KILLED, POWER_CUTS, TORN, Injury, Operation, Outcome, attempt, attempts, preload
from manifests import artifacts_in, manifest_with

from emotion.config import CheckpointConfig
from emotion.errors import EmotionError, ModelError
from emotion.files import sync, write_csv, write_json
from emotion.training.checkpoint import Checkpoint
from job.pipeline.folders import JobFolders, make_folders
from job.preemption import StopRequest
from job.results.publish import copy_run
from job.run_folder.mirror import Mirror
from job.run_folder.receipts import discard_damaged, read_receipt, write_receipt
from job.spec.load import load_spec
from job.spec.model import run_name
from job.storage import local_folder
from job.storage.local_folder import LocalFolder, copy_into

TINY = Path(__file__).with_name("tiny.yaml")
DEATHS = (KILLED, TORN, *POWER_CUTS)
INJURIES = (*DEATHS, *ERRORS)
SECOND_NS = 1_000_000_000
NUMBERS = 5000
"""In a state: enough for several writes, as the buffers of Python's files hold 8 KiB."""

Files = dict[str, bytes]
"""Relative path → content."""


@dataclass(frozen=True)
class Swept:
    """check: raises AssertionError for a wrong state; its last argument is what the folder holds without a fault."""

    prepare: Callable[[Path], None]
    run: Operation
    check: Callable[[Path, Outcome, Files], None]
    injuries: tuple[Injury, ...] = INJURIES


def files_in(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def visible(files: Files) -> Files:
    """Without temporary files, which may remain after a kill."""
    return {name: content for name, content in files.items() if not Path(name).name.startswith(".")}


def has_leftover(folder: Path, outcome: Outcome) -> bool:
    """Whether a temporary file remains although the operation could have removed it."""
    if not outcome.finished or outcome.injury == BROKEN_DISK:
        return False
    struck = outcome.calls[outcome.n - 1] if outcome.struck else ""
    return not struck.startswith("unlink") and files_in(folder) != visible(files_in(folder))


# A checkpoint of step 3 where 1 and 2 are, of which the newest two are kept.


class Box:
    """A state that knows its step."""

    def __init__(self, step: int) -> None:
        self.state: dict[str, Any] = {"weights": torch.full((NUMBERS,), float(step)), "updates": step}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state

    def is_of(self, step: int) -> bool:
        weights = self.state["weights"]
        return self.state["updates"] == step and torch.equal(weights, torch.full((NUMBERS,), float(step)))


def checkpoint_of(folder: Path, box: Box) -> Checkpoint:
    return Checkpoint(folder / "checkpoints", CheckpointConfig(every_seconds=1e9, keep=2), network=box)


def save(folder: Path, *steps: int) -> None:
    box = Box(0)
    with checkpoint_of(folder, box) as checkpoint:
        for step in steps:
            box.state = Box(step).state
            checkpoint.save(step)
        checkpoint.wait_until_durable()


def restored(folder: Path) -> int:
    box = Box(0)
    step = checkpoint_of(folder, box).restore()
    assert box.is_of(step), f"restored step {step} with the values of another"
    return step


def two_checkpoints(folder: Path) -> None:
    save(folder, 1, 2)


def newest_not_finite(folder: Path) -> None:
    save(folder, 1)
    box = Box(2)
    box.state["weights"][7] = float("nan")
    with contextlib.suppress(ModelError), checkpoint_of(folder, box) as checkpoint:
        checkpoint.save(2)


def nothing(folder: Path) -> None:
    folder.mkdir()


def save_1(folder: Path) -> None:
    save(folder, 1)


def save_3(folder: Path) -> None:
    save(folder, 3)


def save_3_and_go_on(folder: Path) -> str | None:
    """As a loop that is not asked to stop: an error is noted, not raised."""
    checkpoint = checkpoint_of(folder, Box(3))
    with checkpoint:
        checkpoint.save(3)
    return checkpoint.failure


def save_3_and_4(folder: Path) -> None:
    save(folder, 3, 4)


def check_1(folder: Path, outcome: Outcome, undisturbed: Files) -> None:
    step = restored(folder)
    assert step == 1 if outcome.succeeded else step in (0, 1), f"restored step {step}"
    save_1(folder)
    assert files_in(folder) == undisturbed, f"the next save left {sorted(files_in(folder))}"


def check_3(folder: Path, outcome: Outcome, undisturbed: Files) -> None:
    step = restored(folder)
    assert step == 3 if outcome.succeeded else step in (2, 3), f"restored step {step}"
    if outcome.said is not None:
        assert os.strerror(outcome.injury.action) in outcome.said, f"said {outcome.said}"
    assert not has_leftover(folder, outcome), f"left {sorted(files_in(folder))}"
    save_3(folder)
    assert files_in(folder) == undisturbed, f"the next save left {sorted(files_in(folder))}"


def check_3_or_1(folder: Path, outcome: Outcome, undisturbed: Files) -> None:
    step = restored(folder)
    assert step == 3 if outcome.succeeded else step in (1, 3), f"restored step {step}"


def check_4(folder: Path, outcome: Outcome, undisturbed: Files) -> None:
    step = restored(folder)
    assert step == 4 if outcome.succeeded else step in (2, 3, 4), f"restored step {step}"
    save(folder, 4)
    assert restored(folder) == 4


def check_next_save_clears(folder: Path, outcome: Outcome, undisturbed: Files) -> None:
    """After a death the next save is of another step, and removes what was left of this one."""
    save(folder, 4, 5)
    expected = {f"checkpoints/step-{step}.{kind}" for step in (4, 5) for kind in ("ckpt", "json")} | {"checkpoints/latest"}
    assert set(files_in(folder)) == expected, f"the next saves left {sorted(files_in(folder))}"


# The same where the newest checkpoint is damaged: it is set aside by the restoring.


def newest_damaged(folder: Path) -> None:
    two_checkpoints(folder)
    newest = folder / "checkpoints" / "step-2.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)


def restore(folder: Path) -> None:
    assert restored(folder) == 1


def check_set_aside(folder: Path, outcome: Outcome, undisturbed: Files) -> None:
    restore(folder)
    restore(folder)
    save_3(folder)
    assert restored(folder) == 3


# A phase's receipt.

KEY = "the key"
OUTPUTS = {"model/weights.bin": bytes(range(256)) * 20, "summary.json": b"{}\n", "table.csv": b"song_id\n7\n"}


def write_plainly(path: Path, content: bytes, seconds: int = 1) -> None:
    """As libraries write: nothing synced. The time is set, so that receipts can be compared."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(seconds * SECOND_NS, seconds * SECOND_NS))


def finish_phase(folder: Path) -> None:
    discard_damaged(folder)
    for name, content in OUTPUTS.items():
        write_plainly(folder / name, content)
    write_receipt(folder, "vit", KEY, {"gan": "another key"}, {"seconds": 1.5}, {"left_out": []})


def finished_with_a_changed_byte(folder: Path) -> None:
    finish_phase(folder)
    write_plainly(folder / "table.csv", b"song_id\n8\n", seconds=2)


def check_receipt(folder: Path, outcome: Outcome, undisturbed: Files) -> None:
    trusted, verified = (read_receipt(folder, KEY, verify) for verify in (False, True))
    if outcome.succeeded:
        assert verified is not None
    if verified is not None:
        assert {name: content for name, content in files_in(folder).items() if name in OUTPUTS} == OUTPUTS
    if outcome.finished or outcome.injury not in POWER_CUTS:
        assert trusted == verified
    finish_phase(folder)
    assert files_in(folder) == undisturbed
    assert read_receipt(folder, KEY, verify=True) is not None


def check_discarded(folder: Path, outcome: Outcome, undisturbed: Files) -> None:
    whole = {name: content for name, content in OUTPUTS.items() if name != "table.csv"}
    found = files_in(folder)
    assert whole.items() <= found.items(), "a good output is gone"
    assert "receipt.json" in found or "table.csv" not in found, "a damaged output remains and no receipt shows it"
    assert read_receipt(folder, KEY, verify=True) is None
    discard_damaged(folder)
    assert files_in(folder) == whole == undisturbed


# Single files.

OLD, NEW = b"old\n", {"new": [1.5, "ü"] * 3000}


def old_files(folder: Path) -> None:
    folder.mkdir()
    write_plainly(folder / "value.json", OLD)
    write_plainly(folder / "table.csv", OLD)


def write_value(folder: Path) -> None:
    write_json(folder / "value.json", NEW)


def write_table(folder: Path) -> None:
    write_csv(folder / "table.csv", ["song_id", "valence"], [[number, number / 7] for number in range(500)])


def check_old_or_new(name: str, run: Operation) -> Callable[[Path, Outcome, Files], None]:
    def check(folder: Path, outcome: Outcome, undisturbed: Files) -> None:
        found = (folder / name).read_bytes()
        assert found == undisturbed[name] if outcome.succeeded else found in (OLD, undisturbed[name])
        assert not has_leftover(folder, outcome), f"left {sorted(files_in(folder))}"
        run(folder)
        assert files_in(folder) == undisturbed, f"the next write left {sorted(files_in(folder))}"

    return check


def source_and_old_target(folder: Path) -> None:
    write_plainly(folder / "source.bin", bytes(range(256)) * 40)
    write_plainly(folder / "target" / "copy.bin", OLD)


def copy(folder: Path) -> None:
    (folder / "target").mkdir(exist_ok=True)
    copy_into(folder / "source.bin", folder / "target" / "copy.bin")


# A run that is published.


def run_to_publish(folder: Path) -> None:
    run = folder / "run"
    for name, content in {**OUTPUTS, "samples/loud/1.wav": bytes(3000)}.items():
        write_plainly(run / name, content)
    manifest = manifest_with(artifacts=artifacts_in(run))
    write_plainly(run / "manifest.json", manifest.model_dump_json(exclude_unset=True).encode())


def publish(folder: Path) -> None:
    copy_run(folder / "run", LocalFolder(folder / "published" / "name-key"), should_stop=lambda: False)


def check_published(folder: Path, outcome: Outcome, undisturbed: Files) -> None:
    target = folder / "published" / "name-key"
    complete = files_in(folder / "run")
    assert files_in(folder / "run").items() <= undisturbed_run(undisturbed).items()
    published = (target / "manifest.json").exists()
    if outcome.succeeded:
        assert published
    if published:
        assert visible(files_in(target)) == complete, "a manifest stands over what is not whole"
    publish(folder)
    assert files_in(folder) == undisturbed, f"publishing again left {sorted(files_in(folder))}"


def undisturbed_run(undisturbed: Files) -> Files:
    return {name.removeprefix("run/"): content for name, content in undisturbed.items() if name.startswith("run/")}


def published(folder: Path) -> None:
    run_to_publish(folder)
    publish(folder)


def check_untouched(folder: Path, outcome: Outcome, undisturbed: Files) -> None:
    assert not outcome.calls, f"called {outcome.calls}"
    assert files_in(folder) == undisturbed


# The folders of a job, none of which is there.


def job_folders_of(folder: Path) -> list[Path]:
    return [folder / "new" / "work" / run_name(load_spec(TINY)), folder / "new" / "scratch" / "of" / "jobs"]


def make_job_folders(folder: Path) -> None:
    _, scratch = job_folders_of(folder)
    make_folders(load_spec(TINY), JobFolders(folder / "new" / "work", scratch))


def check_folders(folder: Path, outcome: Outcome, undisturbed: Files) -> None:
    if outcome.succeeded:
        assert all(path.is_dir() for path in job_folders_of(folder)), sorted(folder.rglob("*"))
    make_job_folders(folder)
    assert all(path.is_dir() for path in job_folders_of(folder))


# A finished and an unfinished phase copied to a mirror, and fetched by another machine.


def machine(folder: Path, name: str) -> Mirror:
    mirror = Mirror(load_spec(TINY, [f"checkpoint.mirror={folder / 'mirror'}"]), folder / name / "run", StopRequest())
    mirror.connect("fail")
    return mirror


def phase_of(folder: Path, name: str, phase: str) -> Path:
    return folder / name / "run" / phase


def one_finished_and_one_begun(folder: Path) -> None:
    (folder / "mirror").mkdir(parents=True)
    finish_phase(phase_of(folder, "here", "vit-1"))
    save(phase_of(folder, "here", "gan-1"), 1)
    put(folder)
    shutil.rmtree(folder / "mirror" / "run" / "vit-1")
    shutil.rmtree(folder / "mirror" / "phases")
    save(phase_of(folder, "here", "gan-1"), 2, 3)


def put(folder: Path) -> str | None:
    mirror = machine(folder, "here")
    receipt = read_receipt(phase_of(folder, "here", "vit-1"), KEY, verify=True)
    assert receipt is not None
    mirror.add_finished(receipt, with_outputs=True)
    mirror.watch_checkpoints(phase_of(folder, "here", "gan-1"))
    mirror.copy_missing()
    return mirror.failure


def fetched(folder: Path) -> tuple[bool, int]:
    """Whether another machine gets the finished phase, and the step from which it resumes the other one."""
    mirror, phase = machine(folder, "there"), phase_of(folder, "there", "vit-1")
    receipt = mirror.find_receipt(phase, KEY)
    if receipt is not None:
        assert mirror.fetch_outputs(receipt), "there is a receipt, but not all outputs"
        assert read_receipt(phase, KEY, verify=True) is not None
    mirror.fetch_checkpoint(phase_of(folder, "there", "gan-1"))
    return receipt is not None, restored(phase_of(folder, "there", "gan-1"))


def check_mirrored(folder: Path, outcome: Outcome, undisturbed: Files) -> None:
    whole, step = fetched(folder)
    assert whole and step == 3 if outcome.succeeded else step in (1, 3), f"fetched {whole}, step {step}"
    shutil.rmtree(folder / "there")
    assert put(folder) is None
    assert fetched(folder) == (True, 3)
    shutil.rmtree(folder / "there")
    assert files_in(folder) == undisturbed, f"the next copy left {sorted(files_in(folder))}"


def mirrored(folder: Path) -> None:
    one_finished_and_one_begun(folder)
    put(folder)
    (folder / "there" / "run").mkdir(parents=True)


def fetch(folder: Path) -> None:
    assert fetched(folder) == (True, 3)


def check_fetched(folder: Path, outcome: Outcome, undisturbed: Files) -> None:
    """After a second fetch everything is complete."""
    phase = phase_of(folder, "there", "vit-1")
    trusted, verified = (read_receipt(phase, KEY, verify) for verify in (False, True))
    assert verified is not None or not outcome.succeeded
    assert trusted is None or verified is not None
    mirror = {name: content for name, content in files_in(folder).items() if name.startswith("mirror/")}
    assert mirror == {name: content for name, content in undisturbed.items() if name.startswith("mirror/")}
    fetch(folder)
    assert visible(files_in(folder)) == undisturbed


# Negative controls: operations that are broken must be found to be.


def write_in_place(folder: Path) -> None:
    with (folder / "value.json").open("wb") as file:
        file.write(json.dumps(NEW).encode())


def make_folders_unsynced(folder: Path) -> None:
    """As `mkdir -p` with a sync of the last parent alone."""
    run_folder, scratch = job_folders_of(folder)
    for path in (run_folder, scratch):
        path.mkdir(parents=True)
        sync(path.parent)


def rename_unsynced(folder: Path) -> None:
    temporary = folder / ".value.json.part"
    temporary.write_bytes(json.dumps(NEW).encode())
    temporary.replace(folder / "value.json")


SWEEPS = {
    "save a first checkpoint": Swept(nothing, save_1, check_1),
    "save a checkpoint and leave": Swept(two_checkpoints, save_3, check_3),
    "save a checkpoint and go on": Swept(two_checkpoints, save_3_and_go_on, check_3, ERRORS),
    "save two checkpoints": Swept(two_checkpoints, save_3_and_4, check_4, ERRORS),
    "save other checkpoints next": Swept(two_checkpoints, save_3, check_next_save_clears, DEATHS),
    "save where the newest is not finite": Swept(newest_not_finite, save_3, check_3_or_1),
    "set a damaged checkpoint aside": Swept(newest_damaged, restore, check_set_aside),
    "write a receipt": Swept(nothing, finish_phase, check_receipt),
    "write a receipt anew": Swept(finished_with_a_changed_byte, finish_phase, check_receipt, DEATHS),
    "discard what is damaged": Swept(finished_with_a_changed_byte, discard_damaged, check_discarded),
    "write JSON": Swept(old_files, write_value, check_old_or_new("value.json", write_value)),
    "write a table": Swept(old_files, write_table, check_old_or_new("table.csv", write_table)),
    "copy a file": Swept(source_and_old_target, copy, check_old_or_new("target/copy.bin", copy)),
    "make the folders of a job": Swept(nothing, make_job_folders, check_folders),
    "publish a run": Swept(run_to_publish, publish, check_published),
    "publish a run again": Swept(published, publish, check_untouched),
    "mirror a run": Swept(one_finished_and_one_begun, put, check_mirrored),
    "fetch a run": Swept(mirrored, fetch, check_fetched),
    "write in place": Swept(old_files, write_in_place, check_old_or_new("value.json", write_in_place)),
    "make folders and sync the last": Swept(nothing, make_folders_unsynced, check_folders, POWER_CUTS),
    "rename what is not synced": Swept(old_files, rename_unsynced, check_old_or_new("value.json", rename_unsynced)),
}


class Sweep:
    """One operation from fresh copies of its start."""

    def __init__(self, folder: Path, swept: Swept) -> None:
        self.swept = swept
        self.start, self.case = folder / "start", folder / "case"
        shutil.rmtree(self.start, ignore_errors=True)
        swept.prepare(self.start)
        outcome = attempt(swept.run, self.fresh(), KILLED, 0)
        assert outcome.succeeded, outcome
        self.undisturbed = files_in(self.case)

    def fresh(self) -> Path:
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.start, self.case)
        return self.case

    def injured(self, injury: Injury) -> dict[str, Any]:
        points, broken = 0, []
        for folder, outcome in attempts(self.swept.run, self.fresh, injury):
            points += outcome.struck
            try:
                self.swept.check(folder, outcome, self.undisturbed)
            except (AssertionError, EmotionError, OSError) as wrong:
                calls = " | ".join(outcome.calls[outcome.n - 1 :]) or "died"
                broken.append(f"{injury.name} at call {outcome.n} ({calls}): {type(wrong).__name__} {wrong}")
        return {"points": points, "broken": broken}


def main() -> None:
    folder = Path(sys.argv[1])
    preload(folder)
    # What others have left half-copied is old at once.
    local_folder.STALE_SECONDS = -1
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for line in sys.stdin:
        name = line.strip()
        sweep = Sweep(folder, SWEEPS[name])
        print(json.dumps({injury.name: sweep.injured(injury) for injury in sweep.swept.injuries}), flush=True)


if __name__ == "__main__":
    main()
