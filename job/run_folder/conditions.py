"""Under which conditions a phase was made: what has to be equal for equal bytes."""

import logging
from pathlib import Path
from typing import Any

from emotion.files import read_json, write_json

log = logging.getLogger(__name__)

CONDITIONS = ".conditions.json"
"""In a phase's folder: under what it was made."""
OF_A_PHASE = ("kind", "gpu", "cuda", "cpu", "precision", "threads", "deterministic", "micro_batch")
"""Conditions that each phase has for itself: its device (emotion/training/device.py) and its micro-batch."""


def device_conditions(described: dict[str, Any]) -> dict[str, Any]:
    """What of a described device (emotion/training/device.py) has to be equal for equal bytes."""
    return {name: described[name] for name in OF_A_PHASE if name in described}


def note_conditions(folder: Path, facts: dict[str, Any]) -> None:
    """Add to what a phase's folder knows of how it was made. A fact with two values: it was gone on with under others."""
    noted = noted_conditions(folder)
    for name, value in facts.items():
        values = noted.setdefault(name, [])
        if value not in values:
            values.append(value)
    write_json(folder / CONDITIONS, noted)


def noted_conditions(folder: Path) -> dict[str, list[Any]]:
    """Fact → its values, in the order of the attempts."""
    try:
        noted: dict[str, list[Any]] = read_json(folder / CONDITIONS)
    except FileNotFoundError:
        return {}
    except ValueError:
        log.warning("%s is damaged: the conditions of earlier attempts are lost", folder / CONDITIONS)
        return {}
    return noted


def comparable_facts(noted: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
    """What has to be equal for equal bytes: fact → value, or the list of values where attempts or phases had different ones.

    noted: phase → its conditions. Facts of device and micro-batch stand for each phase, as `gan.threads`.
    """
    found: dict[str, list[Any]] = {}
    for phase, conditions in noted.items():
        for name, values in conditions.items():
            together = found.setdefault(f"{phase}.{name}" if name in OF_A_PHASE else name, [])
            together += [value for value in values if value not in together]
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}
