"""`emotion-job doctor`: every check, one after the other. Works where torch is not installed."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emotion.config import DeviceConfig
from emotion.errors import AccessError, DataError, EmotionError, NodeError, SpecError, StorageError
from job.machine.check import Check, wrong
from job.machine.device import check_device
from job.machine.disk import check_disk, refuse_folders
from job.machine.notifications import check_notifications
from job.machine.software import check_allocator, check_versions, prepare
from job.machine.stores import check_stores
from job.spec.load import load_spec
from job.spec.model import JobSpec, run_name
from job.spec.strict_yaml import without_secret

WORST_FIRST: tuple[type[EmotionError], ...] = (NodeError, SpecError, DataError, AccessError, EmotionError, StorageError)
"""Precedence of errors: on a bad node other checks are unreliable, and transient errors come last."""


def examine(spec_path: Path | None, overrides: Sequence[str], work: Path, scratch: Path) -> Iterator[Check]:
    """Yield the result of every check. Must be called before torch is imported."""
    spec: JobSpec | None = None
    if spec_path is None and overrides:
        raise SpecError(f"--set {without_secret(overrides[0])}: doctor needs the SPEC whose value it replaces.")
    if spec_path is not None:
        try:
            spec = load_spec(spec_path, overrides)
            yield Check("spec", "ok", f"{spec_path}: valid, run {run_name(spec)}")
        except SpecError as error:
            yield from (wrong("spec", SpecError(problem), "Correct the spec.") for problem in error.problems)
    device = DeviceConfig() if spec is None else spec.device
    problem = prepare(device.threads)
    if problem is not None:
        yield problem
        yield Check(
            "device", "warn", "not checked, as torch would start with a wrong environment", "Fix the previous line first."
        )
    else:
        found, in_force = check_device(device, "auto" if spec is None else spec.precision)
        yield found
        yield check_allocator(in_force)
    yield check_versions()
    yield check_disk("work", work, must_survive=True)
    yield check_disk("scratch", scratch)
    if spec is not None:
        try:
            refuse_folders(spec, work, scratch)
        except SpecError as error:
            yield wrong("folders", error)
        yield from check_stores(spec)
        yield from check_notifications(spec.notify)


def exit_code_of(checks: Sequence[Check]) -> int:
    """The exit code; 0 if no check failed."""
    found = {check.exit_code for check in checks if check.status == "wrong"}
    return next((kind.exit_code for kind in WORST_FIRST if kind.exit_code in found), 0)


def as_report(checks: Sequence[Check]) -> dict[str, Any]:
    """The checks as a JSON-compatible dictionary."""
    return {"exit_code": exit_code_of(checks), "checks": [asdict(check) for check in checks]}
