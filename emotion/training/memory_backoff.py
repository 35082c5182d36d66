"""The micro-batch of a training: the largest that is predicted to fit, and half of it after every out-of-memory error.

The code of a step runs on fake tensors before the training and is recorded once or twice during it. Both times `MemoryRecorder`
counts every storage, except what kernels take and give back inside one operator.
"""

import contextlib
import ctypes
import functools
import gc
import logging
import math
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from emotion.config import GanConfig, VitConfig
from emotion.errors import ModelError
from emotion.proc import memory_bytes
from emotion.training.device import Device
from emotion.training.memory_account import COMPONENTS, MemoryAccount, MemoryRecorder, PersistentTensors, with_peak

log = logging.getLogger(__name__)

MARGIN = 0.9  # share of the free memory that a prediction may fill: the rest is for what kernels use inside and for fragments
# On a CPU, fitted to tests/bench/memory.py: kernels that are compiled at first use, and gaps between the blocks of the heap with
# what kernels use inside, as a share of activations and workspace.
KERNELS_BYTES, FRAGMENTS = 50 << 20, 0.3
PREDICTED_PARTS = 2  # micro-batches that a prediction runs: from the second on, each starts with what the one before has left

# Parts of the messages of RuntimeErrors that mean out of memory. oneDNN raises the last three for other causes too; then halving
# ends at one sample with the same message.
OUT_OF_MEMORY_MESSAGES = (
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


def choose_micro_batch(batch: int, given: int | None, free_bytes: int | None, predict: Callable[[int], MemoryAccount]) -> int:
    """The given size, else the largest of batch, batch / 2, … whose predicted peak fits by a margin. None: no limit."""
    if given is not None:
        return min(given, batch)
    micro = batch
    while free_bytes is not None and micro > 1 and predict(micro).get("peak", 0) > MARGIN * free_bytes:
        micro //= 2
    return micro


def features_fit(features_bytes: int, free_bytes: int | None, step: MemoryAccount) -> bool:
    """Whether the features fit on the device beside a step of this predicted peak, with the same margin. The micro-batch is never
    reduced to make room for them. None: the device is a CPU, and they stay in the mapped file."""
    return free_bytes is not None and bool(step) and features_bytes + step["peak"] <= MARGIN * free_bytes


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in OUT_OF_MEMORY_MESSAGES)


