"""The launcher on a node: runs the job as a child process, forwards stop requests, and requeues the task (see requeue.py).

It runs outside of the container, so images need nothing of SLURM. submitit unpickles and calls a NodeJob. submitit's signal
handlers and pickled results are not used: an attempt ends with `os._exit`.
"""

import contextlib
import ctypes
import math
import os
import signal
import socket
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotion.characters import terminal_text
from emotion.errors import Interrupted, ModelError, NodeError, Stopped, StorageError, as_failure, system_reason
from emotion.files import read_json_lines
from job.spec.load import load_spec
from job.spec.model import JobSpec
from slurm.cluster import RetriesConfig
from slurm.container import job_argv, kill_argv
from slurm.memory import kills_for_memory, may_be_memory, memory_groups, more_gib
from slurm.requeue import KILL_BEFORE_LIMIT_SECONDS, AttemptEnd, Cause, Limits, decide_requeue, is_final, retries_used
from slurm.slurm_cli import JobInfo, cancel, current_job, exclude_node, requeue, set_memory, show_job
from slurm.sweep_folder import JobKind, SweepFolder, append_event

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
FORWARDED_SIGNAL = signal.SIGUSR1
"""SLURM may send its SIGTERM to the child, too, and a second SIGTERM would make the job exit at once. SIGUSR1 never does."""
POLL_SECONDS = 0.2
FORWARD_AGAIN_SECONDS = 2.0
PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass
class NodeJob:
    """The object that submitit pickles: one job of a sweep. folder: the folder of the sweep."""

    folder: str
    submission: int
    kind: JobKind
    index: int

    def __setstate__(self, state: dict[str, Any]) -> None:
        # submitit installs its own handlers between this and the call of `run`. Signals that arrive meanwhile stay pending.
        hold_stop_signals()
        self.__dict__.update(state)

    def run(self) -> None:
        """Run one attempt and exit with its code. submitit calls this on the node; it does not return."""
        received: list[int] = []
        record_stop_signals(received.append)
        try:
            code = Attempt(self, received).run()
        except Exception as raised:  # noqa: BLE001 - the last resort
            if os.getenv("EMOTION_TRACEBACK"):
                traceback.print_exception(raised)
            error = as_failure(raised)
            log(str(error))
            code = error.exit_code
            # The attempt cannot be recorded anywhere: SLURM's own count of restarts limits the retries.
            if code == StorageError.exit_code and int(os.getenv("SLURM_RESTART_COUNT", "0")) < RetriesConfig().errors:
                refusal = requeue(current_job())
                log(f"SLURM does not start it again: {refusal}" if refusal else "this task is started again")
        os._exit(code)


