"""(what to run, where) → the command line that runs it: bare, or in Apptainer, Docker or Podman. Pure functions."""

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from emotion.errors import SpecError
from job.spec.location import Local, Location
from job.spec.model import JobSpec
from slurm.cluster import ClusterConfig

PROGRAM = "emotion-job"


@dataclass(frozen=True)
class Bind:
    """A folder or file that the container sees under its own path."""

    path: str
    writable: bool


def job_argv(
    arguments: Sequence[str],
    spec: JobSpec | None,
    cluster: ClusterConfig,
    name: str,
    user: str,
    variables: Mapping[str, str],
    devices: str = "all",
) -> list[str]:
    """`emotion-job ARGUMENTS` as this cluster runs it.

    spec: whose folders the container has to see. name: of the container. user: UID:GID that files are to belong to, for Docker.
    variables: environment of the job, beside that of the cluster file. devices: what Docker takes after --gpus.
    Raises SpecError for a path that cannot be bound.
    """
    variables = dict(text.split("=", 1) for text in cluster.environment) | dict(variables)
    assignments = [f"{key}={value}" for key, value in variables.items()]
    if cluster.runtime == "bare":
        # -P: a folder `job` where somebody happens to stand is not ours.
        return ["env", *assignments, str(cluster.python), "-P", "-m", "job", *arguments]
    binds = binds_of(spec, cluster)
    if cluster.runtime == "apptainer":
        # Without --cleanenv a PYTHONPATH of the host reaches into the image.
        argv = ["apptainer", "exec", "--cleanenv", "--no-home", "--pwd", cluster.work]
        argv += ["--nv"] if cluster.gpus else []
        for bind in binds:
            argv += ["--bind", f"{bind.path}:{bind.path}:{'rw' if bind.writable else 'ro'}"]
        for assignment in assignments:
            argv += ["--env", assignment]
        return [*argv, *cluster.options, str(cluster.image), PROGRAM, *arguments]
    argv = [cluster.runtime, "run", "--rm", "--name", name, "--workdir", cluster.work]
    if cluster.runtime == "docker":
        argv += ["--user", user]
        argv += ["--gpus", devices] if cluster.gpus else []
    else:
        argv += ["--userns", "keep-id"] if not user.startswith("0:") else []
        argv += ["--device", "nvidia.com/gpu=all"] if cluster.gpus else []
    for bind in binds:
        argv += [
            "--mount",
            f"type=bind,source={bind.path},target={bind.path}" + ("" if bind.writable else ",readonly"),
        ]
    for assignment in assignments:
        argv += ["--env", assignment]
    return [*argv, "--entrypoint", PROGRAM, *cluster.options, str(cluster.image), *arguments]


def kill_argv(cluster: ClusterConfig, name: str) -> list[str] | None:
    """What ends a container for good; None where it is a process of ours like any other."""
    return [cluster.runtime, "rm", "--force", name] if cluster.runtime in ("docker", "podman") else None


def binds_of(spec: JobSpec | None, cluster: ClusterConfig) -> list[Bind]:
    """The folders and files that a job needs, outer ones first, none twice. Object storage needs none."""
    written, read = [cluster.work, str(cluster.scratch_folder)], [*cluster.binds]
    if spec is not None:
        written += _local(spec.destination, spec.mirror)
        read += _local(spec.source, spec.warm_start_run, spec.dataset_manifest, spec.weights)
        read += [spec.split.lists] if spec.split.lists else []
    found: list[Bind] = []
    for path, writable in [
        *((path, True) for path in sorted(set(written))),
        *((path, False) for path in sorted(set(read))),
    ]:
        if any(letter in path for letter in ",:\n"):
            raise SpecError(f"{path}: has a comma, a colon or a line break and cannot be bound into a container")
        if not any(_inside(path, bind.path) and bind.writable >= writable for bind in found):
            found.append(Bind(path, writable))
    return sorted(found, key=lambda bind: bind.path)


def _local(*locations: Location | None) -> list[str]:
    return [str(location) for location in locations if isinstance(location, Local)]


def _inside(path: str, folder: str) -> bool:
    return posixpath.commonpath([path, folder]) == folder
