"""The command `export`: the ViT of a published run as a file for other programs."""

import os
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from emotion.errors import SpecError, StorageError, printable, system_reason, to_install
from job.environment import available_threads, prepare_environment
from job.results.manifest import verified_manifest
from job.results.sounds import fetched_model

SUFFIX = ".onnx"
LIBRARIES = ("onnx", "onnxscript", "onnxruntime")


def export_model(model: str, path: Path, should_stop: Callable[[], bool]) -> str:
    """Write the file, and return a line for the user. Raises SpecError for another suffix, an existing file and missing
    libraries, and what `export_onnx` raises."""
    if path.suffix.lower() != SUFFIX:
        raise SpecError(f"--onnx: {printable(path)} has to end in {SUFFIX}.")
    if os.path.lexists(path):
        raise SpecError(f"--onnx: {printable(path)} exists. Name another file, or remove it.")
    with tempfile.TemporaryDirectory() as name:
        folder = fetched_model(model, Path(name), should_stop)
        verified_manifest(folder)
        missing = [name for name in LIBRARIES if find_spec(name) is None]
        if missing:
            raise SpecError(f"export: needs {', '.join(missing)}, not installed here. {to_install('onnx')}")
        prepare_environment(available_threads())
        # Imported only now: they need a prepared environment.
        from emotion.config import DeviceConfig
        from emotion.training.device import resolve_device
        from emotion.vit.onnx_export import export_onnx

        device = resolve_device(DeviceConfig(kind="cpu"), "fp32")
        try:
            difference = export_onnx(folder / "model" if (folder / "model").is_dir() else folder, path, device)
        except OSError as error:
            raise StorageError.of(error, f"--onnx: cannot write {printable(path)}: {system_reason(error)}.") from error
    return f"{printable(path)}: the ViT of {printable(model)}; onnxruntime and torch differ by at most {difference:.1g}"
