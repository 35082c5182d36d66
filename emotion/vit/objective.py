"""The loss of the ViT, and its gradient over an effective batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emotion.config import VitConfig
from emotion.training.device import Device, LossScaler
from emotion.vit.layers import BatchNoise
from emotion.vit.network import Preprocessing, network_input
from emotion.vit.teacher import LABELS, embedding_loss


@dataclass(frozen=True)
class Objective:
    """Network, noise, preprocessing, loss and device of a training. loss: (predicted, labels), [batch, 2] each → scalar.

    With a teacher the network is a `Pupil`, and predicted and labels have the columns of its output and of `Teacher.beside`.
    """

    network: nn.Module
    noise: BatchNoise
    preprocessing: Preprocessing
    loss: Callable[[Tensor, Tensor], Tensor]
    device: Device


def loss_function(config: VitConfig, label_variance: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """ccc_weight * (1 - CCC) + (1 - ccc_weight) * MSE / label_variance; with a teacher plus teacher_weight * `embedding_loss`.

    label_variance: [2], of the training songs.
    """

    def loss_of_labels(predicted: Tensor, labels: Tensor) -> Tensor:
        mse = ((predicted - labels).square().mean(dim=0) / label_variance).mean()
        return config.ccc_weight * (1 - batch_concordance(predicted, labels)) + (1 - config.ccc_weight) * mse

    def loss(predicted: Tensor, labels: Tensor) -> Tensor:
        if config.teacher is None:
            return loss_of_labels(predicted, labels)
        embedding, known = labels[:, LABELS:-1], labels[:, -1]
        of_embedding = embedding_loss(predicted[:, LABELS:], embedding, known)
        return loss_of_labels(predicted[:, :LABELS], labels[:, :LABELS]) + config.teacher_weight * of_embedding

    return loss


def batch_concordance(predicted: Tensor, labels: Tensor) -> Tensor:
    """Mean of Lin's concordance of valence and arousal in a batch, [batch, 2] each; 0 if nothing varies."""
    assert predicted.shape == labels.shape, f"{predicted.shape} predictions and {labels.shape} labels"
    covariance = ((predicted - predicted.mean(dim=0)) * (labels - labels.mean(dim=0))).mean(dim=0)
    spread = predicted.var(dim=0, unbiased=False) + labels.var(dim=0, unbiased=False)
    bias = (predicted.mean(dim=0) - labels.mean(dim=0)).square()
    return (2 * covariance / (spread + bias + 1e-6)).mean()


def backward(objective: Objective, clips: Tensor, labels: Tensor, parts: Sequence[slice], *, scaler: LossScaler) -> Tensor:
    """Add the gradient of the loss over the whole effective batch and return the loss. parts: the micro-batches.

    The CCC is not a mean over samples. So with several parts, all predictions are first computed without a graph; then a second
    forward pass of each part, with the same noise, backpropagates its rows of the gradient with respect to the predictions. The
    noise of the step must have been drawn.
    """

    def forward(rows: slice) -> Tensor:
        objective.noise.rows = rows
        with objective.device.autocast():
            predicted: Tensor = objective.network(network_input(clips[rows], objective.preprocessing))
        return predicted.float()

    objective.noise.forget_casts()
    if len(parts) == 1:
        loss = objective.loss(forward(slice(0, len(clips))), labels)
        scaler.scale(loss).backward()
        return loss.detach()
    with torch.no_grad():
        predicted = torch.cat([forward(rows) for rows in parts])
    predicted.requires_grad_()
    loss = objective.loss(predicted, labels)
    (gradient,) = torch.autograd.grad(scaler.scale(loss), predicted)
    for rows in parts:
        forward(rows).backward(gradient[rows])
    return loss.detach()
