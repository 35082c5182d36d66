"""The gate: whether the ViT learns from synthetic clips, decided by validation songs (`vit.synthetic: auto`).

The ViT is trained twice, without and with synthetic clips: same seed, same first weights, as many steps of as many clips, and as
many validations; without them real clips take their places. Of both, the best epoch predicts the validation songs by all their
crops. Synthetic clips are kept where the paired difference of the CCC, mean of valence and arousal, is more than two standard
errors above 0, by a jackknife over groups of songs. Test songs have no part in it.

Two and not one, because the standard error is that of other songs, not of another seed; because with few groups a jackknife is
too sure; and because who reads "kept" takes it for "they help". Where both trainings are equally good, 2 to 6 % pass by two
standard errors with five groups or more, and 13 to 18 % by one (as simulated in tests/emotion/test_gate.py).

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
    """What the training without synthetic clips has come to: its best weights, on the host, their epoch and their predictions for
    the validation songs, [songs, 2]. Part of the checkpoint; empty until that training has ended. stopped_at: the step after
    which the budget ended it, if it did."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.epoch, self.ccc = 0, 0.0
        self.predicted = torch.empty(0, 2)
        self.stopped_at: int | None = None

    def take(self, weights: dict[str, Tensor], epoch: int, ccc: float, predicted: Tensor, stopped_at: int | None) -> None:
        """ccc: of the epoch, by its validation."""
        self.weights, self.epoch, self.ccc, self.predicted = weights, epoch, ccc, predicted
        self.stopped_at = stopped_at

    def state_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        vars(self).update(state)


@dataclass(frozen=True)
class FoundByFolds:
    """What stands for validation songs where there are none: the epoch to stop after, and if `auto` keeps synthetic clips."""

    stop_epoch: int
    keeps_synthetic: bool | None = None


@dataclass(frozen=True)
class Trial:
    """One of the trainings of a phase. rival: None where it is the only one, and nothing is decided. folds: of a final model."""

    synthetic_per_batch: int
    rival: Rival | None = None
    folds: FoundByFolds | None = None

    def part(self, steps: int) -> TrainingPart:
        """Its place among the steps of the phase. steps: of each training. One more is left free between them, so that a
        checkpoint at the last step of the first is not one at step 0 of the second."""
        if self.rival is None:
            return WHOLE
        total = 2 * steps + 1
        return TrainingPart(WITH, steps + 1, total) if self.synthetic_per_batch else TrainingPart(WITHOUT, 0, total)


def trials_of(config: VitConfig, folds: FoundByFolds | None = None) -> list[Trial]:
    """In order. Resuming, each finds out from the checkpoint whether it has ended."""
    if config.synthetic == "always":
        return [Trial(config.synthetic_per_batch, folds=folds)]
    if folds is not None:
        return [Trial(config.synthetic_per_batch if folds.keeps_synthetic else 0, folds=folds)]
    rival = Rival()
    return [Trial(0, rival), Trial(config.synthetic_per_batch, rival)]


def verdict(with_clips: Numbers, without: Numbers, actual: Numbers, groups: Sequence[str]) -> dict[str, Any]:
    """Whether synthetic clips are kept, and why, as JSON for summary.json, metrics.json, manifest and report.

    with_clips, without: [songs, 2], predictions for the validation songs by the two trainings; actual: their labels; groups:
    [songs]. Where the difference cannot be told they are left out: with fewer than FEWEST_GROUPS groups, or labels that are all
    the same without one of them.
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
    """In place of a verdict where the budget has ended one of the trainings: of another length they show nothing."""
    found = {"kept": False, "songs": len(groups), "groups": len({*groups})}
    return found | {"why": "left out: the budget ended the trainings before they could be compared"}


def mean_ccc(predicted: Numbers, actual: Numbers, ccc: Callable[[Numbers, Numbers], float] = concordance) -> float:
    """Mean over valence and arousal of the CCC. [songs, 2] each. Raises DataError where one is undefined."""
    return sum(ccc(predicted[:, column], actual[:, column]) for column in (0, 1)) / 2
