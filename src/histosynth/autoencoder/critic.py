"""What makes an autoencoder's tiles sharp: a small judge of patches, trained against the decoder.

An absolute error alone asks for the mean of all textures that fit a latent, which is a blur. The judge of patches
(Isola et al. 2017) with the hinge loss, and a weight that follows the two gradients, are those of VQGAN (Esser et al.
2021).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

_MOST = 10.0
"""Largest ratio of the two gradients that the weight follows."""


class PatchCritic(nn.Module):
    """Images [N, 3, H, W] in [-1, 1], edges multiples of 4, to logits [N, 1, H/4, W/4], positive for real.

    Each logit sees about 36 x 36 px. Spectral normalisation (Miyato et al. 2018) bounds it, so no gradient penalty is
    needed.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers = [
            nn.PixelUnshuffle(2),
            spectral_norm(nn.Conv2d(12, width, 3, padding=1)),
            nn.LeakyReLU(0.2),
            nn.PixelUnshuffle(2),
            spectral_norm(nn.Conv2d(4 * width, 2 * width, 1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(2 * width, 2 * width, 3, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(2 * width, 2 * width, 3, padding=1)),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).float()


def critic_loss(critic: PatchCritic, real: Tensor, fake: Tensor) -> Tensor:
    """The hinge loss of the critic; gradients reach no image."""
    above, below = critic(real.detach()), critic(fake.detach())
    return 0.5 * ((1 - above).clamp_min(0).mean() + (1 + below).clamp_min(0).mean())


def adversarial_term(critic: PatchCritic, fake: Tensor, distance: Tensor, weight: float) -> Tensor:
    """What is added to the decoder's loss: the critic's opinion, as strong as `weight` times the distance's gradient.

    The gradients are compared at the images (Esser et al. 2021 compare them at the last layer, which costs more).

    Args:
        fake: images that came out of the decoder, [N, 3, H, W].
        distance: the rest of the loss of these images, a scalar that depends on them.
    """
    opinion = -critic(fake).mean()
    (ours,) = torch.autograd.grad(opinion, fake, retain_graph=True)
    (theirs,) = torch.autograd.grad(distance, fake, retain_graph=True)
    ratio = (theirs.float().norm() / ours.float().norm().clamp_min(1e-12)).clamp_max(_MOST / max(weight, 1e-6))
    return weight * ratio.detach() * opinion
