"""Arguments of commands: the presets, file names that look like options, and completion of phases and places."""

import os
import sys

import click
from click.shell_completion import CompletionItem

PRESETS = ("small", "small-pretrained", "deam", "deam-t4")
"""Specs in job/specs/ for songs of one's own."""


def hint_at_dashes(error: click.ClickException) -> str:
    """A hint for a file name that was parsed as an option; empty otherwise."""
    if isinstance(error, click.NoSuchOption):
        for word in sys.argv[1:]:
            if word.startswith(error.option_name) and os.path.lexists(word):
                return f"For the file {word} write ./{word}, or -- before the first file."
    return ""


def complete_phase(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from job.pipeline.phases import PHASES

    return [CompletionItem(phase.name) for phase in PHASES if phase.name.startswith(incomplete)]


class Place(click.ParamType[str]):
    """A path or s3://BUCKET/PREFIX, kept as it was written. The shell completes it as a file name."""

    name = "place"

    def shell_complete(self, _context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


PLACE = Place()
