"""The command line: run, reproduce, check, plan, predict, collect, schema. The only place that configures logging and exits."""

import contextlib
import errno
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

import click

from emotion.errors import DataError, EmotionError, Interrupted, SpecError, StorageError
from job.environment import available_threads, passing_caches, prepare_caches, prepare_environment
from job.preemption import StopRequest
from job.spec.load import load_spec
from job.spec.model import JobSpec, run_name, schema

if TYPE_CHECKING:
    from job.pipeline.folders import JobFolders


def as_environment_says(
    _context: click.Context, _parameter: click.Parameter, overrides: tuple[str, ...]
) -> tuple[str, ...]:
    """`KEY=$NAME` is KEY=VALUE of the environment variable: where jobs of an array are numbered in one and no shell is asked."""
    said = []
    for override in overrides:
        asked = re.fullmatch(r"([\w.-]+)=\$(\w+)", override)
        value = os.getenv(asked[2]) if asked else None
        if asked and value is None:
            raise SpecError(f"--set {override}: the environment has no {asked[2]}. Set it, or give a value instead.")
        said.append(f"{asked[1]}={value}" if asked else override)
    return tuple(said)


SPEC = click.argument("spec_path", metavar="SPEC", type=click.Path(path_type=Path))
SET = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    callback=as_environment_says,
    help="Replace a value of the spec; KEY=$NAME takes it from the environment.",
)
WORK = click.option(
    "--work",
    default="work",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Keeps runs; must survive a preemption.",
)
SCRATCH = click.option(
    "--scratch",
    type=click.Path(path_type=Path),
    help="Staged data and features; may be shared or lost. Default: WORK/scratch.",
)


@click.group(no_args_is_help=True)
def app() -> None:
    """Turn a YAML spec and DEAM into a published valence/arousal model."""


@app.command()
@SPEC
@WORK
@SCRATCH
@click.option("--until", metavar="PHASE", default="publish", help="Stop after this phase.")
@click.option("--verify", is_flag=True, help="Hash finished outputs again, do not trust their times.")
@click.option(
    "--mirror-unreachable",
    type=click.Choice(["fail", "wait", "anew"]),
    default="fail",
    show_default=True,
    help="Where checkpoint.mirror cannot be reached at the start.",
)
@SET
def run(
    spec_path: Path,
    work: Path,
    scratch: Path | None,
    until: str,
    verify: bool,
    mirror_unreachable: Literal["fail", "wait", "anew"],
    overrides: tuple[str, ...],
) -> None:
    """Start a job or go on with it; safe to repeat."""
    with StopRequest() as should_stop:
        spec = load_spec(spec_path, overrides)
        prepare_environment(spec.device.threads or available_threads())
        from job.pipeline.phase_functions import published_at
        from job.pipeline.phases import PHASES
        from job.pipeline.runner import run_job

        phases = [phase.name for phase in PHASES]
        if until not in phases:
            raise SpecError(f"--until: there is no phase {until!r}; the phases are {', '.join(phases)}.")
        with set_up(spec, work, scratch, should_stop) as folders:
            folder = run_job(spec, folders, until, verify, should_stop, mirror_unreachable)
    say(published_at(spec, folders.run_folder(spec)) if until == "publish" else folder)


@app.command()
@click.argument("manifest_path", metavar="MANIFEST", type=click.Path(path_type=Path))
@click.option(
    "--work",
    default="reproduced",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Not that of the run itself.",
)
@SCRATCH
@SET
def reproduce(manifest_path: Path, work: Path, scratch: Path | None, overrides: tuple[str, ...]) -> None:
    """Run a published run again and compare the digests of inputs and results.

    MANIFEST is the manifest.json of a published run, or its folder.
    """
    with StopRequest() as should_stop:
        from job.pipeline.reproduce import folder_for, manifest_to_reproduce, reproduce_run, spec_to_reproduce

        manifest = manifest_to_reproduce(manifest_path)
        folder = folder_for(manifest, work)
        spec = spec_to_reproduce(manifest, folder, overrides)
        prepare_environment(spec.device.threads or available_threads())
        with set_up(spec, folder, scratch / folder.name if scratch else None, should_stop, work) as folders:
            found = reproduce_run(manifest, spec, folders, should_stop)
    say(found)


@app.command()
@SPEC
@SET
def check(spec_path: Path, overrides: tuple[str, ...]) -> None:
    """Validate a spec: every error at once, as file:line:column, exit code 64."""
    spec = load_spec(spec_path, overrides)
    say(f"{spec_path}: valid, run {run_name(spec)}")


@app.command()
@SPEC
@WORK
@SCRATCH
@click.option("--probe", is_flag=True, help="Also predict the memory of a training step, on this machine; loads torch.")
@SET
def plan(spec_path: Path, work: Path, scratch: Path | None, probe: bool, overrides: tuple[str, ...]) -> None:
    """Say which phases are done and which are to do."""
    from job.pipeline.folders import job_folders
    from job.pipeline.plan import plan_job

    spec = load_spec(spec_path, overrides)
    say(f"run {run_name(spec)}")
    for name, state in plan_job(spec, job_folders(work, scratch)):
        say(f"{name:10}{state}")
    if probe:
        prepare_environment(spec.device.threads or available_threads())
        from job.pipeline.phase_functions import predicted_memory

        with passing_caches():
            found = predicted_memory(spec)
        say(f"\n{'MiB':14}" + "".join(f"{phase:>10}" for phase in found))
        for component in found["gan"]:
            numbers = [account[component] for account in found.values()]
            shown = [number if component == "micro_batch" else f"{number / 2**20:.1f}" for number in numbers]
            say(f"{component:14}" + "".join(f"{number:>10}" for number in shown))


