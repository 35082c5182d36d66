"""Memory on the node: limit and kills of the launcher's own control group, and the larger request of a retry."""

import contextlib
import math
from pathlib import Path

from emotion.errors import ModelError, exit_codes

GROWTH = 1.5
"""Growth factor between attempts. It reaches any limit in few attempts, and requests less excess memory than doubling."""
OWN_GROUPS, MOUNTED_GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
GIBIBYTE = 2**30


def memory_groups(own: Path = OWN_GROUPS, root: Path = MOUNTED_GROUPS) -> list[Path]:
    """Folders of this process's memory control group and of its parents, innermost first (cgroups(7)); empty without any."""
    found: dict[int, tuple[Path, str]] = {}
    with contextlib.suppress(OSError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                found[1] = (root / "memory", path)
            elif not controllers:
                found[2] = (root, path)
    if not found:
        return []
    mount, path = found[min(found)]  # if both versions are mounted, version 1 controls the memory
    group = mount / path.lstrip("/")
    return [folder for folder in (group, *group.parents) if folder.is_relative_to(mount)]


def kills_for_memory(groups: list[Path]) -> int:
    """Number of processes of the innermost group that the kernel has ever killed for memory; 0 if there is no counter."""
    for name in ("memory.events", "memory.oom_control"):  # cgroups version 2, version 1
        with contextlib.suppress(OSError, IndexError):
            for line in (groups[0] / name).read_text(encoding="utf-8").splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value)
    return 0


def limit_bytes(groups: list[Path]) -> int | None:
    """The lowest limit of the groups in bytes; None without a limit."""
    limits = []
    for group in groups:
        for name in ("memory.max", "memory.limit_in_bytes"):  # cgroups version 2, version 1
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((group / name).read_text(encoding="utf-8")))
    lowest = min(limits, default=2**63)
    return lowest if lowest < 2**62 else None  # version 1 writes a number near 2**63 for no limit


def may_be_memory(exit_code: int) -> bool:
    """Whether a job may have ended because the kernel killed one of its processes: by a signal, or as it noticed the loss."""
    return exit_code == ModelError.exit_code or exit_code not in exit_codes()


def more_gib(now: float, at_most: float) -> float | None:
    """Memory of the next attempt in GiB, a whole number of MiB; None if `at_most` allows no more."""
    more = min(math.ceil(GROWTH * now * 1024), round(at_most * 1024))
    return more / 1024 if more > round(now * 1024) else None
