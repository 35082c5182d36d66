"""Device, precision and threads of a computation: resolved once, recorded in the manifest."""

import contextlib
import functools
import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from emotion.config import DeviceConfig, Precision
from emotion.errors import ModelError, NodeError
from emotion.proc import has_gpu

log = logging.getLogger(__name__)

ResolvedPrecision = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Device:
    """A resolved device. It provides autocast and loss scaler, so that trainings need no case distinctions."""

    device: torch.device
    precision: ResolvedPrecision
    threads: int
    deterministic: bool
    cap_bytes: int | None = None  # of `device.gpu_memory_gib`: the most that the GPU's allocator gives

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision for a forward pass; nothing for fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def scaler(self) -> "LossScaler":
        """A loss scaler, active in fp16 only."""
        return LossScaler(self.device.type, enabled=self.precision == "fp16")

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a host tensor to the device: pinned and asynchronous on a GPU."""
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def write(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy a host tensor into one that stays where it is on the device: pinned and asynchronous on a GPU."""
        target.copy_(source if self.device.type == "cpu" else source.pin_memory(), non_blocking=True)

    def fetch(self, tensor: torch.Tensor) -> "Fetched":
        """Start to copy a tensor to the host: done at once on a CPU, pinned and asynchronous on a GPU."""
        if self.device.type == "cpu":
            return Fetched(tensor, None)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record()
        return Fetched(host, arrival)

    def free_bytes(self) -> int | None:
        """Memory for new tensors on a GPU, within the cap; None on a CPU."""
        if self.device.type == "cpu":
            return None
        allocated = torch.cuda.memory_allocated()
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - allocated
        return free if self.cap_bytes is None else min(free, self.cap_bytes - allocated)

    def describe(self) -> dict[str, Any]:
        """Properties that decide whether two runs can be equal to the byte, for the manifest."""
        description: dict[str, Any] = {"kind": self.device.type, "machine": platform.machine()}
        description |= {name: getattr(self, name) for name in ("precision", "threads", "deterministic")}
        description["cpu"] = torch.backends.cpu.get_cpu_capability()
        if self.cap_bytes is not None:
            description["gpu_memory_cap_gib"] = self.cap_bytes / 2**30
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            description |= {
                "gpu": properties.name,
                "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
                "cuda": torch.version.cuda,
                "expandable_segments": _expandable_segments_in_force(),
            }
        return description


@dataclass(frozen=True)
class Fetched:
    """A tensor on its way to the host."""

    _host: torch.Tensor
    _arrival: torch.cuda.Event | None

    def is_here(self) -> bool:
        """Does not wait."""
        return self._arrival is None or self._arrival.query()

    def wait(self) -> torch.Tensor:
        """The tensor on the host."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._host


class LossScaler(torch.amp.GradScaler):
    """A GradScaler that also loads the state of a run in another precision."""

    def scale_on_device(self) -> torch.Tensor | None:
        """The scale, a scalar, without waiting for it. None before the first loss and where losses are not scaled."""
        return self._scale if self.is_enabled() else None

    def forget_failed_step(self) -> None:
        """Reset after a step that has ended between `unscale_` and `update`: its capture as a graph failed."""
        if self.is_enabled():
            self._per_optimizer_states.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if bool(state_dict) != self.is_enabled():
            log.warning(
                "precision differs from that of the checkpoint (fp16 %s here): the result will differ from an uninterrupted run",
                "begins" if self.is_enabled() else "ends",
            )
            return
        super().load_state_dict(state_dict)


def resolve_device(config: DeviceConfig, precision: Precision) -> Device:
    """Choose device, precision and threads, and set torch's global switches accordingly.

    precision auto is bf16 where the device has it (CPU too), else fp16 on a GPU and fp32 on a CPU.
    Raises ModelError where the device or precision asked for is not available, NodeError for a device that is there and does not
    compute.
    """
    kind = "cpu"
    if config.kind == "cuda" or (config.kind == "auto" and (torch.cuda.is_available() or has_gpu())):
        reason = why_no_gpu()
        # Of a GPU that this process was given, another node may have a better one. Without CUDA in torch, none would do.
        error = NodeError if torch.version.cuda is not None and has_gpu() else ModelError
        if reason is not None and config.kind == "cuda":
            raise error(
                f"device: the spec asks for cuda, and there is no usable GPU: {reason} Start the job where there is one (in a "
                f"container: --nv or --gpus all), or set device.kind to auto or cpu."
            )
        if reason is not None:
            raise error(
                f"device: there is a GPU that cannot be used: {reason} Correct that, or compute without it: device.kind cpu, or "
                f"CUDA_VISIBLE_DEVICES=-1."
            )
        kind = "cuda"
    elif not computes(torch.device("cpu")):
        raise NodeError("device: this CPU computes wrong numbers. Run the job on another node, and have this one examined.")
    deterministic = config.deterministic if config.deterministic is not None else kind == "cpu"
    torch.use_deterministic_algorithms(deterministic)
    # Filling new memory takes a sixth of a step and only helps code that reads memory it never wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if kind == "cuda":
        torch.cuda.set_stream(_stream())
        # cuDNN's benchmark took 20 s in the GAN's first step on an H100, and its choice varied between runs.
        torch.backends.cudnn.benchmark = False
    threads = config.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    resolved = _resolve_precision(kind, precision)
    # torch's own default computes convolutions in TF32 (10 bits) and calls it fp32.
    torch.backends.cuda.matmul.allow_tf32 = resolved != "fp32"
    torch.backends.cudnn.allow_tf32 = resolved != "fp32"
    cap_bytes = None if config.gpu_memory_gib is None else round(config.gpu_memory_gib * 2**30)
    if cap_bytes is not None and kind == "cuda":
        cap_memory(cap_bytes, torch.cuda.get_device_properties(0).total_memory)
    return Device(torch.device(kind), resolved, threads, deterministic, cap_bytes)


@functools.cache
def _stream() -> torch.cuda.Stream:
    """The one stream of this process. A step cannot be captured as a graph on the default one; and the allocator gives a block
    to one stream alone, and cuBLAS has a workspace of 32 MiB for each."""
    return torch.cuda.Stream()


@functools.cache
def why_no_gpu() -> str | None:
    """Why torch cannot compute on the first GPU, as a sentence; None if it can, as a small product has shown."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built for CPUs only."
    try:
        torch.cuda.init()
        capability, architectures = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
        if not is_built_for(capability, architectures):
            return (
                f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, and torch "
                f"{torch.__version__} is built for {', '.join(architectures)}."
            )
        if not computes(torch.device("cuda")):
            return f"{torch.cuda.get_device_name()} computes wrong numbers."
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        # The driver is missing, too old or broken; memory is full; another process has the GPU exclusively.
        reason = str(error).splitlines()[0].rstrip(".") + "."
        setting = os.getenv("PYTORCH_ALLOC_CONF", "")
        if "driver error" in reason and "expandable_segments:True" in setting:
            # CUDA's functions for virtual memory, which many virtual GPUs do not have.
            reason += " If this is a virtual GPU, set PYTORCH_ALLOC_CONF=expandable_segments:False."
        return reason
    return None


