"""What makes two runs comparable: a *setting* is a spec without its name, seeds, fold and runtime keys."""

from typing import Any

from emotion.config import Section, is_runtime
from job.results.manifest import dotted
from job.spec.model import JobSpec

VARIED = {"name", "seed", "split.seed", "split.fold"}
"""Keys in which the runs of one setting may differ: the folds of a set, and sets of other seeds."""


def setting_of(spec: dict[str, Any]) -> dict[str, Any]:
    """Dotted key → value. spec: JSON, such as that of a manifest."""
    values = dotted(spec)
    return {key: values[key] for key in sorted(values.keys() - VARIED - _runtime_keys())}


def _runtime_keys() -> set[str]:
    """Dotted keys of the spec that change no result, such as device.kind and gan.micro_batch."""
    return {
        f"{name}.{field.alias or key}"
        for name, section in JobSpec.model_fields.items()
        if isinstance(section.annotation, type) and issubclass(section.annotation, Section)
        for key, field in section.annotation.model_fields.items()
        if is_runtime(field)
    }
