"""Paths on the command line, --version, and the end of each --help: examples to copy, and exit codes. The launcher uses this
module, too, so it imports nothing of a job."""

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from emotion.characters import problem_of_path
from emotion.errors import SpecError, exit_codes, printable

Examples = Mapping[str, Sequence[str]]  # command → command lines; "" → those of the program
Codes = Mapping[str, Sequence[int]]  # command → exit codes besides ALWAYS

ALWAYS = (0, 64, 70)  # done; a wrong command line; a fault of the program
INPUT = (65, 69, 77)  # data that is wrong, absent or denied
STOPPED = (75,)
NODE = (71,)
IMAGE_VARIABLES = {"image": "EMOTION_IMAGE", "revision": "EMOTION_REVISION"}  # set in images

EXAMPLES: Examples = {
    "": (
        "emotion-job init /data/my-songs --scale 1 9   # a spec for your own songs",
        "emotion-job run my-songs.yaml                 # start, or resume",
        "emotion-job predict work/published/NAME-KEY12 song.mp3",
    ),
    "init": ("emotion-job init /data/DEAM", "emotion-job init /data/my-songs --scale 1 9 --preset small-pretrained"),
    "run": (
        "emotion-job run job/specs/demo.yaml",
        "emotion-job run deam.yaml --work runs --set data.source=/data/DEAM",
        "emotion-job run deam.yaml --until features",
    ),
    "reproduce": ("emotion-job reproduce work/published/NAME-KEY12 --set data.source=/data/DEAM",),
    "check": ("emotion-job check deam.yaml --set data.source=/data/DEAM", "emotion-job check deam.yaml --json"),
    "plan": ("emotion-job plan deam.yaml", "emotion-job plan deam.yaml --probe --json"),
    "doctor": ("emotion-job doctor", "emotion-job doctor deam.yaml --work /shared/work --json"),
    "predict": (
        "emotion-job predict work/published/NAME-KEY12 song.mp3",
        "emotion-job predict work/published/NAME-KEY12 /music --json > moods.jsonl",
    ),
    "export": ("emotion-job export work/published/NAME-KEY12 --onnx mood.onnx",),
    "evaluate": ("emotion-job evaluate work/published/NAME-KEY12 --data /data/PMEmo --json",),
    "collect": ("emotion-job collect work/published --out collected", "emotion-job collect s3://BUCKET/published --json"),
    "schema": ("emotion-job schema > spec.schema.json",),
}
CODES: Codes = {
    "init": INPUT,
    "run": (*INPUT, *NODE, 73, *STOPPED, 76),
    "reproduce": (*INPUT, *NODE, 73, *STOPPED, 76),
    "check": INPUT,
    "plan": (*INPUT, *NODE, *STOPPED),
    "doctor": (*INPUT, *NODE),
    "predict": (*INPUT, *NODE, *STOPPED),
    "export": (*INPUT, *STOPPED),
    "evaluate": (*INPUT, *NODE, *STOPPED),
    "collect": (*INPUT, *STOPPED),
    "schema": (),
}


class NamedPath(click.Path):
    """A path that messages, logs and JSON can hold: UTF-8 on one line. An empty path, as from an unset variable, is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if problem := problem_of_path(str(value)):
            self.fail(f"'{printable(value)}' {problem}", param, ctx)
        return Path(value)


def package_version() -> str:
    try:
        return importlib.metadata.version("emotion-job")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is run without an installation
        return "not installed"


def print_version(context: click.Context, _parameter: click.Parameter, is_wanted: bool) -> None:
    if is_wanted and not context.resilient_parsing:
        text = f"{context.info_name} {package_version()}"
        image = [f"{name} {os.environ[key]}" for name, key in IMAGE_VARIABLES.items() if os.getenv(key)]
        click.echo(f"{text} ({', '.join(image)})" if image else text)
        context.exit()


VERSION = click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=print_version,
    help="Print the version and, in an image, its name and revision.",
)


class Command(click.Command):
    """A command of a Group."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        group = ctx.parent.command if ctx.parent else None
        if isinstance(group, Group):
            write_examples(group.examples.get(self.name or "", ()), formatter)
            write_codes((*ALWAYS, *group.codes.get(self.name or "", ())), formatter)


class Group(click.Group):
    """A program whose help ends with examples, exit codes and how its shell completion is switched on."""

    command_class = Command

    def __init__(self, *arguments: Any, examples: Examples, codes: Codes, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.examples, self.codes = examples, codes

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            # Not click's no_args_is_help, which raises the whole help as the message of an error.
            click.echo(ctx.get_help(), err=True)
            ctx.exit(SpecError.exit_code)
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(self.examples.get("", ()), formatter)
        write_codes([*exit_codes()], formatter)
        name = ctx.info_name or ""
        variable = f"_{name}_COMPLETE".replace("-", "_").upper()
        with formatter.section("Completion in bash; zsh and fish have zsh_source and fish_source"):
            formatter.write(f'  eval "$({variable}=bash_source {name})"\n')


def usage_message(error: click.ClickException, hint: str = "") -> str:
    """A usage error message with a hint; the default hint says where the command line is documented."""
    text = error.format_message()
    if not hint and isinstance(error, click.UsageError) and error.ctx is not None:
        hint = f"See {error.ctx.command_path} --help."
    return f"{text if text.endswith(('.', '?')) else f'{text}.'} {hint}".rstrip()


def write_examples(examples: Sequence[str], formatter: click.HelpFormatter) -> None:
    """Each example on its own line, unwrapped, so that it can be copied."""
    if examples:
        with formatter.section("Examples"):
            for line in examples:
                formatter.write(f"  {line}\n")


def write_codes(codes: Sequence[int], formatter: click.HelpFormatter) -> None:
    known = exit_codes()
    with formatter.section("Exit codes"):
        formatter.write_dl([(str(code), known[code].meaning) for code in sorted({*codes})])
