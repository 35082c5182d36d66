"""Reports the observations of `doctor --live` in sentences. Pure functions."""

from dataclasses import dataclass
from typing import Any, Literal

from slurm.checks import partition_grace_seconds
from slurm.cluster import ClusterConfig
from slurm.live import LIMIT_MINUTES, Seen
from slurm.memory import GIBIBYTE
from slurm.slurm_cli import Site

SLOW_FILE_SECONDS, SLOW_ANSWER_SECONDS = 1.0, 10.0


@dataclass(frozen=True)
class Finding:
    """A line of the report. state: wrong if jobs of the launcher would lose work or not run; warn if they would be slow or less
    safe."""

    state: Literal["ok", "warn", "wrong"]
    name: str
    text: str


def findings(seen: Seen, cluster: ClusterConfig, site: Site) -> list[Finding]:
    if not seen.attempts:
        lines = [line for line in seen.log.splitlines() if line.strip()]
        said = f"its log ends with: {lines[-1]}" if lines else "its log is empty or not there"
        text = (
            f"job {seen.job} ended ({seen.ended or 'cancelled'}) and nothing that it wrote is seen here; {said}. Work "
            f"({cluster.work}) and this Python must be at the same path on all nodes"
        )
        return [Finding("wrong", "start", text)]
    first = seen.attempts[0]
    found = [Finding("ok", "start", f"job {seen.job} ran on {first['node']}, after {seen.waited:.0f} s in the queue")]
    found += [_requeue(seen, first), _stop(first, cluster), _time_limit(seen), _preemption(cluster, site)]
    return [*found, *_files(seen, first), _memory(first, cluster), _inside(first, cluster)]


def _signals_before_kill(attempt: dict[str, Any], since: float) -> str:
    """The signals of an attempt after `since`, such as "SIGTERM 29.8 s before" (the kill)."""
    times: dict[str, float] = {}
    for name, seconds in attempt["signals"]:
        if seconds >= since:
            times.setdefault(name, seconds)
    return ", ".join(f"{name} {attempt['seconds'] - seconds:.1f} s before" for name, seconds in times.items())


def stop_seconds(attempt: dict[str, Any], since: float) -> float | None:
    """Seconds from the first signal after `since` to the kill, in which a job can save. None without a signal."""
    times = [seconds for _, seconds in attempt["signals"] if seconds >= since]
    return attempt["seconds"] - times[0] if times else None


def _requeue(seen: Seen, first: dict[str, Any]) -> Finding:
    asked = first["requeue"]
    if asked is None:
        text = f"not tried: the first attempt ended after {first['seconds']:.0f} s, before it could ask for it; try again"
        return Finding("warn", "requeue", text)
    if asked["refusal"]:
        text = (
            f"SLURM refuses it on the node ({asked['refusal']}): no task is started again. Ask the site for JobRequeue=1 and for "
            f"scontrol on the nodes; until then use emotion-slurm resubmit"
        )
        return Finding("wrong", "requeue", text)
    if len(seen.attempts) < 2:
        text = f"the job was put back into the queue, but did not run again ({seen.ended or 'still waiting, cancelled'})"
        return Finding("warn", "requeue", f"{text}; wait longer with --wait MINUTES")
    second = seen.attempts[1]
    text = f"the same job ran again on {second['node']}, {seen.requeued_after or 0:.0f} s after the node asked for it"
    return Finding("ok", "requeue", text)


def _stop(first: dict[str, Any], cluster: ClusterConfig) -> Finding:
    if first["requeue"] is None or first["requeue"]["refusal"]:
        return Finding("warn", "stop", "not seen, as the job was not put back into the queue")
    since = first["requeue"]["seconds"]
    grace = stop_seconds(first, since)
    if grace is None:
        text = (
            "no signal reached the job before it was killed: scancel, requeue and preemption cost the work since the last "
            "periodic checkpoint. Lower checkpoint.every_seconds, and ask the site why"
        )
        return Finding("wrong", "stop", text)
    seen = f"requeued, the job got {_signals_before_kill(first, since)} it was killed"
    if grace < cluster.save_seconds:
        text = (
            f"{seen}, and a save may take {cluster.save_seconds:g} s (save_seconds): what is not saved by then is lost back to "
            f"the last periodic checkpoint. Lower save_seconds if it is too high, or checkpoint.every_seconds"
        )
        return Finding("warn", "stop", text)
    return Finding("ok", "stop", f"{seen}: enough for save_seconds {cluster.save_seconds:g}")


