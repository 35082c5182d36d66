"""One job as one readable sbatch script: `emotion-slurm script`.

For sites without Python or submitit, and for other submission systems. The script contains the spec and needs bash, coreutils and
scontrol. It starts the job again by the table in requeue.py, with the same values. It has no sweep, so no prepare and collect
jobs, and no `emotion-slurm cancel`; an attempt that was killed without an end is not counted.
"""

import re
import shlex

from emotion.errors import Interrupted, ModelError, NodeError, SpecError, Stopped, StorageError
from job.spec.model import JobSpec, run_name, to_yaml
from slurm.cluster import ClusterConfig
from slurm.container import job_argv, kill_argv
from slurm.environment import CONNECTION
from slurm.requeue import CLOCK_SECONDS, FINAL_EXIT_CODES, KILL_BEFORE_LIMIT_SECONDS, Limits
from slurm.slurm_cli import RUNNING_STATES

NODE_VALUES = {
    "@SPEC@": '"$spec"',
    "@END@": '"$end"',
    # Omitted if SLURM has not set it: an empty list would hide every GPU.
    "--env CUDA_VISIBLE_DEVICES=@GPUS@": '${CUDA_VISIBLE_DEVICES+--env "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"}',
    "CUDA_VISIBLE_DEVICES=@GPUS@": '${CUDA_VISIBLE_DEVICES+"CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"}',
    "@DEVICES@": '"$devices"',
    "@JOB@": '"$SLURM_JOB_ID"',
    "@USER@": '"$(id -u):$(id -g)"',
}
"""Values known only on the node. The command line is quoted with these placeholders, which are then replaced."""

DEVICES = r"""
devices=all
if [ -n "${SLURM_JOB_GPUS:-}" ]; then
    devices="\"device=$SLURM_JOB_GPUS\""
    unset CUDA_VISIBLE_DEVICES  # the container numbers its GPUs from 0
fi
"""

