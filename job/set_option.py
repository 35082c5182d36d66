"""The option --set of both programs."""

from collections.abc import Callable

import click
from click.decorators import FC
from click.shell_completion import CompletionItem

from job.spec.overrides import with_environment_values


def complete_key(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from job.spec.model import keys_of_spec

    return [CompletionItem(f"{key}=", help=text) for key, text in keys_of_spec() if key.startswith(incomplete)]


def set_option(text: str) -> Callable[[FC], FC]:
    """The repeatable option --set KEY=VALUE. text: its help."""
    return click.option(
        "--set",
        "overrides",
        metavar="KEY=VALUE",
        multiple=True,
        callback=lambda _context, _parameter, overrides: with_environment_values(overrides),
        shell_complete=complete_key,
        help=text,
    )
