"""The adversarial game: relativistic logistic loss with zero-centred gradient penalties on real and synthetic clips.

Every term is a mean over samples, so it can be computed one micro-batch at a time. Source: Huang et al. 2024 (R3GAN), eq. 2-5.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from emotion.gan.networks import Discriminator, Generator
from emotion.training.device import Device, LossScaler


@dataclass(frozen=True)
class Batch:
    """An effective batch on the device."""

    clips: Tensor  # [batch, 1, mels, frames], real and normalised
    labels: Tensor  # [batch, 2], of real and synthetic clips
    noise: Tensor  # [2, batch, latent, 1 + columns], first for the update of the discriminator, then of the generator


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """[batch] each; small where each real clip scores above the synthetic one of the same label."""
    assert real_logits.shape == fake_logits.shape, f"{real_logits.shape} logits and {fake_logits.shape}"
    return F.softplus(fake_logits.float() - real_logits.float()).mean()


def generator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The same with the roles swapped: small where each synthetic clip scores above the real one of the same label."""
    return discriminator_loss(fake_logits, real_logits)


def gradient_penalty(discriminator: Discriminator, clips: Tensor, labels: Tensor) -> Tensor:
    """Mean over samples of half the squared norm of d logit / d clip, with a graph for the second derivative.

    R1 on real clips, R2 on synthetic ones. Call it outside autocast: in half precision the squares under- or overflow.
    """
    clips = clips.detach().requires_grad_()
    logits = discriminator(clips, labels)
    (gradient,) = torch.autograd.grad(logits.sum(), clips, create_graph=True)
    return 0.5 * gradient.square().sum(dim=(1, 2, 3)).mean()


def discriminator_backward(
    G: Generator, D: Discriminator, batch: Batch, parts: Sequence[slice], *, gamma: float, device: Device, scaler: LossScaler
) -> tuple[Tensor, Tensor]:
    """Set the discriminator's gradient over the effective batch. Returns its loss, and the share of pairs it tells apart.

    parts: the micro-batches. gamma: weight of the gradient penalties; 0 leaves them out.
    """
    total_loss, accuracy = torch.zeros((), device=device.device), torch.zeros((), device=device.device)
    D.requires_grad_(True)
    D.zero_grad(set_to_none=True)
    for part in parts:
        real, labels, noise = batch.clips[part], batch.labels[part], batch.noise[0][part]
        share = len(real) / len(batch.clips)
        with torch.no_grad(), device.autocast():
            fake = G(labels, noise, real.shape[3])
        with device.autocast():
            real_logits, fake_logits = D(real, labels), D(fake, labels)
            loss = discriminator_loss(real_logits, fake_logits)
        accuracy += share * (real_logits > fake_logits).float().mean()
        total_loss += share * loss.detach()
        if gamma > 0:
            loss = loss + gamma * (gradient_penalty(D, real, labels) + gradient_penalty(D, fake.float(), labels))
        scaler.scale(loss * share).backward()
    return total_loss, accuracy


def generator_backward(
    G: Generator, D: Discriminator, batch: Batch, parts: Sequence[slice], *, device: Device, scaler: LossScaler
) -> Tensor:
    """Set the generator's gradient over the effective batch and return its loss. parts: the micro-batches."""
    total_loss = torch.zeros((), device=device.device)
    # The loss passes through D, but must leave no gradient there for D's next update.
    D.requires_grad_(False)
    G.zero_grad(set_to_none=True)
    for part in parts:
        real, labels, noise = batch.clips[part], batch.labels[part], batch.noise[1][part]
        share = len(real) / len(batch.clips)
        with device.autocast():
            with torch.no_grad():
                real_logits = D(real, labels)
            fake_logits = D(G(labels, noise, real.shape[3]), labels)
            loss = generator_loss(real_logits, fake_logits)
        total_loss += share * loss.detach()
        scaler.scale(loss * share).backward()
    return total_loss
