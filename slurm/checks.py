"""Checks before anything is written or submitted, and the report of `doctor` about a site."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from emotion.errors import SpecError
from emotion.proc import file_system_type
from job.spec.model import JobSpec
from slurm import environment, slurm_cli
from slurm.cluster import ClusterConfig
from slurm.requeue import KILL_BEFORE_LIMIT_SECONDS
from slurm.slurm_cli import Site, parse_duration

LOCAL_FILE_SYSTEMS = {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "squashfs", "tmpfs", "xfs", "zfs"}
"""File systems on a disk of one machine. Whether the machine exports them is unknown."""


def refuse_problems(specs: Sequence[JobSpec], cluster: ClusterConfig, site: Site) -> None:
    """Raise SpecError with all problems, one line each."""
    problems = [*cluster_problems(cluster, site), *spec_problems(specs, cluster, site)]
    if problems:
        raise SpecError(*problems)


def cluster_problems(cluster: ClusterConfig, site: Site) -> list[str]:
    found = []
    own = site.config.get("ClusterName", "")
    if setting := environment.other_cluster(own):
        found.append(
            f"{setting} in the environment: another cluster than that of this machine ({own}), whose jobs emotion-slurm would "
            f"neither see nor cancel. Call it on a machine of that cluster, or unset the variable"
        )
    for resources, key in ((cluster, "partition"), (cluster.for_preparing(), "prepare.partition")):
        found += [problem for problem in _partition_problems(resources, site, key) if problem not in found]
    grace = partition_grace_seconds(cluster, site)
    if grace and grace < cluster.save_seconds:
        found.append(
            f"save_seconds: saving takes {cluster.save_seconds:g} s, but partition {_partition_name(cluster, site)} gives a "
            f"preempted job {grace:g} s (GraceTime). Name another partition, or lower save_seconds if it is too high; with 0 a "
            f"preemption may cost the work since the last periodic checkpoint"
        )
    return [*found, *program_problems(cluster), *_memory_problems(cluster, site), *_folder_problems(cluster)]


def program_problems(cluster: ClusterConfig) -> list[str]:
    """Problems with the file that runs the job, the image or the Python interpreter, as seen from this machine."""
    if cluster.runtime == "apptainer" and "://" not in str(cluster.image) and not Path(str(cluster.image)).exists():
        return [f"image: there is no {cluster.image}; build it, or correct the path"]
    advice = "name the Python that this package is installed for, with its extra job"
    if cluster.python is not None and not Path(cluster.python).exists():
        return [f"python: there is no {cluster.python}; {advice}"]
    if cluster.python is not None and not (Path(cluster.python).is_file() and os.access(cluster.python, os.X_OK)):
        return [f"python: {cluster.python} is not executable; {advice}"]
    return []


def _partition_name(cluster: ClusterConfig, site: Site) -> str | None:
    return cluster.partition or next((name for name, values in site.partitions.items() if values.get("Default") == "YES"), None)


def _partition_problems(cluster: ClusterConfig, site: Site, key: str) -> list[str]:
    name, existing = _partition_name(cluster, site), ", ".join(sorted(site.partitions))
    if name is None:
        return [f"{key}: missing, and this site has no default; there are {existing}"]
    if name not in site.partitions:
        return [f"{key}: there is no partition {name}; there are {existing}"]
    partition = site.partitions[name]
    found = []
    if partition.get("State", "UP") != "UP":
        found.append(f"{key}: {name} is {partition['State']}, so no job would start; wait, or name another partition")
    longest = parse_duration(partition.get("MaxTime", "UNLIMITED"))
    if longest is not None and 60 * cluster.time_limit_minutes > longest:
        found.append(
            f"time_limit_minutes: {cluster.time_limit_minutes}, but partition {name} allows {longest / 60:g}; a task that "
            f"needs longer resumes in its next attempt"
        )
    return found


def _memory_problems(cluster: ClusterConfig, site: Site) -> list[str]:
    at_most, name = cluster.retries.memory_gib_at_most, _partition_name(cluster, site)
    largest = slurm_cli.largest_node_gib(name) if at_most is not None and name is not None else None
    if at_most is None or largest is None or at_most <= largest:
        return []
    return [
        f"retries.memory_gib_at_most: {at_most:g}, but the largest node of partition {name} has {largest:.4g} (RealMemory), so "
        f"a task that asks for more would never start; lower it to that"
    ]


def partition_grace_seconds(cluster: ClusterConfig, site: Site) -> float:
    """Seconds that a preempted job may continue to run; 0 if it is stopped at once or the site does not say."""
    partition = site.partitions.get(_partition_name(cluster, site) or "", {})
    return parse_duration(partition.get("GraceTime", "0")) or 0.0


def _folder_problems(cluster: ClusterConfig) -> list[str]:
    found = []
    for key, folder in (("work", cluster.work_folder), ("scratch", cluster.scratch_folder)):
        existing = _nearest_existing(folder)
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            found.append(f"{key}: {folder} cannot be written to ({existing} is not a writable folder); name another")
            continue
        kind = file_system_type(existing)
        if cluster.work_is_shared or kind not in LOCAL_FILE_SYSTEMS:
            continue
        others = slurm_cli.node_hostnames() - {socket.gethostname(), socket.gethostname().partition(".")[0]}
        if others:
            found.append(
                f"{key}: {folder} is on {kind}, a disk of this machine, and jobs run on others ({min(others)}). Name a folder "
                f"that all of them share, or set work_is_shared: true if this machine exports it under that path"
            )
    return found


def _nearest_existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def spec_problems(specs: Sequence[JobSpec], cluster: ClusterConfig, site: Site) -> list[str]:
    found = []
    max_jobs = site.config_number("MaxJobCount", 10_000)
    if len(specs) + 2 > max_jobs:
        found.append(
            f"the sweep has {len(specs)} tasks, but this site keeps at most {max_jobs} jobs (MaxJobCount); split the sweep"
        )
    limit = min(cluster.time_limit_minutes, cluster.for_preparing().time_limit_minutes)
    needed = cluster.save_seconds + KILL_BEFORE_LIMIT_SECONDS
    for grace in sorted({spec.preemption.grace_seconds for spec in specs}):
        if grace < needed:
            found.append(
                f"preemption.grace_seconds: {grace:g}, but saving takes {cluster.save_seconds:g} s (save_seconds) and the last "
                f"{KILL_BEFORE_LIMIT_SECONDS:g} s before a time limit are for restarting the task; make it {needed:g} or more"
            )
        if 60 * limit < grace + 2 * KILL_BEFORE_LIMIT_SECONDS:
            found.append(
                f"time_limit_minutes: {limit}, but the job exits preemption.grace_seconds {grace:g} before it: no work would be "
                f"done. Raise the one or lower the other"
            )
    return found


def diagnosis(cluster: ClusterConfig, site: Site) -> list[str]:
    """What happens to a job on this site: a line for each kind of event, and for the settings that fit."""
    name = _partition_name(cluster, site) or "?"
    partition = site.partitions.get(name, {})
    grace, kill_wait = partition_grace_seconds(cluster, site), site.config_number("KillWait", 30)
    has_accounting = site.config.get("AccountingStorageType", "").endswith("slurmdbd")
    accounting = "sacct, only for jobs that the controller no longer knows" if has_accounting else "none, not needed"
    lines = [
        f"site: SLURM {site.config.get('SLURM_VERSION', '?')}, cluster {site.config.get('ClusterName', '?')}, partition {name}",
        f"preemption: {_preemption(site, partition, grace)}",
        f"time limit: {cluster.time_limit_minutes} min an attempt; the job stops preemption.grace_seconds (60 by default) "
        f"before it, saves, and is started again, up to {cluster.retries.time_outs} times. It needs no signal from SLURM.",
        f"cancel: SIGTERM, SIGKILL {kill_wait} s later (KillWait). A cancelled task is not started again.",
        f"scontrol requeue: SIGTERM, SIGKILL {kill_wait} s later; SLURM starts the task again.",
        f"lost node: noticed after up to {site.config_number('SlurmdTimeout', 300)} s (SlurmdTimeout); SLURM starts the task "
        f"again, which resumes from its last periodic checkpoint.",
        f"arrays: at most {site.largest_array} tasks each (MaxArraySize), {site.config_number('MaxJobCount', 10_000)} jobs in "
        f"all (MaxJobCount); larger sweeps are split.",
        f"accounting: {accounting}.",
        f"environment: {environment.described()}.",
        f"file system: {cluster.work} is on {file_system_type(_nearest_existing(cluster.work_folder)) or 'an unknown type'}.",
    ]
    longest = parse_duration(partition.get("MaxTime", "UNLIMITED"))
    settings = [f"time_limit_minutes: {longest / 60:g} at most" if longest else "time_limit_minutes: no upper limit"]
    if grace:
        settings.append(f"save_seconds: {grace:g} at most")
    elif _preempt_mode(site, partition) is not None:
        settings.append("checkpoint.every_seconds: the most that a preemption may cost, as nothing is saved at one")
    settings.append(f"preemption.grace_seconds: {cluster.save_seconds + KILL_BEFORE_LIMIT_SECONDS:g} at least")
    return [*lines, f"settings: {'; '.join(settings)}."]


def _preempt_mode(site: Site, partition: dict[str, str]) -> str | None:
    """The preemption mode, such as REQUEUE; None if jobs of the partition are never preempted."""
    mode = partition.get("PreemptMode") or site.config.get("PreemptMode", "OFF")
    return None if mode == "OFF" or site.config.get("PreemptType", "preempt/none").endswith("none") else mode


def _preemption(site: Site, partition: dict[str, str], grace: float) -> str:
    mode, preempt_type = _preempt_mode(site, partition), site.config.get("PreemptType", "preempt/none")
    if mode is None:
        configured = partition.get("PreemptMode") or site.config.get("PreemptMode", "OFF")
        return f"none here (PreemptType {preempt_type}, PreemptMode {configured})."
    is_by_qos = preempt_type.endswith("qos")
    by_qos = " The quality of service has its own mode and grace, see `sacctmgr show qos`." if is_by_qos else ""
    if "SUSPEND" in mode:
        return f"PreemptMode {mode}: the job is suspended and continues later; nothing is lost.{by_qos}"
    killed = f"SIGKILL {site.config_number('KillWait', 30)} s later"
    if grace:
        sends_user_signal = "preempt_send_user_signal" in site.config.get("SlurmctldParameters", "")
        signal_name = "the requested signal (USR2)" if sends_user_signal else "SIGTERM"
        text = (
            f"PreemptMode {mode}, GraceTime {grace:g} s: {signal_name} comes at once, the job saves, and this task alone is "
            f"started again. After the grace time come SIGTERM and {killed}"
        )
    else:
        text = (
            f"PreemptMode {mode}, GraceTime 0: SIGTERM comes with the end, {killed} (KillWait). What is not saved by then is "
            f"lost back to the last periodic checkpoint"
        )
    if mode == "CANCEL":
        text += (
            ". SLURM starts no preempted job again here; the launcher does, if the job has saved before SIGKILL. Otherwise use "
            "emotion-slurm resubmit"
        )
    return f"{text}.{by_qos}"
