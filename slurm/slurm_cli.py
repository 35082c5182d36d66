"""What is asked of SLURM and told to it, by its own commands. They run where the launcher runs, never in an image."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from emotion.errors import SpecError, StorageError

ANSWER_SECONDS = 30.0
"""A busy controller may take as long; SLURM's own commands give up then, too."""

ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
"""Every other state is that of a job which still has something before it."""
AT_WORK = ("RUNNING", "CONFIGURING", "SIGNALING", "RESIZING", "STAGE_OUT", "STOPPED", "SUSPENDED")
"""RUNNING and what stands in its place for a moment, such as while a signal is on its way to the node."""


def ask(*argv: str) -> str:
    """What a command of SLURM answers. Raises StorageError where it fails, with what it said."""
    try:
        found = subprocess.run(argv, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except FileNotFoundError:
        raise SpecError(
            f"{argv[0]} is not in PATH: this is no machine of a SLURM cluster. Log in to one, or load its module."
        ) from None
    except subprocess.TimeoutExpired:
        raise StorageError(f"{argv[0]} did not answer within {ANSWER_SECONDS:g} s. Try again later.") from None
    if found.returncode != 0:
        said = " ".join((found.stderr or found.stdout).split()) or f"exit code {found.returncode}"
        raise StorageError(f"{' '.join(argv)}: {said}")
    return found.stdout


@dataclass(frozen=True)
class Site:
    """What `scontrol show config` and `scontrol show partition` say."""

    config: dict[str, str]
    partitions: dict[str, dict[str, str]]

    def number(self, key: str, default: int) -> int:
        """The number that a value such as "30 sec" begins with."""
        found = re.match(r"\d+", self.config.get(key, ""))
        return int(found[0]) if found else default

    @property
    def sends_user_signal(self) -> bool:
        return "preempt_send_user_signal" in self.config.get("SlurmctldParameters", "")

    @property
    def kill_wait_seconds(self) -> int:
        return self.number("KillWait", 30)

    @property
    def largest_array(self) -> int:
        """Tasks in one array: its indices are below MaxArraySize."""
        return max(1, self.number("MaxArraySize", 1001))

    @property
    def has_accounting(self) -> bool:
        return self.config.get("AccountingStorageType", "").endswith("slurmdbd")

    @property
    def default_partition(self) -> str | None:
        return next((name for name, facts in self.partitions.items() if facts.get("Default") == "YES"), None)


def read_site() -> Site:
    config: dict[str, str] = {}
    for line in ask("scontrol", "show", "config").splitlines():
        key, separator, value = line.partition(" = ")
        if separator:
            config[key.strip()] = value.strip()
    partitions = {}
    for line in ask("scontrol", "-o", "show", "partition").splitlines():
        facts = _pairs(line)
        partitions[facts["PartitionName"]] = facts
    return Site(config, partitions)


def hosts_of_nodes() -> set[str]:
    """The machines that run jobs."""
    return {_pairs(line).get("NodeHostName", "") for line in ask("scontrol", "-o", "show", "node").splitlines()} - {""}


def seconds_of(text: str) -> float | None:
    """Of a length of time such as 30, 5:00, 1:00:00, 2-00:00:00 or 2-12 (hours); None for one without an end."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        return None
    days, *rest = found.groups()
    numbers = [int(part) for part in rest if part is not None]
    # After days come hours, and what follows is optional; without days the last is seconds.
    while len(numbers) < 3:
        numbers = [*numbers, 0] if days else [0, *numbers]
    hours, minutes, seconds = numbers
    return 86400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds


@dataclass(frozen=True)
class JobFacts:
    """A job as the controller sees it now. `preempted`: it is in its grace, to be requeued at its end."""

    state: str
    restarts: int
    end: float | None
    preempted: bool

    @property
    def is_at_work(self) -> bool:
        """Whether nobody has cancelled or requeued it."""
        return self.state in AT_WORK


def show_job(job: str) -> JobFacts | None:
    """None where the controller cannot be asked or has forgotten the job."""
    try:
        facts = _pairs(ask("scontrol", "-o", "show", "job", job))
    except (StorageError, SpecError):
        return None
    if "JobState" not in facts:
        return None
    start, preempt = _time(facts.get("StartTime")), _time(facts.get("PreemptTime"))
    return JobFacts(
        state=facts["JobState"],
        restarts=int(facts.get("Restarts", "0")),
        end=_time(facts.get("EndTime")),
        preempted=preempt is not None and (start is None or preempt >= start),
    )


def requeue(job: str) -> str | None:
    """Start this job again: None, or why that cannot be.

    `incomplete`: where somebody has cancelled the job, also a moment ago, the controller leaves it cancelled.
    """
    said = ""
    for attempt in range(3):
        time.sleep(2 * attempt)
        try:
            ask("scontrol", "requeue", "incomplete", job)
            return None
        except StorageError as error:
            said = str(error)
        except SpecError as error:
            return str(error)
    return said


@dataclass(frozen=True)
class Queued:
    """A line of the queue. `state` such as RUNNING; `reason`: why it waits."""

    state: str
    reason: str
    node: str


def queue(jobs: Sequence[str]) -> dict[str, Queued]:
    """Job (or ARRAY_INDEX) → where it stands, of those that the controller still knows, ended ones for a while, too."""
    found: dict[str, Queued] = {}
    if not jobs:
        return found
    try:
        text = ask("squeue", "-h", "-r", "-t", "all", "-j", ",".join(roots_of(jobs)), "-o", "%i|%T|%r|%N")
    except StorageError as error:
        # What squeue says of a single job that it has forgotten.
        if "Invalid job id" not in str(error):
            raise
        return found
    for line in text.splitlines():
        job, state, reason, node = line.split("|", 3)
        found[job] = Queued(state, reason, node)
    return {job: found[job] for job in jobs if job in found}


def accounted(jobs: Sequence[str]) -> dict[str, str]:
    """Job → final state from the accounting, for those that the controller has forgotten; nothing where there is none."""
    if not jobs or shutil.which("sacct") is None:
        return {}
    try:
        # By the ids of the arrays: one argument may not have more than 128 KiB.
        text = ask("sacct", "-n", "-X", "-P", "-j", ",".join(roots_of(jobs)), "-o", "JobID,State")
    except StorageError:
        return {}
    pairs = [line.split("|", 1) for line in text.splitlines() if "|" in line]
    found = {job: state.split()[0] for name, state in pairs if state for job in expanded(name)}
    return {job: found[job] for job in jobs if job in found}


def roots_of(jobs: Iterable[str]) -> list[str]:
    """The ids before _INDEX, each once."""
    return sorted({job.partition("_")[0] for job in jobs}, key=int)


def expanded(name: str) -> list[str]:
    """The jobs behind a name such as 3_[0-2,5%4], as sacct calls elements of an array that never started."""
    found = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", name)
    if found is None:
        return [name]
    jobs = []
    for part in found[2].split(","):
        first, _, last = part.partition("-")
        jobs += [f"{found[1]}_{index}" for index in range(int(first), int(last or first) + 1)]
    return jobs


def cancel(jobs: Sequence[str]) -> None:
    if jobs:
        ask("scancel", "--quiet", *jobs)


def _pairs(line: str) -> dict[str, str]:
    """KEY=VALUE …; of a key that stands there twice the first."""
    found: dict[str, str] = {}
    for word in line.split():
        key, separator, value = word.partition("=")
        if separator:
            found.setdefault(key, value)
    return found


def _time(text: str | None) -> float | None:
    """Seconds since 1970 of a time such as 2026-11-25T19:48:23, which is local."""
    try:
        return datetime.fromisoformat(text).timestamp() if text else None
    except ValueError:
        return None
