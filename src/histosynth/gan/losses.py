"""Losses: non-saturating logistic (1406.2661) and the gradient penalty R1 (1801.04406)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def generator_loss(fake_logits: Tensor) -> Tensor:
    """-log sigmoid(D(fake)), mean over the batch."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-log sigmoid(D(real)) - log(1 - sigmoid(D(fake))), mean over the batch."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def r1_penalty(real_logits: Tensor, real_images: Tensor) -> Tensor:
    """Mean squared norm of the gradient of D on real images, differentiable; `real_images` needs grad."""
    (gradient,) = torch.autograd.grad(real_logits.sum(), real_images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def default_r1_gamma(size: int, batch: int) -> float:
    """0.0002 size^2 / batch, the rule of thumb of ADA (2006.06676, appendix C)."""
    return 0.0002 * size * size / batch
