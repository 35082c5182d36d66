"""Graphs on a CPU, to stand for those of a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

Work = Callable[[], tuple[Tensor, ...]]


class Tape(TorchDispatchMode):
    """Records operators with their arguments: numbers as they are, tensors by their memory. `replay` runs them again, on the same
    memory, without the Python code around them.

    As a capture runs nothing, at the end all that it has written is as before, and new memory holds NaN. The RuntimeError of a
    capture is raised for numbers that the host would have to wait for, and `error` at the operator fails_at, such as aten::add.
    """

    def __init__(self, fails_at: str | None = None, error: RuntimeError | None = None) -> None:
        super().__init__()
        self._fails_at = fails_at
        self._error = error or RuntimeError("operation failed due to a previous error during capture")
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._written: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._new: dict[int, torch.UntypedStorage] = {}

    @property
    def length(self) -> int:
        return len(self._calls)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for storage, before in self._written.values():
            storage.copy_(before)
        for storage in self._new.values():
            storage.fill_(0xFF)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        if function._schema.name == self._fails_at:
            raise self._error
        for argument, value in zip(function._schema.arguments, args, strict=False):
            self._keep(argument, value)
        for argument in function._schema.arguments:
            self._keep(argument, kwargs.get(argument.name))
        # Other tensors on the same memory, so that no graph of autograd is kept with them.
        kept_args, kept_kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        result = function(*args, **kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        made = [None if t.untyped_storage()._cdata in known else t.detach() for t in tree_leaves(result) if isinstance(t, Tensor)]
        for tensor in made:
            if tensor is not None:
                storage = tensor.untyped_storage()
                self._new[storage._cdata] = storage
        self._calls.append((function, kept_args, kept_kwargs, made))
        return result

    def _keep(self, argument: Any, value: Any) -> None:
        """What was there before the first write to a tensor that is older than the capture."""
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._new and storage._cdata not in self._written:
                    self._written[storage._cdata] = storage, storage.clone()

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, made in self._calls:
                if not made or any(tensor is not None for tensor in made):
                    results = [leaf for leaf in tree_leaves(function(*args, **kwargs)) if isinstance(leaf, Tensor)]
                    for tensor, result in zip(made, results, strict=True):
                        if tensor is not None:
                            tensor.copy_(result)
                elif function._schema.is_mutable:
                    function(*args, **kwargs)


class Tapes:
    """A backend of graphs. fails_at, error: as for Tape."""

    def __init__(self, fails_at: str | None = None, error: RuntimeError | None = None) -> None:
        self.failure: str | None = None
        self._fails_at, self._error = fails_at, error
        self.steps_without, self.frees = 0, 0
        self.captured: list[Tape] = []
        self.replayed: list[Tape] = []

    def run(self, work: Work) -> tuple[Tensor, ...]:
        self.steps_without += 1
        return work()

    def capture(self, work: Work) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        with Tape(self._fails_at, self._error) as tape:
            outputs = work()
        self.captured.append(tape)

        def replay() -> None:
            self.replayed.append(tape)
            tape.replay()

        return outputs, replay

    def free(self) -> None:
        self.frees += 1
