"""What would not work on this site, told before anything is written, and what will happen to a job there (`doctor`)."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from emotion.errors import SpecError
from job.spec.model import JobSpec
from slurm import slurm_cli
from slurm.cluster import ClusterConfig
from slurm.slurm_cli import Site, seconds_of
from slurm.task import LEAVE_SECONDS

LOCAL = {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "squashfs", "tmpfs", "xfs", "zfs"}
"""File systems that belong to one machine; whether it exports them, they do not tell."""


def refuse_problems(specs: Sequence[JobSpec], cluster: ClusterConfig, site: Site) -> None:
    """Raises SpecError with all that would not work, a line each."""
    problems = [*problems_of_cluster(cluster, site), *problems_of_specs(specs, cluster, site)]
    if problems:
        raise SpecError(*problems)


def problems_of_cluster(cluster: ClusterConfig, site: Site) -> list[str]:
    found = []
    for asked, key in ((cluster, "partition"), (cluster.for_preparing(), "prepare.partition")):
        found += [problem for problem in _of_partition(asked, site, key) if problem not in found]
    found += _of_grace(cluster, site)
    if cluster.runtime == "apptainer" and "://" not in str(cluster.image) and not Path(str(cluster.image)).exists():
        found.append(f"image: there is no {cluster.image}; build it, or correct the path")
    if cluster.python is not None and not os.access(cluster.python, os.X_OK):
        found.append(f"python: {cluster.python} is no program; name the Python that has emotion-job[job] installed")
    return [*found, *_of_folders(cluster)]


def _of_partition(cluster: ClusterConfig, site: Site, key: str) -> list[str]:
    name = cluster.partition or site.default_partition
    if name is None:
        return [f"{key}: missing, and this site has no default; there are {', '.join(sorted(site.partitions))}"]
    if name not in site.partitions:
        return [f"{key}: there is no partition {name}; there are {', '.join(sorted(site.partitions))}"]
    facts = site.partitions[name]
    found = []
    if facts.get("State", "UP") != "UP":
        found.append(f"{key}: {name} is {facts['State']}, so nothing would start; wait, or name another")
    longest = seconds_of(facts.get("MaxTime", "UNLIMITED"))
    if longest is not None and 60 * cluster.time_limit_minutes > longest:
        found.append(
            f"time_limit_minutes: {cluster.time_limit_minutes}, but partition {name} allows {longest / 60:g}; a task that "
            f"needs longer goes on in its next attempt"
        )
    return found


def _of_grace(cluster: ClusterConfig, site: Site) -> list[str]:
    grace = grace_seconds(cluster, site)
    if not grace or grace >= cluster.save_seconds:
        return []
    return [
        f"save_seconds: saving takes {cluster.save_seconds:g} s, but partition {cluster.partition or site.default_partition} "
        f"gives a preempted job {grace:g} s (GraceTime). Name another partition, or a lower save_seconds if that is too long; 0 "
        f"accepts that a preemption costs what was done since the last periodic checkpoint"
    ]


def grace_seconds(cluster: ClusterConfig, site: Site) -> float:
    """How long a preempted job may go on; 0 where it is stopped at once, or nothing is known."""
    facts = site.partitions.get(cluster.partition or site.default_partition or "", {})
    return seconds_of(facts.get("GraceTime", "0")) or 0.0


def _of_folders(cluster: ClusterConfig) -> list[str]:
    found = []
    for key, folder in (("work", cluster.work_folder), ("scratch", cluster.scratch_folder)):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            found.append(f"{key}: {folder} cannot be written to ({there} is no folder of yours); name another")
            continue
        kind = file_system_of(there)
        if cluster.work_is_shared or kind not in LOCAL:
            continue
        others = slurm_cli.hosts_of_nodes() - {socket.gethostname(), socket.gethostname().partition(".")[0]}
        if others:
            found.append(
                f"{key}: {folder} is on {kind}, a disk of this machine, and jobs run on others ({min(others)}). Name a folder "
                f"that all of them share, or set work_is_shared: true if this machine exports it under that path"
            )
    return found


def file_system_of(path: Path) -> str:
    """Its type, such as ext4 or nfs4 (proc(5), mountinfo); an empty text where the kernel does not say."""
    best, kind = -1, ""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        mounted = Path(before.split()[4].replace("\\040", " "))
        if path.resolve().is_relative_to(mounted) and len(mounted.parts) >= best:
            best, kind = len(mounted.parts), after.split()[0]
    return kind


def problems_of_specs(specs: Sequence[JobSpec], cluster: ClusterConfig, site: Site) -> list[str]:
    found = []
    most = site.number("MaxJobCount", 10_000)
    if len(specs) + 2 > most:
        found.append(
            f"the sweep has {len(specs)} tasks, but this site keeps at most {most} jobs (MaxJobCount); split the sweep"
        )
    limits = {cluster.time_limit_minutes, cluster.for_preparing().time_limit_minutes}
    for grace in sorted({spec.preemption.grace_seconds for spec in specs}):
        if grace < cluster.save_seconds + LEAVE_SECONDS:
            found.append(
                f"preemption.grace_seconds: {grace:g}, but saving takes {cluster.save_seconds:g} s (save_seconds) and the last "
                f"{LEAVE_SECONDS:g} s before a time limit are for starting the task again; make it "
                f"{cluster.save_seconds + LEAVE_SECONDS:g} or more"
            )
        if 60 * min(limits) < grace + 2 * LEAVE_SECONDS:
            found.append(
                f"time_limit_minutes: {min(limits)}, of which preemption.grace_seconds {grace:g} are for leaving: nothing "
                f"would get done. Raise the one or lower the other"
            )
    return found


def diagnosis(cluster: ClusterConfig, site: Site) -> list[str]:
    """What happens to a job here, in sentences."""
    name = cluster.partition or site.default_partition or "?"
    facts = site.partitions.get(name, {})
    config = site.config
    grace, kill_wait = grace_seconds(cluster, site), site.kill_wait_seconds
    limit = f"{cluster.time_limit_minutes} min"
    lines = [
        f"site: SLURM {config.get('SLURM_VERSION', '?')}, cluster {config.get('ClusterName', '?')}, partition {name}",
        f"preemption: {_preemption(config, facts, grace, kill_wait, site.sends_user_signal)}",
        f"time limit: {limit} an attempt; the job stops itself preemption.grace_seconds (60 by default) before, saves, and is "
        f"started again, up to {cluster.retries.time_outs} times. No signal of SLURM is needed for it.",
        f"cancel: SIGTERM, SIGKILL {kill_wait} s later (KillWait). The task sees that it is cancelled and stays so.",
        f"scontrol requeue: SIGTERM, SIGKILL {kill_wait} s later; SLURM starts the task again.",
        f"lost node: noticed after up to {site.number('SlurmdTimeout', 300)} s (SlurmdTimeout); SLURM starts the task again, "
        f"which goes on from its last periodic checkpoint.",
        f"arrays: at most {site.largest_array} tasks each (MaxArraySize), {site.number('MaxJobCount', 10_000)} jobs in all "
        f"(MaxJobCount); larger sweeps are split.",
        "accounting: "
        + (
            "sacct is asked only for jobs that the controller has forgotten."
            if site.has_accounting
            else "none, and none is needed."
        ),
        f"file system: {cluster.work} is on {file_system_of(_nearest(cluster.work_folder)) or 'an unknown type'}.",
    ]
    longest = seconds_of(facts.get("MaxTime", "UNLIMITED"))
    settings = [f"time_limit_minutes: {longest / 60:g} at most" if longest else "time_limit_minutes: no upper limit"]
    if grace:
        settings.append(f"save_seconds: {grace:g} at most")
    elif may_be_preempted(config, facts):
        settings.append("checkpoint.every_seconds: what a preemption may cost, as nothing is saved at one")
    settings.append(f"preemption.grace_seconds: {cluster.save_seconds + LEAVE_SECONDS:g} at least")
    return [*lines, f"settings: {'; '.join(settings)}."]


def may_be_preempted(config: dict[str, str], partition: dict[str, str]) -> bool:
    modes = partition.get("PreemptMode") or config.get("PreemptMode", "OFF")
    return not config.get("PreemptType", "preempt/none").endswith("none") and modes != "OFF"


def _preemption(
    config: dict[str, str], partition: dict[str, str], grace: float, kill_wait: int, user_signal: bool
) -> str:
    mode = partition.get("PreemptMode") or config.get("PreemptMode", "OFF")
    if not may_be_preempted(config, partition):
        return f"none here (PreemptType {config.get('PreemptType', 'preempt/none')}, PreemptMode {mode})."
    by_qos = (
        " By quality of service: its own grace and mode count, see `sacctmgr show qos`."
        if config.get("PreemptType", "").endswith("qos")
        else ""
    )
    if "SUSPEND" in mode:
        return f"PreemptMode {mode}: the job is stopped and goes on later; nothing is lost.{by_qos}"
    signal_name = "the signal asked for (USR2)" if user_signal else "SIGTERM"
    if grace:
        text = (
            f"PreemptMode {mode}, GraceTime {grace:g} s: {signal_name} comes at once, the job saves, and this task alone is "
            f"started again. One that has not left by then gets SIGTERM, SIGKILL {kill_wait} s later"
        )
    else:
        text = (
            f"PreemptMode {mode}, GraceTime 0: SIGTERM comes with the end, SIGKILL {kill_wait} s later (KillWait). What is not "
            f"saved by then is lost back to the last periodic checkpoint"
        )
    if mode == "CANCEL":
        text += (
            ". SLURM does not requeue here: a task goes on only if it leaves within the grace"
            if grace
            else ". SLURM does not requeue here: a preempted task ends; use emotion-slurm resubmit"
        )
    return text + "." + by_qos


def _nearest(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())
