"""The memory of a training: predicted, measured, and what is done where there is not enough.

The same code of a step is run twice: before the training with tensors that have shape, type and device but no memory, and once or
twice in it for real. Both times `TensorBytes` notes every storage that comes and goes, so the two accounts can be compared
component by component. What kernels use inside and give back before they return is in neither.
"""

import contextlib
import ctypes
import functools
import gc
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emotion.errors import ModelError
from emotion.training.device import Device
from emotion.training.memory_account import Account, Persistent, TensorBytes

log = logging.getLogger(__name__)

MARGIN = 0.9
"""Share of the free memory that a prediction may fill: the rest is for what kernels use inside and for fragments."""
KERNELS_BYTES, FRAGMENTS = 50 << 20, 0.3
"""What a process on a CPU needs beside its tensors: kernels that are made when first used, and, as a share of what comes and goes
in a step, gaps between the blocks of the heap and what kernels use inside. Fitted to what `tests/bench/memory.py` measures."""
MOST_PARTS = 2
"""Micro-batches of a step that a prediction runs: the second finds what the first has left, and so do all after it."""
SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "could not create a primitive",
    "could not execute a primitive",
    "could not create a memory object",
)
"""How a RuntimeError that is no OutOfMemoryError says that memory is missing. The last three are oneDNN's, which says it of other
causes, too; then halving ends at one sample with the same words."""


