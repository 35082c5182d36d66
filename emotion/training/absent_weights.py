"""The error for a missing file of weights. A separate module, because the reader of such files imports torch."""

from pathlib import Path

from emotion.errors import DataError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
NAMED = 3  # files that a message names


def absent(path: Path, key: str) -> DataError:
    """The error for a missing file. key: the spec key that names it."""
    if path.is_symlink():
        return DataError(f"{key}: {path} is a link to {path.readlink()}, which is not here. Fetch that file.")
    return DataError(f"{key}: there is no file {path}. {_others_in(path.parent)}")


def _others_in(folder: Path) -> str:
    """What to do where a file is missing from a folder."""
    found = sorted(path.name for path in folder.glob("*") if path.name.endswith(SUFFIXES)) if folder.is_dir() else []
    if not found:
        return "Name a .safetensors file, a file of torch.save, or a folder with model.safetensors."
    return f"In its folder are {', '.join(found[:NAMED])}{' and others' if len(found) > NAMED else ''}: name one of them."
