"""Copy numbers such as losses from the device to the records of a training without blocking."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emotion.training.device import Device, Fetched


@dataclass(frozen=True)
class Reading:
    """The numbers after `step` steps, under their names, on the host. time: when they were sent, in seconds since 1970."""

    step: int
    time: float
    numbers: dict[str, list[float]]


@dataclass(frozen=True)
class _Sent:
    step: int
    time: float
    layout: dict[str, slice | float]  # name → its part of the tensor, or a number that was on the host
    fetched: Fetched


class Readings:
    """Sends numbers of a step to the host, and reports them once they are there, in the order of the steps.

        readings = Readings(device, report)
        for step in …:
            …
            if progress.due(step + 1):
                readings.send(step + 1, loss=loss)
            readings.poll()
        readings.flush()

    On a CPU numbers are reported at once. On a GPU that is some steps later, and at the latest when the next are sent: the device
    still has the steps since then to do, and the host is never further ahead. Call `flush` before a checkpoint too, so that its
    steps are recorded, and before any other record, or use `flush_then`. report: may raise.
    """

    def __init__(self, device: Device, report: Callable[[Reading], None]) -> None:
        self._device, self._report = device, report
        self._sent: _Sent | None = None

    def send(self, step: int, **numbers: Tensor | float) -> None:
        """Send tensors of at most one dimension, and numbers that the host has, after `step` steps."""
        self.flush()
        parts: list[Tensor] = []
        layout: dict[str, slice | float] = {}
        end = 0
        for name, number in numbers.items():
            if isinstance(number, Tensor):
                parts.append(number.detach().reshape(-1).double())
                layout[name] = slice(end, end + number.numel())
                end += number.numel()
            else:
                layout[name] = number
        self._sent = _Sent(step, time.time(), layout, self._device.fetch(torch.cat(parts)))
        self.poll()

    def poll(self) -> None:
        """Report what is on the host. Does not wait."""
        if self._sent is not None and self._sent.fetched.is_here():
            self.flush()

    def flush(self) -> None:
        """Report what was sent. Waits for it."""
        if self._sent is None:
            return
        sent, self._sent = self._sent, None
        block: list[float] = sent.fetched.wait().tolist()
        numbers = {name: block[part] if isinstance(part, slice) else [part] for name, part in sent.layout.items()}
        self._report(Reading(sent.step, sent.time, numbers))

    def flush_then(self, record: Callable[..., None], *values: Any) -> None:
        """Report what was sent, then call record(*values), which records something of the current step."""
        self.flush()
        record(*values)
