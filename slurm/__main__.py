"""The command line of a login node: submit, status, logs, resubmit, cancel, script, doctor."""

import json
import os
import sys
from pathlib import Path

import click

from emotion.errors import EmotionError, SpecError, StorageError
from job.spec.load import load_spec
from slurm.checks import diagnosis, problems_of_cluster, problems_of_specs, refuse_problems
from slurm.cluster import load_cluster
from slurm.slurm_cli import read_site, roots_of
from slurm.sweep_folder import SweepFolder, submitting

RUN = click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
CLUSTER = click.option("--cluster", "cluster_path", required=True, metavar="CLUSTER", type=click.Path(path_type=Path))


@click.group(no_args_is_help=True)
def app() -> None:
    """Submit arrays of emotion-job to SLURM and look after them.

    RUN is the folder that submit prints.
    """


@app.command()
@click.argument("sweep_path", metavar="SWEEP", type=click.Path(path_type=Path))
@CLUSTER
@click.option("--dry-run", is_flag=True, help="Print the scripts; write and submit nothing.")
def submit(sweep_path: Path, cluster_path: Path, dry_run: bool) -> None:
    """Prepare job → array, one task a spec → collect job. Does not wait for them."""
    from slurm.submit import folder_of, make_sweep_folder, scripts, submit_tasks
    from slurm.sweep import load_sweep

    sweep, cluster = load_sweep(sweep_path), load_cluster(cluster_path)
    site = read_site()
    refuse_problems([task.spec for task in sweep.tasks], cluster, site)
    if dry_run:
        click.echo(scripts(sweep, cluster, site), nl=False)
        return
    with submitting(folder_of(sweep, cluster)):
        folder = make_sweep_folder(sweep, sweep_path, cluster)
        submission = submit_tasks(folder, sweep.specs, site)
    jobs = roots_of(job.job for job in submission.jobs)
    click.echo(f"{len(folder.tasks)} tasks, jobs {', '.join(jobs)}", err=True)
    click.echo(folder.path)


@app.command()
@RUN
@click.option("--json", "as_records", is_flag=True, help="One JSON list.")
def status(run: Path, as_records: bool) -> None:
    """State, phase, step, rate, time to go and attempts of every task."""
    from slurm.status import as_json, as_table, statuses

    folder = SweepFolder(run)
    found = statuses(folder)
    click.echo(json.dumps(as_json(folder, found), indent=1) if as_records else as_table(folder, found))


@app.command()
@RUN
@click.argument("task", required=False, type=int)
@click.option("--follow", "-f", is_flag=True, help="Go on until its jobs have left the queue, restarts included.")
def logs(run: Path, task: int | None, follow: bool) -> None:
    """What a task has said over all its attempts; without TASK, every job of the sweep."""
    from slurm.operations import logs as texts

    for text in texts(SweepFolder(run), task, follow):
        click.echo(text, nl=False)


@app.command()
@RUN
@click.option(
    "--cluster",
    "cluster_path",
    metavar="CLUSTER",
    type=click.Path(path_type=Path),
    help="Other conditions than before.",
)
def resubmit(run: Path, cluster_path: Path | None) -> None:
    """Submit again only what has failed or is missing."""
    from slurm.operations import resubmit as submit_again

    folder = SweepFolder(run)
    cluster = load_cluster(cluster_path) if cluster_path else None
    with submitting(folder.path):
        submission, live = submit_again(folder, read_site(), cluster)
    if live:
        click.echo(f"left alone, as they are in the queue: tasks {', '.join(map(str, live))}", err=True)
    if submission is None:
        click.echo("nothing to submit again", err=True)
        return
    tasks = [job for job in submission.jobs if job.what == "task"]
    click.echo("\n".join(f"task {job.index}: job {job.job}" for job in tasks))


@app.command()
@RUN
def cancel(run: Path) -> None:
    """Cancel what is in the queue, for good; resubmit would go on from there."""
    from slurm.operations import cancel as cancel_jobs

    jobs = cancel_jobs(SweepFolder(run))
    click.echo(f"cancelled: {', '.join(jobs)}" if jobs else "nothing is in the queue")


@app.command()
@click.argument("spec_path", metavar="SPEC", type=click.Path(path_type=Path))
@CLUSTER
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Replace a value of the spec.")
def script(spec_path: Path, cluster_path: Path, overrides: tuple[str, ...]) -> None:
    """One spec as a plain sbatch script with the same protocol, on standard output."""
    from slurm.sbatch_script import script as text_of

    click.echo(text_of(load_spec(spec_path, overrides), load_cluster(cluster_path)), nl=False)


@app.command()
@CLUSTER
@click.option("--sweep", "sweep_path", metavar="SWEEP", type=click.Path(path_type=Path), help="Check this one, too.")
def doctor(cluster_path: Path, sweep_path: Path | None) -> None:
    """Say what will happen to a job on this site, which settings to use, and what is wrong (exit code 64)."""
    from slurm.sweep import load_sweep

    cluster, site = load_cluster(cluster_path), read_site()
    for line in diagnosis(cluster, site):
        click.echo(line)
    problems = problems_of_cluster(cluster, site)
    if sweep_path is not None:
        specs = [task.spec for task in load_sweep(sweep_path).tasks]
        problems += problems_of_specs(specs, cluster, site)
    if problems:
        raise SpecError(*problems)


def command() -> int:
    """Run a command and return its exit code; a user's mistake ends in lines that say what to do, never in a traceback."""
    try:
        result = app(prog_name="emotion-slurm", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except EmotionError as error:
        found, code = str(error), error.exit_code
    except BrokenPipeError:
        # Nobody reads any more; without this, Python complains once more while it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        storage_error = StorageError.of(error)
        found, code = str(storage_error), storage_error.exit_code
    except click.ClickException as error:
        found, code = error.format_message(), SpecError.exit_code
    except click.exceptions.Abort:
        return 130
    click.echo(f"emotion-slurm: {found}", err=True)
    return code


def main() -> None:
    sys.exit(command())


if __name__ == "__main__":
    main()
