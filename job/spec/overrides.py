"""Values of --set that are taken from the environment."""

import os
import re
from collections.abc import Sequence

from emotion.characters import is_utf8
from emotion.errors import SpecError
from job.spec.strict_yaml import without_secret


def with_environment_values(overrides: Sequence[str]) -> tuple[str, ...]:
    """Replace `KEY=$NAME` by KEY=VALUE with the value of the environment variable. AWS Batch passes the index of an array job in
    a variable, and starts no shell. Raises SpecError for an unset variable, and for bytes that are not UTF-8."""
    resolved = []
    for override in overrides:
        match = re.fullmatch(r"([\w.-]+)=\$(\w+)", override)
        value = os.getenv(match[2]) if match else None
        if match and value is None:
            raise SpecError(f"--set {override}: the environment has no {match[2]}. Set it, or give a value instead.")
        resolved.append(f"{match[1]}={value}" if match else override)
    for override in resolved:
        if not is_utf8(override):
            raise SpecError(f"--set {without_secret(override)}: this is not UTF-8, as a value of the spec has to be.")
    return tuple(resolved)
