"""The first head of a ViT with pretrained weights: a linear probe, from which training goes on.

Under a random head the first gradients would spoil the pretrained features before the head can read them. Source: Kumar et al.
2022, Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution, arXiv:2202.10054 (LP-FT).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from emotion.audio.partition import TrainingSongs
from emotion.evaluation.regressors import fit_ridge, grouped_folds
from emotion.training.context import TrainingContext
from emotion.vit.network import Preprocessing
from emotion.vit.validation import means_over_crops


class Pooled(nn.Module):
    """A ViT of timm without its last layer: [batch, channels, height, width] → [batch, numbers]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.network.forward_head(self.network.forward_features(x), pre_logits=True)  # type: ignore[operator]
        return pooled


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
    Raises DataError for fewer than two groups, Interrupted when asked to stop.
    """
    features = means_over_crops(Pooled(network), preprocessing, [songs], context=context, micro_batch=micro_batch)
    folds = grouped_folds(groups, context.seed)
    ridge, _ = fit_ridge(features.astype(np.float64), songs.labels.astype(np.float64), folds)
    weights = ridge.weights / ridge.scaling.sd[:, None]  # of features that are not standardised
    head: nn.Linear = network.get_classifier()  # type: ignore[operator]
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weights.T))
        head.bias.copy_(torch.from_numpy(ridge.intercept - ridge.scaling.mean @ weights))
