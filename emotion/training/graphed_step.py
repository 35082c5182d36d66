"""A training step as a CUDA graph: one launch starts all its kernels.

Launching the thousands of kernels of a step one by one takes longer than a GPU needs to run them. A graph stores them with their
arguments, which are addresses and constants. So values that change between steps must be in tensors with fixed addresses, which
are written before the step runs.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

Tensors: TypeAlias = tuple[Tensor, ...]
Result = TypeVar("Result")

WARM_UP = 2
"""Calls of a key that run without a graph. The first makes what a step keeps: moments, workspaces, the choice of cuDNN's
algorithms. Memory can be measured without a graph only: `MemoryBackoff.measure` does so in the second call at the latest."""


class GraphBackend(Protocol):
    """What makes and keeps the graphs of one phase. failure: why a step could not be captured; from then on none is."""

    failure: str | None

    def run(self, work: Callable[[], Tensors]) -> Tensors:
        """Run it without a graph, under the conditions of a capture."""
        ...

    def capture(self, work: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        """Record it without running it. Returns its outputs, and what runs it, which overwrites them. Raises RuntimeError."""
        ...

    def free(self) -> None:
        """Forget all graphs and free their memory."""
        ...


class CudaGraphs:
    """Graphs on the current stream of the GPU, which is not the default one: `resolve_device` sees to that.

    One pool for all: they never run at the same time, so a later one may use the memory that an earlier one needs only while it
    runs.
    """

    def __init__(self) -> None:
        self.failure: str | None = None
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def run(self, work: Callable[[], Tensors]) -> Tensors:
        return work()

    def capture(self, work: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # memory that is kept for later tensors cannot become part of the pool
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`, which takes another stream, and after a failure leaves that the current one.
        # Other threads may continue with what a capture forbids, such as pinning memory.
        graph.capture_begin(self._pool, capture_error_mode="thread_local")
        try:
            outputs = work()
            graph.capture_end()
        except BaseException:
            _abandon(graph, self._pool)
            raise
        self._graphs.append(graph)
        return outputs, graph.replay

    def free(self) -> None:
        torch.cuda.synchronize()
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()  # the old one has ended with its last graph
        torch.cuda.empty_cache()


def _abandon(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """End a capture that failed, so that the allocator works as before. What has ended already raises an error."""
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):
        # Where CUDA reports the end itself as failed, torch may leave this out; then every later `empty_cache` raises an error.
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


class GraphedSteps:
    """Runs the steps of one training: the first calls of a key as they are, later ones as a graph; with equal results.

        steps = GraphedSteps(graphs, [network], warn)
        for …:
            (loss,) = steps.run(key, functools.partial(update, parts=parts), clips, labels)

    graphs: None runs every step as it is. networks: whose gradients a step makes anew. warn: called once if a step could not be
    captured; then the training continues without graphs. Where memory is too small for a capture, `run` raises
    OutOfMemoryError: with a smaller micro-batch there can be graphs again.

    A step without a graph needs the memory that the graphs hold. So it frees them, and they are captured again at their next
    call: a training never needs more memory than without graphs, except for a copy of the inputs.
    """

    def __init__(self, graphs: GraphBackend | None, networks: Sequence[nn.Module], warn: Callable[[str], None]) -> None:
        self._graphs, self._networks, self._warn = graphs, networks, warn
        self._calls: Counter[Hashable] = Counter()
        self._inputs: dict[Hashable, Tensors] = {}
        self._captured: dict[Hashable, tuple[Tensors, Callable[[], None]]] = {}
        if graphs is not None:
            graphs.free()  # of an attempt that ran out of memory
            if graphs.failure is not None:
                self._say(graphs.failure)  # again, as a training that restarts loses its later records

    def run(self, key: Hashable, step: Callable[..., Tensors], *inputs: Tensor) -> Tensors:
        """Run `step(*inputs)` once and return its outputs, which the next call overwrites.

        key: all that the step depends on, except for values of tensors; shapes and types of the inputs belong to it anyway.
        step: with its settings bound. It changes nothing on the host that outlasts it.
        """
        if self._graphs is None or self._graphs.failure is not None:
            return step(*inputs)
        form = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        form_and_key = (form, key)
        if self._calls[form_and_key] < WARM_UP:
            self._calls[form_and_key] += 1
            self.free()
            return self._graphs.run(lambda: step(*inputs))
        if form not in self._inputs:
            self._inputs[form] = tuple(tensor.clone() for tensor in inputs)
        static = self._inputs[form]
        if form_and_key not in self._captured:
            failure = self._capture(self._graphs, form_and_key, lambda: step(*static))
            if failure is not None:
                self._give_up(self._graphs, failure)
                return step(*inputs)
        outputs, replay = self._captured[form_and_key]
        for kept, given in zip(static, inputs, strict=True):
            kept.copy_(given)
        replay()
        return outputs

    def beside(self, call: Callable[[], Result]) -> Result:
        """Call what needs memory beside the graphs, such as a validation. Where there is too little, free them and call it again:
        it may have no effect but its result."""
        try:
            return call()
        except torch.OutOfMemoryError:
            if not self._captured:
                raise
        # Outside the except block, whose traceback keeps tensors.
        self.free()
        return call()

    def free(self) -> None:
        """Free the memory of all graphs. They are captured again when they are needed."""
        if self._graphs is None or not self._captured:
            return
        self._captured.clear()
        self._forget_gradients()
        self._graphs.free()

    def _capture(self, graphs: GraphBackend, key: Hashable, work: Callable[[], Tensors]) -> str | None:
        """Returns the reason where it fails. Raises OutOfMemoryError, with all graphs freed, where memory is the reason."""
        self._forget_gradients()
        try:
            self._captured[key] = graphs.capture(work)
        except torch.OutOfMemoryError:
            self._forget_all(graphs)
            raise
        except RuntimeError as error:
            return (str(error).splitlines() or [type(error).__name__])[0]
        return None

    def _give_up(self, graphs: GraphBackend, failure: str) -> None:
        graphs.failure = failure
        self._forget_all(graphs)
        self._say(failure)

    def _forget_all(self, graphs: GraphBackend) -> None:
        self._forget_gradients()  # those of a capture that failed were never computed
        self._captured.clear()
        graphs.free()
        self._inputs.clear()

    def _say(self, failure: str) -> None:
        self._warn(f"no CUDA graph could be made of a step ({failure}): it is started kernel by kernel, which takes longer.")

    def _forget_gradients(self) -> None:
        """Free the gradients: each graph allocates gradients of its own."""
        for network in self._networks:
            network.zero_grad(set_to_none=True)
