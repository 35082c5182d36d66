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
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

import click

from emotion.errors import DataError, EmotionError, Interrupted, SpecError, StorageError
from job.environment import available_threads, prepare_caches, prepare_environment, temporary_caches
from job.preemption import StopRequest
from job.spec.load import load_spec
from job.spec.location import Local
from job.spec.model import JobSpec, run_name, schema

if TYPE_CHECKING:
    from job.pipeline.folders import JobFolders


def with_environment_values(_context: click.Context, _parameter: click.Parameter, overrides: tuple[str, ...]) -> tuple[str, ...]:
    """Replace `KEY=$NAME` by KEY=VALUE of the environment variable. AWS Batch numbers array jobs in one, and starts no shell."""
    resolved = []
    for override in overrides:
        match = re.fullmatch(r"([\w.-]+)=\$(\w+)", override)
        value = os.getenv(match[2]) if match else None
        if match and value is None:
            raise SpecError(f"--set {override}: the environment has no {match[2]}. Set it, or give a value instead.")
        resolved.append(f"{match[1]}={value}" if match else override)
    return tuple(resolved)


PATH = click.Path(path_type=Path)
SPEC = click.argument("spec_path", metavar="SPEC", type=PATH)
SET = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    callback=with_environment_values,
    help="Replace a value of the spec; KEY=$NAME takes it from the environment.",
)
WORK = click.option("--work", default="work", show_default=True, type=PATH, help="Folder of runs; must survive a preemption.")
SCRATCH = click.option("--scratch", type=PATH, help="Staged data and features; may be shared or lost. Default: WORK/scratch.")


@click.group(no_args_is_help=True)
def app() -> None:
    """Turn a YAML spec and DEAM into a published valence/arousal model."""