def is_built_for(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a build with these architectures, such as sm_90, has code for a GPU of this compute capability.

    Machine code (sm_90) runs on the same major version with an equal or later minor one; PTX (compute_90) on everything later;
    code with a letter at its end (sm_90a) is ignored. Source: CUDA C++ Programming Guide.
    """
    for architecture in architectures:
        kind, _, version = architecture.partition("_")
        if version.isdecimal():
            major, minor = divmod(int(version), 10)
            if kind == "sm" and major == capability[0] and minor <= capability[1]:
                return True
            if kind == "compute" and (major, minor) <= capability:
                return True
    return False


def computes(device: torch.device) -> bool:
    """Whether a device multiplies two small matrices correctly. Without cuBLAS, which would keep a workspace."""
    numbers = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], device=device)
    return (numbers[:, None] * numbers).sum(dim=2).tolist() == [[5.0, 14.0], [14.0, 50.0]]


def cap_memory(cap_bytes: int, total_bytes: int) -> None:
    """Limit torch's allocator on the first GPU. Raises ModelError if the limit exceeds the memory of the GPU."""
    if cap_bytes > total_bytes:
        raise ModelError(
            f"device: gpu_memory_gib is {cap_bytes / 2**30:g}, but this GPU has {total_bytes / 2**30:.1f} GiB. Lower it or leave "
            f"it out."
        )
    torch.cuda.set_per_process_memory_fraction(cap_bytes / total_bytes)


def _resolve_precision(kind: str, precision: Precision) -> ResolvedPrecision:
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if kind == "cuda" else _cpu_has_bf16()
    if precision == "auto":
        return "bf16" if has_bf16 else "fp16" if kind == "cuda" else "fp32"
    if precision == "bf16" and not has_bf16:
        raise ModelError(f"device: this {kind} does not compute in bf16. Set precision to auto or fp32.")
    if precision == "fp16" and kind == "cpu":
        raise ModelError("device: fp16 on a CPU is slower than fp32 and less exact. Set precision to auto or fp32.")
    return precision


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies in bf16; without that torch emulates it, slower than fp32."""
    abilities = torch.cpu.get_capabilities()
    return any(abilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _expandable_segments_in_force() -> bool:
    """Whether the allocator uses expandable segments, read back from it after an allocation."""
    torch.empty(1, device="cuda")
    return any(segment.get("is_expandable", False) for segment in torch.cuda.memory_snapshot())
