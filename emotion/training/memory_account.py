"""The memory of a training step by component: predicted on fake tensors, measured on real ones."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MemoryAccount: TypeAlias = dict[str, int]  # component → bytes at the moment of the peak, and their sum, `peak`
PersistentTensors: TypeAlias = Callable[[], Mapping[str, Iterable[Tensor]]]  # component → the tensors that outlast a step
COMPONENTS = ("parameters", "gradients", "optimizer", "averages", "data", "activations", "workspace")


class MemoryRecorder(TorchDispatchMode):
    """While active, records every storage on one device; at the end `account` says what was alive at the peak.

    persistent: called at the beginning and at the end. data: the inputs of the step. Of the other tensors, those that backward
    passes make are workspace; the rest are activations.
    """

    def __init__(self, device: torch.device, persistent: PersistentTensors, data: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.account: MemoryAccount = {}
        self._device, self._persistent, self._data = device.type, persistent, data
        self._alive: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._component: list[str] = []
        self._events: list[tuple[int, int]] = []

    def __enter__(self) -> Self:
        self._record_known()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._record_known()
        self.account = self._at_peak()
        self._alive.clear()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        component = "activations" if torch._C._current_graph_task_id() == -1 else "workspace"
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._record(tensor, component)
        return result

    def _record(self, tensor: Tensor, component: str) -> int | None:
        """Record a tensor; returns the number of its storage, counted from 0, or None on another device."""
        if tensor.device.type != self._device:
            return None
        storage = tensor.untyped_storage()
        # An address is used again only after its storage was freed, which calls `forget`.
        address = storage._cdata
        if address not in self._alive:
            number, size = len(self._component), storage.nbytes()

            def forget(_: object) -> None:
                del self._alive[address]
                self._events.append((number, -size))

            self._alive[address] = number, weakref.ref(storage, forget)
            self._component.append(component)
            self._events.append((number, size))
        return self._alive[address][0]

    def _record_known(self) -> None:
        for component, tensors in {**self._persistent(), "data": self._data}.items():
            for tensor in tensors:
                number = self._record(tensor, component)
                if number is not None:
                    self._component[number] = component

    def _at_peak(self) -> MemoryAccount:
        now = peak = length = 0
        for count, (_, size) in enumerate(self._events, start=1):
            now += size
            if now > peak:
                peak, length = now, count
        found: Counter[str] = Counter()
        for number, size in self._events[:length]:
            found[self._component[number]] += size
        return with_peak({component: found[component] for component in COMPONENTS})


def with_peak(components: dict[str, int]) -> MemoryAccount:
    return {**components, "peak": sum(components.values())}


def fake_tensors() -> FakeTensorMode:
    """Inside, tensors have shape, type and device but no memory; operators pick the same kernels, and nothing is computed."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def weights(*networks: nn.Module) -> list[Tensor]:
    return [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]


def persistent_tensors(
    networks: Sequence[nn.Module], optimizers: Sequence[Optimizer] = (), averaged: Sequence[nn.Module] = ()
) -> dict[str, list[Tensor]]:
    """The tensors that outlast a step, by component."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return {
        "parameters": weights(*networks),
        "gradients": [p.grad for network in networks for p in network.parameters() if p.grad is not None],
        "optimizer": [value for state in states for value in state.values() if isinstance(value, Tensor)],
        "averages": weights(*averaged),
    }


def add_adam_and_ema(step: MemoryAccount, learning: Iterable[nn.Module], averaged: nn.Module) -> MemoryAccount:
    """Add what a step does not allocate: two moments and a step count of Adam per parameter, and the EMA."""
    learn = [p for network in learning for p in network.parameters() if p.requires_grad]
    kept = {"optimizer": sum(2 * p.nbytes + 4 for p in learn), "averages": sum(t.nbytes for t in weights(averaged))}
    return with_peak({name: step[name] + kept.get(name, 0) for name in COMPONENTS})
