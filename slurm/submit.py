"""Submits a sweep with submitit: jobs that prepare features, arrays with a task per spec, a job that collects results."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emotion.errors import EmotionError, Interrupted, SpecError, StorageError, to_install
from emotion.files import make_folder, write_json
from job.spec.location import Local
from job.spec.model import JobSpec, run_name, to_yaml
from slurm import environment, slurm_cli
from slurm.cluster import ClusterConfig
from slurm.slurm_cli import Site
from slurm.sweep import Sweep, distinct_features
from slurm.sweep_folder import SWEEP, JobKind, JobRecord, Submission, SweepFolder, TaskRecord
from slurm.task import NodeJob

if TYPE_CHECKING:
    from submitit import SlurmExecutor

SHIELDED_SHELL = """/bin/sh -c 'trap "" TERM INT USR1 USR2 XCPU; exec "$0" "$@"'"""
"""Ignores stop signals until the launcher has installed its handlers. At its start, the launcher asks SLURM for missed ones."""


@dataclass(frozen=True)
class Part:
    """Jobs submitted with one sbatch. after_ok, after_any: indices of the parts that must first succeed, or only end."""

    kind: JobKind
    tasks: tuple[int, ...]
    after_ok: tuple[int, ...] = ()
    after_any: tuple[int, ...] = ()


def parts_of(prepare: Sequence[int], tasks: Sequence[int], largest_array: int) -> list[Part]:
    """The parts of a submission: prepare → arrays of at most `largest_array` tasks → collect. Arrays run one after another, so
    that the limit at_most holds."""
    parts = [Part("prepare", chunk) for chunk in _chunks(prepare, largest_array)]
    prepared = tuple(range(len(parts)))
    arrays: list[int] = []
    for chunk in _chunks(tasks, largest_array):
        parts.append(Part("task", chunk, prepared, tuple(arrays[-1:])))
        arrays.append(len(parts) - 1)
    return [*parts, Part("collect", (0,), (), tuple(arrays))]


def _chunks(items: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(items[start : start + size]) for start in range(0, len(items), size)]


def dependency_of(part: Part, ids: Sequence[str]) -> str | None:
    """The value of sbatch --dependency, None without one. ids: id of each part, which is a job or an array."""
    conditions = [("afterok", part.after_ok), ("afterany", part.after_any)]
    texts = [":".join([name, *(ids[index] for index in parts)]) for name, parts in conditions if parts]
    return ",".join(texts) or None


def folder_of(sweep: Sweep, cluster: ClusterConfig) -> Path:
    return cluster.work_folder / "sweeps" / sweep.folder_name


def make_sweep_folder(sweep: Sweep, sweep_path: Path, cluster: ClusterConfig) -> SweepFolder:
    """Write the specs and sweep.json. Raises SpecError for a sweep that was submitted before."""
    path = folder_of(sweep, cluster)
    if (path / SWEEP).exists() and SweepFolder(path).submissions():
        raise SpecError(
            f"{path}: this sweep was submitted before. `emotion-slurm status {path}` shows its state; `emotion-slurm resubmit` "
            f"submits again what failed."
        )
    try:
        destinations = {task.spec.destination for task in sweep.tasks}
        published = [destination.path for destination in destinations if isinstance(destination, Local)]
        for folder in (path / "specs", path / "submissions", path / "attempts", cluster.scratch_folder, *published):
            make_folder(folder)
        for index, task in enumerate(sweep.tasks):
            (path / "specs" / f"{index:04}.yaml").write_text(to_yaml(task.spec), encoding="utf-8")
        write_json(path / SWEEP, _sweep_record(sweep, sweep_path, cluster))
    except OSError as error:
        raise StorageError.of(error) from error
    return SweepFolder(path)


def _sweep_record(sweep: Sweep, sweep_path: Path, cluster: ClusterConfig) -> dict[str, Any]:
    """The content of sweep.json."""
    tasks = []
    for index, task in enumerate(sweep.tasks):
        run = run_name(task.spec)
        published = f"{task.spec.artifacts.destination or cluster.work_folder / 'published'}/{run}"
        tasks.append(asdict(TaskRecord(index, task.label, task.setting, task.seed, task.fold, run, published)))
    # For people: bytes of the path that are not UTF-8 are escaped.
    origin = {"name": sweep.name, "sweep_file": os.fsencode(sweep_path.absolute()).decode(errors="backslashreplace")}
    return {**origin, "cluster": cluster.model_dump(mode="json"), "tasks": tasks}


def submit_tasks(folder: SweepFolder, specs: Mapping[int, JobSpec], site: Site) -> Submission:
    """Submit tasks. specs: task index → spec. If sbatch refuses a part, the parts before it are cancelled."""
    number = max((earlier.number for earlier in folder.submissions()), default=0) + 1
    submission, ids = Submission(number, ()), list[str]()
    try:
        # Features are prepared in the run folders of these tasks, because the run folders of other tasks may be in use.
        for part in parts_of(distinct_features(specs), list(specs), site.largest_array):
            executor = executor_for(folder.path, folder.name, folder.cluster, part.kind, dependency_of(part, ids))
            node_jobs = [NodeJob(str(folder.path), number, part.kind, task) for task in part.tasks]
            with environment.cleaned():
                jobs = executor.map_array(NodeJob.run, node_jobs)
            ids.append(jobs[0].job_id.partition("_")[0])
            records = [JobRecord(part.kind, task, job.job_id) for task, job in zip(part.tasks, jobs, strict=True)]
            submission = Submission(number, (*submission.jobs, *records))
            # Written after every part, so that every job in the queue is recorded.
            folder.write_submission(submission)
    except (RuntimeError, OSError, UnicodeError, EmotionError, KeyboardInterrupt) as error:
        remaining = "Nothing of this submission is left in the queue."
        try:
            slurm_cli.cancel(ids)
            (folder.path / "submissions" / f"{number}.json").unlink(missing_ok=True)
        except (OSError, EmotionError) as second:
            remaining = f"Jobs {', '.join(ids)} are left in the queue ({second}); scancel them."
        if isinstance(error, UnicodeError):
            remaining = (
                f"It may have put a job named emotion-{folder.name}-… in the queue; look there, as its answer cannot be read."
            )
        if isinstance(error, KeyboardInterrupt):
            remaining += f" sbatch may have put one more job named emotion-{folder.name}-… in it; look there."
            raise Interrupted(f"submit: stopped. {remaining}") from error
        raise StorageError(f"sbatch: {' '.join(str(error).split())}. {remaining}") from error
    return submission


def scripts(sweep: Sweep, cluster: ClusterConfig, site: Site) -> str:
    """The scripts that submit would give to sbatch. Writes nothing."""
    parts = parts_of(distinct_features(sweep.specs), range(len(sweep.tasks)), site.largest_array)
    ids = [f"<job {number} of this list>" for number in range(1, len(parts) + 1)]
    texts = []
    for number, part in enumerate(parts, 1):
        executor = executor_for(folder_of(sweep, cluster), sweep.name, cluster, part.kind, dependency_of(part, ids))
        if len(part.tasks) > 1:
            executor.parameters["map_count"] = len(part.tasks)
        script = executor._make_submission_file_text(executor._submitit_command_str, "dry")
        labels = [sweep.tasks[task].label for task in part.tasks] if part.kind != "collect" else []
        comment = "\n".join([f"# job {number}: {part.kind}", *(f"#   {label}" for label in labels)])
        texts.append(f"{comment}\n{script.rstrip()}\n")
    return "\n".join(texts)


def executor_for(folder: Path, name: str, cluster: ClusterConfig, kind: JobKind, after: str | None) -> "SlurmExecutor":
    """A submitit executor with every parameter set, so that it uses no defaults of its own. after: value of --dependency."""
    try:
        from submitit import SlurmExecutor
    except ImportError as error:
        raise SpecError(f"submitit is not installed here. {to_install('slurm')}") from error
    if kind != "task":
        cluster = cluster.for_preparing()
    try:
        # -P: do not import a folder `slurm` or `job` of the current directory.
        executor = SlurmExecutor(folder / "submitit", python=f"{SHIELDED_SHELL} {shlex.quote(sys.executable)} -P")
    except RuntimeError as error:
        raise SpecError(f"{error} Log in to a machine of the cluster.") from error
    options = {key.removeprefix("--"): value or True for key, _, value in (o.partition("=") for o in cluster.sbatch)}
    # submitit always requests a signal before the time limit. The job watches the limit itself; this signal is for sites
    # that also send it at a preemption.
    options |= {"requeue": True, "signal": f"USR2@{max(1, round(cluster.save_seconds))}"}
    if after is not None:
        options["kill-on-invalid-dep"] = "yes"
    executor.update_parameters(
        job_name=f"emotion-{name}-{kind}",
        **cluster.model_dump(include={"partition", "account", "qos"}),
        time=cluster.time_limit_minutes,
        cpus_per_task=cluster.cpus,
        mem=f"{round(cluster.memory_gib * 1024)}M",
        gpus_per_node=cluster.gpus or None,
        array_parallelism=cluster.at_most,
        dependency=after,
        stderr_to_stdout=True,
        ntasks_per_node=1,
        # --ntasks: on an exclusive node, srun would start a task for each CPU. --cpus-per-task: not inherited since SLURM 22.05.
        # --export: a site may configure sbatch to pass on no variables, which srun would inherit.
        srun_args=["--ntasks=1", f"--cpus-per-task={cluster.cpus}", "--export=ALL"],
        additional_parameters=options,
    )
    return executor