@app.command()
@SPEC
@WORK
@SCRATCH
@click.option("--until", metavar="PHASE", default="publish", help="Stop after this phase.")
@click.option("--verify", is_flag=True, help="Verify finished outputs by their digests, not by size and time.")
@click.option(
    "--mirror-unreachable",
    type=click.Choice(["fail", "wait", "anew"]),
    default="fail",
    show_default=True,
    help="If checkpoint.mirror cannot be used at the start: exit with 69, wait for it, or start with what is here.",
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
    """Start a job or resume it; safe to repeat."""
    with StopRequest() as should_stop:
        spec = load_spec(spec_path, overrides)
        prepare_environment(spec.device.threads or available_threads())
        from job.pipeline.phase_functions import published_at
        from job.pipeline.phases import PHASES
        from job.pipeline.runner import run_job

        phases = [phase.name for phase in PHASES]
        if until not in phases:
            raise SpecError(f"--until: there is no phase {until!r}; the phases are {', '.join(phases)}.")
        with job_setup(spec, work, scratch, should_stop) as folders:
            folder = run_job(spec, folders, until, verify, should_stop, mirror_unreachable)
    say(published_at(spec, folders.run_folder(spec)) if until == "publish" else folder)


@app.command()
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@click.option(
    "--work", default="reproduced", show_default=True, type=PATH, help="Folder of reproduced runs; not the one of the run itself."
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
        with job_setup(spec, folder, scratch / folder.name if scratch else None, should_stop, work) as folders:
            found = reproduce_run(manifest, spec, folders, should_stop)
    say(found)


@app.command()
@SPEC
@SET
def check(spec_path: Path, overrides: tuple[str, ...]) -> None:
    """Validate a spec: every error at once, as file:line:column, exit code 64.

    A file that vit.weights names is loaded into the network, where torch is installed.
    """
    spec = load_spec(spec_path, overrides)
    say(f"{spec_path}: valid, run {run_name(spec)}{check_weights(spec)}")


def check_weights(spec: JobSpec) -> str:
    """Load a local file of vit.weights into the network, which `run` does before its first phase. Returns what was found."""
    if not isinstance(spec.weights_file, Local):
        return ""
    if find_spec("timm") is None:
        return "; vit.weights was not read, as timm is not installed here: run reads it first"
    prepare_environment(spec.device.threads or available_threads())
    with temporary_caches():
        from emotion.vit.network import check_model

        check_model(spec.vit, spec.mel)
    return f"; the weights in {spec.weights_file} fit"


@app.command()
@SPEC
@WORK
@SCRATCH
@click.option("--probe", is_flag=True, help="Also predict the memory of a training step, on this machine; loads torch.")
@SET
def plan(spec_path: Path, work: Path, scratch: Path | None, probe: bool, overrides: tuple[str, ...]) -> None:
    """List the phases: finished, started or to do."""
    from job.pipeline.folders import job_folders
    from job.pipeline.runner import plan_job

    spec = load_spec(spec_path, overrides)
    say(f"run {run_name(spec)}")
    for name, state in plan_job(spec, job_folders(work, scratch)):
        say(f"{name:10}{state}")
    if probe:
        prepare_environment(spec.device.threads or available_threads())
        from job.pipeline.phase_functions import predicted_memory

        with temporary_caches():
            accounts = predicted_memory(spec)
        say(f"\n{'MiB':14}" + "".join(f"{phase:>10}" for phase in accounts))
        for component in accounts["gan"]:
            numbers = [account[component] for account in accounts.values()]
            cells = [number if component == "micro_batch" else f"{number / 2**20:.1f}" for number in numbers]
            say(f"{component:14}" + "".join(f"{cell:>10}" for cell in cells))


@app.command()
@click.argument("model", type=PATH)
@click.argument("audio", metavar="AUDIO...", nargs=-1, required=True, type=PATH)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@temporary_caches()
def predict(model: Path, audio: tuple[Path, ...], as_json: bool) -> None:
    """Valence and arousal of audio files, on -1..1 and 1..9, one row per file.

    MODEL is a published run or its folder model/.
    """
    from job.results.manifest import refuse_changed_model

    refuse_changed_model(model)
    prepare_environment(available_threads())
    from emotion.config import DeviceConfig
    from emotion.data.label_scale import rating_of
    from emotion.training.device import resolve_device
    from emotion.vit.predict import AudioPredictor

    predictor = AudioPredictor(model, resolve_device(DeviceConfig(), "fp32"))
    if not as_json:
        say("valence\tarousal\tvalence_1_9\tarousal_1_9\tfile")
    failed = []
    for path in audio:
        try:
            prediction = predictor(path)
        except (DataError, StorageError) as error:
            failed.append(str(error))
            continue
        rated = [rating_of(value) for value in (prediction.valence, prediction.arousal)]
        if as_json:
            row = {"file": str(path), "valence": prediction.valence, "arousal": prediction.arousal}
            say(json.dumps({**row, "valence_1_9": rated[0], "arousal_1_9": rated[1]}))
        else:
            say(f"{prediction.valence:+.3f}\t{prediction.arousal:+.3f}\t{rated[0]:.2f}\t{rated[1]:.2f}\t{path}")
    if failed:
        raise DataError("\n".join(failed))


@app.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--out", default="collected", show_default=True, type=PATH, help="Folder to write.")
def collect(runs: tuple[str, ...], out: Path) -> None:
    """Many published runs → one table, folds pooled, with intervals.

    RUN is a published run, a folder of such, or the folder of a sweep, finished or not. Runs may be in s3://BUCKET/PREFIX.
    """
    from job.results.collect import collect_runs, fetch_tables

    with StopRequest() as should_stop, tempfile.TemporaryDirectory() as fetched:
        say(collect_runs(fetch_tables(runs, Path(fetched), should_stop), out))


@app.command("schema")
def print_schema() -> None:
    """JSON Schema of the spec, for editors."""
    say(json.dumps(schema(), indent=1))


@contextlib.contextmanager
def job_setup(spec: JobSpec, work: Path, scratch: Path | None, should_stop: StopRequest, *also: Path) -> Iterator["JobFolders"]:
    """Make the folders, watch for stop requests (STOP files also in `also`) and open the log. Needs a prepared environment."""
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
    """Write log lines of emotion and job to standard error and to the run's log file."""
    logging.raiseExceptions = False  # on a full disk, logging would print a traceback for every line
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(path, encoding="utf-8")]
    loggers = [logging.getLogger(name) for name in ("emotion", "job")]
    for handler in handlers:
        handler.setFormatter(formatter)
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
    """Print a line to standard output or `stream`. A reader that has gone away is not an error."""
    stream = stream or sys.stdout
    try:
        click.echo(text, stream)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):  # a closed pipe, or a closed terminal
            raise
        # Otherwise Python fails again when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def command() -> int:
    """Run a command and return its exit code. An expected error is one line on standard error, without a traceback."""
    failure: EmotionError | Interrupted
    try:
        result = app(prog_name="emotion-job", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (EmotionError, Interrupted) as error:
        failure = error
    except OSError as error:
        failure = StorageError.of(error)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("emotion", "job", "slurm"):
            raise
        failure = SpecError(f"this command needs {error.name}, which is not installed here: pip install 'emotion-job[job]'")
    except click.ClickException as error:
        failure = SpecError(error.format_message())
    except click.exceptions.Abort:
        return Interrupted.exit_code
    say(f"emotion-job: {failure}", sys.stderr)
    return failure.exit_code


def main() -> None:
    """Run a command and exit."""
    code = command()
    # Progress bars and log lines; `say` has reported its own errors.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Not sys.exit: shutting torch down takes a second, in which another SIGTERM would replace the exit code.
    os._exit(code)


if __name__ == "__main__":
    main()
