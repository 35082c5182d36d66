"""The adversarial game: relativistic logistic loss with zero-centred gradient penalties on real and synthetic clips, and a term
for clips that do not go with their label.

Every term is a mean over samples, so it can be computed one micro-batch at a time. Source: Huang et al. 2024 (R3GAN), eq. 2-5;
of the last term Reed et al. 2016 (GAN-CLS).
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


GENERATORS_MATCHING = 0.3
"""Weight of the generator's matching term, as a share of the discriminator's."""


@dataclass(frozen=True)
class Terms:
    """Weights of the terms beside the relativistic loss; 0 leaves one out. penalty: gamma of the gradient penalties."""

    penalty: float = 0.0
    matching: float = 0.0


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


def matching_loss(right_logits: Tensor, wrong_logits: Tensor) -> Tensor:
    """[batch] each, of the same clips with their own and with another label; small where a clip scores higher with its own.

    A pair counts by how much its labels differ: between equal ones there is no difference of logits, and so no gradient.
    Source: Reed et al. 2016 (GAN-CLS); relativistic here, so that it asks nothing of how real the clip is.
    """
    return discriminator_loss(right_logits, wrong_logits)


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


def _judged_labels(batch: Batch, terms: Terms) -> Tensor:
    """[1, batch, 2], the labels; with the matching term [2, batch, 2]: behind them those of the clip before, mostly of another
    song; a pair of the same teaches nothing.

    Rolled over the effective batch, so that which clip meets which label does not depend on the micro-batch.
    """
    return torch.stack([batch.labels, batch.labels.roll(1, dims=0)] if terms.matching > 0 else [batch.labels])


def discriminator_backward(
    G: Generator, D: Discriminator, batch: Batch, parts: Sequence[slice], *, terms: Terms, device: Device, scaler: LossScaler
) -> tuple[Tensor, Tensor]:
    """Set the discriminator's gradient over the effective batch. Returns its loss, without the penalties, and the share of
    pairs it tells apart. parts: the micro-batches."""
    total_loss, accuracy = torch.zeros((), device=device.device), torch.zeros((), device=device.device)
    D.requires_grad_(True)
    D.zero_grad(set_to_none=True)
    judged_labels = _judged_labels(batch, terms)
    for part in parts:
        real, labels, noise = batch.clips[part], judged_labels[:, part], batch.noise[0][part]
        share = len(real) / len(batch.clips)
        with device.autocast():
            with torch.no_grad():
                fake = G(labels[0], noise, real.shape[3])
            clips, both_labels = torch.cat([real.to(fake.dtype), fake]), torch.cat([labels, labels], dim=1)
            logits, *wrong_logits = D(clips.requires_grad_(terms.penalty > 0), both_labels)
            real_logits, fake_logits = logits.chunk(2)
            loss = discriminator_loss(real_logits, fake_logits)
            if terms.matching > 0:
                loss = loss + terms.matching * matching_loss(real_logits, wrong_logits[0][: len(real)])
            accuracy += share * (real_logits > fake_logits).float().mean()
            total_loss += share * loss.detach()
            if terms.penalty > 0:
                # Twice the mean over all clips: the mean over the real ones plus that over the synthetic ones.
                loss = loss + 2 * terms.penalty * gradient_penalty(D, clips, both_labels[0], logits, scaler=scaler)
        scaler.scale(loss * share).backward()
    return total_loss, accuracy


def generator_backward(
    G: Generator, D: Discriminator, batch: Batch, parts: Sequence[slice], *, terms: Terms, device: Device, scaler: LossScaler
) -> Tensor:
    """Set the generator's gradient over the effective batch and return its loss. parts: the micro-batches."""
    total_loss = torch.zeros((), device=device.device)
    # The loss passes through D, but must leave no gradient there for D's next update.
    D.requires_grad_(False)
    G.zero_grad(set_to_none=True)
    judged_labels = _judged_labels(batch, terms)
    for part in parts:
        real, labels, noise = batch.clips[part], judged_labels[:, part], batch.noise[1][part]
        share = len(real) / len(batch.clips)
        with device.autocast():
            with torch.no_grad():
                real_logits = D(real, labels[0])
            fake_logits, *wrong_logits = D(G(labels[0], noise, real.shape[3]), labels)
            loss = generator_loss(real_logits, fake_logits)
            if terms.matching > 0:
                loss = loss + GENERATORS_MATCHING * terms.matching * matching_loss(fake_logits, wrong_logits[0])
        total_loss += share * loss.detach()
        scaler.scale(loss * share).backward()
    return total_loss
