"""One attempt at one task, on its node: run the job as a child, pass a stop request on, start this task again or not.

It stays outside of the container, so that an image needs nothing of SLURM. submitit unpickles and calls a NodeTask; what it
would do after that (its own signal handlers, results as pickles) is left out: an attempt ends with `os._exit`.

    the job ends with    and                                         then
    0                                                                done
    64, 65, 70, 77                                                   failed: it would fail again
    64               within the grace before its time limit          started again, within the budget of time-outs
    76                                                               stopped by a person: left alone
    75, or by a signal   it was asked to stop, or out of time        started again, within the budget of preemptions or time-outs
    after it was asked   SLURM says that the job is being cancelled  cancelled: left alone
    69, 73, anything else                                            started again, within the budget of errors
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotion.errors import EmotionError, Interrupted, SpecError, Stopped, StorageError
from emotion.files import read_json_lines
from job.spec.load import load_spec
from job.spec.model import JobSpec
from slurm.cluster import RetriesConfig
from slurm.container import job_argv, kill_argv
from slurm.slurm_cli import JobFacts, requeue, show_job
from slurm.sweep_folder import SweepFolder, What, append_event

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
PASSED_ON = signal.SIGUSR1
"""Of SLURM's own SIGTERM the child may have had its copy; this one is never taken for an impatient request."""
FINAL = {64, 65, 70, 77}
OVER_BUDGET = 70
LOOK_SECONDS = 0.2
ASK_AGAIN_SECONDS = 2.0
LEAVE_SECONDS = 10.0
"""So long before its time limit an attempt is over, whatever the child does: a job out of time is not started again by SLURM."""
EARLY_SECONDS = 60.0
"""SLURM may send the signal before a time limit so much earlier than it was told."""
PR_SET_PDEATHSIG = 1


@dataclass
class NodeTask:
    """What submitit pickles: where to read what to do."""

    folder: str
    submission: int
    what: What
    index: int

    def __setstate__(self, state: dict[str, Any]) -> None:
        # submitit installs handlers of its own between this and the call; what comes meanwhile waits for ours.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        self.__dict__.update(state)

    def run(self) -> None:
        """Leave with the exit code of this attempt."""
        received: list[int] = []
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, _frame: received.append(number))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        try:
            code = Attempt(self, received).run()
        except (EmotionError, OSError) as error:
            found = StorageError.of(error) if isinstance(error, OSError) else error
            say(str(found))
            code = found.exit_code
            if code == StorageError.exit_code:
                start_again_unless_often()
        os._exit(code)


def run_task(task: NodeTask) -> None:
    """What submitit calls on the node; it never comes back to it."""
    task.run()


