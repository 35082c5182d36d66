"""Writing weights as safetensors, with errors of the disk as OSError."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from emotion.files import errors_name


@contextlib.contextmanager
def safetensors_errors_as_os_errors(folder: Path) -> Iterator[None]:
    """Raise OSError where the system refused a write of safetensors, whose own error has the number in its text only.
    folder: where it writes."""
    try:
        with errors_name(folder):
            yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
