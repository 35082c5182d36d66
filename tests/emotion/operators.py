"""What the operators of a training step do, as torch's dispatcher sees them."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

UNKNOWN_BEFORE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index")


class Operators(TorchDispatchMode):
    """Records the operators that run while it is active. waits: those for whose result the host has to wait on a GPU, as it is a
    Python number (`.item()`) or its shape depends on the data (`nonzero`, boolean indices)."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        self.names.append(name)
        if name in INDEXING:
            # Integer indices have a known shape.
            indices = [x for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)]
            makes_wait = any(x.dtype in (torch.bool, torch.uint8) for x in indices)
        else:
            makes_wait = any(tag in function.tags for tag in UNKNOWN_BEFORE)
        if makes_wait:
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


class HostReads(TorchFunctionMode):
    """Records in `names` the methods of tensors that copy to the host: the dispatcher does not see all of them on a CPU."""

    READS = ("cpu", "item", "numpy", "tolist", "__array__", "__bool__", "__float__", "__index__", "__int__")

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in self.READS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))