class Attempt:
    """received: the stop signals so far, which the handlers append to."""

    def __init__(self, task: NodeTask, received: list[int]) -> None:
        self.task, self.received = task, received
        self.folder = SweepFolder(Path(task.folder))
        cluster = self.folder.cluster
        self.cluster = cluster if task.what == "task" else cluster.for_preparing()
        self.job = this_job()
        self.events = self.folder.attempts_path(task.what, task.index)
        self.facts = show_job(self.job)
        self.restarts = self.facts.restarts if self.facts else 0
        # Where the controller does not answer, as long as was asked for.
        self.end = self.facts.end if self.facts else time.time() + 60 * self.cluster.time_limit_minutes

    def run(self) -> int:
        """Exit code of this attempt, after SLURM has been told to start the task again where it should."""
        task = self.task
        if self.folder.cancelled_mark(task.submission).exists():
            return self.leave("cancelled", Stopped.exit_code, "this submission was cancelled")
        used = used_up(read_json_lines(self.events), task.submission)
        host = os.getenv("SLURMD_NODENAME") or socket.gethostname()
        self.write({"event": "start", "restarts": self.restarts, "host": host})
        if used["preempted"] > self.cluster.retries.preemptions:
            return self.leave("failed", OVER_BUDGET, "retries.preemptions are used up")
        path = self.folder.spec_path(task.index)
        path.open("rb").close()  # a disk that is away for a moment is no mistake in a spec
        spec = load_spec(path)
        code = Interrupted.exit_code if self.is_leaving() else self.run_child(spec)
        return self.settle(code, spec, used)

    def is_leaving(self) -> bool:
        """Whether the stop request came before we could hear it."""
        return bool(self.received) or (self.facts is not None and (self.facts.preempted or not self.facts.is_at_work))

    def run_child(self, spec: JobSpec) -> int:
        """Exit code of the job, as it says itself: a wrapper may have made another one of it."""
        task, folder = self.task, self.folder
        # The same over all restarts of this job, and no other job's: what has its name is killed.
        name = f"emotion-{folder.tasks[task.index].run}-{task.what}-{self.job}"
        user = f"{os.getuid()}:{os.getgid()}"
        variables = {"OMP_NUM_THREADS": os.getenv("SLURM_CPUS_PER_TASK") or str(self.cluster.cpus)}
        if self.end is not None:
            variables["SLURM_JOB_END_TIME"] = str(int(self.end))
        # Docker's daemon is outside of the job, so it is told which GPUs; and a container numbers its devices anew.
        given = os.getenv("SLURM_JOB_GPUS") if self.cluster.runtime == "docker" else None
        if (visible := os.getenv("CUDA_VISIBLE_DEVICES")) is not None and not given:
            variables["CUDA_VISIBLE_DEVICES"] = visible
        cluster = self.cluster
        if task.what == "collect":
            # All that was published, wherever; a container sees no more than what one spec names.
            published = {str(one.published_folder.parent) for one in folder.tasks if one.published_folder is not None}
            cluster = cluster.model_copy(update={"binds": (*cluster.binds, *sorted(published))})
        devices = f'"device={given}"' if given else "all"
        argv = job_argv(self.arguments(), spec, cluster, name, user, variables, devices)
        started = time.time() - 0.01  # events are written to the millisecond
        self.kill_container(name)  # of an attempt whose node lost sight of it
        with contextlib.ExitStack() as stack:
            try:
                child = stack.enter_context(
                    subprocess.Popen(argv, stdin=subprocess.DEVNULL, preexec_fn=stop_with_parent)
                )
            except OSError as error:
                say(f"{argv[0]}: cannot be started ({error.strerror})")
                return 69
            code = self.wait(child, name)
        if task.what != "collect":
            # By their times: a mirror may have brought events of earlier attempts meanwhile.
            try:
                events = read_json_lines(folder.run_folder(task.index) / "attempts.jsonl")
            except OSError as error:
                say(f"what the job has written cannot be read ({error.strerror}); its exit code counts")
                return code
            ends = [event for event in events if event.get("event") == "end" and event.get("time", 0) >= started]
            if ends and isinstance(ends[-1].get("exit_code"), int):
                return int(ends[-1]["exit_code"])
        return code

    def arguments(self) -> list[str]:
        task, folder = self.task, self.folder
        if task.what == "collect":
            return ["collect", str(folder.path), "--out", str(folder.path / "collected")]
        spec, work, scratch = folder.spec_path(task.index), self.cluster.work, self.cluster.scratch_folder
        arguments = ["run", str(spec), "--work", work, "--scratch", str(scratch)]
        return [*arguments, "--until", "features"] if task.what == "prepare" else arguments

    def wait(self, child: subprocess.Popen[bytes], name: str) -> int:
        """Until the child has ended. A stop request is passed on to it; what does not end in time is killed.

        Passed on again and again: the first process of a container that is just starting has no handler and loses it.
        """
        killed = False
        asked: float | None = None
        while child.poll() is None:
            if self.received and (asked is None or time.monotonic() - asked >= ASK_AGAIN_SECONDS):
                child.send_signal(PASSED_ON)
                if asked is None:
                    say(f"received {signal.Signals(self.received[0]).name}: the job is asked to save and leave")
                    self.facts = show_job(self.job)
                asked = time.monotonic()
            if not killed and self.is_out_of_time():
                killed = True
                say("out of time: what the job has not saved by now is lost")
                self.kill_container(name)
                child.kill()
            time.sleep(LOOK_SECONDS)
        return child.returncode if child.returncode >= 0 else 128 - child.returncode

    def is_out_of_time(self) -> bool:
        if self.end is None or time.time() <= self.end - LEAVE_SECONDS:
            return False
        # An operator may have given it more, or it was suspended for a while. What a grace leaves is for SLURM to end.
        facts = show_job(self.job)
        if facts is not None and facts.end is not None and not facts.preempted:
            self.end = max(self.end, facts.end)
        return time.time() > self.end - LEAVE_SECONDS

    def kill_container(self, name: str) -> None:
        argv = kill_argv(self.cluster, name)
        if argv is not None:
            # A runtime that is not there is told of when the job is to be started.
            with contextlib.suppress(OSError):
                subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)

    def settle(self, code: int, spec: JobSpec, used: dict[str, int]) -> int:
        """Leave for good or be started again."""
        if code == 0:
            return self.leave("done", 0)
        if code == Stopped.exit_code:
            return self.leave("stopped", code, "a person has asked the job to stop; resubmit goes on")
        # What started so slowly that its time limit had come near finds the limit wrong.
        too_late = self.end is not None and time.time() >= self.end - spec.preemption.grace_seconds
        if code in FINAL and not (code == SpecError.exit_code and too_late):
            return self.leave("failed", code, f"exit code {code}: it would fail again as it is; its log says why")
        self.facts = show_job(self.job) or self.facts
        late = spec.preemption.grace_seconds + self.cluster.save_seconds + EARLY_SECONDS
        kind = why(code, self.received, self.facts, self.restarts, self.end, late)
        if kind == "error" and code == SpecError.exit_code:
            kind = "timed out"
        if kind == "requeued":
            return self.leave(kind, Interrupted.exit_code, "SLURM starts this task again")
        if kind == "cancelled" or self.folder.cancelled_mark(self.task.submission).exists():
            return self.leave("cancelled", Interrupted.exit_code, "cancelled: this task is not started again")
        if kind == "error":
            say(f"the job ended with {code}")
        budget = {
            "preempted": self.cluster.retries.preemptions,
            "timed out": self.cluster.retries.time_outs,
            "error": self.cluster.retries.errors,
        }[kind]
        if used[kind] >= budget:
            return self.leave(
                "failed", code if kind == "error" else OVER_BUDGET, f"{kind}, and all {budget} retries are used up"
            )
        # Written first: SLURM may end this process before the command returns.
        text = f"{kind}: this task is started again ({used[kind] + 1} of {budget})"
        counted = self.write({"event": "end", "kind": kind, "exit_code": code, "text": text})
        if kind == "error" and not counted:
            say("the job failed and that could not be counted, so it is not started again: make room, then resubmit")
            return code
        say(text)
        refused = requeue(self.job)
        if refused is not None:
            return self.leave("failed", code, f"SLURM does not start it again: {refused}. Use emotion-slurm resubmit")
        return code

    def leave(self, kind: str, code: int, text: str = "") -> int:
        """Write down and say how this attempt ended."""
        self.write({"event": "end", "kind": kind, "exit_code": code, **({"text": text} if text else {})})
        say(text or kind)
        return code

    def write(self, event: dict[str, Any]) -> bool:
        """Whether it is written down: a disk that takes no more lines is no reason to lose a task that was preempted."""
        try:
            append_event(self.events, {"submission": self.task.submission, "job": self.job, **event})
        except OSError as error:
            say(f"{self.events} cannot be written ({error.strerror})")
            return False
        return True


