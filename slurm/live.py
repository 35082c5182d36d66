"""`emotion-slurm doctor --live`: observes the probe (probe.py), a real job of a minute that is stopped on purpose."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emotion.errors import StorageError, system_reason
from emotion.files import make_folder, write_bytes
from slurm import environment, slurm_cli
from slurm.cluster import ClusterConfig
from slurm.probe import CLUSTER, QUESTION, Probe, attempt_path
from slurm.slurm_cli import ENDED_STATES, QueueEntry, Site
from slurm.submit import executor_for
from slurm.task import interruptions_held

READ_SECONDS, QUEUE_SECONDS = 0.05, 2.0
"""How often the files of the probe are read, and how often the controller is asked."""
LIMIT_MINUTES = 1


@dataclass
class Seen:
    """What the login node has observed of the probe.

    job: its id. waited: seconds in the queue. attempts: newest state of each attempt (probe.py). answers: seconds from each
    question to its answer. reads: number of reads of the state file, which the probe keeps replacing; broken: errors of reads
    that found no file or half of one; stale: errors of other failed reads, as NFS may refuse to read a file that was replaced
    meanwhile. requeued_after: seconds until the job ran again. ended: the last state of the job in SLURM. log: its output.
    """

    job: str
    waited: float = 0.0
    attempts: list[dict[str, Any]] = field(default_factory=list)
    answers: list[float] = field(default_factory=list)
    reads: int = 0
    broken: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    requeued_after: float | None = None
    ended: str = ""
    log: str = ""


class Observer:
    """Follows one probe from the login node."""

    def __init__(self, folder: Path, seen: Seen, wait_seconds: float) -> None:
        self.folder, self.seen, self.wait_seconds = folder, seen, wait_seconds
        self.asked: tuple[str, float] | None = None
        self.question = 0

    def moments(self, seconds: float) -> Iterator[QueueEntry | None]:
        """Poll the queue for `seconds`, and yield the job's entry each time. Yields None once the job has ended, and stops."""
        end, asked = time.monotonic() + seconds, -QUEUE_SECONDS
        entry: QueueEntry | None = None
        while time.monotonic() < end:
            if time.monotonic() - asked >= QUEUE_SECONDS:
                asked = time.monotonic()
                entry = slurm_cli.read_queue([self.seen.job]).get(self.seen.job)
                if entry is None or entry.state in ENDED_STATES:
                    self.seen.ended = entry.state if entry else "unknown to SLURM"
                    yield None
                    return
            yield entry
            time.sleep(READ_SECONDS)

    def read(self) -> None:
        """Read the state of the newest attempt, and write the next question once the last one is answered."""
        attempts = self.seen.attempts
        try:
            if attempt_path(self.folder, len(attempts)).exists():
                attempts.append({"answer": "", "requeue": None})
            if not attempts:
                return
            self.seen.reads += 1
            attempts[-1] = json.loads(attempt_path(self.folder, len(attempts) - 1).read_bytes())
        except (FileNotFoundError, ValueError) as error:
            self.seen.broken.append(f"{type(error).__name__}: {error}")
        except OSError as error:
            self.seen.stale.append(system_reason(error))
        if len(attempts) == 1 and self.asked is not None and attempts[0]["answer"] == self.asked[0]:
            self.seen.answers.append(time.monotonic() - self.asked[1])
            self.asked = None
        if self.asked is None and len(attempts) == 1:
            self.question += 1
            write_bytes(self.folder / QUESTION, str(self.question).encode())
            self.asked = (str(self.question), time.monotonic())

    def read_again(self) -> None:
        """Read the final states, after all writers have ended. Attempts whose state was never complete are dropped."""
        for index in range(len(self.seen.attempts)):
            with contextlib.suppress(OSError, ValueError):
                self.seen.attempts[index] = json.loads(attempt_path(self.folder, index).read_bytes())
        self.seen.attempts = [attempt for attempt in self.seen.attempts if "job" in attempt]

    def wait_for_start(self) -> None:
        """Wait until the job starts. Raises StorageError if it does not start in time."""
        started = time.monotonic()
        entry: QueueEntry | None = None
        for entry in self.moments(self.wait_seconds):
            self.seen.waited = time.monotonic() - started
            if entry is None or entry.state not in ("PENDING", "CONFIGURING"):
                return
        reason = f"{entry.state.lower()}, {entry.reason}" if entry else "unknown to SLURM"
        raise StorageError(
            f"job {self.seen.job} of --live did not start within {self.wait_seconds / 60:g} minutes ({reason}) and is cancelled. "
            f"Wait longer with --wait MINUTES, or name another partition"
        )

    def follow(self, longest: float) -> None:
        """Observe the job from its start to its end. longest: maximum seconds of one attempt. Returns early if the job is not
        started again in time."""
        since: float | None = None
        for entry in self.moments(2 * longest + self.wait_seconds):
            self.read()
            if entry is None:
                return
            attempts = self.seen.attempts
            is_again = len(attempts) > 1
            if since is None and attempts and attempts[0]["requeue"] is not None:
                since = time.monotonic()
            if is_again and self.seen.requeued_after is None:
                self.seen.requeued_after = time.monotonic() - (since or time.monotonic())
            if since is not None and not is_again and time.monotonic() - since > self.wait_seconds + longest:
                return


