"""What a training step holds in memory, by component: predicted on fake tensors, measured on real ones."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Account: TypeAlias = dict[str, int]
"""Component → bytes at the moment of the peak, and their sum, `peak`."""
Persistent: TypeAlias = Callable[[], dict[str, Iterable[Tensor]]]
"""Asked for the tensors that outlast a step, by component: parameters, gradients, optimizer, averages."""
COMPONENTS = ("parameters", "gradients", "optimizer", "averages", "data", "activations", "workspace")


class TensorBytes(TorchDispatchMode):
    """While active, notes the bytes of every storage on one device; then `account` says what was alive at the peak.

    persistent: component → its tensors, asked for at the beginning and at the end. data: what the step is given. Of the others,
    what backward passes make is workspace, all else activations: what forward passes keep for backward or have in use.
    """

    def __init__(self, device: torch.device, persistent: Persistent, data: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.account: Account = {}
        self._device, self._persistent, self._data = device.type, persistent, data
        self._alive: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._component: list[str] = []
        self._events: list[tuple[int, int]] = []

    def __enter__(self) -> Self:
        self._note_known()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._note_known()
        self.account = self._at_peak()
        self._alive.clear()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        component = "activations" if torch._C._current_graph_task_id() == -1 else "workspace"
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor, component)
        return result

    def _note(self, tensor: Tensor, component: str) -> int | None:
        """The number of the tensor's storage: what came first is 0."""
        if tensor.device.type != self._device:
            return None
        storage = tensor.untyped_storage()
        # An address is used again once its storage is freed, which `forget` hears of first.
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

    def _note_known(self) -> None:
        for component, tensors in {**self._persistent(), "data": self._data}.items():
            for tensor in tensors:
                number = self._note(tensor, component)
                if number is not None:
                    self._component[number] = component

    def _at_peak(self) -> Account:
        now = peak = length = 0
        for count, (_, size) in enumerate(self._events, start=1):
            now += size
            if now > peak:
                peak, length = now, count
        found: Counter[str] = Counter()
        for number, size in self._events[:length]:
            found[self._component[number]] += size
        return account({component: found[component] for component in COMPONENTS})


def account(components: dict[str, int]) -> Account:
    return {**components, "peak": sum(components.values())}


def without_memory() -> FakeTensorMode:
    """Inside, tensors have shape, type and device, and operators choose what they would choose, but nothing is computed."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def weights_of(*networks: nn.Module) -> list[Tensor]:
    return [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]


def gradients_of(*networks: nn.Module) -> list[Tensor]:
    return [p.grad for network in networks for p in network.parameters() if p.grad is not None]


def state_of(*optimizers: torch.optim.Optimizer) -> list[Tensor]:
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def with_adam_and_ema(step: Account, learning: Iterable[nn.Module], averaged: nn.Module) -> Account:
    """The account of a step and what it does not make: Adam's two averages and count of steps per parameter, the EMA."""
    learn = [p for network in learning for p in network.parameters() if p.requires_grad]
    kept = {"optimizer": sum(2 * p.nbytes + 4 for p in learn), "averages": sum(t.nbytes for t in weights_of(averaged))}
    return account({name: step[name] + kept.get(name, 0) for name in COMPONENTS})
