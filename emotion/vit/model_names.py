"""The names of timm's models, without importing timm: that takes seconds and torch."""

import difflib
import re
from collections.abc import Collection
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from emotion.errors import SpecError

ENTRY_POINT = re.compile(r"^@register_model\s+def (\w+)\(", re.MULTILINE)
"""The declaration of a model in the source of timm."""


def names_in_sources() -> dict[str, bool]:
    """Model names of the installed timm, as from timm.list_models() → whether the model may be a ViT.

    A source file without patches and blocks, such as that of ResNets, declares no ViT. One with them may declare other models,
    such as Swin. Empty if timm or its source is not installed.
    """
    found = find_spec("timm")
    folders = [] if found is None else found.submodule_search_locations or []
    files = [path for folder in folders for path in Path(folder, "models").glob("*.py")]
    texts = [path.read_text(encoding="utf-8") for path in files]
    return {name: "patch_embed" in text and "blocks" in text for text in texts for name in ENTRY_POINT.findall(text)}


def not_a_vit(model: str) -> SpecError:
    return SpecError(f"vit.model: {model!r} is not a vision transformer with patches; try vit_tiny_patch16_224.")


def require_known(model: str, known: Collection[str]) -> None:
    """Raise SpecError for a model that timm does not have."""
    if model in known:
        return
    similar = difflib.get_close_matches(model, known)
    hint = f"; did you mean {' or '.join(similar)}?" if similar else "."
    raise SpecError(f"vit.model: timm {version('timm')} knows no model {model!r}{hint} Weights tags go into vit.weights.")