SCRIPT = r"""#!/bin/bash -p
@OPTIONS@

# bash -p: without BASH_ENV and functions of the environment.
export PATH="${PATH:+$PATH:}/usr/local/bin:/usr/bin:/bin"
work=@WORK@
run=@RUN@
spec="$work/slurm/$run.yaml"
ledger="$work/slurm/$run.$SLURM_JOB_ID.retries"
attempts="$work/$run/attempts.jsonl"

log() { echo "emotion-slurm: $*"; }
field() { LC_ALL=C TZ=UTC0 scontrol -o show "$1" "$2" | tr ' ' '\n' | sed -n "s/^$3=//p" | head -n 1; }  # KIND NAME KEY
job_field() { field job "$SLURM_JOB_ID" "$1"; }
seconds() { date -u -d "$1" +%s; }
requeue_within_budget() {  # OUTCOME BUDGET WHICH: start this job again and exit, unless that is impossible
    used=$(grep -cx "$1" "$ledger")
    if [ "$used" -ge "$2" ]; then
        log "$1, and all $2 retries are used up"
        [ "$1" = error ] && exit "$code"
        exit @OVER_BUDGET@
    fi
    # An error that cannot be counted, as on a full disk, would be retried forever.
    echo "$1" >> "$ledger" || [ "$1" != error ] || exit "$code"
    log "$1: this job is started again ($((used + 1)) of $2)"
    # incomplete: a job that was cancelled a moment ago stays cancelled.
    trap '' TERM  # the requeue sends it to commands of SLURM, too
    if ! scontrol requeue ${3-incomplete} "$SLURM_JOB_ID"; then
        log "SLURM does not start it again: submit this script once more"
    elif [ "$code" = @NODE_ERROR@ ]; then
        exclude_node
    fi
    exit @INTERRUPTED@
}
exclude_node() {  # SLURM accepts it for pending jobs alone: right after the requeue
    nodes=$(job_field ExcNodeList)
    [ "${nodes:-(null)}" != '(null)' ] && nodes="$nodes,$SLURMD_NODENAME" || nodes=$SLURMD_NODENAME
    if scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$nodes"; then
        log "$SLURMD_NODENAME cannot do the job and is excluded: this job is started on another node"
    else
        log "$SLURMD_NODENAME cannot do the job, and SLURM does not exclude it: this job may start there again"
    fi
}
leave_ended() {
    log "cancelled, or started again by SLURM itself"
    exit @INTERRUPTED@
}
ended_by_preemption() {  # PREEMPTTIME: SLURM has ended this job for it, and nobody has cancelled it in its grace time
    [ -n "$1" ] && [ "$(job_field Restarts)" = "$restarts" ] || return
    lasted=$(($(seconds "$(job_field EndTime)") - $(seconds "$1")))
    grace=$(field partition "$SLURM_JOB_PARTITION" GraceTime)
    if [ "${grace:-0}" -gt 0 ]; then [ "$lasted" -ge "$((grace - @CLOCK@))" ]; else [ "$lasted" -le @CLOCK@ ]; fi
}

for name in "${!SBATCH_@}"; do
    log "$name was set when this script was submitted: sbatch prefers it to the option in the script"
done
# What the user or an enclosing job has set would be options of srun, and change what scontrol prints.
for name in "${!SBATCH_@}" "${!SCONTROL_@}" "${!SLURM_@}" "${!SRUN_@}"; do
    case $name in
        SLURM_JOB* | @KEPT@ | SLURM_CLUSTER_NAME | SLURM_NODELIST | SLURM_NODE_ALIASES | SLURM_WORKING_CLUSTER) ;;
        *) unset "$name" ;;
    esac
done
mkdir -p "$work/slurm"
touch "$ledger"
cat > "$spec.$SLURM_JOB_ID" <<'END_OF_SPEC' && mv "$spec.$SLURM_JOB_ID" "$spec" || exit @STORAGE_ERROR@
@YAML@END_OF_SPEC
end=$(job_field EndTime)
end=$(seconds "${end:-@MINUTES@ minutes}") || exit @STORAGE_ERROR@
restarts=$(job_field Restarts)
[ "$(job_field Requeue)" != 0 ] || scontrol update "JobId=$SLURM_JOB_ID" Requeue=1  # SBATCH_NO_REQUEUE
before=$(wc -l 2>/dev/null < "$attempts" || echo 0)

@DEVICES@
# The job receives a stop request, too. This shell waits until the job has saved.
stop_requested=0
trap 'stop_requested=1' TERM USR1 USR2
@CLEAN@srun --unbuffered --export=ALL --ntasks=1 --cpus-per-task=@CPUS@ @COMMAND@ &
step=$!
# SLURM does not requeue a job that has reached its time limit. What the job has not saved by now is lost.
(
    trap 'kill $(jobs -p); exit' TERM
    sleep "$((end - $(date +%s) - @KILL_BEFORE_LIMIT@))" & wait "$!"
    kill -KILL "$step"
) >/dev/null 2>&1 &
watchdog=$!
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done  # a signal interrupts `wait`
left=$((end - $(date +%s)))
kill "$watchdog" 2>/dev/null
@CLEAN@
# The exit code that the job itself recorded counts: wrappers change exit codes.
recorded=$(tail -n +"$((before + 1))" "$attempts" 2>/dev/null | grep '"event": "end"' | tail -n 1 |
    sed -n 's/.*"exit_code": \([0-9]*\).*/\1/p')
code=${recorded:-$code}
log "the job ended with $code"
# The table of slurm/requeue.py. scancel and scontrol requeue may signal the step alone: the state of the job says so.
if [ "$code" = @SPEC_ERROR@ ] && [ "$left" -le @GRACE@ ]; then
    out_of_time=1
else
    out_of_time=$((left <= @KILL_BEFORE_LIMIT@ + 1))
    case $code in @FINAL@) exit "$code" ;; esac
fi
preempted=$(job_field PreemptTime)
[ "$preempted" != None ] && [[ ! $preempted < $(job_field StartTime) ]] || preempted=  # none, or of an earlier attempt
case $(job_field JobState) in
    @RUNNING@ | '') ;;  # a controller that does not answer has cancelled nothing
    COMPLETING | PREEMPTED) ended_by_preemption "$preempted" || leave_ended ;;
    *) leave_ended ;;
esac
[ -z "$preempted" ] || requeue_within_budget preempted @PREEMPTIONS@ ''
if [ "$code" != @INTERRUPTED@ ] && [ "$stop_requested" = 0 ]; then
    [ "$out_of_time" = 0 ] && requeue_within_budget error @ERRORS@
    requeue_within_budget 'timed out' @TIMEOUTS@
fi
[ "$left" -lt @NEAR_LIMIT@ ] && requeue_within_budget 'timed out' @TIMEOUTS@
requeue_within_budget preempted @PREEMPTIONS@
"""


