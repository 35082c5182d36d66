import argparse
import io
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

from emotion.errors import DataError
from emotion.training.weight_files import load_strictly, read_weights_file

TENSORS = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.ones(2)}


def saved(content: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def legacy(content: object) -> bytes:
    return saved(content, _use_new_zipfile_serialization=False)


def arrays(**content: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **content)
    return file.getvalue()


def numpy_archive(tensors: dict[str, torch.Tensor]) -> bytes:
    return arrays(**{name: tensor.numpy() for name, tensor in tensors.items()})


def zipped(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, b"x")
    return file.getvalue()


def torchscript() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), file)
    return file.getvalue()


@pytest.mark.parametrize("make", [saved, legacy, save, numpy_archive])
@pytest.mark.parametrize("suffix", ["pth", "safetensors", "bin", "ckpt", "npz", ""])
def test_a_format_is_known_by_its_content_and_not_by_its_name(make: Callable[..., bytes], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(make(TENSORS))
    found = read_weights_file(path, "key")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in TENSORS.items()
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-lfs pointer.*git lfs pull"),
        (b"/annex/objects/SHA256E-s9--0.pth\n", "is a git-annex pointer.*git annex get"),
        (b"<!DOCTYPE html><html>Virus scan warning</html>", "is a web page.*Download the file itself"),
        (b"\n  <?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page or another XML text"),
        (b'{"metadata": {"total_size": 1}, "weight_map": {}}', "is JSON text"),
        (b'{"ABCD": {"a": 1}}', "is JSON text"),
        (b"", "is empty"),
        (bytes(4096), "is full of zero bytes"),
        (b"Entry not found", "is a text .'Entry not found' …., not the weights"),
        (b"\x1f\x8b\x08\0" + bytes(99), "is compressed with gzip. Unpack it"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "is HDF5"),
        (b"GGUF\x03\0\0\0" + bytes(99), "is GGUF"),
        (b"model/" + bytes(251) + b"ustar\0" + bytes(249), "is a tar archive"),
        (b"\x08\x07\x12\x07pytorch", "has no format that is known here"),
        (arrays(a=np.array([Path()], object)), r"holds a, no array of numbers \(Object arrays cannot be loaded"),
        (arrays(a=np.array(["x"])), "holds a, no array of numbers"),
        (arrays(a=np.ones(9))[:-40], "is cut short or damaged"),
        (zipped("model.pth"), r"is a zip archive of other files \(model\.pth\)\. Unpack it"),
        (saved(TENSORS)[:-40], "is cut short or damaged"),
        (legacy(TENSORS)[:-40], "is cut short or damaged"),
        (save(TENSORS)[:-4], "is cut short or damaged"),
        (saved([torch.ones(1)]), "holds a list, expected a mapping"),
        (pickle.dumps(TENSORS, protocol=4), "a pickle that torch.save did not write"),
        (saved({"state_dict": TENSORS, "args": argparse.Namespace(lr=1)}), r"\(argparse\.Namespace\).*weights_only=False"),
        (legacy({"state_dict": TENSORS, "args": argparse.Namespace(lr=1)}), r"\(argparse\.Namespace\).*weights_only=False"),
        (saved(nn.Linear(2, 2)), r"\(torch\.nn\.modules\.linear\.Linear\).*content\.state_dict\(\)"),
    ],
)
def test_a_file_that_holds_no_weights_is_named_for_what_it_is(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^key: {path} [^\n]*{words}[^\n]*$"):
        read_weights_file(path, "key")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_program_is_not_read(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    for make in (saved, legacy):
        (tmp_path / "w.pth").write_bytes(make({"a": Evil()}))
        with pytest.raises(DataError, match="besides tensors"):
            read_weights_file(tmp_path / "w.pth", "key")
    (tmp_path / "w.pth").write_bytes(torchscript())
    with pytest.raises(DataError, match="is TorchScript"):
        read_weights_file(tmp_path / "w.pth", "key")
    assert not (tmp_path / "executed").exists()


def test_what_is_no_regular_file_or_absent_is_said_and_the_files_beside_it_are_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for path, words in [
        (tmp_path / "model", "is a folder"),
        (Path("/dev/zero"), "is a device or pipe"),
        (tmp_path / "model" / "model.safetensors", "there is no file .*Name a .safetensors file"),
        (tmp_path / "absent" / "model.safetensors", "there is no file"),
    ]:
        with pytest.raises(DataError, match=words):
            read_weights_file(path, "key")
    (tmp_path / "model" / "pytorch_model.bin").touch()
    with pytest.raises(DataError, match=r"there is no file .*In its folder are pytorch_model\.bin: name one of them"):
        read_weights_file(tmp_path / "model" / "model.safetensors", "key")


@pytest.mark.parametrize("make", [saved, legacy, save, numpy_archive])
def test_damage_anywhere_is_read_or_refused_and_never_another_exception(make: Callable[..., bytes], tmp_path: Path) -> None:
    whole, draws, path = make(TENSORS), random.Random(0), tmp_path / "w.pth"
    refused = 0
    for round_ in range(300):
        damaged = bytearray(whole)
        if round_ % 3:
            damaged[draws.randrange(len(whole))] = draws.randrange(256)
        else:
            del damaged[draws.randrange(len(whole)) :]
        path.write_bytes(damaged)
        try:
            read_weights_file(path, "key")
        except DataError:
            refused += 1
    assert refused >= 100, "a file that is cut anywhere is refused"


def test_our_own_files_are_loaded_whole_or_not_at_all(tmp_path: Path) -> None:
    network, path = nn.Sequential(nn.Linear(3, 2)), tmp_path / "w.safetensors"
    state = {"0.weight": torch.ones(2, 3), "0.bias": torch.zeros(2)}
    for changed, words in [
        ({"0.bias": None}, "it lacks 0.bias"),
        ({"1.bias": torch.ones(2)}, "it has, left over, 1.bias"),
        ({"0.bias": torch.ones(3)}, r"0\.bias \[3\] for \[2\]"),
        ({"0.bias": torch.ones(2, dtype=torch.int8)}, "0.bias is int8"),
        ({"0.bias": torch.tensor([1.0, torch.inf])}, "0.bias holds NaN or infinity"),
        ({"0.bias": torch.ones(2, device="meta")}, "0.bias has no data"),
    ]:
        torch.save({name: tensor for name, tensor in {**state, **changed}.items() if tensor is not None}, path)
        with pytest.raises(DataError, match=words):
            load_strictly(network, path, "key")
    save_file(state, path)
    load_strictly(network, path, "key")
    assert network[0].weight.eq(1).all()
    assert load_file(path).keys() == network.state_dict().keys()


def test_a_link_to_nothing_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "w.pth").symlink_to(".git/annex/objects/w.pth")
    with pytest.raises(DataError, match=r"is a link to \.git/annex/objects/w\.pth, which is not here"):
        read_weights_file(tmp_path / "w.pth", "key")
