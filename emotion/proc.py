"""What Linux says under /proc of this process and of the processor. On other systems there is nothing to read."""

import contextlib
from pathlib import Path
from typing import Literal

STATUS, CPU_INFO = Path("/proc/self/status"), Path("/proc/cpuinfo")


def read_field(path: Path, name: str) -> str | None:
    """The value of the first line `name: value` of a file; None where there is none, or no such file."""
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return None


def memory_bytes(field: Literal["VmRSS", "VmHWM", "RssFile"], status: Path = STATUS) -> int | None:
    """Physical memory of a process: now (VmRSS), at its peak (VmHWM), now of mapped files (RssFile)."""
    value = read_field(status, field)
    return None if value is None else int(value.split()[0]) * 1024


def cpu_model(path: Path = CPU_INFO) -> str | None:
    """The processor's name for itself; ARM processors have none."""
    return read_field(path, "model name")
