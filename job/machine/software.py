"""Checks of the allocator's setting and of the versions of libraries."""

import importlib.metadata
import os
import platform

from emotion.errors import EmotionError, LimitError, SpecError, to_install
from job.environment import ALLOCATOR_VARIABLES, available_threads, prepare_environment
from job.machine.check import Check, wrong
from job.machine.tested import TESTED

EXPANDABLE = "expandable_segments:True"


def prepare(threads: int | None) -> Check | None:
    """Set the variables that `run` sets before it imports torch. threads: device.threads. Returns the problems found."""
    try:
        threads = threads or available_threads()
    except SpecError as error:
        return wrong("threads", error)
    try:
        prepare_environment(threads)
    except EmotionError as error:
        return wrong("threads" if isinstance(error, LimitError) else "allocator", error)
    return None


def check_allocator(in_force: bool | None) -> Check:
    """Check the allocator's setting. in_force: whether torch reports expandable segments on the GPU; None without a GPU."""
    setting, variables = os.environ[ALLOCATOR_VARIABLES[0]], " and ".join(ALLOCATOR_VARIABLES)
    if EXPANDABLE not in setting:
        return Check(
            "allocator",
            "warn",
            f"{setting}: fragmented free GPU memory stays unused",
            f"Unset {variables}, unless this is a virtual GPU.",
        )
    if in_force is False:
        return Check("allocator", "warn", f"{setting} is set, but not in force on this GPU", "Trainings may need more memory.")
    read_back = "read back from torch" if in_force else "set before torch is imported; no GPU to read it back from"
    return Check("allocator", "ok", f"{setting}, {read_back}")


def check_versions() -> Check:
    """Compare installed libraries with those of container/constraints.txt."""
    others, absent = [], []
    for name, tested in TESTED.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
            continue
        if version.partition("+")[0] != tested:  # +cpu: the build
            others.append(f"{name} {version} (tested: {tested})")
    found = [f"not as tested: {', '.join(others)}"] if others else []
    found += [f"not installed: {', '.join(absent)}"] if absent else []
    if not found:
        return Check("versions", "ok", f"Python {platform.python_version()}, {len(TESTED)} libraries as tested")
    return Check("versions", "warn", "; ".join(found), f"Use our image. {to_install('job')}")
