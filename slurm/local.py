"""Runs a sweep without SLURM: its tasks on this machine, one after the other, then the tables."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from emotion.errors import StorageError
from emotion.files import make_folder, write_json, write_text
from job.preemption import StopRequest
from job.spec.model import run_name, to_yaml
from slurm.sweep import Sweep
from slurm.sweep_folder import SWEEP

LOOK_SECONDS = 0.2  # between checks for a stop request


def run_here(sweep: Sweep, work: Path, say: Callable[[str], None]) -> int:
    """Run `emotion-job run` for each task and `emotion-job collect` for all. Returns the exit code of the first that fails, or 0.

    Specs and tables are in WORK/sweeps/NAME-KEY12. A second call resumes: a published task takes a second. A stop signal is
    passed on to the running job, which saves its state.
    """
    folder = work / "sweeps" / sweep.folder_name
    tasks = []
    for index, task in enumerate(sweep.tasks):
        spec = folder / "specs" / f"{index:04}.yaml"
        try:
            make_folder(spec.parent)
            write_text(spec, to_yaml(task.spec))
        except OSError as error:
            raise StorageError.of(error) from error
        say(f"task {index + 1} of {len(sweep.tasks)}: {task.label}")
        code = _emotion_job(say, "run", str(spec), "--work", str(work))
        if code:
            return code
        run = run_name(task.spec)
        published = f"{task.spec.artifacts.destination or work / 'published'}/{run}"
        tasks.append({"index": index, "label": task.label, "setting": task.setting, "run": run, "published": published})
    try:
        write_json(folder / SWEEP, {"tasks": tasks})  # collect reads from the specs how to reach object storage
    except OSError as error:
        raise StorageError.of(error) from error
    return _emotion_job(say, "collect", str(folder), "--out", str(folder / "collected"))


def _emotion_job(say: Callable[[str], None], *arguments: str) -> int:
    """Run emotion-job. Returns its exit code, or as a shell 128 and the number of the signal that killed it. A stop request is
    passed on: the job saves its state."""
    with StopRequest() as should_stop:
        process = subprocess.Popen([sys.executable, "-m", "job", *arguments])
        told = False
        while True:
            try:
                code = process.wait(timeout=LOOK_SECONDS)
                if code >= 0:
                    return code
                why = ", perhaps for lack of memory" if code == -9 else ""  # SIGKILL
                say(f"emotion-job {arguments[0]} was killed by signal {-code}{why}. The same command resumes.")
                return 128 - code
            except subprocess.TimeoutExpired:
                if should_stop() and not told:
                    process.terminate()
                    told = True
