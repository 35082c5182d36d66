"""Runs the tiny job again and again, interrupted at questions, and compares what it leaves with an unbroken run.

    python tests/job/interruption_driver.py UNBROKEN_WORK FOLDER    # then sweeps on standard input, a line of JSON each

Answers each sweep (see `Sweep`) with a line {"cases": number, "broken": [where, and what was wrong]}. A question is one call of
should_stop() in a phase. Every attempt is a process of its own, forked from one that has imported everything and computed
nothing but the predictions of memory: a case costs little more than its computing.
"""

import importlib
import json
import logging
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emotion.errors import Interrupted
from emotion.files import read_json, sha256_of
from emotion.threads import _awaited
from job.environment import prepare_environment
from job.pipeline.folders import JobFolders
from job.pipeline.phase_functions import predicted_memory
from job.pipeline.phases import PHASES
from job.pipeline.runner import run_job
from job.preemption import StopRequest
from job.spec.load import load_spec
from job.spec.model import JobSpec

TINY = Path(__file__).parents[1] / "tiny.yaml"
LONGEST_SECONDS = 120
NEVER = 0
PHASE_NAMES = [phase.name for phase in PHASES]
IN_SCRATCH = [phase.name for phase in PHASES if phase.kept_in == "scratch"]

LATE_IMPORTS = (
    "emotion.evaluation.evaluate",
    "emotion.evaluation.stack",
    "emotion.audio.extract",
    "emotion.gan.train",
    "emotion.data.toy_dataset",
    "emotion.gan.quality",
    "emotion.gan.synth",
    "emotion.vit.train",
    "job.results.publish",
    "matplotlib.backends.backend_agg",
    "sklearn.ensemble",
    "sklearn.model_selection",
    "sklearn.svm",
)

Manner = Literal["asked", "SIGTERM", "SIGKILL"]
EXIT_CODES: dict[Manner, int] = {"asked": Interrupted.exit_code, "SIGTERM": Interrupted.exit_code, "SIGKILL": -signal.SIGKILL}
"""Manner of interruption → how the process has to end."""

FEW = 8
"""A line that asks so often, or less, is interrupted at each of its questions; another one amid them and at the last. A training
that is killed before it has saved anything restarts, wherever it was: there each line is another one."""


@dataclass(frozen=True)
class Sweep:
    """One interruption per case, then on to the end of `phase`, which begins where the phases before it are done.

    With no phase: one whole job, from where the dataset is staged and heard, interrupted in the middle of each phase. `late_ms`:
    the first case is interrupted at its question, the next so long after it, the next twice as long, up to four times; meanwhile
    a save goes on.
    """

    manner: Manner
    phase: str | None
    checkpoint_seconds: float
    late_ms: float = 0.0


@dataclass(frozen=True)
class Strike:
    """What interrupts an attempt: at question number `question` of a phase, counted from 1; 0 is never."""

    phase: str
    question: int
    manner: Manner = "asked"
    late_ms: float = 0.0


def import_everything() -> None:
    """What the phases import when they are entered, and the predictions of memory, which take longer than most of them."""
    for name in LATE_IMPORTS:
        importlib.import_module(name)
    predicted_memory(load_spec(TINY))
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, f"{len(threads) - 1} threads were started, which forking loses"


class StruckRequest(StopRequest):
    """Records which lines ask in one phase since its folder is there: the line of a module's function, not of one inside it."""

    def __init__(self, strike: Strike, folders: JobFolders) -> None:
        super().__init__()
        self.strike, self.folders = strike, folders
        self.asked_by: list[str] = []

    def __call__(self) -> bool:
        frame = sys._getframe(1)
        while "<locals>" in frame.f_code.co_qualname and frame.f_back:
            frame = frame.f_back
        # How often `in_threads` asks while it waits depends on the time that passes.
        if frame.f_code is not _awaited.__code__ and folders_of(self.strike.phase, self.folders):
            self.asked_by.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            if len(self.asked_by) == self.strike.question:
                time.sleep(self.strike.late_ms / 1000)
                if self.strike.manner == "asked":
                    self.request("the sweep asked for it")
                else:
                    os.kill(os.getpid(), signal.Signals[self.strike.manner])
        return super().__call__()


def folders_of(phase: str, folders: JobFolders) -> list[Path]:
    return list(folders.scratch.glob(f"{phase}-*") if phase in IN_SCRATCH else folders.work.glob(f"tiny-*/{phase}-*"))


