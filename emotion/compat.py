"""The one module that imports timm.

timm imports torchvision, and the torchvision of the public index is a CUDA build: beside a CPU build of torch its C++ extension
does not load, and its Python part fails on two operators without schemas, which are therefore declared here and never called.

timm also imports wandb, where that is installed, and uses it in none of our calls. That takes time, leaves temporary folders and
replaces methods of sys.stdout. So timm does not find it; a tracker that imports it does.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


def _import_torchvision() -> torch.library.Library | None:
    """Import torchvision, declaring its operators first where its extension cannot. The library must be kept alive."""
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
    """A finder of modules that finds no wandb in this thread. In another one a tracker may be importing it now."""

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
def before_each_load(inspect: Callable[[nn.Module, Mapping[str, Any]], None]) -> Iterator[None]:
    """Call `inspect` with a module and a state dict before that is loaded, in all of torch.

    timm only logs what a file lacks, has left over or has in a form that it cannot convert, and loads the rest. Which names and
    shapes a file has after timm's filters can be seen at this one place: each model has its own, and they are not public.
    """
    load = nn.Module.load_state_dict

    def inspected(module: nn.Module, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        inspect(module, state_dict)
        return load(module, state_dict, *args, **options)

    nn.Module.load_state_dict = inspected  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]
