"""Read files of weights, identify files of other kinds, and load weights strictly."""

import contextlib
import errno
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from emotion.errors import DataError, StorageError, first_of
from emotion.files import errors_name
from emotion.training.absent_weights import absent
from emotion.training.memory_backoff import is_out_of_memory

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LONGEST_HEADER = 100_000_000  # bytes; the limit of safetensors itself
NAMED = 3  # tensors that a message names before it counts the rest
DAMAGED = "is cut short or damaged. Copy or download it again"
KINDS = {
    b"version https://git-lfs": "is a git-lfs pointer, not the weights. Run `git lfs pull` where it comes from",
    b"/annex/objects/": "is a git-annex pointer, not the weights. Run `git annex get` where it comes from",
    b"\x1f\x8b": "is compressed with gzip. Unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd. Unpack it",
    b"\xfd7zXZ": "is compressed with xz. Unpack it",
    b"BZh": "is compressed with bzip2. Unpack it",
    b"7z\xbc\xaf": "is a 7z archive. Unpack it",
    b"Rar!": "is a rar archive. Unpack it",
    b"\x89HDF": "is HDF5, as Keras writes it. Convert its tensors to .safetensors",
    b"GGUF": "is GGUF, with quantised weights. Name a .safetensors file of the model",
    b"\x93NUMPY": "is a single numpy array. Save the weights by their names as .safetensors",
}
"""First bytes of files that hold no weights that can be read → what they are, and what to do."""
# What safetensors, and torch's unpickler and reader of zip files, raise for damaged bytes.
DECODING_ERRORS = (
    SafetensorError,
    RuntimeError,
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


@contextlib.contextmanager
def safetensors_errors_as_os_errors(folder: Path) -> Iterator[None]:
    """Raise OSError where the system refused a write of safetensors, whose own error has the number in its text only.
    folder: where it writes."""
    try:
        with errors_name(folder):
            yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


def read_weights_file(path: Path, key: str) -> Mapping[Any, Any]:
    """What a .safetensors file, a file of torch.save or an archive of numpy holds, whatever its suffix. Only tensors and plain
    values are unpickled.

    key: of the spec, for messages. Raises DataError for any other file, StorageError where the disk cannot be read.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{key}: {path} is a {'folder' if path.is_dir() else 'device or pipe'}. Name a file of weights.")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise absent(path, key) from error
    except OSError as error:
        raise StorageError.of(error, f"{key}: {path} cannot be read: {error.strerror}") from error
    is_safetensors = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < LONGEST_HEADER
    problem = None if is_safetensors else _what_it_is(path, head)
    if problem is not None:
        raise DataError(f"{key}: {path} {problem}.")
    try:
        content = load_file(path) if is_safetensors else _arrays(path, key) if _is_numpy(path, head) else _torch_load(path)
    except UnpicklingError as error:
        raise DataError(f"{key}: {path} {_why_not_unpickled(str(error))}.") from error
    except DECODING_ERRORS as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{key}: {path} {DAMAGED} ({reason}).") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # a damaged archive sends its reader to a place before the file
            raise DataError(f"{key}: {path} {DAMAGED} ({error.strerror}).") from error
        raise StorageError.of(error, f"{key}: {path} cannot be read: {error.strerror or error}") from error
    if not isinstance(content, Mapping):
        raise DataError(
            f"{key}: {path} holds a {type(content).__name__}, expected a mapping of names to tensors. Save a state dict."
        )
    return content


def _is_numpy(path: Path, head: bytes) -> bool:
    if not head.startswith(b"PK"):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(".npy") for name in archive.namelist())


def _arrays(path: Path, key: str) -> dict[str, Tensor]:
    """The arrays of a .npz file. Raises DataError for one that is not made of numbers, which could run any program."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        found = {}
        for name in archive.files:
            try:
                found[name] = torch.from_numpy(archive[name])
            except (ValueError, TypeError) as error:
                raise DataError(f"{key}: {path} holds {name}, no array of numbers ({error}). Save only the weights.") from error
        return found


def _torch_load(path: Path) -> Any:
    # From an open file: by a name that ends in .safetensors torch would not read its own format.
    with path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _what_it_is(path: Path, head: bytes) -> str | None:
    """What a file is by its first bytes, and what to do; None for one that torch may read."""
    for start, kind in KINDS.items():
        if head.startswith(start):
            return kind
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head.strip(b"\0"):
        return "is full of zero bytes. Copy or download it again" if head else "is empty. Copy or download it again"
    if head[257:262] == b"ustar":
        return "is a tar archive. Unpack it"
    if head.startswith(b"PK"):
        return _what_zip_it_is(path)
    if head[:1] == b"\x80":
        return None
    if text[:1] == b"<":
        return "is a web page or another XML text, not the weights. Download the file itself"
    if text[:1] in (b"{", b"["):
        return "is JSON text, not the weights. Name the file of weights that it belongs to"
    if all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return f"is a text ({head[:40].decode('ascii', 'backslashreplace')!r} …), not the weights. Download the file itself"
    return "has no format that is known here. Save the weights as .safetensors"


def _what_zip_it_is(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        return DAMAGED
    files = {name.rpartition("/")[2] for name in names}
    if "data.pkl" in files:
        return (
            "is TorchScript, a program. Save only its tensors: torch.jit.load(FILE).state_dict()"
            if "constants.pkl" in files
            else None
        )
    if any(name.endswith(".npy") for name in files):
        return None
    return f"is a zip archive of other files ({', '.join(names[:NAMED])}). Unpack it"


def _why_not_unpickled(error: str) -> str:
    """torch's own message advises to switch its check off, which lets the file run any program."""
    found = re.search(r"GLOBAL ([\w.]+)", error) or re.search(r"[Uu]nsupported class ([\w.]+)", error)
    if found is None:
        return f"{DAMAGED}; or it is a pickle that torch.save did not write"
    return (
        f"holds Python objects ({found[1]}) besides tensors, and those can run any program. Save only the tensors: where the "
        f"file is trusted, content = torch.load(FILE, weights_only=False), then torch.save(content['state_dict'], NEW_FILE), or "
        f"content.state_dict() of a whole model"
    )


def misfit(network: nn.Module, state: Mapping[str, Any], may_lack: Collection[str] = ()) -> str | None:
    """Why a state dict does not fit a network by names and shapes, None where it does."""
    expected = network.state_dict()
    missing = [name for name in expected if name not in state and name not in may_lack]
    left_over = [name for name in state if name not in expected]
    shapes = [
        f"{name} {list(state[name].shape)} for {list(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    parts = {"it lacks": missing, "it has, left over,": left_over, "it has other shapes:": shapes}
    return "; ".join(f"{what} {first_of(names, NAMED)}" for what, names in parts.items() if names) or None


def bad_values(network: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """Which tensors of a state dict that fits cannot be weights: no data, other types than floating ones, NaN, infinity."""
    expected = network.state_dict()
    found = []
    for name, tensor in state.items():
        if tensor.is_meta:
            found.append(f"{name} has no data")
        elif expected[name].is_floating_point() and (tensor.dtype not in FLOATS or tensor.layout != torch.strided):
            kind = "" if tensor.layout == torch.strided else "sparse "
            found.append(f"{name} is {kind}{str(tensor.dtype).removeprefix('torch.')}")
        elif tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            found.append(f"{name} holds NaN or infinity")
    return first_of(found, NAMED) if found else None


def load_strictly(network: nn.Module, path: Path, key: str) -> None:
    """Load a file of ours. Raises DataError where anything is missing, left over, of another shape or type, or not finite."""
    state = dict(read_weights_file(path, key))
    problem = misfit(network, state) or bad_values(network, state)
    if problem is not None:
        raise DataError(f"{key}: {path} does not fit: {problem}. Another version made it, or it is damaged.")
    network.load_state_dict(state)
