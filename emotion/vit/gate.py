"""The gate: decide by validation songs whether the ViT is trained with synthetic clips (`vit.synthetic: auto`).

The ViT is trained twice, without and with synthetic clips: same seed, initial weights, batch size and numbers of steps and
validations; without synthetic clips, real clips replace them. The best epoch of each predicts the validation songs from all their
crops. Synthetic clips are kept if the paired difference of the CCC (mean of valence and arousal) is more than two standard errors
above 0, by a jackknife over groups of songs. Test songs are not used.

Why two standard errors: they cover the choice of songs, but not of the seed; a jackknife of few groups underestimates them; and
readers take "kept" for "they help". If both trainings are equally good, 2 to 6 % pass two standard errors with five groups or
more, and 13 to 18 % pass one (simulated in tests/emotion/test_gate.py).

Source of the jackknife: Efron & Tibshirani 1993, An Introduction to the Bootstrap, eq. 11.5; of one training with and one without
generated data, judged on real data alone: Ravuri & Vinyals 2019, arXiv:1905.10887.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from emotion.config import VitConfig
from emotion.errors import DataError, counted
from emotion.evaluation.metrics import Numbers, concordance, jackknife_variance, validation_concordance
from emotion.training.progress import WHOLE, WITH, WITHOUT, TrainingPart

STANDARD_ERRORS = 2
FEWEST_GROUPS = 3


class Rival:
    """Result of the training without synthetic clips: its best weights, on the host, their epoch and CCC, and predictions for
    the validation songs, [songs, 2]. Part of the checkpoint; empty until that training has ended. stopped_at: the step at which
    the budget ended it, else None."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.epoch, self.ccc = 0, 0.0
        self.predicted = torch.empty(0, 2)
        self.stopped_at: int | None = None

    def take(self, weights: dict[str, Tensor], epoch: int, ccc: float, predicted: Tensor, stopped_at: int | None) -> None:
        """Store the result. ccc: validation CCC of the epoch."""
        self.weights, self.epoch, self.ccc, self.predicted = weights, epoch, ccc, predicted
        self.stopped_at = stopped_at

    def state_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        vars(self).update(state)


@dataclass(frozen=True)
class FoundByFolds:
    """Decisions of earlier folds for a training without validation songs: when to stop, and whether to keep synthetic clips."""

    stop_epoch: int
    keeps_synthetic: bool | None = None


@dataclass(frozen=True)
class Trial:
    """One training of the phase. rival: None if it is the only one. folds: decisions of the folds, for a final model."""

    synthetic_per_batch: int
    rival: Rival | None = None
    folds: FoundByFolds | None = None

    def part(self, steps: int) -> TrainingPart:
        """The steps of the phase that belong to this training. steps: of each training. One unused step between them separates
        a checkpoint at the last step of the first training from one at step 0 of the second."""
        if self.rival is None:
            return WHOLE
        total = 2 * steps + 1
        return TrainingPart(WITH, steps + 1, total) if self.synthetic_per_batch else TrainingPart(WITHOUT, 0, total)


def trials_of(config: VitConfig, folds: FoundByFolds | None = None) -> list[Trial]:
    """The trainings of the phase, in order. After a resume, each one finds out from the checkpoint whether it has ended."""
    if config.synthetic == "always":
        return [Trial(config.synthetic_per_batch, folds=folds)]
    if folds is not None:
        return [Trial(config.synthetic_per_batch if folds.keeps_synthetic else 0, folds=folds)]
    rival = Rival()
    return [Trial(0, rival), Trial(config.synthetic_per_batch, rival)]


def verdict(with_clips: Numbers, without: Numbers, actual: Numbers, groups: Sequence[str]) -> dict[str, Any]:
    """Whether synthetic clips are kept, and why, as JSON for summary.json, metrics.json, manifest and report.

    with_clips, without: [songs, 2], predictions for the validation songs by the two trainings; actual: their labels; groups:
    [songs]. Synthetic clips are left out if the difference cannot be estimated: with fewer than FEWEST_GROUPS groups, or if a
    CCC is undefined without one group.
    """
    names, members = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    found: dict[str, Any] = {"kept": False, "songs": len(actual), "groups": len(names)}

    def difference(chosen: npt.NDArray[np.bool_]) -> float:
        return mean_ccc(with_clips[chosen], actual[chosen]) - mean_ccc(without[chosen], actual[chosen])

    of_all = [mean_ccc(predicted, actual, validation_concordance) for predicted in (with_clips, without)]
    found |= {"ccc_with": of_all[0], "ccc_without": of_all[1], "difference": of_all[0] - of_all[1], "standard_error": None}
    if len(names) < FEWEST_GROUPS:
        count = counted(len(names), "group")
        return found | {"why": f"left out: validation songs of {count} cannot show whether synthetic clips help"}
    try:
        without_each = np.array([difference(members != group) for group in range(len(names))])
    except DataError:
        return found | {"why": "left out: without one group of validation songs no CCC can be measured"}
    found["standard_error"] = math.sqrt(jackknife_variance(without_each))
    found["kept"] = bool(found["difference"] > STANDARD_ERRORS * found["standard_error"])
    compared = f"CCC of {len(actual)} validation songs {found['ccc_with']:.3f} with them, {found['ccc_without']:.3f} without"
    beyond = "more than" if found["kept"] else "not more than"
    found["why"] = (
        f"{'kept' if found['kept'] else 'left out'}: {compared}; the difference {found['difference']:z.3f} is {beyond} two "
        f"standard errors of {found['standard_error']:.3f} above 0"
    )
    return found


def undecided(groups: Sequence[str]) -> dict[str, Any]:
    """Replaces a verdict if the budget ended one of the trainings: trainings of different length are not comparable."""
    found = {"kept": False, "songs": len(groups), "groups": len({*groups})}
    return found | {"why": "left out: the budget ended the trainings before they could be compared"}


def mean_ccc(predicted: Numbers, actual: Numbers, ccc: Callable[[Numbers, Numbers], float] = concordance) -> float:
    """Mean CCC of valence and arousal. predicted, actual: [songs, 2]. Raises DataError if a CCC is undefined."""
    return sum(ccc(predicted[:, column], actual[:, column]) for column in (0, 1)) / 2
