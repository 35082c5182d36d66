"""The adversarial game: relativistic logistic loss with zero-centred gradient penalties on real and synthetic clips.

Every term is a mean over samples, so it can be computed one micro-batch at a time. Source: Huang et al. 2024 (R3GAN), eq. 2-5.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from emotion.gan.networks import Discriminator, Generator
from emotion.training.device import Device, LossScaler

STEP = 0.01
"""Root mean square by which a point of a clip changes in the difference of a gradient penalty; clips have a deviation of about 1.
Smaller steps drown in the rounding of bf16, over larger ones the gradient changes."""


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


def gradient_penalty(D: Discriminator, clips: Tensor, labels: Tensor, logits: Tensor, *, scaler: LossScaler) -> Tensor:
    """Mean over samples of half the squared norm of d logit / d clip, without a second derivative. R1 on real clips, R2 on
    synthetic ones.

        r(x) = ½ ((D(x + h u) − D(x)) / h)²    u = ∇D(x) / |∇D(x)|, a constant    h = STEP √points

    For small h it is ½ |∇D|², and its gradient by the weights is that of ½ |∇D|², as u · ∂∇D = ∂|∇D|. The difference along
    the gradient is √points times as large as that along as much noise, which has the same expectation (Lin et al. 2025,
    Seaweed-APT), and needs no random numbers. Source: Finlay & Oberman 2021 (input gradient regularization).

    logits: of D on clips and labels, on the graph; they are float32, and so are differences. clips: of any precision; a part of
    that graph. scaler: keeps the gradient in range where it is in fp16; its scale cancels out.
    """
    (gradient,) = torch.autograd.grad(scaler.scale(logits.mean()), clips, retain_graph=True)
    gradient = gradient.float()
    length = torch.linalg.vector_norm(gradient, dim=(1, 2, 3), keepdim=True)
    distance = STEP * math.sqrt(clips[0].numel())
    moved = clips.detach() + distance * gradient / length.clamp(min=torch.finfo(torch.float32).tiny)
    penalty: Tensor = 0.5 * ((D(moved, labels) - logits) / distance).square().mean()
    return penalty


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
        with device.autocast():
            with torch.no_grad():
                fake = G(labels, noise, real.shape[3])
            clips, both_labels = torch.cat([real.to(fake.dtype), fake]), torch.cat([labels, labels])
            logits = D(clips.requires_grad_(gamma > 0), both_labels)
            real_logits, fake_logits = logits.chunk(2)
            loss = discriminator_loss(real_logits, fake_logits)
            accuracy += share * (real_logits > fake_logits).float().mean()
            total_loss += share * loss.detach()
            if gamma > 0:
                # Twice the mean over all clips: the mean over the real ones plus that over the synthetic ones.
                loss = loss + 2 * gamma * gradient_penalty(D, clips, both_labels, logits, scaler=scaler)
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
