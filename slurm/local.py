"""A sweep without SLURM: its tasks on this machine, one after the other, then the tables."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from emotion.errors import StorageError
from emotion.files import make_folder, write_text
from job.spec.model import run_name, to_yaml
from slurm.sweep import Sweep


def run_here(sweep: Sweep, work: Path, say: Callable[[str], None]) -> int:
    """Run `emotion-job run` for each task and `emotion-job collect` for all. Returns the exit code of the first that fails.

    Specs and tables are in WORK/sweeps/NAME-KEY12. Called again it resumes: a task that is published takes a second. Ctrl-C
    reaches the running job, which saves its state.
    """
    folder = work / "sweeps" / sweep.folder_name
    published = []
    for index, task in enumerate(sweep.tasks):
        spec = folder / "specs" / f"{index:04}.yaml"
        try:
            make_folder(spec.parent)
            write_text(spec, to_yaml(task.spec))
        except OSError as error:
            raise StorageError.of(error) from error
        say(f"task {index + 1} of {len(sweep.tasks)}: {task.label}")
        code = _emotion_job("run", str(spec), "--work", str(work))
        if code:
            return code
        published.append(f"{task.spec.artifacts.destination or work / 'published'}/{run_name(task.spec)}")
    return _emotion_job("collect", *published, "--out", str(folder / "collected"))


def _emotion_job(*arguments: str) -> int:
    process = subprocess.Popen([sys.executable, "-m", "job", *arguments])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the job got it, too, and stops by itself
            continue
