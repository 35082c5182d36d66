"""Facts that Linux reports about this process, the processor, GPUs and file systems. Other systems report none."""

import contextlib
import errno
import os
import re
from pathlib import Path
from typing import Literal

STATUS, CPU_INFO = Path("/proc/self/status"), Path("/proc/cpuinfo")
MOUNTS, NVIDIA_DRIVER = Path("/proc/self/mountinfo"), Path("/proc/driver/nvidia/version")
DEVICE_FILES = Path("/dev")
READ_ONLY_FILE_SYSTEMS = ("erofs", "iso9660", "squashfs")  # squashfs: a SIF image


def read_field(path: Path, name: str) -> str | None:
    """The value of the first line `name: value` of a file; None if there is no such line or file."""
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return None


def memory_bytes(field: Literal["VmRSS", "VmHWM", "RssFile"], status: Path = STATUS) -> int | None:
    """Physical memory of a process: current (VmRSS), peak (VmHWM), currently of mapped files (RssFile). None if unknown."""
    value = read_field(status, field)
    return None if value is None else int(value.split()[0]) * 1024


def cpu_model(path: Path = CPU_INFO) -> str | None:
    """The model name of the processor; None if it is unknown, as for ARM processors."""
    return read_field(path, "model name")


def nvidia_driver(path: Path = NVIDIA_DRIVER) -> str | None:
    """Version of the NVIDIA driver, such as 550.54.15; None if none is loaded."""
    with contextlib.suppress(OSError):
        found = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d[\d.]*)", path.read_text(encoding="utf-8"))
        return found[1] if found else None
    return None


def file_system_type(path: Path, mounts: Path = MOUNTS) -> str:
    """Type of the file system of a path, such as ext4 or nfs4; an empty text if it is unknown."""
    return _mount_of(path, mounts)[0]


def is_mounted_read_only(path: Path) -> bool:
    """Whether the path is read-only on purpose: a read-only mount of a writable file system, or a file system type that is always
    read-only. False if the whole file system is read-only, for example remounted after an error."""
    kind, of_mount, of_file_system = _mount_of(path, MOUNTS)
    return kind in READ_ONLY_FILE_SYSTEMS or ("ro" in of_mount and "ro" not in of_file_system)


def _mount_of(path: Path, mounts: Path) -> tuple[str, list[str], list[str]]:
    """File system type, mount options and file system options of a path, from /proc/self/mountinfo (proc(5)); empty if that
    cannot be read."""
    deepest, found = -1, ("", list[str](), list[str]())
    try:
        lines = os.fsdecode(mounts.read_bytes()).split("\n")[:-1]
    except OSError:
        return found
    for line in lines:
        before, _, after = line.partition(" - ")
        mount, options = before.split()[4:6]
        # The kernel escapes blanks, tabs, line ends and backslashes.
        folder = Path(re.sub(r"\\([0-7]{3})", lambda escape: chr(int(escape[1], 8)), mount))
        if path.resolve().is_relative_to(folder) and len(folder.parts) >= deepest:
            deepest, found = len(folder.parts), (after.split()[0], options.split(","), after.split()[-1].split(","))
    return found


def has_gpu() -> bool:
    """Whether this process has access to an NVIDIA GPU, even if torch cannot use it.

    There must be a device file that the control group allows (SLURM denies it to a job without GPUs), and CUDA_VISIBLE_DEVICES
    must not hide all GPUs.
    """
    if os.getenv("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        return False
    for path in DEVICE_FILES.glob("nvidia[0-9]*"):
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOENT):  # denied by a control group; file permissions give EACCES
                continue
        return True
    return False