class MemoryBackoff:
    """The micro-batch of one training phase and its memory account. `run` retries the training with half the micro-batch.

        backoff = MemoryBackoff("gan", config, device, predict=…, host_bytes=…, settings="gan.width")
        account = backoff.run(lambda: train_gan(…, backoff=backoff))

    Its state is part of the checkpoint, so that a resumed training keeps a reduced micro-batch.

    predict: micro-batch → account of a step. host_bytes: what the process holds beside the tensors of a step, such as copies
    for checkpoints and mapped files. features_bytes: of the songs that clips are drawn from. settings: what to lower where one
    sample at a time is too much, for the message.
    """

    def __init__(
        self,
        phase: str,
        config: GanConfig | VitConfig,
        device: Device,
        *,
        predict: Callable[[int], MemoryAccount],
        host_bytes: Callable[[MemoryAccount], int],
        features_bytes: int,
        settings: str,
    ) -> None:
        self.phase, self.device, self.host_bytes, self.settings = phase, device, host_bytes, settings
        self.batch_size = config.batch_size
        self.predict = functools.cache(lambda micro: _predict_if_possible(phase, predict, micro))
        free_bytes = device.free_bytes()
        self.micro_batch = choose_micro_batch(config.batch_size, config.micro_batch, free_bytes, self.predict)
        self._features_bytes = features_bytes
        self._features_fit = features_fit(features_bytes, free_bytes, self.predict(self.micro_batch))
        self.used: list[int] = []
        self.halved: list[dict[str, Any]] = []
        self.measured: MemoryAccount = {}
        self.step = 0
        self._resident_before, self.largest_measured = memory_bytes("VmRSS") or 0, False
        peak_mib = self._predicted().get("peak", math.nan) / 2**20
        place = "device" if self.features_on_device else "file"
        log.info(
            "phase=%s micro_batch=%d/%d predicted_peak_mib=%.0f features=%s",
            *(phase, self.micro_batch, self.batch_size, peak_mib, place),
        )

    @property
    def features_on_device(self) -> bool:
        """Whether the features are to lie on the device: where they fit, until memory runs out all the same."""
        return self._features_fit and not self.halved

    def run(self, train: Callable[[], None]) -> dict[str, Any]:
        """Call `train` until it does not run out of memory, each time with half the micro-batch. Returns the memory account.

        train: a whole training, which resumes from its last checkpoint. Raises ModelError where one sample is too much.
        """
        while (failure := _out_of_memory_failure(train)) is not None:
            # Outside the except block: its traceback would keep the frames, and with them all tensors of the failed attempt.
            gc.collect()
            _release_failed_backward()
            _empty_caches()
            self._halve(failure)
        return self.to_json()

    def _halve(self, failure: str) -> None:
        if self.micro_batch == 1:
            raise ModelError(
                f"{self.phase}: out of memory at step {self.step} with one sample at a time ({failure}). Lower {self.settings}, "
                f"or give the job more memory."
            )
        before, self.micro_batch = self.micro_batch, self.micro_batch // 2
        self.halved.append({"step": self.step, "from": before, "to": self.micro_batch, "failure": failure})
        self.measured, self.largest_measured = {}, False
        log.warning(
            "phase=%s step=%d out of memory (%s): resumes from the last checkpoint with micro_batch=%d instead of %d",
            *(self.phase, self.step, failure, self.micro_batch, before),
        )

    def parts(self) -> list[slice]:
        """The effective batch, cut into micro-batches of the size in use."""
        if self.micro_batch not in self.used:
            self.used.append(self.micro_batch)
        return micro_batches(self.batch_size, self.micro_batch)

    def measure(
        self, step: int, is_largest: bool, persistent: PersistentTensors, data: Iterable[Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        """Around the work of a step. Only the first step and the first of the largest steps are measured, as it takes time.

        is_largest: whether no step needs more memory. persistent, data: as for MemoryRecorder.
        """
        self.step = step
        if self.measured and (self.largest_measured or not is_largest):
            return contextlib.nullcontext()
        return self._measure(is_largest, persistent, data)

    @contextlib.contextmanager
    def _measure(self, is_largest: bool, persistent: PersistentTensors, data: Iterable[Tensor]) -> Iterator[None]:
        with MemoryRecorder(self.device.device, persistent, data) as recorder:
            yield
        self.largest_measured = is_largest
        if recorder.account["peak"] > self.measured.get("peak", 0):
            self.measured = recorder.account

    def advice(self) -> str | None:
        """A warning for metrics, manifest and report where the micro-batch was halved."""
        if not self.halved:
            return None
        last = self.halved[-1]
        return (
            f"out of memory at step {last['step']}: since then {last['to']} samples at a time instead of {last['from']}, at the "
            f"same effective batch. Set {self.phase}.micro_batch to {last['to']}."
        )

    def to_json(self) -> dict[str, Any]:
        """The memory account of the phase, for receipt, manifest and `memory.json`."""
        used = {"micro_batch": self.micro_batch, "micro_batches": self.used, "halved": self.halved}
        return {**used, "predicted": self._predicted(), "measured": self.measured}

    def state_dict(self) -> dict[str, Any]:
        names = ("micro_batch", "used", "halved", "measured", "largest_measured")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Take the smaller micro-batch and the longer history: the checkpoint may be older than the last halving."""
        self.used = [*state["used"], *(micro for micro in self.used if micro not in state["used"])]
        self.halved = max(self.halved, state["halved"], key=len)
        if state["micro_batch"] <= self.micro_batch:
            self.micro_batch, self.measured = state["micro_batch"], state["measured"]
            self.largest_measured = state["largest_measured"]

    def _predicted(self) -> MemoryAccount:
        predicted = self.predict(self.micro_batch)
        if not predicted:
            return {}
        if self.features_on_device:
            with_features = {name: predicted[name] for name in COMPONENTS}
            with_features["data"] += self._features_bytes
            predicted = with_peak(with_features)
        host = self.host_bytes(predicted)
        if self.device.device.type == "cpu":
            host += KERNELS_BYTES + round(FRAGMENTS * (predicted["activations"] + predicted["workspace"]))
            return {**predicted, "host": host, "process": self._resident_before + predicted["peak"] + host}
        return {**predicted, "host": host}


def micro_batches(batch: int, micro: int) -> list[slice]:
    """A batch, cut into micro-batches; the last one may be smaller."""
    return [slice(start, min(start + micro, batch)) for start in range(0, batch, micro)]


def _predict_if_possible(phase: str, predict: Callable[[int], MemoryAccount], micro: int) -> MemoryAccount:
    """The prediction; empty for a network that does not run on fake tensors, which can still be trained."""
    try:
        return predict(micro)
    except (RuntimeError, NotImplementedError) as error:
        log.warning("phase=%s its memory cannot be predicted: %s", phase, (str(error).splitlines() or [""])[0])
        return {}


def _out_of_memory_failure(train: Callable[[], None]) -> str | None:
    """The message where `train` ran out of memory, else None. Other errors pass."""
    try:
        train()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Of CUDA's message, which lists all that the allocator knows, the beginning.
        return textwrap.shorten(str(error), 120, placeholder=" …") or type(error).__name__
    return None


def _empty_caches() -> None:
    """Return memory that the allocators keep for later tensors to the system: kernels allocate elsewhere."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _release_failed_backward() -> None:
    """Release the graph of a backward pass that failed on a CPU.

    Its nodes wait in this thread's queue until a later backward pass runs them, newest first. So a node that is older than all
    of them is run: one from a new thread, whose node numbers start at 0.
    """
    tensors: list[Tensor] = []

    def make() -> None:
        leaf = torch.zeros((), requires_grad=True)
        tensors.extend([leaf.clone(), leaf, torch.ones(())])

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    output, leaf, gradient = tensors
    torch.autograd.grad(output, leaf, gradient)
