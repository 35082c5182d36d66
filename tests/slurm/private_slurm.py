"""A private, real SLURM in one directory: nodes, partitions, preemption; no systemd, no network but loopback, and no control
groups but those of memory, on request.

Needs root and Debian's slurmctld, slurmd, slurm-client and munge. All ports are free ones. Every daemon is a child of one
supervisor, which adopts whatever they leave behind (PR_SET_CHILD_SUBREAPER) and ends when its standard input closes: nothing
survives, even if the tests receive SIGKILL.

    with PrivateSlurm(Path("/tmp/lab")) as cluster:
        cluster.run("sinfo")
"""

import contextlib
import ctypes
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# cred_expire: a requeued job may not start again before it has passed; 120 s by default, 5 works, 2 is refused.
CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin={task_plugin}
JobAcctGatherType=jobacct_gather/linux
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_min_interval=0,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait={kill_wait}
MinJobAge=600
MaxArraySize=4
ReturnToService=2
SlurmdTimeout=15
InactiveLimit=0
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
{extra}
NodeName=node[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 RealMemory=8000 State=UNKNOWN
PartitionName=low Nodes=node[1-{nodes}] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 DefaultTime=10
PartitionName=abrupt Nodes=node[1-{nodes}] PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 DefaultTime=10
PartitionName=brief Nodes=node[1-{nodes}] PriorityTier=1 PreemptMode=REQUEUE GraceTime=2 MaxTime=5
PartitionName=closed Nodes=node[1-{nodes}] PriorityTier=1 State=DOWN
PartitionName=high Nodes=node[1-{nodes}] PriorityTier=10 PreemptMode=OFF DefaultTime=10
"""

# Memory alone, of version 1: version 2 would need systemd, or a kernel whose other users allow it.
CGROUP_CONF = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
ConstrainRAMSpace=yes
"""
MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


def wait_for(name: str, condition: Callable[[], Any], timeout: float = 240) -> Any:
    """Wait until `condition` returns something true, and return that. The timeout only keeps a broken test from hanging."""
    end = time.monotonic() + timeout
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > end:
            raise TimeoutError(f"{name}: not within {timeout} s")
        time.sleep(0.1)


class PrivateSlurm:
    """kill_wait: seconds from SIGTERM to SIGKILL; extra: lines of slurm.conf; limits_memory: the kernel kills a step that needs
    more memory than it asked for."""

    def __init__(self, root: Path, nodes: int = 3, kill_wait: int = 3, extra: str = "", limits_memory: bool = False) -> None:
        self.root, self.nodes = root, nodes
        for name in ("munge", "state", "run", "log", *(f"spool/node{node}" for node in range(1, nodes + 1))):
            (root / name).mkdir(parents=True, exist_ok=True)
        root.chmod(0o755)
        port = _free_ports(nodes + 1)
        conf = CONF.format(
            root=root,
            host=socket.gethostname().split(".")[0],
            port=port,
            first=port + 1,
            last=port + nodes,
            nodes=nodes,
            kill_wait=kill_wait,
            task_plugin="task/cgroup" if limits_memory else "task/none",
            extra=extra,
        )
        (root / "slurm.conf").write_text(conf, encoding="utf-8")
        if limits_memory:
            (root / "cgroup.conf").write_text(CGROUP_CONF, encoding="utf-8")
        # A job submitted from inside a job would inherit its options.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SQUEUE"))}
        self.environment = {**inherited, "SLURM_CONF": str(root / "slurm.conf")}

    def __enter__(self) -> Self:
        self._supervisor = subprocess.Popen(
            [sys.executable, __file__, str(self.root), str(self.nodes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        # Closes its standard input, so it stops everything and ends.
        self._supervisor.communicate(timeout=60)

    def crash(self, node: int) -> None:
        """The node dies with its steps and their processes, all at once. The controller is notified, as it would wait 15 s."""
        self._request(f"crash {node}")
        self.run("scontrol", "update", f"nodename=node{node}", "state=down", "reason=crashed")

    def revive(self, node: int) -> None:
        self._request(f"start {node}")
        wait_for(
            f"node{node} idle", lambda: self.run("sinfo", "-h", "-n", f"node{node}", "-p", "low", "-o", "%T").strip() == "idle"
        )

    def run(self, *command: str, check: bool = True) -> str:
        """The output of a command, both streams."""
        done = subprocess.run(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout
        return done.stdout

    def job_fields(self, job: str) -> dict[str, str]:
        """The output of scontrol for one job or ARRAY_INDEX, by key."""
        words = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(reversed([word.split("=", 1) for word in words if "=" in word]))

    def _request(self, line: str) -> None:
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.write(line + "\n")
        self._supervisor.stdin.flush()
        self._answer()

    def _answer(self) -> None:
        assert self._supervisor.stdout is not None
        answer = self._supervisor.stdout.readline().strip()
        if answer != "ok":
            tails = [
                f"\n--- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in sorted((self.root / "log").iterdir())
            ]
            raise RuntimeError(f"{answer or 'the supervisor died'}{''.join(tails)}")


@contextlib.contextmanager
def started(**options: Any) -> Iterator[PrivateSlurm]:
    """A cluster in a folder of its own. Its path is short: that of munge's socket may have 107 characters."""
    with (
        tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp", ignore_cleanup_errors=True) as root,
        PrivateSlurm(Path(root), **options) as cluster,
    ):
        yield cluster


def _free_ports(count: int) -> int:
    """The first of `count` consecutive ports below 32768, where the kernel's ports for connections begin."""
    while True:
        first = random.randrange(20000, 32000)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first


class _Supervisor:
    """Starts and stops the daemons, in a separate process."""

    def __init__(self, root: Path, nodes: int) -> None:
        self.root, self.nodes = root, nodes
        self.daemons: dict[str, int] = {}
        self.environment = {"PATH": PATH, "LANG": "C.UTF-8", "SLURM_CONF": str(root / "slurm.conf")}
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER

    def start(self) -> None:
        munge = self.root / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        files = {"key": "key", "socket": "munge.sock", "pid": "pid", "seed": "seed", "log": "log"}
        names = {"key": "key-file", "socket": "socket", "pid": "pid-file", "seed": "seed-file", "log": "log-file"}
        options = [f"--{names[kind]}={munge / name}" for kind, name in files.items()]
        self.spawn("munged", ["munged", "--foreground", "--force", *options])
        wait_for("munged", lambda: self.answer("munge", f"--socket={munge}/munge.sock", "-n"), 20)
        self.spawn("slurmctld", ["slurmctld", "-D"])
        wait_for("slurmctld", lambda: "UP" in self.answer("scontrol", "ping"), 30)
        for node in range(1, self.nodes + 1):
            self.start_node(node)
        idle = ("sinfo", "-hN", "-p", "low", "-t", "idle", "-o", "%N")
        wait_for("nodes", lambda: len(self.answer(*idle).split()) == self.nodes, 60)

    def start_node(self, node: int) -> None:
        self.spawn(f"node{node}", ["slurmd", "-D", "-N", f"node{node}"], SLURM_TEST_NODE=f"node{node}")

    def spawn(self, name: str, argv: list[str], **variables: str) -> None:
        with (self.root / "log" / f"{name}.console").open("ab") as log:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self.environment, **variables},
                start_new_session=True,
            )
        self.daemons[name] = process.pid
        process.returncode = 0  # reaped by hand

    def answer(self, *argv: str) -> str:
        found = subprocess.run(argv, env=self.environment, capture_output=True, text=True, check=False)
        return found.stdout if found.returncode == 0 else ""

    def reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                self.daemons = {name: daemon for name, daemon in self.daemons.items() if daemon != pid}

    def parents(self) -> dict[int, int]:
        """Pid → parent pid of all running processes."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    found[int(folder.name)] = int(parent)
        return found

    def descendants(self) -> set[int]:
        parents = self.parents()
        found = {os.getpid()}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return found - {os.getpid()}

    def crash(self, node: int) -> None:
        mark = f"SLURM_TEST_NODE=node{node}".encode()
        parents = self.parents()
        doomed = set()
        for pid in self.descendants():
            with contextlib.suppress(OSError):
                if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    doomed.add(pid)
        while more := {pid for pid, parent in parents.items() if parent in doomed} - doomed:
            doomed |= more
        self.kill(doomed)
        wait_for("the node is gone", lambda: self.reap() or f"node{node}" not in self.daemons, 20)

    def kill(self, pids: set[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                ["scancel", "--quiet", "-u", "root"], env=self.environment, timeout=5, capture_output=True, check=False
            )
        end = time.monotonic() + 20
        while (left := self.descendants()) and time.monotonic() < end:
            self.kill(left)
            self.reap()
            time.sleep(0.05)

    def serve(self) -> None:
        """A command a line, `crash N` or `start N`, each answered by `ok`. At the end of the input everything is stopped."""
        try:
            self.start()
            print("ok", flush=True)
            while True:
                ready = select.select([0], [], [], 0.2)[0]
                self.reap()  # often: adopted processes stay zombies until then
                if not ready:
                    continue
                line = os.read(0, 100).decode().split()
                if not line:
                    return
                {"crash": self.crash, "start": self.start_node}[line[0]](int(line[1]))
                print("ok", flush=True)
        except Exception as error:
            print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)
            raise
        finally:
            self.stop()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _Supervisor(Path(sys.argv[1]), int(sys.argv[2])).serve()
