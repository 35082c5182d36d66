"""The first head of a ViT with pretrained weights: a linear probe, from which training goes on.

Under a random head the first gradients would spoil the pretrained features before the head can read them. Source: Kumar et al.
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
    """Set the last layer to a ridge regression of the songs' labels on what it gets, the mean over all crops of each song.

    network: of timm, on the device of the context, in evaluation mode. groups: [songs], kept whole by the cross-validation that
    chooses the penalty. The layer is linear, so that its output for a mean is the mean of its outputs, as songs are predicted.
    By single crops, each with the label of its song, the penalty would be that of a far noisier task.
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
    weights = ridge.weights / ridge.scaling.sd[:, None]  # of features that are not standardised
    head: nn.Linear = network.get_classifier()  # type: ignore[operator]
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weights.T))
        head.bias.copy_(torch.from_numpy(ridge.intercept - ridge.scaling.mean @ weights))
