"""The conditions under which a phase ran: equal bytes require equal conditions."""

import logging
from pathlib import Path
from typing import Any

from emotion.files import read_json, write_json

log = logging.getLogger(__name__)

CONDITIONS = ".conditions.json"  # in a phase's folder: condition → its values, in the order of the attempts
OF_A_PHASE = (
    "kind",
    "gpu",
    "cuda",
    "cpu",
    "precision",
    "threads",
    "deterministic",
    "micro_batch",
    "cuda_graphs",
    "stopped_after",
)
"""Conditions that may differ between phases: the device (emotion/training/device.py), micro-batch, whether steps are CUDA graphs,
and the step after which a budget has ended a training."""


def device_conditions(described: dict[str, Any]) -> dict[str, Any]:
    """The conditions among the properties of a device (emotion/training/device.py)."""
    return {name: described[name] for name in OF_A_PHASE if name in described}


def record_conditions(folder: Path, conditions: dict[str, Any]) -> None:
    """Add conditions to those of a phase. A condition gets a second value if the phase was resumed under another one."""
    recorded = read_conditions(folder)
    for name, value in conditions.items():
        values = recorded.setdefault(name, [])
        if value not in values:
            values.append(value)
    write_json(folder / CONDITIONS, recorded)


def read_conditions(folder: Path) -> dict[str, list[Any]]:
    """Condition → its values, in the order of the attempts."""
    try:
        recorded = read_json(folder / CONDITIONS)
    except FileNotFoundError:
        return {}
    except ValueError:
        recorded = None
    if not isinstance(recorded, dict) or not all(isinstance(values, list) for values in recorded.values()):
        log.warning("%s is damaged: the conditions of earlier attempts are lost", folder / CONDITIONS)
        return {}
    return recorded


def comparable_conditions(recorded: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
    """Condition → value, or a list of values if attempts or phases had different ones.
    recorded: phase → its conditions. Those in OF_A_PHASE are kept per phase, such as `gan.threads`."""
    merged: dict[str, list[Any]] = {}
    for phase, conditions in recorded.items():
        for name, values in conditions.items():
            together = merged.setdefault(f"{phase}.{name}" if name in OF_A_PHASE else name, [])
            together += [value for value in values if value not in together]
    return {name: values[0] if len(values) == 1 else values for name, values in merged.items()}