def attempt(spec: JobSpec, folders: JobFolders, until: str, strike: Strike) -> tuple[int, list[str]]:
    """Run the job in a child: its exit code, -N where signal N ended it, and who asked if it came to the end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(LONGEST_SECONDS)
        # An exception ends the child, too, with its traceback.
        os._exit(_run(spec, folders, until, strike, writer))
    os.close(writer)
    with os.fdopen(reader) as pipe:
        asked_by = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), asked_by.split()


def _run(spec: JobSpec, folders: JobFolders, until: str, strike: Strike, writer: int) -> int:
    try:
        with StruckRequest(strike, folders) as should_stop:
            run_job(spec, folders, until, False, should_stop)
    except Interrupted as interrupted:
        return interrupted.exit_code
    os.write(writer, " ".join(should_stop.asked_by).encode())
    return 0


def outputs_of(phase: str, folders: JobFolders) -> dict[str, str]:
    """Name → SHA-256 of what has to be equal in two runs: all that a phase leaves; of what is published what is promised."""
    if phase != "publish":
        (folder,) = folders_of(phase, folders)
        return {name: facts["sha256"] for name, facts in read_json(folder / "receipt.json")["outputs"].items()}
    from job.results.publish import is_promised

    (published,) = folders.work.glob("published/tiny-*")
    names = [path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()]
    return {name: sha256_of(published / name) for name in names if is_promised(name)}


def questions_to_strike(asked_by: list[str], few: int) -> list[int]:
    """Numbers of questions, from 1."""
    chosen = []
    for name in set(asked_by):
        numbers = [number for number, asker in enumerate(asked_by, start=1) if asker == name]
        chosen += numbers if len(numbers) <= few else [numbers[len(numbers) // 2], numbers[-1]]
    return sorted(chosen)


class Driver:
    """Cases begin with copies of what they need of the unbroken run."""

    def __init__(self, unbroken: Path, folder: Path) -> None:
        self.unbroken = JobFolders(unbroken, unbroken / "scratch")
        self.start, self.case = folder / "start", folder / "case"
        self.prepared: str | None = None
        self.asked_by: dict[str, list[str]] = {}

    def run(self, sweep: Sweep) -> tuple[int, list[str]]:
        """The number of cases, and what was wrong in them."""
        spec = load_spec(TINY, [f"checkpoint.every_seconds={sweep.checkpoint_seconds}"])
        if sweep.phase is None:
            cases = [self._middle_of_each_phase(spec, sweep)]
        else:
            has_saved_nothing = sweep.phase in ("gan", "vit") and sweep.manner == "SIGKILL" and sweep.checkpoint_seconds > 0
            questions = questions_to_strike(self._asked_by(spec, sweep.phase), 1 if has_saved_nothing else FEW)
            cases = [
                [Strike(sweep.phase, question, sweep.manner, case % 5 * sweep.late_ms)] for case, question in enumerate(questions)
            ]
        found = [self._interrupted(spec, strikes) for strikes in cases]
        return len(found), [wrong for wrong in found if wrong]

    def _middle_of_each_phase(self, spec: JobSpec, sweep: Sweep) -> list[Strike]:
        phases = [phase for phase in PHASE_NAMES if phase not in IN_SCRATCH]
        return [Strike(phase, 1 + len(self._asked_by(spec, phase)) // 2, sweep.manner) for phase in phases]

    def _interrupted(self, spec: JobSpec, strikes: list[Strike]) -> str | None:
        """One attempt per strike and one more to the end; what was wrong."""
        folders, until = self._ready_for(strikes[0].phase), strikes[-1].phase
        for strike in strikes:
            code, _ = attempt(spec, folders, until, strike)
            if code != EXIT_CODES[strike.manner]:
                return f"{strike}: exit code {code}"
        code, _ = attempt(spec, folders, until, Strike(until, NEVER))
        if code != 0:
            return f"after {strikes}: exit code {code}"
        different = [name for strike in strikes for name in self._different(strike.phase, folders)]
        torn = sorted(str(path) for path in folders.work.rglob(".*.part"))
        return f"after {strikes}: differs in {different}, left {torn}" if different or torn else None

    def _different(self, phase: str, folders: JobFolders) -> list[str]:
        """Outputs of a phase that are not those of the unbroken run."""
        found, expected = outputs_of(phase, folders), outputs_of(phase, self.unbroken)
        return sorted({f"{phase}/{name}" for name, _ in found.items() ^ expected.items()})

    def _asked_by(self, spec: JobSpec, phase: str) -> list[str]:
        """Which lines ask in a phase that is not interrupted, in order."""
        if phase not in self.asked_by:
            code, asked_by = attempt(spec, self._ready_for(phase), phase, Strike(phase, NEVER))
            assert code == 0, f"{phase} without an interruption: exit code {code}"
            self.asked_by[phase] = asked_by
        return self.asked_by[phase]

    def _ready_for(self, phase: str) -> JobFolders:
        """The case's folder, in which all phases before this one are done."""
        if self.prepared != phase:
            shutil.rmtree(self.start, ignore_errors=True)
            shutil.copytree(self.unbroken.work, self.start)
            shutil.rmtree(self.start / "published")
            start = JobFolders(self.start, self.start / "scratch")
            for later in PHASE_NAMES[PHASE_NAMES.index(phase) :]:
                for folder in folders_of(later, start):
                    shutil.rmtree(folder)
            self.prepared = phase
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.start, self.case)
        return JobFolders(self.case, self.case / "scratch")


def main() -> None:
    unbroken, folder = map(Path, sys.argv[1:])
    logging.disable(logging.WARNING)
    prepare_environment(1)
    import_everything()
    driver = Driver(unbroken, folder)
    for line in sys.stdin:
        cases, broken = driver.run(Sweep(**json.loads(line)))
        print(json.dumps({"cases": cases, "broken": broken}), flush=True)


if __name__ == "__main__":
    main()
