"""The protocol of slurm/task.py as one sbatch script: no submitit, no Python on the node, the spec inside."""

import re
import shlex

from emotion.errors import SpecError
from job.spec.model import JobSpec, run_name, to_yaml
from slurm.cluster import ClusterConfig
from slurm.container import job_argv, kill_argv
from slurm.slurm_cli import AT_WORK
from slurm.task import EARLY_SECONDS, FINAL, LEAVE_SECONDS

# What is known on the node only. The command line is quoted with these words in it, and they are put in afterwards.
ON_THE_NODE = {
    "@SPEC@": '"$spec"',
    "@END@": '"$end"',
    # Nothing at all where SLURM has set nothing: an empty list would hide every GPU.
    "--env CUDA_VISIBLE_DEVICES=@GPUS@": '${CUDA_VISIBLE_DEVICES+--env "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"}',
    "CUDA_VISIBLE_DEVICES=@GPUS@": '${CUDA_VISIBLE_DEVICES+"CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"}',
    "@DEVICES@": '"$devices"',
    "@JOB@": '"$SLURM_JOB_ID"',
    "@USER@": '"$(id -u):$(id -g)"',
}

DEVICES = r"""
devices=all
if [ -n "${SLURM_JOB_GPUS:-}" ]; then
    devices="\"device=$SLURM_JOB_GPUS\""
    unset CUDA_VISIBLE_DEVICES  # a container numbers its devices anew
fi
"""

PROTOCOL = r"""
say() { echo "emotion-slurm: $*"; }
field() { scontrol -o show job "$SLURM_JOB_ID" | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1; }
again() {  # again KIND BUDGET: start this job again and leave, unless the budget is used up or somebody has cancelled it
    used=$(grep -cx "$1" "$ledger")
    if [ "$used" -ge "$2" ]; then
        say "$1, and all $2 retries are used up"
        [ "$1" = error ] && exit "$code"
        exit 70
    fi
    # What cannot be counted, as on a full disk, would go on for ever.
    echo "$1" >> "$ledger" || [ "$1" != error ] || exit "$code"
    say "$1: this job is started again ($((used + 1)) of $2)"
    scontrol requeue incomplete "$SLURM_JOB_ID" || say "SLURM does not start it again: submit this script once more"
    exit 75
}

mkdir -p "$work/slurm"
touch "$ledger"
cat > "$spec.$SLURM_JOB_ID" <<'END_OF_SPEC' && mv "$spec.$SLURM_JOB_ID" "$spec" || exit 69
@YAML@END_OF_SPEC
end=$(date -d "$(field EndTime)" +%s) || exit 69
before=$(wc -l 2>/dev/null < "$attempts" || echo 0)

@DEVICES@
# This shell is not the job: asked to stop, it waits for the job to save, and then it is the one to start it again.
asked=0
trap 'asked=1' TERM USR1 USR2
@CLEAN@srun --unbuffered --ntasks=1 --cpus-per-task=@CPUS@ @COMMAND@ &
step=$!
# A job that is out of time is not started again by SLURM. What it has not saved by then is lost.
(
    trap 'kill $(jobs -p); exit' TERM
    sleep "$((end - $(date +%s) - @LEAVE@))" & wait "$!"
    kill -KILL "$step"
) >/dev/null 2>&1 &
watchdog=$!
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
left=$((end - $(date +%s)))
kill "$watchdog" 2>/dev/null
@CLEAN@
# What the job itself has written down counts: wrappers change exit codes.
told=$(tail -n +"$((before + 1))" "$attempts" 2>/dev/null | grep '"event": "end"' | tail -n 1 |
    sed -n 's/.*"exit_code": \([0-9]*\).*/\1/p')
code=${told:-$code}
say "the job ended with $code"
case $code in
    0 | 76 | @FINAL@) exit "$code" ;;
esac
case $(field JobState) in
    @AT_WORK@ | '') ;;  # a controller that does not answer has cancelled nothing
    *)
        say "cancelled, or started again by SLURM itself"
        exit 75
        ;;
esac
case $(field PreemptTime) in
    None | '') ;;
    *) again preempted @PREEMPTIONS@ ;;
esac
if [ "$left" -le "$((@LEAVE@ + 1))" ]; then again 'timed out' @TIMEOUTS@; fi
if [ "$code" != 75 ] && [ "$asked" = 0 ]; then again error @ERRORS@; fi
if [ "$left" -lt @LATE@ ]; then again 'timed out' @TIMEOUTS@; fi
again preempted @PREEMPTIONS@
"""


