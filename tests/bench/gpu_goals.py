"""The goals of tests/bench/gpu.py, and how each is computed from the measurements of the parts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CAP_GIB = 2.5


@dataclass(frozen=True)
class Goal:
    """A goal. at_most: whether smaller values are better. value: computes it from the results by part; raises KeyError if it was
    not measured."""

    name: str
    limit: float
    at_most: bool
    value: Callable[[dict[str, Any]], float]


def peak_gib(found: dict[str, Any]) -> float:
    peaks = [phase.get("peak_device_bytes", 0) for part in ("deam_t4", "deam") for phase in found[part]["phases"].values()]
    return float(max(peaks)) / 2**30


def songs_per_second(found: dict[str, Any], part: str, batch: int) -> float:
    return batch / float(found[part]["phases"]["gan"]["seconds_per_step"])


GOALS = (
    Goal("ViT-B/16, batch 12, in the job: ms per step", 10, True,
         lambda found: 1000 * found["deam_t4"]["phases"]["vit"]["seconds_per_step"]),
    Goal("ViT-B/16: times the notebook's loop", 4, False,
         lambda found: found["notebook"]["vit_ms"] / 1000 / found["deam_t4"]["phases"]["vit"]["seconds_per_step"]),
    Goal("ViT-S, batch 64, in the job: ms per step", 18, True,
         lambda found: 1000 * found["deam"]["phases"]["vit"]["seconds_per_step"]),
    Goal("GAN, 30 s clips: songs per second", 1000, False, lambda found: songs_per_second(found, "deam_t4", 48)),
    Goal("GAN: times the notebook's loop", 2, False,
         lambda found: songs_per_second(found, "deam_t4", 48) / found["notebook"]["gan_songs_per_second"]),
    Goal("first GAN step, seconds", 3, True, lambda found: found["deam_t4"]["phases"]["gan"]["seconds_to_first_step"]),
    Goal("features, seconds", 10, True, lambda found: found["deam_t4"]["phases"]["features"]["seconds"]),
    Goal("quality, seconds", 10, True, lambda found: found["deam"]["phases"]["quality"]["seconds"]),
    Goal("synthesis, seconds", 10, True, lambda found: found["deam"]["phases"]["synth"]["seconds"]),
    Goal("evaluate, seconds", 10, True, lambda found: found["deam"]["phases"]["evaluate"]["seconds"]),
    Goal("whole deam-t4, cold, seconds", 120, True, lambda found: found["deam_t4"]["seconds"]),
    Goal("whole deam, seconds, computed from a twentieth", 240, True, lambda found: found["deam"]["seconds_computed"]),
    Goal("peak allocated, GiB", CAP_GIB, True, peak_gib),
    Goal("GAN: speed within the cap", 0.95, False,
         lambda found: found["variants"]["gan_plain_seconds_per_step"] / found["variants"]["gan_capped_seconds_per_step"]),
    Goal("kernels' share of a GAN step", 0.9, False, lambda found: found["profile"]["gan_busy_share"]),
    Goal("kernels' share of a ViT step", 0.9, False, lambda found: found["profile"]["vit_busy_share"]),
)  # fmt: skip


def verdicts(found: dict[str, Any], is_toy: bool) -> list[list[str]]:
    """[goal, limit, value, verdict] of each goal."""
    rows = []
    for goal in GOALS:
        limit = f"{'at most' if goal.at_most else 'at least'} {goal.limit:g}"
        try:
            value = goal.value(found)
        except KeyError:
            rows.append([goal.name, limit, "", "not measured"])
            continue
        met = value <= goal.limit if goal.at_most else value >= goal.limit
        rows.append([goal.name, limit, f"{value:.3g}", "toy size" if is_toy else "met" if met else "missed"])
    return rows
