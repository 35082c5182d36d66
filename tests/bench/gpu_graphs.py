"""Times steps of GAN and ViT inside the job's own trainings, with or without CUDA graphs."""

import contextlib
import time
from pathlib import Path

from emotion.errors import Interrupted
from job.pipeline.context import PhaseContext
from job.pipeline.fetch_inputs import fetch_inputs
from job.pipeline.folders import JobFolders
from job.pipeline.phases import BY_NAME
from job.pipeline.runner import run_job
from job.preemption import StopRequest
from job.spec.model import JobSpec


class Stopwatch(StopRequest):
    """A StopRequest that is called once per step. It measures the time from the end of step `first` to the end of step `last`,
    then stops the training."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last, self.asked, self.seconds_per_step = first, last, 0, 0.0

    def __call__(self) -> bool:
        import torch

        self.asked += 1
        if self.asked in (self.first, self.last):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            if self.asked == self.first:
                self.started = now
            else:
                self.seconds_per_step = (now - self.started) / (self.last - self.first)
                self.request("the time is taken")
        return super().__call__()


def seconds_per_step(spec: JobSpec, folders: JobFolders, phase: str, out: Path, watch: Stopwatch, uses_graphs: bool) -> float:
    """Train in `out`, a new folder, on the results of earlier phases, until the time has been measured."""
    inputs = {name: run_job(spec, folders, name, False, StopRequest()) for name in BY_NAME[phase].needs}
    fetched = fetch_inputs(spec, folders.scratch, StopRequest())
    out.mkdir()
    context = PhaseContext(spec, fetched, inputs, out, folders.run_folder(spec), watch, uses_graphs=uses_graphs)
    with contextlib.suppress(Interrupted):
        BY_NAME[phase].run(context)
    return watch.seconds_per_step
