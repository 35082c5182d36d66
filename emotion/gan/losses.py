"""GAN losses: relativistic logistic loss, zero-centred R1 and R2 gradient penalties, and an optional matching loss for mismatched
labels.

Every term is a mean over samples, so it can be computed one micro-batch at a time. Sources: Huang et al. 2024 (R3GAN), eq. 2-5;
for the matching loss Reed et al. 2016 (GAN-CLS).
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
"""Step of the finite difference in a gradient penalty: root mean square change of a point of a clip, which has a standard
deviation of about 1. Smaller steps are lost in bf16 rounding; over larger ones the gradient changes."""


GENERATORS_MATCHING = 0.3
"""Weight of the generator's matching term, as a share of the discriminator's."""


@dataclass(frozen=True)
class Terms:
    """Weights of the terms added to the relativistic loss; 0 omits a term. penalty: gamma of the gradient penalties."""

    penalty: float = 0.0
    matching: float = 0.0


@dataclass(frozen=True)
class Batch:
    """An effective batch on the device."""

    clips: Tensor  # [batch, 1, mels, frames], real and normalised
    labels: Tensor  # [batch, 2], of real and synthetic clips
    noise: Tensor  # [2, batch, latent, 1 + columns], for the updates of the discriminator and of the generator


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Relativistic logistic loss of logits, [batch] each; low if each real clip scores above the synthetic one with its label."""
    assert real_logits.shape == fake_logits.shape, f"{real_logits.shape} logits and {fake_logits.shape}"
    return F.softplus(fake_logits.float() - real_logits.float()).mean()


def generator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """`discriminator_loss` with the roles swapped: low if each synthetic clip scores above the real one with its label."""
    return discriminator_loss(fake_logits, real_logits)


def matching_loss(right_logits: Tensor, wrong_logits: Tensor) -> Tensor:
    """Loss of the logits, [batch] each, of the same clips with their own and with another label; small if the own label scores
    higher.

    If both labels of a pair are equal, so are the logits, and the pair has no gradient. Source: Reed et al. 2016 (GAN-CLS);
    relativistic here, so that the loss does not depend on how real the clip is.
    """
    return discriminator_loss(right_logits, wrong_logits)


def gradient_penalty(D: Discriminator, clips: Tensor, labels: Tensor, logits: Tensor, *, scaler: LossScaler) -> Tensor:
    """Mean over samples of half the squared norm of d logit / d clip, without second derivatives.

    On real clips this is R1, on synthetic ones R2.

        r(x) = ½ ((D(x + h u) − D(x)) / h)²    u = ∇D(x) / |∇D(x)|, a constant    h = STEP √points

    For small h, r is ½ |∇D|², and so is its gradient by the weights, as u · ∂∇D = ∂|∇D|. The finite difference along the gradient
    is √points times as large as one along noise of the same norm, which has the same expectation (Lin et al. 2025, Seaweed-APT),
    and it needs no random numbers. Source: Finlay & Oberman 2021 (input gradient regularization).

    logits: float32, of D on clips and labels, with a graph. clips: of any precision, part of that graph. scaler: keeps an fp16
    gradient in range; its scale cancels out.
    """
    (gradient,) = torch.autograd.grad(scaler.scale(logits.mean()), clips, retain_graph=True)
    gradient = gradient.float()
    length = torch.linalg.vector_norm(gradient, dim=(1, 2, 3), keepdim=True)
    distance = STEP * math.sqrt(clips[0].numel())
    moved = clips.detach() + distance * gradient / length.clamp(min=torch.finfo(torch.float32).tiny)
    penalty: Tensor = 0.5 * ((D(moved, labels) - logits) / distance).square().mean()
    return penalty


def _judged_labels(batch: Batch, terms: Terms) -> Tensor:
    """The labels for the discriminator: [1, batch, 2], or with the matching term [2, batch, 2]: also those of the previous clip.

    The previous clip is mostly of another song; a pair of one song adds nothing. The labels are rolled over the effective batch,
    so that the pairs do not depend on the micro-batch.
    """
    return torch.stack([batch.labels, batch.labels.roll(1, dims=0)] if terms.matching > 0 else [batch.labels])


def discriminator_backward(
    G: Generator, D: Discriminator, batch: Batch, parts: Sequence[slice], *, terms: Terms, device: Device, scaler: LossScaler
) -> tuple[Tensor, Tensor]:
    """Set the discriminator's gradient over the effective batch. Returns its loss without the penalties, and the share of pairs
    in which the real clip scores above the synthetic one. parts: the micro-batches."""
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
    # Backpropagation passes through D, but must leave no gradient in D.
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
