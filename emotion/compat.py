"""The one module that imports timm.

timm imports torchvision, and the torchvision of the public index is a CUDA build: beside a CPU build of torch its C++ extension
does not load, and its Python part fails on two operators without schemas, which are therefore declared here and never called.
"""

import sys

import torch


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

import timm  # noqa: E402
from timm.layers.drop import DropPath  # noqa: E402
from timm.models import group_parameters  # noqa: E402

__all__ = ["DropPath", "group_parameters", "timm"]
