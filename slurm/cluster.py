"""The cluster file: where jobs run and which resources they get. It never changes what they compute."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from emotion.config import Section
from job.secrets import secrets_of
from job.spec.load import load_document
from job.spec.location import VARIABLE, refuse_misread

SECRET = re.compile(r"SECRET|TOKEN(?!IZER)|PASSWORD", re.IGNORECASE)
"""Matches the names of variables that hold a secret."""
RESERVED_OPTIONS = {
    **dict.fromkeys(
        (
            "array", "dependency", "error", "input", "job-name", "kill-on-invalid-dep", "mem-per-cpu", "mem-per-gpu", "no-kill",
            "no-requeue", "nodes", "ntasks", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-node", "ntasks-per-socket",
            "ntasks-per-tres", "open-mode", "output", "requeue", "signal", "wrap",
        ),
        "is set by the launcher; remove it",
    ),
    **dict.fromkeys(
        ("help", "parsable", "quiet", "test-only", "usage", "version", "wait"),
        "changes what sbatch answers, which the launcher reads; remove it",
    ),
    **dict.fromkeys(
        ("clusters", "cluster-constraint"),
        "would submit to another cluster, whose jobs the launcher could neither see nor cancel; call emotion-slurm there",
    ),
    **dict.fromkeys(("export", "export-file"), "would hide variables that a job needs; name those to add in environment"),
    **{
        option: f"has a key of its own in this file, {key}"
        for option, key in {
            "account": "account", "cpus-per-task": "cpus", "gpus-per-node": "gpus", "mem": "memory_gib",
            "partition": "partition", "qos": "qos", "time": "time_limit_minutes",
        }.items()
    },
}  # fmt: skip
"""Option of sbatch → why the cluster file may not have it. All other options are allowed."""
WHOLE_OPTIONS = {"gpus"}
"""Real options whose name is a prefix of a reserved one. sbatch reads any other such prefix as an abbreviation."""


def _absolute(text: str) -> str:
    refuse_misread(text)
    path = Path(text).expanduser()
    if not path.is_absolute():
        raise ValueError(f"expected an absolute path, as every node sees it, found {text!r}")
    if re.search(r"[,:\x00-\x1f]", text):
        raise ValueError(f"a path with a comma, a colon or a control character cannot be bound into a container: {text!r}")
    return str(path)


def _without_patterns(path: str) -> str:
    if found := re.search(r"[%\\]", path):
        raise ValueError(f"{found[0]} has a meaning in the path of a log of SLURM; name another folder, found {path!r}")
    return path


def _assignment(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*=[^\n]*", text):
        raise ValueError(f"expected NAME=VALUE, found {text!r}")
    name, _, value = text.partition("=")
    if VARIABLE.match(value):
        raise ValueError(f"{name}: {value!r} is not replaced; write the value out")
    named = SECRET.search(name) and not name.upper().endswith(("_FILE", "_PATH"))
    if named or any(secrets_of({name: value})):  # the value may hold a password in a URL, as of a proxy
        raise ValueError(
            f"{name}: secrets do not belong in this file, which is copied and shown; name a file with them, as "
            f"AWS_SHARED_CREDENTIALS_FILE does"
        )
    return text


def _sbatch_option(text: str) -> str:
    found = re.fullmatch(r"--([a-z][a-z-]*)(=\S+)?", text)
    if found is None:
        raise ValueError(f"expected --OPTION or --OPTION=VALUE, found {text!r}")
    name = found[1]
    if name in RESERVED_OPTIONS:
        raise ValueError(f"--{name} {RESERVED_OPTIONS[name]}")
    for whole, reason in RESERVED_OPTIONS.items():
        if whole.startswith(name) and name not in WHOLE_OPTIONS:
            raise ValueError(f"--{name} may be read as --{whole}, which {reason}")
    return text


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.@:+-]{1,64}$", description="letters, digits and . _ @ : + -")]
AbsolutePath = Annotated[str, AfterValidator(_absolute)]
Assignment = Annotated[str, AfterValidator(_assignment)]
SbatchOption = Annotated[str, AfterValidator(_sbatch_option)]


class RetriesConfig(Section):
    """How often one task may be started again, by the outcome of its attempt (requeue.py)."""

    preemptions: int = Field(1000, ge=0, description="preempted, requeued by an operator, or lost with its node")
    time_outs: int = Field(100, ge=0, description="reached its time limit; resumes from its last checkpoint")
    errors: int = Field(2, ge=0, description="storage unavailable, run owned by another job, out of memory, crashed")
    memory_gib_at_most: float | None = Field(
        None, gt=0, description="a task killed for memory is restarted with 1.5 times as much, up to this; default: no increase"
    )


class PrepareConfig(Section):
    """Resources of the jobs that compute features and collect results, if they differ from those of the array."""

    partition: Name | None = Field(None, description="default: that of the array")
    time_limit_minutes: int | None = Field(None, ge=1, description="default: that of the array")
    cpus: int | None = Field(None, ge=1, description="default: those of the array")
    memory_gib: float | None = Field(None, gt=0, description="default: that of the array")
    gpus: int = Field(0, ge=0, description="needs none")
    account: Name | None = Field(None, description="default: that of the array")
    qos: Name | None = Field(None, description="default: that of the array")
    sbatch: tuple[SbatchOption, ...] | None = Field(None, description="default: those of the array; [] for none")


class ClusterConfig(Section):
    partition: Name | None = Field(None, description="default: that of the site")
    account: Name | None = Field(None, description="charged for the jobs")
    qos: Name | None = Field(None, description="quality of service")
    time_limit_minutes: int = Field(ge=1, description="of one attempt; a longer task resumes in the next one")
    cpus: int = Field(4, ge=1, description="of one task")
    memory_gib: float = Field(16, gt=0, description="of one task")
    gpus: int = Field(1, ge=0, description="of one task")
    at_most: int = Field(8, ge=1, description="tasks that run at the same time")
    work: Annotated[AbsolutePath, AfterValidator(_without_patterns)] = Field(
        description="folder of the runs, at the same path on all nodes"
    )
    scratch: AbsolutePath | None = Field(None, description="folder for staged data and features; default: WORK/scratch")
    work_is_shared: bool = Field(False, description="true: work is on a disk of this machine that it exports to the nodes")
    runtime: Literal["apptainer", "docker", "podman", "bare"] = Field(description="how the job is run")
    image: str | None = Field(None, description="apptainer: SIF file or folder; docker, podman: image name")
    python: AbsolutePath | None = Field(
        None, description="bare: the Python that this package is installed for, with its extra job"
    )
    binds: tuple[AbsolutePath, ...] = Field((), description="more folders to mount, at the same paths")
    environment: tuple[Assignment, ...] = Field((), description="NAME=VALUE for the job, such as HF_HOME=/shared/hf")
    options: tuple[str, ...] = Field((), description="more options of apptainer exec, docker run or podman run")
    sbatch: tuple[SbatchOption, ...] = Field((), description="more options of sbatch, such as --constraint=a100")
    save_seconds: float = Field(
        10.0, ge=0, description="time needed to save and exit; a partition with a GraceTime above 0 and below this is refused"
    )
    retries: RetriesConfig = Field(default_factory=RetriesConfig)
    prepare: PrepareConfig = Field(default_factory=PrepareConfig)

    @model_validator(mode="after")
    def _runtime_has_what_it_needs(self) -> Self:
        needed, other = ("python", "image") if self.runtime == "bare" else ("image", "python")
        if getattr(self, needed) is None:
            raise ValueError(f"{needed}: missing, runtime {self.runtime} needs it")
        if getattr(self, other) is not None:
            raise ValueError(f"{other}: not used by runtime {self.runtime}; remove it")
        if self.runtime == "apptainer" and "://" not in str(self.image):
            _absolute(str(self.image))
        return self

    @model_validator(mode="after")
    def _memory_may_grow(self) -> Self:
        at_most, first = self.retries.memory_gib_at_most, max(self.memory_gib, self.prepare.memory_gib or 0)
        if at_most is not None and at_most < first:
            raise ValueError(f"retries.memory_gib_at_most: {at_most:g}, but a job begins with {first:g} (memory_gib); raise it")
        return self

    @property
    def work_folder(self) -> Path:
        return Path(self.work)

    @property
    def scratch_folder(self) -> Path:
        return Path(self.scratch) if self.scratch else self.work_folder / "scratch"

    def for_preparing(self) -> "ClusterConfig":
        """This cluster with the resources of `prepare`."""
        return self.model_copy(update=self.prepare.model_dump(exclude_none=True))


def load_cluster(path: Path) -> ClusterConfig:
    """Read a cluster file. Raises SpecError with all its mistakes, each as file:line:column."""
    return load_document(path, ClusterConfig, "cluster file")
