"""The one module that imports timm.

timm imports torchvision, and the torchvision of the public index is a CUDA build: with a CPU build of torch its C++ extension
does not load, and its Python part fails because two operators have no schema. This module declares them; nothing calls them.

timm also imports wandb if it is installed, but uses it in none of our calls. That import takes time, leaves temporary folders and
replaces methods of sys.stdout, so this module hides wandb from timm. A tracker can still import it.
"""

import contextlib
import copy
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def _import_torchvision() -> torch.library.Library | None:
    """Import torchvision. If its extension does not load, declare its operators first and return the library: keep it alive."""
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    else:
        return None
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

    return library


_TORCHVISION_SCHEMAS = _import_torchvision()


class _NoWandb:
    """A module finder that hides wandb in this thread only: a tracker may be importing it in another thread."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:  # noqa: ARG002 - the interface
        if name == "wandb" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError("hidden from timm", name=name)


@contextlib.contextmanager
def _without_wandb() -> Iterator[None]:
    finder = _NoWandb()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


with _without_wandb():
    import timm
    from timm.layers.drop import DropPath
    from timm.models import group_parameters

__all__ = ["DropPath", "before_each_load", "group_parameters", "timm"]


@contextlib.contextmanager
def before_each_load(inspect: Callable[[nn.Module, dict[str, Any]], None]) -> Iterator[None]:
    """Call `inspect` with a module and a copy of a state dict before any module in this process loads it. It may change the copy.

    timm only logs missing, surplus and unconvertible weights, and loads the rest. The names and shapes after timm's filters are
    visible at this point only: each model has its own filter, and the filters are not public.
    """
    load = nn.Module.load_state_dict

    def inspected(module: nn.Module, state_dict: dict[str, Any], *args: Any, **options: Any) -> Any:
        copied = copy.copy(state_dict)  # keeps the attribute `_metadata`
        inspect(module, copied)
        return load(module, copied, *args, **options)

    nn.Module.load_state_dict = inspected  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]