@app.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("audio", metavar="AUDIO...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@passing_caches()
def predict(model: Path, audio: tuple[Path, ...], as_json: bool) -> None:
    """Valence and arousal of audio files, on -1..1 and 1..9, one row per file.

    MODEL is a published run or its folder model/.
    """
    prepare_environment(available_threads())
    from emotion.config import DeviceConfig
    from emotion.data.label_scale import rating_of
    from emotion.training.device import resolve_device
    from emotion.vit.predict import Predictor
    from job.results.manifest import refuse_changed_model

    refuse_changed_model(model)
    predictor = Predictor(model, resolve_device(DeviceConfig(), "fp32"))
    if not as_json:
        say("valence\tarousal\tvalence_1_9\tarousal_1_9\tfile")
    failed = []
    for path in audio:
        try:
            found = predictor(path)
        except (DataError, StorageError) as error:
            failed.append(str(error))
            continue
        rated = [rating_of(value) for value in (found.valence, found.arousal)]
        if as_json:
            row = {"file": str(path), "valence": found.valence, "arousal": found.arousal}
            say(json.dumps({**row, "valence_1_9": rated[0], "arousal_1_9": rated[1]}))
        else:
            say(f"{found.valence:+.3f}\t{found.arousal:+.3f}\t{rated[0]:.2f}\t{rated[1]:.2f}\t{path}")
    if failed:
        raise DataError("\n".join(failed))


@app.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--out", default="collected", show_default=True, type=click.Path(path_type=Path), help="Folder to write.")
def collect(runs: tuple[str, ...], out: Path) -> None:
    """Many published runs → one table, folds pooled, with intervals.

    RUN is a published run, a folder of some, or the folder of a sweep, finished or not; runs also in a store: s3://BUCKET/PREFIX.
    """
    from job.results.collect import collect_runs
    from job.results.fetch_tables import fetch_tables

    with StopRequest() as should_stop, tempfile.TemporaryDirectory() as fetched:
        say(collect_runs(fetch_tables(runs, Path(fetched), should_stop), out))


@app.command("schema")
def print_schema() -> None:
    """JSON Schema of the spec, for editors."""
    say(json.dumps(schema(), indent=1))


@contextlib.contextmanager
def set_up(
    spec: JobSpec, work: Path, scratch: Path | None, should_stop: StopRequest, *also: Path
) -> Iterator["JobFolders"]:
    """Folders, what asks the job to stop, and its log: all that a job needs, after its environment is prepared.

    also: folders in which a STOP file is obeyed, besides work and that of the run.
    """
    from job.pipeline.folders import job_folders, make_folders
    from job.run_folder.receipts import LOG

    folders = job_folders(work, scratch)
    should_stop.watch([folders.work, folders.run_folder(spec), *also], spec.preemption)
    run_folder = make_folders(spec, folders)
    prepare_caches(folders.scratch / "caches")
    with logging_to(run_folder / LOG):
        yield folders


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Log lines of our packages to standard error and to the run's log file."""
    # A line that cannot be written is not worth a traceback each.
    logging.raiseExceptions = False
    form = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    form.converter = time.gmtime
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(path, encoding="utf-8")]
    loggers = [logging.getLogger(name) for name in ("emotion", "job")]
    for handler in handlers:
        handler.setFormatter(form)
        for logger in loggers:
            logger.setLevel(logging.INFO)
            logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            for logger in loggers:
                logger.removeHandler(handler)
            handler.close()


def say(text: object, stream: TextIO | None = None) -> None:
    """A line to standard output, or to this stream. Nobody who reads it any more is no reason to fail."""
    stream = stream or sys.stdout
    try:
        click.echo(text, stream)
    except OSError as error:
        # A reader that left, or a terminal that went away.
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        # Without this, Python complains once more while it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def command() -> int:
    """Run a command and return its exit code; a user's mistake ends in one line, never in a traceback."""
    try:
        result = app(prog_name="emotion-job", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except (EmotionError, Interrupted) as error:
        say(f"emotion-job: {error}", sys.stderr)
        code = error.exit_code
    except OSError as error:
        storage_error = StorageError.of(error)
        say(f"emotion-job: {storage_error}", sys.stderr)
        code = storage_error.exit_code
    except click.ClickException as error:
        say(f"emotion-job: {error.format_message()}", sys.stderr)
        code = SpecError.exit_code
    except click.exceptions.Abort:
        code = Interrupted.exit_code
    return code


def main() -> None:
    """Run a command and leave."""
    code = command()
    # What `say` could not say it has told; what is left are bars and log lines.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # At once: taking torch down in order takes a second, in which another SIGTERM would end the process with its own code.
    os._exit(code)


if __name__ == "__main__":
    main()
