"""Signs that a training goes wrong, each with the setting to change. `Progress.warn_once` reports each of them once.

Every rule reads numbers that are recorded anyway and returns a warning or None. The limits are wide: a run with a warning
deserves a look; a run without one may still be poor. A record: one of the about 200 lines per phase in metrics.jsonl.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

WINDOW = 50  # records that a verdict on the discriminator rests on: a quarter of a phase
ACCURACY_RANGE = (0.5, 0.97)  # at the end of a training
LOST_BELOW, LOST_ABOVE = 0.02, 0.995  # accuracy, while the training runs
DEAD_UPDATE_RATIO = 1e-6
NOT_LEARNING_BELOW = 0.1  # CCC on training songs
LARGEST_GAP = 0.3  # CCC on training songs minus CCC on validation songs
EPOCHS_IN_A_ROW = 3
LARGEST_COPY_EXCESS = 0.1
LEAST_DIVERSITY = 0.3


def discriminator_accuracy(accuracies: Sequence[float], ended: bool) -> str | None:
    """accuracies: share of pairs that it told apart, one per record. Before the end only one near 0 or 1 gives a warning."""
    recent = accuracies[-WINDOW:]
    if not ended and len(recent) < WINDOW:
        return None
    mean = sum(recent) / len(recent)
    low, high = ACCURACY_RANGE if ended else (LOST_BELOW, LOST_ABOVE)
    finding = "the discriminator was right for {:.0%} of the last pairs; {:.0%} to {:.0%} is healthy".format(
        mean, *ACCURACY_RANGE
    )
    if mean > high:
        return (
            f"{finding}. The generator learns little from it: raise gan.penalty_weight or lower gan.discriminator_learning_rate."
        )
    if mean < low:
        return f"{finding}. It is behind the generator: raise gan.discriminator_learning_rate or lower gan.penalty_weight."
    return None


def relative_change(after: Tensor, before: Tensor) -> Tensor:
    """|after - before| / |before|, a scalar on their device: about 1e-3 for a step of a training that goes well."""
    change: Tensor = (after.detach() - before).norm() / before.norm().clamp(min=1e-12)
    return change


def dead_learning_rate(ratios: Sequence[float], setting: str) -> str | None:
    """ratios: `relative_change` of the last layer in one step, one per record, without steps whose scheduled rate is near 0."""
    recent = ratios[-10:]
    if len(recent) < 10 or max(recent) >= DEAD_UPDATE_RATIO:
        return None
    change = f"a step changes the weights by less than a millionth ({max(recent):.1g})"
    return f"{change}: the learning rate is too low to change anything, raise {setting}."


def skipped_updates(name: str, total: int, longest: int, settings: str) -> str | None:
    """total, longest: skipped updates of one optimizer, and the most in a row. settings: what to lower."""
    if total == 0:
        return None
    return (
        f"{total} updates of the {name} were skipped, up to {longest} in a row, as loss or gradient was not finite. "
        f"Lower {settings}, or set precision to fp32."
    )


def fp16_overflow(scale: float) -> str | None:
    """scale: of the loss, which a GradScaler halves whenever a gradient is not finite."""
    if scale >= 1:
        return None
    return f"gradients in fp16 are infinite in step after step (loss scale {scale:g}): set precision to bf16 or fp32."


def not_learning(training_cccs: Sequence[float], epochs: float) -> str | None:
    """training_cccs: mean CCC on training songs after each epoch so far, of `epochs` planned."""
    if len(training_cccs) < max(epochs / 2, 2) or training_cccs[-1] >= NOT_LEARNING_BELOW:
        return None
    return (
        f"after epoch {len(training_cccs)} the CCC on its own training songs is {training_cccs[-1]:.2f}: it does not learn. "
        f"Change vit.learning_rate by a factor of 3, up first; give it more vit.epochs."
    )


def overfitting(training_cccs: Sequence[float], validation_cccs: Sequence[float]) -> str | None:
    """Mean CCC on training and on validation songs after each epoch so far."""
    gaps = [a - b for a, b in zip(training_cccs, validation_cccs, strict=True)][-EPOCHS_IN_A_ROW:]
    if len(gaps) < EPOCHS_IN_A_ROW or min(gaps) <= LARGEST_GAP:
        return None
    return (
        f"CCC {training_cccs[-1]:.2f} on training songs, {validation_cccs[-1]:.2f} on validation songs: it overfits. Raise "
        f"vit.head_dropout (0.2), vit.weight_decay (0.1) or vit.drop_path, or lower vit.epochs."
    )


def no_better_epoch(best: int) -> str | None:
    """best: the epoch whose weights a training ends with; 0: those before the first step."""
    if best > 0:
        return None
    return (
        "no epoch is better on validation songs than the weights before the first step, so this training ends with those. Lower "
        "vit.learning_rate by a factor of 3, or give it more vit.epochs. With few songs, a pretrained ViT may have no better."
    )


def generator_warnings(quality: dict[str, Any]) -> dict[str, str]:
    """Warnings of copies and of collapse by name, from the content of `quality.json`."""
    found = {}
    copies, diversity = quality["copy_rate"], quality["diversity"]
    if copies is not None:
        synthetic, real = copies["synthetic"]["value"], copies["validation"]["value"]
        if synthetic - real > LARGEST_COPY_EXCESS:
            found["copying"] = (
                f"{synthetic:.0%} of the synthetic clips copy a training song (of validation songs {real:.0%} would pass for "
                f"copies): lower gan.epochs or gan.width, or raise gan.penalty_weight."
            )
    if diversity is not None and diversity["value"] < LEAST_DIVERSITY:
        found["collapsed"] = (
            f"synthetic clips are {diversity['value']:.2f} times as far from one another as real ones: the generator has "
            f"collapsed. Raise gan.penalty_weight or gan.latent, or lower gan.generator_learning_rate."
        )
    return found
