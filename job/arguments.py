"""What may stand on the command line: paths, file names that look like options; and what completes it."""

import os
import sys
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from emotion.errors import printable
from job.pipeline.folders import problem_of_path


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
