"""The command line: init, run, reproduce, check, plan, doctor, predict, export, evaluate, collect, schema. Only this exits."""

if __name__ == "__main__":
    # Before the imports below: job.entry imports this module once more, under its own name.
    from job.entry import main as start

    start()

import contextlib
import errno
import io
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

import click

from emotion.characters import terminal_text
from emotion.errors import EmotionError, Interrupted, SpecError, StorageError, as_failure, system_reason, to_install
from job.arguments import PLACE, PRESETS, complete_phase, hint_at_dashes
from job.console import logging_to, said_if_slow
from job.environment import available_threads, prepare_caches, prepare_environment, temporary_caches
from job.help import CODES, EXAMPLES, VERSION, Group, NamedPath, usage_message
from job.preemption import StopRequest
from job.secrets import scrub_tracebacks, scrubbed
from job.set_option import set_option
from job.spec.load import load_spec
from job.spec.model import JobSpec, schema

if TYPE_CHECKING:
    from job.pipeline.folders import JobFolders


PATH = NamedPath()
SPEC = click.argument("spec_path", metavar="SPEC", type=PATH)
SET = set_option("Replace a value of the spec; KEY=$NAME takes it from the environment.")
WORK = click.option("--work", default="work", show_default=True, type=PATH, help="Folder of runs; must survive a preemption.")
SCRATCH = click.option("--scratch", type=PATH, help="Staged data and features; may be shared or lost. Default: WORK/scratch.")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group(cls=Group, examples=EXAMPLES, codes=CODES)
@VERSION
def app() -> None:
    """Turn a YAML spec and labelled songs into a published valence/arousal model."""


@app.command()
@click.argument("source", metavar="DATA", type=PLACE)
@click.option("--scale", nargs=2, type=float, metavar="LOW HIGH", help="Lowest and highest rating of a songs.csv.")
@click.option("--preset", type=click.Choice(PRESETS), help="Default: deam for many songs and a GPU, else small.")
@click.option("--out", type=PATH, help="File to write, which must not exist. Default: the name of the folder, in this one.")
def init(source: str, scale: tuple[float, float] | None, preset: str | None, out: Path | None) -> None:
    """Write a commented spec for the songs in a folder.

    Its values depend on the songs' layout, groups and number. DATA is a folder with audio and songs.csv, or DEAM, EmoMusic or
    PMEmo as they are unpacked.
    """
    from job.pipeline.new_spec import make_spec

    with said_if_slow(f"looks at the songs in {source}, and at what a step of training takes …"):
        found = make_spec(source, scale, out, preset)
    say(found)


@app.command()
@SPEC
@WORK
@SCRATCH
@click.option("--until", metavar="PHASE", default="publish", shell_complete=complete_phase, help="Stop after this phase.")
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
    """Start a job or resume it; safe to repeat. Prints the folder of the result.

    Standard error says first what is to do and for how long, and at the end how good the model is. A terminal shows a bar for
    each phase, anything else a line every 10 s. NO_COLOR=1 turns colours off.
    """
    with StopRequest() as should_stop:
        from job.pipeline.phases import BY_NAME
        from job.pipeline.runner import run_job
        from job.results.manifest import published_at

        if until not in BY_NAME:
            raise SpecError(f"--until: there is no phase {until!r}; the phases are {', '.join(BY_NAME)}.")
        spec = load_spec(spec_path, overrides)
        prepare_environment(spec.device.threads or available_threads())
        with job_setup(spec, work, scratch, should_stop) as folders:
            folder = run_job(spec, folders, until, verify, should_stop, mirror_unreachable)
            if until == "publish":
                from job.results.closing import say_result

                say_result(spec, published_at(spec, folders.run_folder(spec)), folders.run_folder(spec))
    say(published_at(spec, folders.run_folder(spec)) if until == "publish" else folder)