def _time_limit(seen: Seen) -> Finding:
    last = seen.attempts[-1]
    if seen.ended != "TIMEOUT":
        return Finding("warn", "time limit", f"not seen: the job ended as {seen.ended or 'cancelled'}")
    signals = _signals_before_kill(last, 0)
    text = (
        f"with a limit of {60 * LIMIT_MINUTES} s the job was killed {last['seconds']:.0f} s after its start; "
        f"{f'it got {signals}' if signals else 'no signal came'}. The launcher leaves before, without a signal"
    )
    return Finding("ok", "time limit", text)


def _preemption(cluster: ClusterConfig, site: Site) -> Finding:
    grace = partition_grace_seconds(cluster, site)
    text = f"not tried, as it takes a job of higher priority; GraceTime {grace:g} s comes on top of the seconds of stop"
    return Finding("ok", "preemption", text)


def _files(seen: Seen, first: dict[str, Any]) -> list[Finding]:
    made = first["replacements"]
    if seen.broken:
        text = (
            f"{len(seen.broken)} of {seen.reads} reads here found a file that the node replaces missing or incomplete "
            f"({seen.broken[0]}). Records may be misread; put work on a file system whose rename is atomic"
        )
        rename = Finding("wrong", "rename", text)
    elif seen.stale:
        text = f"{len(seen.stale)} of {seen.reads} reads here failed as the file was replaced meanwhile ({seen.stale[0]})"
        rename = Finding("warn", "rename", f"{text}; a command that fails so can be repeated")
    else:
        count = sum(attempt["replacements"]["count"] for attempt in seen.attempts)
        text = f"atomic: the node replaced a file {count} times, and each of {seen.reads} reads here found a whole one"
        rename = Finding("ok", "rename", text)
    text = f"writing, fsync and rename of a small file take {made['median']:.3f} s on the node, {made['longest']:.3f} s at most"
    if made["median"] > SLOW_FILE_SECONDS:
        fsync = Finding("warn", "fsync", f"{text}; every checkpoint waits for it. Raise checkpoint.every_seconds or move work")
    else:
        fsync = Finding("ok", "fsync", text)
    if not seen.answers:
        text = (
            f"the node did not see a change that was made here within {first['seconds']:.0f} s: a long attribute cache; status, "
            f"logs and STOP files are at least that late. Ask the site for a shorter one"
        )
        return [rename, fsync, Finding("warn", "visibility", text)]
    slowest = max(seen.answers)
    text = f"what is written here is answered from the node within {slowest:.1f} s, the slowest of {len(seen.answers)} answers"
    if slowest > SLOW_ANSWER_SECONDS:
        return [rename, fsync, Finding("warn", "visibility", f"{text}: status, logs and STOP files are that late")]
    return [rename, fsync, Finding("ok", "visibility", text)]


def _memory(first: dict[str, Any], cluster: ClusterConfig) -> Finding:
    limit, total = first["memory"]["limit"], first["memory"]["total"]
    if limit is None:
        text = f"the node has {total / GIBIBYTE:.4g} GiB and limits no job to its memory_gib by a control group"
        if cluster.retries.memory_gib_at_most is None:
            return Finding("ok", "memory", text)
        return Finding("warn", "memory", f"{text}, so retries.memory_gib_at_most may have no effect")
    if limit < 0.99 * cluster.memory_gib * GIBIBYTE:
        text = f"limited to {limit / GIBIBYTE:.4g} GiB, though memory_gib asks for {cluster.memory_gib:g}. Ask the site why"
        return Finding("wrong", "memory", text)
    return Finding(
        "ok", "memory", f"limited to {limit / GIBIBYTE:.4g} GiB by a control group, on a node with {total / GIBIBYTE:.4g} GiB"
    )


def _inside(first: dict[str, Any], cluster: ClusterConfig) -> Finding:
    inside = first["inside"]
    name = "python" if cluster.runtime == "bare" else cluster.runtime
    if inside is None or inside["exit_code"] is None:
        seconds = first["seconds"] if inside is None else inside["seconds"]
        text = f"did not start and import torch within {seconds:.0f} s: a slow disk, or an image that is fetched first; try again"
        return Finding("warn", name, text)
    if inside["exit_code"] != 0 or inside["said"]:
        text = f"ended with exit code {inside['exit_code']} and said: {inside['said'] or 'nothing'}"
        return Finding("wrong", name, f"{text}. Correct runtime, image, python or options")
    if "error" in inside:
        return Finding("wrong", name, f"has no torch ({inside['error']}): name the image or Python with emotion-job[job]")
    gpus = inside["gpus"]
    text = f"started in {inside['seconds']:.1f} s, torch {inside['torch']}, GPUs: {', '.join(gpus) or 'none'}"
    if len(gpus) < cluster.gpus:
        return Finding("wrong", name, f"{text}, though gpus asks for {cluster.gpus}. Look at drivers, options and the image")
    return Finding("ok", name, text)