def submitted(folder: Path, cluster: ClusterConfig) -> str:
    """Submit the probe and return the id of its job."""
    try:
        for needed in (folder, cluster.scratch_folder):  # as in a submission: containers mount them
            make_folder(needed)
        (folder / CLUSTER).write_text(cluster.model_dump_json(), encoding="utf-8")
        (folder / QUESTION).touch()  # NFS may cache for a minute that there is no such file
    except OSError as error:
        raise StorageError.of(error) from error
    executor = executor_for(folder, "doctor", cluster.model_copy(update={"time_limit_minutes": LIMIT_MINUTES}), "task", None)
    try:
        with environment.cleaned():
            job: str = executor.submit(Probe.run, Probe(str(folder))).job_id
            return job
    except (RuntimeError, OSError, UnicodeError) as error:
        raise StorageError(f"sbatch: {' '.join(str(error).split())}") from error


def try_site(cluster: ClusterConfig, site: Site, wait_minutes: float, say: Callable[[str], None]) -> Seen:
    """Submit the probe with the settings of the cluster file, follow it to its end, and cancel it if it is still in the queue.

    say: shows progress messages. Raises StorageError if the queue does not start the probe within `wait_minutes`.
    """
    folder = cluster.work_folder / "doctor" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    seen = Seen("")
    observer = Observer(folder, seen, 60 * wait_minutes)
    try:
        with interruptions_held():  # an interruption would leave a job whose id was not recorded
            seen.job = submitted(folder, cluster)
        say(
            f"job {seen.job} is submitted. It is stopped on purpose and started again once; this takes some minutes after its "
            f"start"
        )
        observer.wait_for_start()
        # The controller may overlook the time limit for half a minute, and Python may start slowly from a shared disk.
        minutes = LIMIT_MINUTES + site.config_number("OverTimeLimit", 0) + 1
        observer.follow(60 * minutes + site.config_number("KillWait", 30))
    finally:
        if seen.job and seen.ended not in ENDED_STATES:
            # Also if the queue does not show the job at the moment: it may still exist.
            with contextlib.suppress(StorageError):
                slurm_cli.cancel([seen.job])
                if not seen.ended:
                    say(f"job {seen.job} is cancelled")
    observer.read_again()
    with contextlib.suppress(OSError):
        seen.log = (folder / "submitit" / f"{seen.job}_0_log.out").read_text(encoding="utf-8", errors="replace")
    if len(seen.attempts) > 1:
        shutil.rmtree(folder, ignore_errors=True)
    return seen
