"""The device that a job would compute on."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from emotion.config import DeviceConfig, Precision
from emotion.errors import EmotionError, as_failure
from emotion.proc import cpu_model, has_gpu, nvidia_driver
from job.machine.check import Check, wrong

if TYPE_CHECKING:
    from emotion.training.device import Device

FREE_SHARE = 0.8  # expected share of free memory on an otherwise idle GPU; torch itself takes some hundred MB


def check_device(config: DeviceConfig, precision: Precision) -> tuple[Check, bool | None]:
    """The check of the device, and whether the GPU's allocator uses expandable segments (None without a GPU). Imports torch, so
    the environment must have been prepared."""
    if find_spec("torch") is None:
        gpu = f"there is a GPU, driver {nvidia_driver()}" if has_gpu() else "there is no GPU"
        remedy = "Call it with the Python or the image that runs the job."
        return Check("device", "warn", f"torch is not installed here, so nothing was computed; {gpu}", remedy), None
    try:
        from emotion.training.device import resolve_device

        device = resolve_device(config, precision)
        if device.device.type == "cuda":
            return _described_gpu(device)
    except EmotionError as error:
        return wrong("device", error), None
    except (ImportError, OSError, RuntimeError) as error:
        failure = as_failure(error)
        assert isinstance(failure, EmotionError)
        return wrong("device", failure), None
    found = f"CPU {cpu_model() or 'of unknown model'}, {device.threads} threads, {device.precision}; it computes a small product"
    if config.kind == "auto" and (driver := nvidia_driver()):
        remedy = "Ask for one: docker run --gpus all, apptainer --nv, gpus of a cluster file."
        return Check("device", "warn", f"{found}; there is an NVIDIA driver {driver}, but no GPU for this process", remedy), None
    return Check("device", "ok", found), None


def _described_gpu(device: "Device") -> tuple[Check, bool]:
    import torch

    properties, (free, total) = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info()
    found = (
        f"{properties.name}, driver {nvidia_driver()}, CUDA {torch.version.cuda}, compute capability {properties.major}."
        f"{properties.minor}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, {device.precision}; it computes a small product"
    )
    in_force = bool(device.describe()["expandable_segments"])
    if free < FREE_SHARE * total:
        remedy = "Another process uses it: see nvidia-smi, end that or ask for another GPU."
        return Check("device", "warn", found, remedy), in_force
    return Check("device", "ok", found), in_force