def resident_bytes() -> int:
    """Physical memory of this process now; 0 where the kernel does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


def chosen_micro_batch(batch: int, given: int | None, free_bytes: int | None, predict: Callable[[int], Account]) -> int:
    """What is given, else the largest of batch, batch / 2, … whose predicted peak fits by a margin; None is no limit."""
    if given is not None:
        return min(given, batch)
    micro = batch
    while free_bytes is not None and micro > 1 and predict(micro).get("peak", 0) > MARGIN * free_bytes:
        micro //= 2
    return micro


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


class Memory:
    """What a training phase knows of its memory: the micro-batch in use, each time it was halved, what a step takes.

    It travels in the checkpoint, so that what was found out once is not forgotten by whoever goes on.

    predict: micro-batch → account of a step. given: the micro-batch of the spec; where there is none, the largest that is
    predicted to fit. host_bytes: what the process keeps beside the tensors of a step: copies for checkpoints, mapped files.
    """

    def __init__(
        self,
        phase: str,
        batch: int,
        given: int | None,
        device: Device,
        predict: Callable[[int], Account],
        host_bytes: Callable[[Account], int],
    ) -> None:
        self.phase, self.device, self.host_bytes = phase, device, host_bytes
        self.predict = functools.cache(lambda micro: _predicted_if_possible(phase, predict, micro))
        self.micro_batch = chosen_micro_batch(batch, given, device.free_bytes(), self.predict)
        self.used: list[int] = []
        self.halved: list[dict[str, Any]] = []
        self.measured: Account = {}
        self.step = 0
        self._before, self._largest = resident_bytes(), False
        peak_mib = self._predicted().get("peak", math.nan) / 2**20
        log.info("phase=%s micro_batch=%d/%d predicted_peak_mib=%.0f", phase, self.micro_batch, batch, peak_mib)

    def state_dict(self) -> dict[str, Any]:
        return {
            "micro_batch": self.micro_batch,
            "used": self.used,
            "halved": self.halved,
            "measured": self.measured,
            "largest": self._largest,
        }

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """The smaller micro-batch counts, and the longer history: a checkpoint is from before the failure it has to mend."""
        self.used = [*state["used"], *(micro for micro in self.used if micro not in state["used"])]
        self.halved = max(self.halved, state["halved"], key=len)
        if state["micro_batch"] <= self.micro_batch:
            self.micro_batch, self.measured, self._largest = state["micro_batch"], state["measured"], state["largest"]

    def parts(self, batch: int) -> list[slice]:
        """A batch, cut into micro-batches."""
        if self.micro_batch not in self.used:
            self.used.append(self.micro_batch)
        return parts_of(batch, self.micro_batch)

    def counted(
        self, step: int, largest: bool, persistent: Persistent, data: Iterable[Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        """Around the work of a step. Counting takes time, so it is done at the first step and at the first that is largest.

        largest: whether no step takes more. persistent, data: as of TensorBytes.
        """
        self.step = step
        if self.measured and (self._largest or not largest):
            return contextlib.nullcontext()
        return self._counting(largest, persistent, data)

    @contextlib.contextmanager
    def _counting(self, largest: bool, persistent: Persistent, data: Iterable[Tensor]) -> Iterator[None]:
        with TensorBytes(self.device.device, persistent, data) as counted:
            yield
        self._largest = largest
        if counted.account["peak"] > self.measured.get("peak", 0):
            self.measured = counted.account

    def kept_within(self, attempt: Callable[[], None], settings: str) -> dict[str, Any]:
        """Call `attempt` until it does not run out of memory, each time with half the micro-batch; return the account.

        attempt: a whole training, which goes on from its last checkpoint. So the steps since then are repeated from the same
        random numbers, whatever the failed step had done already. settings: what to lower. Raises ModelError where one
        sample at a time is too much.
        """
        while (failure := _failure_of(attempt)) is not None:
            # Not in the except block: its traceback would keep the frames alive, and they all tensors of the failed attempt.
            gc.collect()
            _forget_failed_backward()
            _give_back()
            self._halve(failure, settings)
        return self.to_json()

    def _halve(self, failure: str, settings: str) -> None:
        if self.micro_batch == 1:
            raise ModelError(
                f"{self.phase}: out of memory at step {self.step} with one sample at a time ({failure}). Lower {settings}, or "
                f"give the job more memory."
            )
        before, self.micro_batch = self.micro_batch, self.micro_batch // 2
        self.halved.append({"step": self.step, "from": before, "to": self.micro_batch, "failure": failure})
        self.measured, self._largest = {}, False
        log.warning(
            "phase=%s step=%d out of memory (%s): goes on from the last checkpoint with micro_batch=%d instead of %d",
            self.phase,
            self.step,
            failure,
            self.micro_batch,
            before,
        )

    def told(self) -> str | None:
        """What to say in metrics, manifest and report."""
        if not self.halved:
            return None
        last = self.halved[-1]
        return (
            f"out of memory at step {last['step']}: since then {last['to']} samples at a time instead of {last['from']}, at the "
            f"same effective batch. Set {self.phase}.micro_batch to {last['to']}."
        )

    def to_json(self) -> dict[str, Any]:
        """The account of the phase, for receipt, manifest and `memory.json`."""
        return {
            "micro_batch": self.micro_batch,
            "micro_batches": self.used,
            "halved": self.halved,
            "predicted": self._predicted(),
            "measured": self.measured,
        }

    def _predicted(self) -> Account:
        predicted = self.predict(self.micro_batch)
        if not predicted:
            return {}
        host = self.host_bytes(predicted)
        if self.device.device.type == "cpu":
            passing = predicted["activations"] + predicted["workspace"]
            host += KERNELS_BYTES + round(FRAGMENTS * passing)
            return {**predicted, "host": host, "process": self._before + predicted["peak"] + host}
        return {**predicted, "host": host}


def parts_of(batch: int, micro: int) -> list[slice]:
    """A batch, cut into micro-batches; the last one may be smaller."""
    return [slice(at, min(at + micro, batch)) for at in range(0, batch, micro)]


def _predicted_if_possible(phase: str, predict: Callable[[int], Account], micro: int) -> Account:
    """Nothing for a network that cannot be run without memory: it can be trained all the same."""
    try:
        return predict(micro)
    except (RuntimeError, NotImplementedError) as error:
        log.warning("phase=%s its memory cannot be predicted: %s", phase, (str(error).splitlines() or [""])[0])
        return {}


def _failure_of(attempt: Callable[[], None]) -> str | None:
    """What an attempt said when it ran out of memory, else None. Every other error passes."""
    try:
        attempt()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def _give_back() -> None:
    """Return to the system what the allocators keep for the next tensor: kernels take memory that is not from them."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _forget_failed_backward() -> None:
    """Let go of the graph of a backward pass that has failed on a CPU.

    What it had still to do waits in the queue of this thread, and keeps the graph alive, until a later backward pass comes to it:
    the newest nodes first. So one that is older than all of them is sent through, from a thread that has made none before.
    """
    made: list[Tensor] = []

    def make() -> None:
        leaf = torch.zeros((), requires_grad=True)
        made.extend([leaf.clone(), leaf, torch.ones(())])

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    output, leaf, gradient = made
    torch.autograd.grad(output, leaf, gradient)
