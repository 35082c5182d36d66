"""The adversarial game: relativistic logistic loss with zero-centred gradient penalties on real and synthetic clips.

Every term is a mean over samples, so it may be taken micro-batch by micro-batch. Source: Huang et al. 2024 (R3GAN), eq. 2-5.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from emotion.gan.networks import Discriminator


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """[batch] each; small where each real clip scores above the synthetic one of the same label."""
    assert real_logits.shape == fake_logits.shape, f"{real_logits.shape} logits and {fake_logits.shape}"
    return F.softplus(fake_logits.float() - real_logits.float()).mean()


def generator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The other side of the same game."""
    assert real_logits.shape == fake_logits.shape, f"{real_logits.shape} logits and {fake_logits.shape}"
    return F.softplus(real_logits.float() - fake_logits.float()).mean()


def gradient_penalty(discriminator: Discriminator, clips: Tensor, labels: Tensor) -> Tensor:
    """Mean over samples of half the squared norm of d logit / d clip, with a graph for the second derivative.

    R1 on real clips, R2 on synthetic ones. Call it outside autocast: in half precision the squares under- or overflow.
    """
    clips = clips.detach().requires_grad_()
    logits = discriminator(clips, labels)
    (gradient,) = torch.autograd.grad(logits.sum(), clips, create_graph=True)
    return 0.5 * gradient.square().sum(dim=(1, 2, 3)).mean()
