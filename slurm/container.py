"""The command line that runs emotion-job: bare, or in Apptainer, Docker or Podman. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from emotion.errors import SpecError
from job.spec.location import Local, Location
from job.spec.model import JobSpec
from slurm.cluster import ClusterConfig

PROGRAM = "emotion-job"


@dataclass(frozen=True)
class Bind:
    """A folder or file mounted into the container at the same path."""

    path: str
    writable: bool


def job_argv(
    arguments: Sequence[str],
    spec: JobSpec,
    cluster: ClusterConfig,
    name: str,
    user: str,
    variables: Mapping[str, str],
    devices: str = "all",
) -> list[str]:
    """The argv of `emotion-job ARGUMENTS` on this cluster.

    spec: the job's spec, whose local folders are mounted. name: of the container. user: UID:GID of the files that Docker writes.
    variables: environment of the job, added to that of the cluster file. devices: value of Docker's --gpus.
    Raises SpecError for a path that cannot be bound.
    """
    return program_argv([PROGRAM, *arguments], spec, cluster, name, user, variables, devices)


def program_argv(
    program: Sequence[str],
    spec: JobSpec,
    cluster: ClusterConfig,
    name: str,
    user: str,
    variables: Mapping[str, str],
    devices: str = "all",
) -> list[str]:
    """The argv of any program in the job's environment. program: `emotion-job` or `python`, with its arguments. The other
    parameters are those of job_argv."""
    variables = dict(text.split("=", 1) for text in cluster.environment) | dict(variables)
    assignments = [f"{key}={value}" for key, value in variables.items()]
    if cluster.runtime == "bare":
        # -P: do not import a folder `job` of the current directory.
        module = ["-m", "job"] if program[0] == PROGRAM else []
        return ["/usr/bin/env", *assignments, str(cluster.python), "-P", *module, *program[1:]]
    binds = binds_of(spec, cluster)
    if cluster.runtime == "apptainer":
        # Without --cleanenv, a PYTHONPATH of the host would apply inside the image.
        argv = ["apptainer", "exec", "--cleanenv", "--no-home", "--pwd", cluster.work]
        argv += ["--nv"] if cluster.gpus else []
        argv += _repeated("--bind", [f"{bind.path}:{bind.path}:{'rw' if bind.writable else 'ro'}" for bind in binds])
        argv += _repeated("--env", assignments)
        return [*argv, *cluster.options, str(cluster.image), *program]
    argv = [cluster.runtime, "run", "--rm", "--name", name, "--workdir", cluster.work]
    if cluster.runtime == "docker":
        argv += ["--user", user]
        argv += ["--gpus", devices] if cluster.gpus else []
    else:
        argv += ["--userns", "keep-id"] if not user.startswith("0:") else []
        argv += ["--device", "nvidia.com/gpu=all"] if cluster.gpus else []
    mounts = [f"type=bind,source={bind.path},target={bind.path}{'' if bind.writable else ',readonly'}" for bind in binds]
    argv += _repeated("--mount", mounts)
    argv += _repeated("--env", assignments)
    return [*argv, "--entrypoint", program[0], *cluster.options, str(cluster.image), *program[1:]]


def _repeated(option: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def kill_argv(cluster: ClusterConfig, name: str) -> list[str] | None:
    """The argv that kills and removes a container; None if the job is an ordinary child process."""
    return [cluster.runtime, "rm", "--force", name] if cluster.runtime in ("docker", "podman") else None


def binds_of(spec: JobSpec, cluster: ClusterConfig) -> list[Bind]:
    """The folders and files that a job reads and writes, sorted, without those inside another bind."""
    written = {cluster.work, str(cluster.scratch_folder), *_local(spec.destination, spec.mirror)}
    read = {*cluster.binds, *_local(spec.source, spec.warm_start_run, spec.dataset_manifest, spec.weights, spec.teacher)}
    read |= {path for path in (spec.split.lists, spec.split.out_of_fold) if path}
    found: list[Bind] = []
    for path, writable in [*((path, True) for path in sorted(written)), *((path, False) for path in sorted(read))]:
        if any(character in path for character in ",:\n"):
            raise SpecError(f"{path}: has a comma, a colon or a line break and cannot be bound into a container")
        if not any(PurePath(path).is_relative_to(bind.path) and bind.writable >= writable for bind in found):
            found.append(Bind(path, writable))
    return sorted(found, key=lambda bind: bind.path)


def _local(*locations: Location | None) -> list[str]:
    return [str(location) for location in locations if isinstance(location, Local)]
