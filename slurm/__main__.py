"""The command line `emotion-slurm`: submit, local, status, logs, resubmit, cancel, script, doctor."""

import io
import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

import click

from emotion.characters import terminal_text
from emotion.errors import EmotionError, Interrupted, SpecError, as_failure, counted
from job.help import VERSION, Codes, Examples, Group, NamedPath, usage_message
from job.secrets import scrubbed
from job.set_option import set_option
from job.spec.load import load_spec
from slurm import operations, sbatch_script
from slurm.checks import cluster_problems, diagnosis, program_problems, refuse_problems, spec_problems
from slurm.cluster import load_cluster
from slurm.environment import unused_options
from slurm.live import try_site
from slurm.live_report import Finding, findings
from slurm.local import run_here
from slurm.slurm_cli import read_site, root_ids
from slurm.status import as_json, as_table, statuses
from slurm.submit import folder_of, make_sweep_folder, scripts, submit_tasks
from slurm.sweep import load_sweep
from slurm.sweep_folder import SweepFolder, submitting

PATH = NamedPath()
RUN = click.argument("run", metavar="FOLDER", type=PATH)
SET = set_option("Replace a value of the spec, of a sweep in all specs; KEY=$NAME takes it, now, from the environment.")
CLUSTER = click.option(
    "--cluster",
    "cluster_path",
    required=True,
    metavar="CLUSTER",
    type=PATH,
    help="YAML file: partition, limits, work folder, and how jobs are run.",
)
SWEEP = click.argument("sweep_path", metavar="SWEEP", type=PATH)

EXAMPLES: Examples = {
    "": (
        "emotion-slurm doctor --cluster cluster.yaml",
        "emotion-slurm submit sweep.yaml --cluster cluster.yaml",
        "emotion-slurm status FOLDER",
    ),
    "submit": (
        "emotion-slurm submit sweep.yaml --cluster cluster.yaml --dry-run",
        "emotion-slurm submit sweep.yaml --cluster cluster.yaml --set gan.epochs=100",
    ),
    "local": ("emotion-slurm local sweep.yaml --work work",),
    "status": ("emotion-slurm status FOLDER", "emotion-slurm status FOLDER --json"),
    "logs": ("emotion-slurm logs FOLDER 3 --follow",),
    "resubmit": ("emotion-slurm resubmit FOLDER",),
    "cancel": ("emotion-slurm cancel FOLDER",),
    "script": ("emotion-slurm script deam.yaml --cluster cluster.yaml > deam.sbatch",),
    "doctor": (
        "emotion-slurm doctor --cluster cluster.yaml --sweep sweep.yaml",
        "emotion-slurm doctor --cluster cluster.yaml --live --wait 30",
    ),
}
ASKS_SLURM = (65, 69, 77)
CODES: Codes = {
    **dict.fromkeys(("submit", "status", "logs", "resubmit", "cancel", "doctor"), ASKS_SLURM),
    "local": (*ASKS_SLURM, 71, 73, 75, 76),
    "script": (),
}


@click.group(cls=Group, examples=EXAMPLES, codes=CODES)
@VERSION
def app() -> None:
    """Submit arrays of emotion-job to SLURM, watch and control them.

    FOLDER is the folder of a sweep, as submit prints it.
    """