def why(code: int, received: list[int], facts: JobFacts | None, restarts: int, end: float | None, late: float) -> str:
    """requeued (by SLURM or an operator), cancelled, preempted, timed out or error.

    late: seconds before the end of the time limit in which a stop is one for lack of time.
    """
    asked = bool(received) or code == Interrupted.exit_code
    if facts is not None and not facts.is_at_work and asked:
        return "requeued" if facts.restarts > restarts else "cancelled"
    if facts is not None and facts.preempted:
        return "preempted"
    if not asked:
        return "timed out" if end is not None and time.time() > end - LEAVE_SECONDS else "error"
    return "timed out" if end is not None and time.time() > end - late else "preempted"


def used_up(events: list[dict[str, Any]], submission: int) -> dict[str, int]:
    """How many attempts of this submission ended by what.

    One without an end was killed: preempted without grace, or lost with its node.
    """
    used = {"preempted": 0, "timed out": 0, "error": 0}
    open_attempt = False
    for event in events:
        if event.get("submission") != submission:
            continue
        if event.get("event") == "start":
            used["preempted"] += open_attempt
            open_attempt = True
        elif event.get("event") == "end":
            open_attempt = False
            kind = "preempted" if event.get("kind") == "requeued" else str(event.get("kind"))
            if kind in used:
                used[kind] += 1
    used["preempted"] += open_attempt
    return used


def this_job() -> str:
    """ARRAY_INDEX of an array's task: the bare id of one of them is the array's, and would start all of it again."""
    array, index, job = (os.getenv(f"SLURM_{name}") for name in ("ARRAY_JOB_ID", "ARRAY_TASK_ID", "JOB_ID"))
    if job is None:
        raise SpecError("SLURM_JOB_ID is not set: a task runs in a job of SLURM")
    return f"{array}_{index}" if array and index else job


def start_again_unless_often() -> None:
    """After a failure of storage that nothing can be written about: SLURM's own count of restarts is what bounds it."""
    if int(os.getenv("SLURM_RESTART_COUNT", "0")) < RetriesConfig().errors:
        refused = requeue(this_job())
        say(f"SLURM does not start it again: {refused}" if refused else "this task is started again")


def stop_with_parent() -> None:
    """Of the child: be asked to stop when this process dies, so that it is never left alone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(PASSED_ON), 0, 0, 0)


def say(text: str) -> None:
    print(f"emotion-slurm: {text}", flush=True)
