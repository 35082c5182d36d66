"""The data of each step, sent from host to device as one block of fixed layout in one copy."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from emotion.threads import in_threads
from emotion.training.device import Device

Numbers: TypeAlias = dict[str, npt.NDArray[Any]]  # of one step, on the host: the same shapes and types in each step
Record: TypeAlias = dict[str, Tensor]  # the same on the device

ALIGNMENT = 64  # bytes: any type may begin there
SLOTS = 3  # blocks on the host: one on its way to the device, two that a thread fills


def step_records(
    numbers_of: Callable[[int], Numbers], steps: range, device: Device, *, ahead: bool
) -> Generator[Record, None, None]:
    """The record of each step, in order. On a CPU it is what `numbers_of` returns, asked when the record is. Close it.

    ahead: on a GPU, a thread calls `numbers_of`, at most two steps ahead. See `sent_records`.
    """
    if device.device.type == "cpu":
        return ({name: torch.from_numpy(array) for name, array in numbers_of(step).items()} for step in steps)
    return sent_records(numbers_of, steps, device, ahead=ahead)


def sent_records(
    numbers_of: Callable[[int], Numbers], steps: range, device: Device, *, ahead: bool
) -> Generator[Record, None, None]:
    """The record of each step, in order: views of a block that is copied to the device, pinned and asynchronous on a GPU.

    ahead: see `step_records`. The thread makes no call to the GPU, so it disturbs no capture of a graph. Its exceptions come
    through at their step. It has ended when the generator has, so close the generator.

    A block of the host is filled again once its last copy has arrived, so the host is at most SLOTS steps ahead of the device.
    """
    if not steps:
        return
    layout = Layout(numbers_of(steps[0]))
    slots = [_Slot(layout.nbytes, device) for _ in range(SLOTS)]

    def free_slots() -> Iterator[tuple[int, _Slot]]:
        for step in steps:
            slot = slots[step % SLOTS]
            slot.wait()
            yield step, slot

    def fill(item: tuple[int, _Slot]) -> _Slot:
        step, slot = item
        layout.write(numbers_of(step), slot.bytes)
        return slot

    filled = in_threads(fill, free_slots(), 1, lambda: None) if ahead else (fill(item) for item in free_slots())
    with contextlib.closing(filled):
        for slot in filled:
            yield layout.read(slot.send())


class Layout:
    """Where the arrays of a record are in its block of `nbytes` bytes."""

    def __init__(self, numbers: Numbers) -> None:
        self.nbytes = 0
        self._places: dict[str, tuple[slice, npt.NDArray[Any]]] = {}  # the array stands for its shape and type
        for name, array in numbers.items():
            end = self.nbytes + array.nbytes
            self._places[name] = slice(self.nbytes, end), np.empty_like(array)
            self.nbytes = -(-end // ALIGNMENT) * ALIGNMENT

    def write(self, numbers: Numbers, block: npt.NDArray[np.uint8]) -> None:
        for name, (place, like) in self._places.items():
            array = numbers[name]
            assert (array.shape, array.dtype) == (like.shape, like.dtype), f"{name}: {array.shape} after {like.shape}"
            block[place].view(like.dtype).reshape(like.shape)[...] = array

    def read(self, block: Tensor) -> Record:
        """Views of a block, on any device."""
        return {
            name: block[place].view(torch.from_numpy(like).dtype).view(like.shape) for name, (place, like) in self._places.items()
        }


class _Slot:
    """A block on the host, pinned where the device is a GPU. `bytes` is to be filled."""

    def __init__(self, nbytes: int, device: Device) -> None:
        is_gpu = device.device.type == "cuda"
        self._device = device.device
        self._block = torch.empty(nbytes, dtype=torch.uint8, pin_memory=is_gpu)
        self._arrival = torch.cuda.Event(blocking=True) if is_gpu else None
        self.bytes: npt.NDArray[np.uint8] = self._block.numpy()

    def send(self) -> Tensor:
        """Start to copy it to the device."""
        sent = self._block.to(self._device, non_blocking=True, copy=True)
        if self._arrival is not None:
            self._arrival.record()
        return sent

    def wait(self) -> None:
        """Until the last copy, if there was one, has arrived."""
        if self._arrival is not None:
            self._arrival.synchronize()