def script(spec: JobSpec, cluster: ClusterConfig) -> str:
    """The text of the script. Raises SpecError for a path that cannot be bound into a container."""
    run = run_name(spec)
    arguments = ["run", "@SPEC@", "--work", cluster.work, "--scratch", str(cluster.scratch_folder)]
    variables = {"OMP_NUM_THREADS": str(cluster.cpus), "SLURM_JOB_END_TIME": "@END@"}
    variables |= {"CUDA_VISIBLE_DEVICES": "@GPUS@"} if cluster.gpus else {}
    container = f"emotion-{run}-@JOB@"
    command = shlex.join(job_argv(arguments, spec, cluster, container, "@USER@", variables, "@DEVICES@"))
    clean = shlex.join(kill_argv(cluster, container) or [])
    yaml = to_yaml(spec)
    if "END_OF_SPEC" in yaml:
        raise SpecError("the spec contains END_OF_SPEC, which ends the spec inside the script; change that text")
    limits = Limits(spec.preemption.grace_seconds, cluster.save_seconds, cluster.retries)
    return _filled(
        SCRIPT,
        {
            "@CLEAN@": f"{_filled(clean, NODE_VALUES)} >/dev/null 2>&1\n" if clean else "",
            "@CLOCK@": f"{CLOCK_SECONDS:.0f}",
            "@COMMAND@": _filled(command, NODE_VALUES),
            "@CPUS@": str(cluster.cpus),
            "@DEVICES@": DEVICES if cluster.runtime == "docker" and cluster.gpus else "",
            "@ERRORS@": str(cluster.retries.errors),
            "@FINAL@": " | ".join(map(str, sorted({0, Stopped.exit_code} | FINAL_EXIT_CODES))),
            "@GRACE@": f"{limits.grace_seconds:.0f}",
            "@INTERRUPTED@": str(Interrupted.exit_code),
            "@KEPT@": " | ".join(sorted(CONNECTION)),
            "@KILL_BEFORE_LIMIT@": f"{KILL_BEFORE_LIMIT_SECONDS:.0f}",
            "@MINUTES@": str(cluster.time_limit_minutes),
            "@NEAR_LIMIT@": f"{limits.near_limit_seconds:.0f}",
            "@NODE_ERROR@": str(NodeError.exit_code),
            "@OPTIONS@": "\n".join(f"#SBATCH {option}" for option in _sbatch_options(cluster, f"emotion-{run}")),
            "@OVER_BUDGET@": str(ModelError.exit_code),
            "@PREEMPTIONS@": str(cluster.retries.preemptions),
            "@RUN@": run,
            "@RUNNING@": " | ".join(RUNNING_STATES),
            "@SPEC_ERROR@": str(SpecError.exit_code),
            "@STORAGE_ERROR@": str(StorageError.exit_code),
            "@TIMEOUTS@": str(cluster.retries.time_outs),
            "@WORK@": shlex.quote(cluster.work),
            "@YAML@": yaml,
        },
    )


def _sbatch_options(cluster: ClusterConfig, name: str) -> list[str]:
    options = [f"--job-name={name}", "--output=%x-%j.log", "--open-mode=append", "--requeue"]
    options += [f"--signal=USR2@{max(1, round(cluster.save_seconds))}", f"--time={cluster.time_limit_minutes}"]
    options += ["--nodes=1", "--ntasks=1", f"--cpus-per-task={cluster.cpus}"]
    options += [f"--mem={round(cluster.memory_gib * 1024)}M"]
    options += [f"--gpus-per-node={cluster.gpus}"] if cluster.gpus else []
    options += [f"--{key}={value}" for key in ("partition", "account", "qos") if (value := getattr(cluster, key))]
    pairs = [option.partition("=") for option in cluster.sbatch]
    return [*options, *(f"{name}{equals}{shlex.quote(value) if value else ''}" for name, equals, value in pairs)]


def _filled(text: str, values: dict[str, str]) -> str:
    """The text with all placeholders replaced in one pass, so that placeholders inside a value are not replaced."""
    return re.sub("|".join(map(re.escape, values)), lambda found: values[found[0]], text)