def script(spec: JobSpec, cluster: ClusterConfig) -> str:
    """For sbatch. Raises SpecError for a path that cannot be bound into a container."""
    run = run_name(spec)
    arguments = ["run", "@SPEC@", "--work", cluster.work, "--scratch", str(cluster.scratch_folder)]
    variables = {"OMP_NUM_THREADS": str(cluster.cpus), "SLURM_JOB_END_TIME": "@END@"}
    if cluster.gpus:
        variables["CUDA_VISIBLE_DEVICES"] = "@GPUS@"
    container = f"emotion-{run}-@JOB@"
    command = shlex.join(job_argv(arguments, spec, cluster, container, "@USER@", variables, "@DEVICES@"))
    clean = shlex.join(kill_argv(cluster, container) or [])
    yaml = to_yaml(spec)
    if "END_OF_SPEC" in yaml:
        raise SpecError("the spec contains END_OF_SPEC, which would end it in a script; change that text")
    late = spec.preemption.grace_seconds + cluster.save_seconds + EARLY_SECONDS
    filled = {
        "@AT_WORK@": " | ".join(AT_WORK),
        "@DEVICES@": DEVICES if cluster.runtime == "docker" and cluster.gpus else "",
        "@CLEAN@": f"{_filled(clean, ON_THE_NODE)} >/dev/null 2>&1\n" if clean else "",
        "@COMMAND@": _filled(command, ON_THE_NODE),
        "@CPUS@": str(cluster.cpus),
        "@ERRORS@": str(cluster.retries.errors),
        "@FINAL@": " | ".join(map(str, sorted(FINAL))),
        "@LATE@": f"{late:.0f}",
        "@LEAVE@": f"{LEAVE_SECONDS:.0f}",
        "@PREEMPTIONS@": str(cluster.retries.preemptions),
        "@TIMEOUTS@": str(cluster.retries.time_outs),
        "@YAML@": yaml,
    }
    body = _filled(PROTOCOL, filled)
    work = shlex.quote(cluster.work)
    head = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options_of(cluster, f"emotion-{run}")),
        "",
        f"work={work}",
        f"run={run}",
    ]
    head += ['spec="$work/slurm/$run.yaml"', 'ledger="$work/slurm/$run.$SLURM_JOB_ID.retries"']
    head += ['attempts="$work/$run/attempts.jsonl"']
    return "\n".join(head) + "\n" + body


def options_of(cluster: ClusterConfig, name: str) -> list[str]:
    """What stands behind #SBATCH."""
    options = [f"--job-name={name}", "--output=%x-%j.log", "--open-mode=append", "--requeue"]
    options += [f"--signal=USR2@{max(1, round(cluster.save_seconds))}", f"--time={cluster.time_limit_minutes}"]
    options += [
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={cluster.cpus}",
        f"--mem={round(cluster.memory_gib * 1024)}M",
    ]
    options += [f"--gpus-per-node={cluster.gpus}"] if cluster.gpus else []
    for key in ("partition", "account", "qos"):
        value = getattr(cluster, key)
        options += [f"--{key}={value}"] if value else []
    return [*options, *cluster.sbatch]


def _filled(text: str, values: dict[str, str]) -> str:
    """In one pass, so that nothing that is put in is looked at again."""
    return re.sub("|".join(map(re.escape, values)), lambda found: values[found[0]], text)
