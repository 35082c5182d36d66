"""Initialise the head of a pretrained ViT with a linear probe (LP-FT).

With a random head the first gradients would distort the pretrained features before the head is fitted. Source: Kumar et al.
2022, Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution, arXiv:2202.10054 (LP-FT).
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from emotion.audio.partition import TrainingSongs
from emotion.errors import ModelError
from emotion.evaluation.regressors import fit_ridge, grouped_folds
from emotion.training.context import TrainingContext
from emotion.vit.network import Preprocessing, pooled
from emotion.vit.validation import means_over_crops


def fit_head(
    network: nn.Module,
    preprocessing: Preprocessing,
    songs: TrainingSongs,
    *,
    groups: Sequence[str],
    context: TrainingContext,
    micro_batch: int,
) -> None:
    """Set the last layer to a ridge regression of the songs' labels on its inputs, averaged over all crops of each song.

    network: of timm, on the device of the context, in evaluation mode. groups: [songs], kept whole by the cross-validation that
    chooses the penalty. The layer is linear, so its output for the mean input is the mean output, which is the prediction of a
    song. Fitted to single crops, the penalty would suit a far noisier task.

    `fit_ridge` clips its inputs at 3 standard deviations of the songs, while it fits and when it predicts. A linear layer cannot
    clip: for inputs beyond them it continues in a straight line.

    Raises DataError for fewer than two groups, ModelError for features that are not finite, Interrupted when asked to stop.
    """
    features_of = functools.partial(pooled, network)
    features = means_over_crops(features_of, preprocessing, [songs], context=context, micro_batch=micro_batch)
    if not np.isfinite(features).all():
        raise ModelError(
            "vit: with its first weights the network gives NaN or infinity for training songs. Set precision to bf16 or fp32, or "
            "name other weights in vit.weights."
        )
    folds = grouped_folds(groups, context.seed)
    ridge, _ = fit_ridge(features.astype(np.float64), songs.labels.astype(np.float64), folds)
    weights = ridge.weights / ridge.scaling.sd[:, None]  # undo the standardisation of the features
    head: nn.Linear = network.get_classifier()  # type: ignore[operator]
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weights.T))
        head.bias.copy_(torch.from_numpy(ridge.intercept - ridge.scaling.mean @ weights))