@app.command()
@SWEEP
@CLUSTER
@SET
@click.option("--dry-run", is_flag=True, help="Print the scripts; write and submit nothing.")
def submit(sweep_path: Path, cluster_path: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Submit a sweep. Does not wait.

    Submits a job that prepares features, an array with a task for each spec, and a job that collects. SWEEP is a YAML file with a
    spec, and the folds, seeds and settings to run it with.
    """
    sweep, cluster = load_sweep(sweep_path, overrides), load_cluster(cluster_path)
    site = read_site()
    refuse_problems([task.spec for task in sweep.tasks], cluster, site)
    if dry_run:
        click.echo(scripts(sweep, cluster, site), nl=False)
        return
    with submitting(folder_of(sweep, cluster)):
        folder = make_sweep_folder(sweep, sweep_path, cluster)
        submission = submit_tasks(folder, sweep.specs, site)
    _say_unused()
    jobs = root_ids(job.job for job in submission.jobs)
    click.echo(f"{counted(len(folder.tasks), 'task')}, jobs {', '.join(jobs)}", err=True)
    click.echo(folder.path)


@app.command()
@SWEEP
@click.option("--work", default=Path("work"), show_default=True, type=PATH, help="Folder for runs and tables.")
@SET
def local(sweep_path: Path, work: Path, overrides: tuple[str, ...]) -> int:
    """Run a sweep on this machine, without SLURM.

    SWEEP is as in submit. Its tasks run one after the other, then the tables are made. Called again, it resumes.
    """
    return run_here(load_sweep(sweep_path, overrides), work.absolute(), lambda text: click.echo(text, err=True))


def _say_unused() -> None:
    if unused := unused_options():
        click.echo(f"set, but not used, as the cluster file says what jobs may use: {', '.join(unused)}", err=True)


@app.command()
@RUN
@click.option("--json", "as_records", is_flag=True, help="Print a JSON list.")
def status(run: Path, as_records: bool) -> None:
    """Show the state of every task.

    Each with its phase, step, rate, time to go, attempts, and the reason why it ended.
    """
    folder = SweepFolder(run)
    found = statuses(folder)
    click.echo(json.dumps(as_json(found), indent=1) if as_records else terminal_text(as_table(folder, found)))


@app.command()
@RUN
@click.argument("task", required=False, type=int)
@click.option("--follow", "-f", is_flag=True, help="Follow until its jobs have left the queue.")
def logs(run: Path, task: int | None, follow: bool) -> None:
    """Print the output of a task.

    It is the output of all attempts of the task; without TASK, of every job of the sweep.
    """
    is_empty = True
    for text in operations.logs(SweepFolder(run), task, follow):
        click.echo(text, nl=False)
        is_empty = is_empty and not text
    if is_empty:
        click.echo("nothing is written yet; `emotion-slurm status` says what the jobs wait for", err=True)


@app.command()
@RUN
@click.option("--cluster", "cluster_path", metavar="CLUSTER", type=PATH, help="Replace the cluster file of the sweep.")
def resubmit(run: Path, cluster_path: Path | None) -> None:
    """Submit again the tasks that failed or are missing.

    No other tasks are submitted.
    """
    folder = SweepFolder(run)
    cluster = load_cluster(cluster_path) if cluster_path else None
    with submitting(folder.path):
        submission, live = operations.resubmit(folder, read_site(), cluster)
    if live:
        click.echo(f"still in the queue, not submitted again: tasks {', '.join(map(str, live))}", err=True)
    if submission is None:
        click.echo("nothing to submit again", err=True)
        return
    _say_unused()
    tasks = [job for job in submission.jobs if job.kind == "task"]
    click.echo("\n".join(f"task {job.index}: job {job.job}" for job in tasks))


@app.command()
@RUN
def cancel(run: Path) -> None:
    """Cancel all jobs of the sweep that are in the queue. Resubmit would resume them."""
    jobs = operations.cancel(SweepFolder(run))
    click.echo(f"cancelled: {', '.join(jobs)}" if jobs else "nothing is in the queue")


@app.command()
@click.argument("spec_path", metavar="SPEC", type=PATH)
@CLUSTER
@SET
def script(spec_path: Path, cluster_path: Path, overrides: tuple[str, ...]) -> None:
    """Print one spec as an sbatch script.

    It needs neither Python nor submitit on the cluster. An image or a Python that is not on this machine is a warning.
    """
    spec, cluster = load_spec(spec_path, overrides), load_cluster(cluster_path)
    # As bytes: names escaped for the terminal would refer to other files.
    click.echo(sbatch_script.script(spec, cluster).encode(), nl=False)
    for problem in program_problems(cluster):
        # The script may be created on a machine outside of the cluster.
        click.echo(f"emotion-slurm: warning: {problem}, unless the nodes have it", err=True)


@app.command()
@CLUSTER
@click.option("--sweep", "sweep_path", metavar="SWEEP", type=PATH, help="Also check this sweep.")
@click.option("--live", is_flag=True, help="Also submit a job of a minute that is stopped on purpose, and report what it saw.")
@click.option(
    "--wait",
    type=click.FloatRange(min=0, min_open=True),
    default=10,
    show_default=True,
    metavar="MINUTES",
    help="With --live: for the queue to start that job.",
)
@click.option("--json", "as_records", is_flag=True, help="Print a JSON object.")
def doctor(cluster_path: Path, sweep_path: Path | None, live: bool, wait: float, as_records: bool) -> None:
    """Report what happens to a job on this site.

    The report also says which settings fit, and what is wrong (exit code 64).
    """
    cluster, site = load_cluster(cluster_path), read_site()
    lines = diagnosis(cluster, site)
    problems = cluster_problems(cluster, site)
    problems += spec_problems([task.spec for task in load_sweep(sweep_path).tasks] if sweep_path else [], cluster, site)
    if not as_records:
        click.echo(terminal_text("\n".join(lines)))
    found: list[Finding] = []
    if live and not problems:  # with a wrong cluster file, the job would show little
        found = findings(try_site(cluster, site, wait, lambda text: click.echo(text, err=True)), cluster, site)
        problems += [f"{finding.name}: {finding.text}" for finding in found if finding.state == "wrong"]
    if as_records:
        report = dict(line.split(": ", 1) for line in lines)
        seen = {"live": [asdict(finding) for finding in found]} if live else {}
        click.echo(json.dumps({"report": report, "problems": problems, **seen}, indent=1))
    else:
        for finding in found:
            click.echo(terminal_text(f"{finding.state:5} {finding.name}: {finding.text}."))
    if problems:
        raise SpecError(*problems)


def main() -> int:
    """Run a command and return its exit code. Errors meant for users are printed without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a closed stream is None
            stream.reconfigure(errors="backslashreplace")
    failure: EmotionError | Interrupted
    try:
        result = app(prog_name="emotion-slurm", standalone_mode=False)
        if sys.stdout is not None:  # a closed stream is None
            sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        # The reader has closed the pipe. Without this, Python reports that a second time when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except click.exceptions.Abort:
        failure = Interrupted("stopped")
    except click.ClickException as error:
        failure = SpecError(usage_message(error))
    except Exception as error:  # noqa: BLE001 - the last resort
        if os.getenv("EMOTION_TRACEBACK"):
            click.echo(scrubbed("".join(traceback.format_exception(error))), err=True)
        failure = as_failure(error)
    click.echo(terminal_text(scrubbed(f"emotion-slurm: {failure}")), err=True)
    return failure.exit_code


if __name__ == "__main__":
    sys.exit(main())
