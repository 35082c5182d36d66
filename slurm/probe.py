"""The probe that `emotion-slurm doctor --live` runs on a node: a job that writes its state ten times a second until it is killed.

Its first attempt asks SLURM to start it again, as a task does; the second one runs into its time limit. Each attempt writes
attempt-N.json into the folder of the probe, where N is SLURM's count of restarts:

    job, node, seconds    since the start of the attempt, when this was written
    signals               [name, seconds] of each received signal
    answer                the newest question, a file that the login node writes
    requeue               null, or seconds and refusal (null, or what SLURM says)
    replacements          how often this file was replaced, and how long that took, in seconds: median and longest
    memory                limit and total of the node, in bytes; limit is null for none
    inside                null, or the result of the container: exit code, seconds, its last line
"""

import contextlib
import json
import os
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotion.errors import as_failure, system_reason
from emotion.files import write_json
from job.spec.model import JobSpec
from slurm.cluster import ClusterConfig
from slurm.container import kill_argv, program_argv
from slurm.memory import limit_bytes, memory_groups
from slurm.slurm_cli import current_job, requeue, show_job
from slurm.task import hold_stop_signals, log, record_stop_signals, signal_name, stop_with_parent

BEAT_SECONDS = 0.1
REQUEUE_SECONDS = 25.0
"""The first attempt asks for its restart at most this long after its start: it has a minute, which includes KillWait."""
QUESTIONS_SECONDS = 5.0
"""The first attempt answers the login node for at least this long, so that the login node reads the file often enough."""
END_SECONDS = 600.0
CLUSTER, QUESTION = "cluster.json", "question"
CANNOT_START = 127  # the exit code of shells for it
PADDING = "." * 2**14
"""Makes the file several pages long: a file system that shows half-written files would then not show it whole by chance."""
INSIDE = """
import json
try:
    import torch
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(json.dumps({"torch": torch.__version__, "gpus": gpus}))
except ImportError as error:
    print(json.dumps({"error": str(error)}))
"""


def attempt_path(folder: Path, restarts: int) -> Path:
    return folder / f"attempt-{restarts}.json"


@dataclass
class Probe:
    """The object that submitit pickles. folder: of the probe, with the cluster file."""

    folder: str

    def __setstate__(self, state: dict[str, Any]) -> None:
        # As NodeJob (task.py): submitit installs its own handlers between this and the call.
        hold_stop_signals()
        self.__dict__.update(state)

    def run(self) -> None:
        """The function that submitit calls on the node. It does not return, and ends by SIGKILL if the site works."""
        started = time.monotonic()
        signals: list[tuple[str, float]] = []
        record_stop_signals(lambda number: signals.append((signal_name(number), round(time.monotonic() - started, 2))))
        code = 0
        try:
            watch(Path(self.folder), started, signals)
        except Exception as raised:  # noqa: BLE001 - the last resort
            error = as_failure(raised)
            log(str(error))
            code = error.exit_code
        os._exit(code)


def watch(folder: Path, started: float, signals: list[tuple[str, float]]) -> None:
    """Write the state of this attempt repeatedly. signals: received signals; the handlers append to it."""
    cluster = ClusterConfig.model_validate_json((folder / CLUSTER).read_bytes())
    job_id = current_job()
    job = show_job(job_id)
    restarts = job.restarts if job else int(os.getenv("SLURM_RESTART_COUNT", "0"))
    state: dict[str, Any] = {
        "job": job_id,
        "node": os.getenv("SLURMD_NODENAME", ""),
        "signals": signals,
        "answer": "",
        "requeue": None,
        "memory": {"limit": limit_bytes(memory_groups()), "total": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")},
        "inside": None,
        "padding": PADDING,
    }
    durations: list[float] = []
    inside = Inside(folder, cluster, f"emotion-doctor-{job_id}") if restarts == 0 else None
    while (seconds := time.monotonic() - started) < END_SECONDS:
        state["seconds"] = round(seconds, 2)
        state["replacements"] = {"count": len(durations), "longest": max(durations, default=0.0)}
        state["replacements"]["median"] = statistics.median(durations) if durations else 0.0
        begin = time.monotonic()
        write_json(attempt_path(folder, restarts), state)
        durations.append(round(time.monotonic() - begin, 5))
        with contextlib.suppress(OSError):  # such as on NFS, if the file is replaced at this moment
            state["answer"] = (folder / QUESTION).read_text(encoding="utf-8")
        if inside is not None and state["requeue"] is None:
            state["inside"] = inside.ended(give_up=seconds > REQUEUE_SECONDS)
            has_answered = bool(state["answer"]) and seconds > QUESTIONS_SECONDS
            if seconds > REQUEUE_SECONDS or (state["inside"] is not None and has_answered):
                asked = round(time.monotonic() - started, 2)
                state["requeue"] = {"seconds": asked, "refusal": requeue(job_id)}
        time.sleep(max(0.0, BEAT_SECONDS - (time.monotonic() - begin)))


class Inside:
    """A Python process that runs as the job would, in the container if there is one."""

    def __init__(self, folder: Path, cluster: ClusterConfig, name: str) -> None:
        self.cluster, self.name, self.started = cluster, name, time.monotonic()
        self.output = folder / "inside.txt"
        gpus = os.getenv("SLURM_JOB_GPUS") if cluster.runtime == "docker" else None
        visible = os.getenv("CUDA_VISIBLE_DEVICES")
        variables = {"CUDA_VISIBLE_DEVICES": visible} if visible is not None and not gpus else {}
        spec = JobSpec.model_validate({"name": "doctor", "data": {"source": "generated:12"}})
        user, devices = f"{os.getuid()}:{os.getgid()}", f'"device={gpus}"' if gpus else "all"
        argv = program_argv(["python", "-c", INSIDE], spec, cluster, name, user, variables, devices)
        self.child: subprocess.Popen[bytes] | None = None
        with self.output.open("wb") as file:
            try:
                self.child = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, preexec_fn=stop_with_parent
                )
            except OSError as error:
                file.write(f"{argv[0]}: cannot be started ({system_reason(error)})".encode())

    def ended(self, give_up: bool) -> dict[str, Any] | None:
        """The result of the process; None while it runs. give_up: kill it if it still runs."""
        code = self.child.poll() if self.child else CANNOT_START
        if code is None and not give_up:
            return None
        if self.child is not None and code is None:
            self.child.kill()
            if argv := kill_argv(self.cluster, self.name):
                subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        lines = self.output.read_text(encoding="utf-8", errors="replace").splitlines()
        # A runtime may print something after the result, such as that it cleans up.
        said = next((line for line in reversed(lines) if line.startswith("{")), lines[-1] if lines else "")
        found: dict[str, Any] = {"exit_code": code, "seconds": round(time.monotonic() - self.started, 1), "said": said}
        with contextlib.suppress(ValueError):
            found |= {"said": "", **json.loads(said)}
        return found
