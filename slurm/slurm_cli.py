"""Calls SLURM's own commands and parses their answers. Runs where the launcher runs, never in an image."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from emotion.errors import SpecError, StorageError
from slurm import environment

ANSWER_SECONDS = 30.0
"""Timeout of one command. A busy controller may take this long; SLURM's own commands give up after it, too."""
ENDED_STATES = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT",
}  # fmt: skip
"""States of ended jobs. A job in any other state is in the queue or runs."""
RUNNING_STATES = ("RUNNING", "CONFIGURING", "SIGNALING", "RESIZING", "STAGE_OUT", "STOPPED", "SUSPENDED")
"""RUNNING, and the states that replace it for a moment, such as while a signal is on its way to the node."""

NO_CONTROLLER = ("Unable to contact slurm controller", "configuration source", "ClusterName needs to be specified")
"""Parts of the messages of SLURM's commands if slurmctld is down, or if they do not know its address."""


def run_command(*argv: str) -> str:
    """Standard output of a SLURM command. Raises StorageError with its message if it fails, SpecError if it is missing."""
    try:
        done = subprocess.run(
            argv,
            env=environment.for_queries(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="backslashreplace",  # names of jobs, folders and nodes may be any bytes
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise SpecError(
            f"{argv[0]} is not in PATH: this is not a machine of a SLURM cluster. Log in to one, or load its module."
        ) from None
    except OSError as error:
        raise StorageError(f"{argv[0]}: cannot be started ({error.strerror})") from error
    except subprocess.TimeoutExpired:
        raise StorageError(f"{argv[0]} did not answer within {ANSWER_SECONDS:g} s. Try again later.") from None
    if done.returncode != 0:
        message = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        if any(said in message for said in NO_CONTROLLER):
            reason = re.split(r"(?:error|fatal): ", message)[-1]
            raise StorageError(
                f"{argv[0]}: no controller of SLURM answers here ({reason}). Try again later, or on a login node of the cluster; "
                f"SLURM_CONF, where it is set, must name its configuration. `scontrol ping` asks, too."
            )
        raise StorageError(f"{' '.join(argv)}: {message}")
    return done.stdout


@dataclass(frozen=True)
class Site:
    """The configuration of the site. config: `scontrol show config`, by key; partitions: name → fields of `show partition`."""

    config: dict[str, str]
    partitions: dict[str, dict[str, str]]

    def config_number(self, key: str, default: int) -> int:
        """The leading number of a config value such as "30 sec"."""
        found = re.match(r"\d+", self.config.get(key, ""))
        return int(found[0]) if found else default

    @property
    def largest_array(self) -> int:
        """The largest number of tasks in one array, whose indices are below MaxArraySize."""
        return max(1, self.config_number("MaxArraySize", 1001))


def read_site() -> Site:
    config = [line.split(" = ", 1) for line in run_command("scontrol", "show", "config").splitlines() if " = " in line]
    partitions = map(_parse_fields, run_command("scontrol", "-o", "show", "partition").splitlines())
    named = {values["PartitionName"]: values for values in partitions if "PartitionName" in values}
    return Site({key.strip(): value.strip() for key, value in config}, named)


def node_hostnames() -> set[str]:
    """Host names of the machines that run jobs."""
    nodes = map(_parse_fields, run_command("scontrol", "-o", "show", "node").splitlines())
    return {node["NodeHostName"] for node in nodes if node.get("NodeHostName")}


def largest_node_gib(partition: str) -> float | None:
    """GiB of memory that a job may request on the largest node of a partition; None if SLURM does not say."""
    nodes = map(_parse_fields, run_command("scontrol", "-o", "show", "node").splitlines())
    sizes = [int(node["RealMemory"]) for node in nodes if partition in node.get("Partitions", "").split(",")]
    return max(sizes) / 1024 if sizes else None


def parse_duration(text: str) -> float | None:
    """Seconds of a duration such as 5:00, 1:00:00, 2-00:00:00, 2-12 (days-hours) or 30 (seconds). None for UNLIMITED."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        return None
    days, *rest = found.groups()
    numbers = [int(part) for part in rest if part is not None]
    # After days come hours, and the rest is optional. Without days, the last number is seconds.
    zeros = [0] * (3 - len(numbers))
    hours, minutes, seconds = [*numbers, *zeros] if days else [*zeros, *numbers]
    return 86400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds


@dataclass(frozen=True)
class JobInfo:
    """The present state of a job. Times are in seconds since 1970.

    end: when its time limit or its grace time ends, or when it ended. preempted_at: when its preemption began, None without one.
    memory_gib: memory requested per node, None if it was requested otherwise.
    """

    state: str
    restarts: int
    end: float | None
    preempted_at: float | None
    memory_gib: float | None = None

    @property
    def is_running(self) -> bool:
        """Whether the job runs. False once it was cancelled, requeued, or preempted without grace."""
        return self.state in RUNNING_STATES

    @property
    def is_preempted(self) -> bool:
        return self.preempted_at is not None


def show_job(job: str) -> JobInfo | None:
    """The state of a job; None if the controller does not answer or no longer knows the job."""
    try:
        values = _parse_fields(run_command("scontrol", "-o", "show", "job", job))
    except (StorageError, SpecError):
        return None
    if "JobState" not in values:
        return None
    start, preempt = _parse_time(values.get("StartTime")), _parse_time(values.get("PreemptTime"))
    return JobInfo(
        state=values["JobState"],
        restarts=int(values.get("Restarts", "0")),
        end=_parse_time(values.get("EndTime")),
        # A time before the start is of a preemption of an earlier attempt.
        preempted_at=preempt if preempt is not None and (start is None or preempt >= start) else None,
        memory_gib=_parse_gib(values.get("MinMemoryNode", "")),
    )


def current_job() -> str:
    """The id of this process's job. For an array task it is ARRAY_INDEX, because the bare id may requeue the whole array."""
    array, index, job = (os.getenv(f"SLURM_{name}") for name in ("ARRAY_JOB_ID", "ARRAY_TASK_ID", "JOB_ID"))
    if job is None:
        raise SpecError("SLURM_JOB_ID is not set: a task runs in a job of SLURM")
    return f"{array}_{index}" if array and index else job


def requeue(job: str, even_if_ended: bool = False) -> str | None:
    """Start this job again. Returns None, or SLURM's message if it refuses.

    even_if_ended: requeue it even if SLURM has ended it. Otherwise a cancelled job, even if just cancelled, stays cancelled.
    """
    message, which = "", [] if even_if_ended else ["incomplete"]
    for attempt in range(3):
        time.sleep(2 * attempt)
        try:
            run_command("scontrol", "requeue", *which, job)
            return None
        except StorageError as error:
            message = str(error)
        except SpecError as error:
            return str(error)
    return message


def set_memory(job: str, gib: float) -> str | None:
    """Change the memory that a job requests per node. Returns None, or SLURM's message if it refuses.

    SLURM accepts this only for pending jobs: call it right after `requeue`, which makes the job pending.
    """
    try:
        run_command("scontrol", "update", f"JobId={job}", f"MinMemoryNode={round(gib * 1024)}")
    except (StorageError, SpecError) as error:
        return str(error)
    return None


def exclude_node(job: str, node: str) -> str | None:
    """Exclude a node from running this job, in addition to nodes that were excluded before. Returns None, or SLURM's message if
    it refuses. SLURM accepts this only for pending jobs: call it right after `requeue`."""
    try:
        before = _parse_fields(run_command("scontrol", "-o", "show", "job", job)).get("ExcNodeList", "(null)")
        nodes = node if before == "(null)" else f"{before},{node}"
        run_command("scontrol", "update", f"JobId={job}", f"ExcNodeList={nodes}")
        return None
    except (StorageError, SpecError) as error:
        return str(error)


@dataclass(frozen=True)
class QueueEntry:
    """A line of squeue. state: SLURM's state, such as RUNNING. reason: why the job waits."""

    state: str
    reason: str
    node: str


def read_queue(jobs: Sequence[str]) -> dict[str, QueueEntry]:
    """Job id → its entry, for the jobs that the controller still knows. It also knows ended jobs for a while."""
    if not jobs:
        return {}
    try:
        text = run_command("squeue", "-h", "-r", "-t", "all", "-j", ",".join(root_ids(jobs)), "-o", "%i|%T|%r|%N")
    except StorageError as error:
        # This is the answer if squeue no longer knows the only job.
        if "Invalid job id" not in str(error):
            raise
        return {}
    lines = (line.split("|", 3) for line in text.splitlines())
    found = {job: QueueEntry(state, reason, node) for job, state, reason, node in lines}
    return {job: found[job] for job in jobs if job in found}


def accounting_states(jobs: Sequence[str]) -> dict[str, str]:
    """Job id → final state, from SLURM's accounting. Empty on a site without accounting."""
    if not jobs or shutil.which("sacct") is None:
        return {}
    try:
        # Array ids instead of all elements: one argument may not exceed 128 KiB.
        text = run_command("sacct", "-n", "-X", "-P", "-j", ",".join(root_ids(jobs)), "-o", "JobID,State")
    except StorageError:
        return {}
    pairs = [line.split("|", 1) for line in text.splitlines() if "|" in line]
    found = {job: state.split()[0] for name, state in pairs if state for job in expand_job_name(name)}
    return {job: found[job] for job in jobs if job in found}


def root_ids(jobs: Iterable[str]) -> list[str]:
    """Job and array ids without _INDEX, each once."""
    return sorted({job.partition("_")[0] for job in jobs}, key=int)


def expand_job_name(name: str) -> list[str]:
    """Job ids in a name such as 3_[0-2,5%4], which sacct uses for array elements that never started."""
    found = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", name)
    if found is None:
        return [name]
    ranges = [part.partition("-") for part in found[2].split(",")]
    return [f"{found[1]}_{index}" for first, _, last in ranges for index in range(int(first), int(last or first) + 1)]


def cancel(jobs: Sequence[str]) -> None:
    if jobs:
        run_command("scancel", "--quiet", *jobs)


def _parse_fields(line: str) -> dict[str, str]:
    """KEY=VALUE KEY=VALUE … as a dict. The first value counts if a key is repeated."""
    return dict(reversed([word.split("=", 1) for word in line.split() if "=" in word]))


def _parse_gib(text: str) -> float | None:
    """GiB of a size such as 16G or 700M."""
    found = re.fullmatch(r"([\d.]+)([KMGTP])", text)
    return float(found[1]) * 1024.0 ** ("KMGTP".index(found[2]) - 2) if found else None


def _parse_time(text: str | None) -> float | None:
    """Seconds since 1970 of a time such as 2026-11-25T19:48:23, which is UTC; None for anything else, such as Unknown."""
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() if text else None
    except ValueError:
        return None
