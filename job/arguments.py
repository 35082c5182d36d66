"""What may stand on the command line: paths, values from the environment, file names that look like options."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from emotion.errors import SpecError, printable
from job.pipeline.folders import is_utf8, problem_of_path


def with_environment_values(_context: click.Context, _parameter: click.Parameter, overrides: tuple[str, ...]) -> tuple[str, ...]:
    """Replace `KEY=$NAME` by KEY=VALUE of the environment variable. AWS Batch numbers array jobs in one, and starts no shell."""
    resolved = []
    for override in overrides:
        match = re.fullmatch(r"([\w.-]+)=\$(\w+)", override)
        value = os.getenv(match[2]) if match else None
        if match and value is None:
            raise SpecError(f"--set {override}: the environment has no {match[2]}. Set it, or give a value instead.")
        resolved.append(f"{match[1]}={value}" if match else override)
    for override in resolved:
        if not is_utf8(override):
            raise SpecError(f"--set {override}: this is not UTF-8, as a value of the spec has to be.")
    return tuple(resolved)


class NamedPath(click.Path):
    """A path for messages, logs and JSON: UTF-8 on one line. An empty one, such as of a variable that is not set, is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if problem := problem_of_path(str(value)):
            self.fail(f"'{printable(value)}' {problem}", param, ctx)
        return Path(value)


def hint_at_dashes(error: click.ClickException) -> str:
    """For a file name that was taken for an option."""
    if isinstance(error, click.NoSuchOption):
        for word in sys.argv[1:]:
            if word.startswith(error.option_name) and os.path.lexists(word):
                return f" For the file {word} write ./{word}, or -- before the first file."
    return ""


def complete_key(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Keys of a spec, for --set."""
    from job.spec.model import keys_of_spec

    return [CompletionItem(f"{key}=", help=text) for key, text in keys_of_spec() if key.startswith(incomplete)]


def complete_phase(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from job.pipeline.phases import PHASES

    return [CompletionItem(phase.name) for phase in PHASES if phase.name.startswith(incomplete)]
