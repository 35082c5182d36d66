"""Decides which environment variables reach SLURM's commands: only the cluster file may set the resources of jobs.

sbatch and srun have a variable for nearly every option (SBATCH_TIMELIMIT, SLURM_MEM_PER_CPU), which overrides the script. Other
variables filter and format the output of squeue, scontrol and scancel. Inside a job, SLURM has set dozens of them for that job.
"""

import contextlib
import os
import re
from collections.abc import Iterator

READ_BY_SLURM = re.compile(r"_?(SLURM|SLURMD|SBATCH|SALLOC|SRUN|SQUEUE|SACCT|SCONTROL|SCANCEL|SINFO)_\w+")
CONNECTION = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_SACK_SOCKET"}
"""Variables that are kept: where the controller is, and the credentials of the user."""
OF_THE_JOB = {"CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"}
"""Inside a job, these name the job's own GPUs, not those of the jobs that it submits."""
READ_BY_BASH = {"BASH_ENV", "BASHOPTS", "ENV", "SHELLOPTS"}
"""Variables that could run other code at the start of a job's script, or make it end at its first error."""
QUERIES = {"LC_ALL": "C", "TZ": "UTC0"}
"""For commands whose answers are parsed: English text, and UTC times, which the end of summer time does not make ambiguous."""


def removed() -> list[str]:
    """Sorted names of the variables in this environment that are hidden from SLURM's commands."""
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
    """Remove these variables during the block: submitit calls sbatch in the environment of this process, which jobs inherit."""
    values = {name: os.environ.pop(name) for name in removed()}
    try:
        yield
    finally:
        os.environ.update(values)


def unused_options() -> list[str]:
    """The removed variables that a user may have set as options of sbatch."""
    is_inside = "SLURM_JOB_ID" in os.environ
    return [name for name in removed() if name.startswith("SBATCH_") or (name.startswith("SLURM_") and not is_inside)]


def described() -> str:
    """A text about the removed variables: their names, but only the number of those of an enclosing job."""
    names, job = removed(), os.getenv("SLURM_JOB_ID")
    of_job = [name for name in names if job and (name.startswith(("SLURM", "_SLURM", "SRUN_")) or name in OF_THE_JOB)]
    texts = [name for name in names if name not in of_job]
    texts += [f"{len(of_job)} variables of job {job}, inside of which this runs"] if of_job else []
    return f"not passed on to SLURM: {', '.join(texts)}" if texts else "nothing that would change jobs or answers of SLURM"


def other_cluster(own: str) -> str | None:
    """NAME=VALUE of a variable that directs SLURM's commands to another cluster than `own`, or None."""
    for name in ("SBATCH_CLUSTERS", "SLURM_CLUSTERS", "SLURM_WORKING_CLUSTER"):
        value = os.getenv(name, "").partition(":")[0]
        if value not in ("", own):
            return f"{name}={value}"
    return None
