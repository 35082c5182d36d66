"""Settings: runs are comparable if they have the same *setting*, a spec without its name, seeds, fold and runtime keys."""

import json
from collections.abc import Collection, Sequence
from typing import Any

from emotion.config import Section, is_runtime
from job.results.manifest import dotted
from job.spec.model import JobSpec

VARIED = {"name", "seed", "split.seed", "split.fold"}
"""Keys in which the runs of one setting may differ: the folds of a set, and sets of other seeds."""

LONGEST_LABEL = 60  # characters; longer headings need several lines on a page or a terminal


def setting_of(spec: dict[str, Any]) -> dict[str, Any]:
    """The setting of a spec: dotted key → value. spec: JSON, such as that of a manifest."""
    values = dotted(spec)
    return {key: values[key] for key in sorted(values.keys() - VARIED - _runtime_keys())}


def _runtime_keys() -> set[str]:
    """Dotted keys of the spec that do not affect results, such as device.kind and gan.micro_batch."""
    return {
        f"{name}.{field.alias or key}"
        for name, section in JobSpec.model_fields.items()
        if isinstance(section.annotation, type) and issubclass(section.annotation, Section)
        for key, field in section.annotation.model_fields.items()
        if is_runtime(field)
    }


def differing_keys(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Sorted keys whose values are not the same in all settings."""
    keys = sorted({key for setting in settings for key in setting})
    return [key for key in keys if len({text_of(setting, key) for setting in settings}) > 1]


def text_of(setting: dict[str, Any], key: str) -> str:
    if key not in setting:
        return "(none)"
    value = setting[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def labels_of(settings: Sequence[dict[str, Any]], names: Sequence[Collection[str]]) -> list[str]:
    """A short, unique label for each setting: the values in which settings differ, if these texts are short; else its names, with
    the number of the setting if two have the same names. A single setting is labelled by its names.

    names: for each setting, such as those of its runs.
    """
    keys = differing_keys(settings)
    labels = [values_text(setting, keys) for setting in settings]
    if len(settings) > 1 and max(map(len, labels)) <= LONGEST_LABEL:
        return labels
    labels = [names_text(found) for found in names]
    if len({*labels}) < len(labels):
        labels = [f"{label} ({number})" for number, label in enumerate(labels, 1)]
    return labels


def values_text(setting: dict[str, Any], keys: Sequence[str]) -> str:
    """gan.epochs=20.0, vit.epochs=9.0"""
    return ", ".join(f"{key}={text_of(setting, key)}" for key in keys)


def names_text(names: Collection[str]) -> str:
    """Sorted names; if that is too long, the first name and the number of the others."""
    ordered = sorted({*names})
    text = ", ".join(ordered)
    return text if len(text) <= LONGEST_LABEL or len(ordered) == 1 else f"{ordered[0]} and {len(ordered) - 1} more"
