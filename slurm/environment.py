"""Which of the user's environment variables reach SLURM's commands. Only the cluster file decides what jobs may use.

sbatch and srun have a variable for nearly every option (SBATCH_TIMELIMIT, SLURM_MEM_PER_CPU), and it overrides the script; others
filter and format what squeue, scontrol and scancel do. Inside a job SLURM has set dozens of them for that job.
"""

import contextlib
import os
import re
from collections.abc import Iterator

READ_BY_SLURM = re.compile(r"_?(SLURM|SLURMD|SBATCH|SALLOC|SRUN|SQUEUE|SACCT|SCONTROL|SCANCEL|SINFO)_\w+")
CONNECTION = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_SACK_SOCKET"}
"""Where the controller is and who asks: these are kept."""
OF_THE_JOB = {"CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"}
"""Inside a job these name its own GPUs, which are not those of the jobs that it submits."""
READ_BY_BASH = {"BASH_ENV", "BASHOPTS", "ENV", "SHELLOPTS"}
"""Would run foreign code at the start of a job's script, or have it end at its first error."""
QUERIES = {"LC_ALL": "C", "TZ": "UTC0"}
"""Answers are parsed: in English, and with times that a change to winter time does not make ambiguous."""


def removed() -> list[str]:
    """Names of the variables set here that SLURM's commands do not see, sorted."""
    is_inside = "SLURM_JOB_ID" in os.environ
    return sorted(
        name
        for name in os.environ
        if (READ_BY_SLURM.fullmatch(name) and name not in CONNECTION)
        or name in READ_BY_BASH
        or (is_inside and name in OF_THE_JOB)
    )


def for_queries() -> dict[str, str]:
    """The environment of a command whose answer is parsed."""
    names = set(removed())
    return {name: value for name, value in os.environ.items() if name not in names} | QUERIES


@contextlib.contextmanager
def cleaned() -> Iterator[None]:
    """Without the removed variables: submitit calls sbatch in the environment of this process, which jobs inherit."""
    values = {name: os.environ.pop(name) for name in removed()}
    try:
        yield
    finally:
        os.environ.update(values)


def unused_options() -> list[str]:
    """Of the removed variables, those with which a user may have meant to set an option of sbatch."""
    is_inside = "SLURM_JOB_ID" in os.environ
    return [name for name in removed() if name.startswith("SBATCH_") or (name.startswith("SLURM_") and not is_inside)]


def described() -> str:
    """The removed variables for a report: by name, but those of an enclosing job as a number."""
    names, job = removed(), os.getenv("SLURM_JOB_ID")
    of_job = [name for name in names if job and (name.startswith(("SLURM", "_SLURM", "SRUN_")) or name in OF_THE_JOB)]
    texts = [name for name in names if name not in of_job]
    texts += [f"{len(of_job)} variables of job {job}, inside of which this runs"] if of_job else []
    return f"not passed on to SLURM: {', '.join(texts)}" if texts else "nothing that would change jobs or answers of SLURM"


def other_cluster(own: str) -> str | None:
    """NAME=VALUE of a variable by which SLURM's commands would turn to another cluster than `own`, or None."""
    for name in ("SBATCH_CLUSTERS", "SLURM_CLUSTERS", "SLURM_WORKING_CLUSTER"):
        value = os.getenv(name, "").partition(":")[0]
        if value not in ("", own):
            return f"{name}={value}"
    return None