@app.command()
@click.argument("manifest_at", metavar="MANIFEST", type=PLACE)
@click.option(
    "--work", default="reproduced", show_default=True, type=PATH, help="Folder of reproduced runs; not the one of the run itself."
)
@SCRATCH
@SET
def reproduce(manifest_at: str, work: Path, scratch: Path | None, overrides: tuple[str, ...]) -> None:
    """Run a published run again and compare the digests.

    The digests are those of inputs and results. MANIFEST is the manifest.json of a published run, or its folder; also in
    s3://BUCKET/PREFIX.
    """
    with StopRequest() as should_stop:
        from job.pipeline.reproduce import folder_for, manifest_to_reproduce, reproduce_run, spec_to_reproduce

        manifest = manifest_to_reproduce(manifest_at, should_stop)
        folder = folder_for(manifest, work)
        spec = spec_to_reproduce(manifest, folder, overrides)
        prepare_environment(spec.device.threads or available_threads())
        with job_setup(spec, folder, scratch / folder.name if scratch else None, should_stop, work) as folders:
            found = reproduce_run(manifest, spec, folders, should_stop)
    say(found)


@app.command()
@SPEC
@AS_JSON
@SET
def check(spec_path: Path, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Validate a spec, the files that it names and labels of songs.

    It reports every error of the spec at once, as file:line:column, with exit code 64. Files and folders that the spec names have
    to be on this machine (65), and vit.model has to be a ViT of timm (64). For songs in a folder, labels and file names are
    examined (65); no audio is decoded. If timm is installed, a file of vit.weights is loaded into the network. Checks that are
    left to run are listed.
    """
    from job.pipeline.facts import checked

    found = checked(spec_path, overrides)
    if as_json or found.lines:
        say(scrubbed(json.dumps(found.as_json(), indent=1)) if as_json else "\n".join(found.lines))
    if found.error is not None:
        raise found.error


@app.command()
@SPEC
@WORK
@SCRATCH
@click.option("--probe", is_flag=True, help="Also measure how long it takes here, and predict the memory of a step; loads torch.")
@AS_JSON
@SET
def plan(spec_path: Path, work: Path, scratch: Path | None, probe: bool, as_json: bool, overrides: tuple[str, ...]) -> None:
    """List the phases, which are done and how long others take."""
    from job.pipeline.facts import memory_table, planned
    from job.pipeline.folders import job_folders

    spec = load_spec(spec_path, overrides)
    found = planned(spec, job_folders(work, scratch))
    if probe:
        prepare_environment(spec.device.threads or available_threads())
        from job.pipeline.phase_functions import predicted_memory
        from job.pipeline.rehearsal import expected_times

        with said_if_slow("measures each phase …"), temporary_caches(), tempfile.TemporaryDirectory() as name:
            if found.songs:
                found.measured = expected_times(spec, found.songs, Path(name))
            else:
                found.data.append("time: not measured, as the songs are not here")
            found.memory = predicted_memory(spec)
    if as_json:
        say(json.dumps(found.as_json(), indent=1))
        return
    say("\n".join(found.lines(spec.budget.price_per_hour)))
    if found.memory is not None:
        say(f"\n{memory_table(found.memory)}")


@app.command()
@click.argument("spec_path", metavar="[SPEC]", required=False, type=PATH)
@WORK
@SCRATCH
@AS_JSON
@SET
def doctor(spec_path: Path | None, work: Path, scratch: Path | None, as_json: bool, overrides: tuple[str, ...]) -> int:
    """Say whether this machine can do the job.

    It prints a line, ok, warn or wrong, for each of device, allocator, libraries, disks and, with a SPEC, its storage and the
    clock. If several are wrong, the exit code is the first of 71, 64, 65, 77, 70, 69 among theirs.
    """
    from job.machine.doctor import as_report, examine, exit_code_of
    from job.pipeline.folders import job_folders

    folders, found = job_folders(work, scratch), []
    for check in examine(spec_path, overrides, folders.work, folders.scratch):
        found.append(check)
        if not as_json:
            say(scrubbed(check.line()))  # at once: the next one may wait for a server
    if as_json:
        say(scrubbed(json.dumps(as_report(found), indent=1)))
    return exit_code_of(found)


@app.command()
@click.argument("model", type=PLACE)
@click.argument("audio", metavar="AUDIO...", nargs=-1, required=True, type=PLACE)
@click.option("--plain", is_flag=True, help="Predict by the ViT alone, without the stack.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option("--csv", "as_csv", is_flag=True, help="Comma-separated rows, UTF-8.")
@click.option("--bom", is_flag=True, help="With --csv: begin with a byte order mark, as Excel needs for UTF-8.")
@click.option(
    "--curve",
    "curves",
    metavar="FILE",
    multiple=True,
    type=PATH,
    help="Also write the ViT's curves, a point each half second: .csv, .jsonl or, of the first songs, a picture .png. An "
    "existing file must be from an earlier --curve.",
)
@temporary_caches()
def predict(
    model: str, audio: tuple[str, ...], plain: bool, as_json: bool, as_csv: bool, bom: bool, curves: tuple[Path, ...]
) -> None:
    """Predict the valence and arousal of audio files.

    On -1..1, with the ends of its 90 % interval, on 1..9, and in words. MODEL is a published run, whose stack predicts,
    or its folder model/, the ViT alone. AUDIO is a file, a folder with audio files at any depth, a pipe, or - for standard input.
    Both may be in s3://BUCKET/PREFIX. One row per file: for people on a terminal, else tab-separated.
    """
    from job.results.predict_files import form_of, predict_files

    form = form_of(as_json=as_json, as_csv=as_csv, bom=bom)
    with StopRequest(saves=False) as should_stop:
        predict_files(model, audio, plain=plain, form=form, curves=curves, say=say, should_stop=should_stop)


@app.command()
@click.argument("model", type=PLACE)
@click.option("--onnx", "path", metavar="FILE", required=True, type=PATH, help="The file to write, .onnx, which must not exist.")
@temporary_caches()
def export(model: str, path: Path) -> None:
    """Write the ViT of a published run as an ONNX file.

    It is verified by onnxruntime. Needs the extra onnx. MODEL is as in predict. The input is the log-mel of a crop in dB; the
    file's metadata say how it is made of a sound.
    """
    from job.results.export import export_model

    with StopRequest(saves=False) as should_stop:
        say(export_model(model, path, should_stop))


@app.command("evaluate")
@click.argument("run_path", metavar="RUN", type=PLACE)
@click.option("--data", "source", required=True, metavar="SOURCE", type=PLACE, help="Labelled songs, as in data.source.")
@click.option("--scale", nargs=2, type=float, metavar="LOW HIGH", help="Lowest and highest rating of a songs.csv.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@temporary_caches()
def evaluate_on(run_path: str, source: str, scale: tuple[float, float] | None, as_json: bool) -> None:
    """Score a published run on the songs of another dataset.

    RUN is a published run. SOURCE is a folder or s3://…, as in data.source. Songs that the run has seen in its training are named
    and left out, and so are faulty ones, a twentieth of all at most (65).
    """
    prepare_environment(available_threads())
    from job.results.cross import as_text, evaluate_run

    slow = said_if_slow(f"decodes and predicts the songs of {source} …")
    with StopRequest(saves=False) as should_stop, slow, tempfile.TemporaryDirectory() as name:
        found = evaluate_run(run_path, source, scale, Path(name), should_stop)
    say(json.dumps(found, indent=1) if as_json else as_text(found))


@app.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=PLACE)
@click.option("--out", default="collected", show_default=True, type=PATH, help="Output folder, new or of an earlier collect.")
@click.option("--json", "as_json", is_flag=True, help="Print what collected.json holds, instead of the table.")
def collect(runs: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Many published runs → one table, folds pooled, with intervals. For complete folds also the spec of the final model.

    RUN is a published run, a folder of such, or the folder of a sweep, finished or not. Runs may be in s3://BUCKET/PREFIX.
    """
    from job.results.collect import collect_runs
    from job.results.published_runs import fetch_tables

    slow = said_if_slow("reads the runs and resamples their songs …")
    with StopRequest(saves=False) as should_stop, slow, tempfile.TemporaryDirectory() as fetched:
        table = collect_runs(fetch_tables(runs, Path(fetched), should_stop), out)
    say((out / "collected.json").read_text(encoding="utf-8") if as_json else table)


@app.command("schema")
def print_schema() -> None:
    """JSON Schema of the spec, for editors."""
    say(json.dumps(schema(), indent=1))


@contextlib.contextmanager
def job_setup(spec: JobSpec, work: Path, scratch: Path | None, should_stop: StopRequest, *also: Path) -> Iterator["JobFolders"]:
    """Make the folders, watch for stop requests (STOP files also in `also`) and open the log. Needs a prepared environment."""
    from job.machine.disk import refuse_folders, require_writable
    from job.pipeline.folders import job_folders, make_folders
    from job.run_folder.receipts import LOG

    folders = job_folders(work, scratch)
    should_stop.watch([folders.work, folders.run_folder(spec), *also], spec.preemption)
    refuse_folders(spec, folders.work, folders.scratch)
    require_writable(folders.work, folders.scratch)
    run_folder = make_folders(spec, folders)
    prepare_caches(folders.scratch / "caches")
    with logging_to(run_folder / LOG) as log_file:
        try:
            yield folders
        except (EmotionError, Interrupted):
            raise
        except Exception:
            record = logging.getLogger("job").makeRecord(
                "job", logging.ERROR, __file__, 0, "unexpected error", (), sys.exc_info()
            )
            log_file.handle(record)
            raise


def say(text: object, stream: TextIO | None = None) -> None:
    """Print a line to standard output or `stream`: text through terminal_text, bytes unchanged. A closed pipe or terminal is no
    error. Nor is a failed write to standard error, which cannot be reported: the exit code still tells the outcome."""
    stream = stream or sys.stdout
    try:
        click.echo(text if isinstance(text, bytes) else terminal_text(text), stream, nl=not isinstance(text, bytes))
    except OSError as error:
        if stream is not sys.stderr and error.errno not in (errno.EPIPE, errno.EIO):  # a closed pipe, or a closed terminal
            text = f"standard output: {system_reason(error)}. Not all was printed: make room or name another file, and try again."
            raise StorageError.of(error, text) from error
        # Otherwise Python fails again when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def command() -> int:
    """Run a command and return its exit code. An expected error is one line on standard error, without a traceback."""
    scrub_tracebacks()
    failure: EmotionError | Interrupted
    try:
        result = app(prog_name="emotion-job", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (EmotionError, Interrupted) as error:
        failure = error
    except ModuleNotFoundError as error:
        failure = as_failure(error)
        if (error.name or "").partition(".")[0] not in ("emotion", "job", "slurm"):
            failure = SpecError(
                f"this command needs the libraries of a job, and {error.name} is not installed here. {to_install('job')}"
            )
    except click.ClickException as error:
        failure = SpecError(usage_message(error, hint_at_dashes(error)))
    except click.exceptions.Abort:
        return Interrupted.exit_code
    except Exception as error:  # noqa: BLE001 - the last resort
        if os.getenv("EMOTION_TRACEBACK"):
            say(scrubbed("".join(traceback.format_exception(error))), sys.stderr)
        failure = as_failure(error)
    say(scrubbed(f"emotion-job: {failure}"), sys.stderr)
    return failure.exit_code


def main() -> None:
    """Run a command and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a closed stream is None
            stream.reconfigure(errors="backslashreplace")
    code = command()
    # Progress bars and log lines; `say` has reported its own errors.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):  # a closed stream is None
            stream.flush()
    # Not sys.exit: shutting torch down takes a second, in which another SIGTERM would replace the exit code.
    os._exit(code)
