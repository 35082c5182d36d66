"""Weights as safetensors, where a full disk is an error of the disk."""

import contextlib
import os
import re
from collections.abc import Iterator

from safetensors import SafetensorError


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Within the block, what the system said to safetensors is raised as OSError: safetensors has it in a text only."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