class Attempt:
    """One attempt at one job of a sweep. received: stop signals so far; the handlers append to it."""

    def __init__(self, node_job: NodeJob, received: list[int]) -> None:
        self.node_job, self.received = node_job, received
        self.folder = SweepFolder(Path(node_job.folder))
        self.cluster = self.folder.cluster if node_job.kind == "task" else self.folder.cluster.for_preparing()
        self.job_id = current_job()
        self.events_path = self.folder.attempts_path(node_job.kind, node_job.index)
        self.job: JobInfo | None = None
        self.grace_end: float | None = None
        self.memory_kills = 0
        self.look()
        self.restarts = self.job.restarts if self.job else 0
        # If the controller does not answer, the requested time limit counts.
        limit = self.job.end if self.job else time.time() + 60 * self.cluster.time_limit_minutes
        self.end = math.inf if limit is None else monotonic_of(limit)  # the clock may be set while the job runs

    def look(self) -> None:
        """Ask SLURM for the state of this job."""
        self.job = show_job(self.job_id) or self.job
        if self.job is not None and self.job.is_running and self.job.is_preempted:
            self.grace_end = self.job.end

    def run(self) -> int:
        """Run the attempt and return its exit code. If a retry helps, SLURM has then been asked to start the task again."""
        if self.is_cancelled():
            return self.leave("cancelled", Stopped.exit_code, "this submission was cancelled")
        used = retries_used(read_json_lines(self.events_path), self.node_job.submission)
        self.record({"event": "start", "restarts": self.restarts, "host": node_name()})
        if used["preempted"] > self.cluster.retries.preemptions:
            return self.leave("failed", ModelError.exit_code, "retries.preemptions are used up")
        path = self.folder.spec_path(self.node_job.index)
        path.open("rb").close()  # an OSError here is unavailable storage; load_spec would call it a wrong spec
        spec = load_spec(path)
        # A stop request may have come before this process could handle signals.
        is_stopping = self.job is not None and (self.job.is_preempted or not self.job.is_running)
        code = Interrupted.exit_code if self.received or is_stopping else self.run_child(spec)
        return self.finish(code, spec, used)

    def is_cancelled(self) -> bool:
        return self.folder.cancelled_mark(self.node_job.submission).exists()

    def run_child(self, spec: JobSpec) -> int:
        """Run the job. Returns the exit code that the job recorded, else that of the child process: a wrapper may change it."""
        started = time.time() - 0.01  # events have a resolution of a millisecond
        # The name is the same in all attempts of this job, and in no other job: an existing container with it is a leftover.
        name = f"emotion-{self.folder.tasks[self.node_job.index].run}-{self.node_job.kind}-{self.job_id}"
        argv = self.child_argv(spec, name)
        self.kill_container(name)  # a leftover of an attempt on a node that SLURM had lost
        groups = memory_groups()
        before = kills_for_memory(groups)
        try:
            prepare = stop_with_parent_and_wait if self.cluster.runtime == "bare" else stop_with_parent
            child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, preexec_fn=prepare)
        except OSError as error:
            log(f"{argv[0]}: cannot be started ({system_reason(error)})")
            return StorageError.exit_code
        with child:
            code = self.wait(child, name)
        self.memory_kills = kills_for_memory(groups) - before
        return code if self.node_job.kind == "collect" else self.recorded_exit_code(started, code)

    def child_argv(self, spec: JobSpec, name: str) -> list[str]:
        cluster, folder = self.cluster, self.folder
        user = f"{os.getuid()}:{os.getgid()}"
        variables = {"OMP_NUM_THREADS": os.getenv("SLURM_CPUS_PER_TASK") or str(cluster.cpus)}
        if self.end < math.inf:
            variables["SLURM_JOB_END_TIME"] = str(int(time.time() + self.end - time.monotonic()))
        # Docker's daemon runs outside of the job and needs the list of GPUs; the container numbers them from 0.
        gpus = os.getenv("SLURM_JOB_GPUS") if cluster.runtime == "docker" else None
        if (visible := os.getenv("CUDA_VISIBLE_DEVICES")) is not None and not gpus:
            variables["CUDA_VISIBLE_DEVICES"] = visible
        if self.node_job.kind == "collect":
            # The container needs the published folders of all tasks; the spec names those of one.
            published = {str(task.published_folder.parent) for task in folder.tasks if task.published_folder is not None}
            cluster = cluster.model_copy(update={"binds": (*cluster.binds, *sorted(published))})
        devices = f'"device={gpus}"' if gpus else "all"
        return job_argv(self.arguments(), spec, cluster, name, user, variables, devices)

    def arguments(self) -> list[str]:
        """The arguments of emotion-job."""
        kind, folder = self.node_job.kind, self.folder
        if kind == "collect":
            return ["collect", str(folder.path), "--out", str(folder.path / "collected")]
        spec, scratch = folder.spec_path(self.node_job.index), self.cluster.scratch_folder
        arguments = ["run", str(spec), "--work", self.cluster.work, "--scratch", str(scratch)]
        return [*arguments, "--until", "features"] if kind == "prepare" else arguments

    def recorded_exit_code(self, started: float, code: int) -> int:
        """The exit code in the job's own attempts.jsonl since `started`, or `code` if there is none."""
        # Selected by time, because a mirror may have added events of earlier attempts meanwhile.
        try:
            events = read_json_lines(self.folder.run_folder(self.node_job.index) / "attempts.jsonl")
        except OSError as error:
            log(f"the job's record of its attempts cannot be read ({system_reason(error)}); its exit code counts")
            return code
        ends = [event for event in events if event.get("event") == "end" and isinstance(event.get("time"), float | int)]
        ends = [event for event in ends if event["time"] >= started]
        recorded = ends[-1].get("exit_code") if ends else None
        return recorded if isinstance(recorded, int) else code

    def wait(self, child: subprocess.Popen[bytes], name: str) -> int:
        """Wait for the child and return its exit code. Forward stop requests; kill the child when it is out of time."""
        is_killed, forwarded, seen = False, -math.inf, 0
        while child.poll() is None:
            if self.received and time.monotonic() - forwarded >= FORWARD_AGAIN_SECONDS:
                # Sent repeatedly, because the first process of a starting container has no handler yet and ignores the signal.
                child.send_signal(FORWARDED_SIGNAL)
                forwarded = time.monotonic()
            received = len(self.received)
            if received > seen:
                # At once: SLURM reports the end of a preemption's grace time only during it (see AttemptEnd).
                self.look()
                if not seen:
                    log(f"received {signal_name(self.received[0])}: the job is asked to save and exit")
                seen = received
            if not is_killed and self.is_out_of_time():
                is_killed = True
                log("out of time: what the job has not saved by now is lost")
                self.kill_container(name)
                child.kill()
            time.sleep(POLL_SECONDS)
        return child.returncode if child.returncode >= 0 else 128 - child.returncode

    def is_out_of_time(self) -> bool:
        if time.monotonic() <= self.end - KILL_BEFORE_LIMIT_SECONDS:
            return False
        # An operator may have extended the limit, or the job was suspended. During a preemption, EndTime is the end of the
        # grace time, at which SLURM itself ends the job.
        job = show_job(self.job_id)
        if job is not None and job.end is not None and not job.is_preempted:
            self.end = max(self.end, monotonic_of(job.end))
        return time.monotonic() > self.end - KILL_BEFORE_LIMIT_SECONDS

    def kill_container(self, name: str) -> None:
        if argv := kill_argv(self.cluster, name):
            # A missing runtime is reported when the job is started.
            with contextlib.suppress(OSError):
                subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)

    def finish(self, code: int, spec: JobSpec, used: dict[Cause, int]) -> int:
        """Record how the attempt ended, and ask SLURM to start the task again if that is the decision."""
        ended = self.retry_with_more_memory(code)
        if ended is not None:
            return ended
        left = self.end - time.monotonic()
        limits = Limits(spec.preemption.grace_seconds, self.cluster.save_seconds, self.cluster.retries)
        is_cancelled = False
        if not is_final(code, left, limits):
            self.look()
            is_cancelled = self.is_cancelled()
        end = AttemptEnd(code, bool(self.received), left, self.job, self.restarts, is_cancelled, self.grace_end)
        decision = decide_requeue(end, limits, used)
        if decision.cause == "error":
            log(f"the job ended with {code}")
        if not decision.requeue:
            return self.leave(decision.outcome, decision.exit_code, decision.text)
        # Recorded first: SLURM may end this process before the requeue command returns.
        is_recorded = self.record_end(decision.outcome, code, decision.text)
        if decision.cause == "error" and not is_recorded:
            log("the error could not be counted, so the task is not started again: free disk space, then resubmit")
            return code
        log(decision.text)
        refusal = requeue(self.job_id, even_if_ended=end.is_preempted)
        if refusal and decision.cause == "preempted":
            text = f"preempted; this site does not requeue ({refusal}): use emotion-slurm resubmit"
            self.record({"event": "refused", "text": text})
            log(text)
        elif refusal:
            return self.leave("failed", code, f"SLURM does not start it again: {refusal}. Use emotion-slurm resubmit")
        elif code == NodeError.exit_code:
            self.exclude_this_node()
        return code

    def retry_with_more_memory(self, code: int) -> int | None:
        """If the kernel has killed the job for memory and the cluster file allows more, start it again with more memory.

        Returns the exit code; None if this does not apply, so that `finish` decides about the task.
        """
        at_most = self.cluster.retries.memory_gib_at_most
        was_killed = self.memory_kills > 0 and may_be_memory(code)
        if at_most is None or not was_killed or self.received or self.is_cancelled():
            return None
        self.look()
        now = (self.job.memory_gib if self.job else None) or self.cluster.memory_gib
        more = more_gib(now, at_most)
        if more is None:
            text = f"out of memory with {now:.4g} GiB, and retries.memory_gib_at_most allows no more"
            return self.leave("failed", ModelError.exit_code, text)
        events = read_json_lines(self.events_path)
        if more in [event.get("memory_gib") for event in events if event.get("job") == self.job_id]:
            return None  # it was requested before and not granted: this counts as an error
        text = f"out of memory with {now:.4g} GiB: this task is started again with {more:.4g} GiB (of {at_most:.4g} at most)"
        self.record({"event": "end", "outcome": "out of memory", "exit_code": code, "memory_gib": more, "text": text})
        log(text)
        if refusal := requeue(self.job_id):
            return self.leave("failed", code, f"SLURM does not start it again: {refusal}. Use emotion-slurm resubmit")
        # The requeue sends SIGTERM to all processes of the job, also to commands of SLURM that do not block it.
        with signals_held(*STOP_SIGNALS):
            refusal = set_memory(self.job_id, more)
            if refusal:  # otherwise the job would be killed again and again
                with contextlib.suppress(StorageError):
                    cancel([self.job_id])
        if refusal:
            text = f"out of memory with {now:.4g} GiB, and SLURM refuses {more:.4g} GiB ({refusal})"
            return self.leave("failed", ModelError.exit_code, text)
        return code

    def exclude_this_node(self) -> None:
        """Exclude this node from a job that was just requeued because the node is bad. If SLURM refuses, the job may start here
        again."""
        with signals_held(*STOP_SIGNALS):  # as in retry_with_more_memory
            refusal = exclude_node(self.job_id, node_name())
        text = f"{node_name()} cannot do the job and is excluded: this task is started on another node"
        if refusal is not None:
            text = f"{node_name()} cannot do the job, and SLURM does not exclude it ({refusal}): this task may start there again"
        self.record({"event": "not excluded" if refusal else "excluded", "node": node_name(), "text": text})
        log(text)

    def leave(self, outcome: str, code: int, text: str) -> int:
        """Record and log the end of an attempt after which this launcher does not start the task again."""
        self.record_end(outcome, code, text)
        log(text or outcome)
        return code

    def record_end(self, outcome: str, code: int, text: str) -> bool:
        return self.record({"event": "end", "outcome": outcome, "exit_code": code, **({"text": text} if text else {})})

    def record(self, event: dict[str, Any]) -> bool:
        """Append to the file in attempts/. Returns False if that fails: a full disk must not lose a preempted task."""
        try:
            append_event(self.events_path, {"submission": self.node_job.submission, "job": self.job_id, **event})
        except OSError as error:
            log(f"{self.events_path} cannot be written ({system_reason(error)})")
            return False
        return True


