"""Peak memory of a phase: of its process, and of the GPU if torch uses one."""

import contextlib
import resource
import sys
from pathlib import Path

from emotion.proc import memory_bytes


def reset_peak_memory() -> None:
    """Reset the kernel's peak memory counter, so that it covers this phase only, where supported (proc(5), clear_refs)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_memory(other_processes: int = 0) -> dict[str, int]:
    """Peak memory in bytes, of the process and the device. other_processes: peak bytes of processes that the phase started."""
    peak = memory_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"peak_process_bytes": peak + other_processes}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found["peak_device_bytes"] = torch.cuda.max_memory_allocated()
        found["peak_reserved_device_bytes"] = torch.cuda.max_memory_reserved()
    return found