def node_name() -> str:
    return os.getenv("SLURMD_NODENAME") or socket.gethostname()


def monotonic_of(moment: float) -> float:
    """Convert a time in seconds since 1970 to the monotonic clock."""
    return time.monotonic() + moment - time.time()


def hold_stop_signals() -> None:
    """Block stop signals until record_stop_signals is called."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def record_stop_signals(record: Callable[[int], None]) -> None:
    """Pass stop signals, including pending ones, to `record` from now on, and do nothing else."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _frame: record(number))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def signal_name(number: int) -> str:
    return signal.Signals(number).name


@contextlib.contextmanager
def signals_held(*numbers: signal.Signals) -> Iterator[None]:
    """Block these signals until the end of the block, also in programs that the block starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def interruptions_held() -> contextlib.AbstractContextManager[None]:
    """Delay Ctrl-C until the end of the block."""
    return signals_held(signal.SIGINT)


def stop_with_parent() -> None:
    """Called in the child. It receives the stop signal when this process dies, so that it never outlives this process."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(FORWARDED_SIGNAL), 0, 0, 0)


def stop_with_parent_and_wait() -> None:
    """Also block stop signals until the job can handle them (job/entry.py). Not for container engines, which would not unblock
    them."""
    stop_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def log(text: str) -> None:
    # A full disk must not lose a preempted task.
    with contextlib.suppress(OSError):
        print(terminal_text(f"emotion-slurm: {text}"), flush=True)
