"""Adaptive discriminator augmentation (2006.06676): the discriminator sees real and fake tiles alike through
differentiable random changes, each with probability p, and p follows how much the discriminator over-fits.

Tissue has no up and no left, so flips and quarter turns are free; the colour changes imitate staining.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NUMBERS = 24  # random numbers a sample; each sample reads only its own row


def augment(images: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Change every sample on its own, each change with probability `p`; p = 0 returns `images` itself.

    Args:
        images: float [N, 3, H, W] in [-1, 1], H = W; gradients flow through.
        p: 0 to 1.
        generator: on the device of the images; the numbers drawn depend on N only.
    """
    if p <= 0:
        return images
    n = len(images)
    uniform = torch.rand(n, NUMBERS, generator=generator, device=images.device)
    normal = torch.randn(n, NUMBERS, generator=generator, device=images.device)
    return _colour(_geometry(images, p, uniform[:, :12], normal[:, :12]), p, uniform[:, 12:], normal[:, 12:])


def _geometry(images: Tensor, p: float, uniform: Tensor, normal: Tensor) -> Tensor:
    """Flip, quarter turn, whole-pixel shift up to an eighth, scale by about 2^(0.2 N), any rotation."""
    on = uniform[:, :5] < p
    size = images.shape[-1]
    flip = torch.where(on[:, 0] & (uniform[:, 5] < 0.5), -1.0, 1.0)
    quarter = torch.where(on[:, 1], (uniform[:, 6] * 4).floor(), 0.0) * (math.pi / 2)
    shift = torch.where(on[:, 2, None], ((uniform[:, 7:9] - 0.5) * (size / 4)).round() * (2 / size), 0.0)
    scale = torch.where(on[:, 3], torch.exp2(0.2 * normal[:, 0]), 1.0)
    turn = torch.where(on[:, 4], (uniform[:, 9] * 2 - 1) * math.pi, 0.0)
    angle = quarter + turn
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    # output coordinates -> input coordinates, in units of half the image
    rows = torch.stack([flip * cos, -flip * sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1)
    grid = F.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid.to(images.dtype), padding_mode="reflection", align_corners=False)
    # untouched samples stay exact: interpolation on the identity grid is not
    return torch.where(on.any(dim=1).view(-1, 1, 1, 1), moved, images)


def _colour(images: Tensor, p: float, uniform: Tensor, normal: Tensor) -> Tensor:
    """Brightness, contrast, rotation of the hue, saturation; then stain strength of every channel."""
    on = (uniform[:, :5] < p)[:, :, None, None]
    brightness = torch.where(on[:, 0], 0.2 * normal[:, 0, None, None], 0.0)
    contrast = torch.where(on[:, 1], torch.exp2(0.5 * normal[:, 1, None, None]), 1.0)
    hue = torch.where(on[:, 2], (uniform[:, 5, None, None] * 2 - 1) * math.pi, 0.0)
    saturation = torch.where(on[:, 3], torch.exp2(normal[:, 2, None, None]), 1.0)

    # one 3 x 3 matrix a sample: grey axis kept, the plane across it turned (hue) and stretched (saturation)
    axis = torch.full((3,), 1 / math.sqrt(3.0), device=images.device)
    along = torch.outer(axis, axis)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=images.device) / math.sqrt(3.0)
    across = torch.eye(3, device=images.device) - along
    matrix = contrast * (along + saturation * (torch.cos(hue) * across + torch.sin(hue) * cross))
    mixed = (matrix @ images.flatten(2) + brightness).view_as(images)
    coloured = torch.where(on[:, :4].any(dim=1).view(-1, 1, 1, 1), mixed, images)

    # more or less stain: optical density of a channel times a factor, which is transmission to that power
    strength = torch.exp2(0.5 * normal[:, 3:6])[:, :, None, None]
    transmission = (coloured * 0.5 + 0.5).clamp_min(1 / 255)
    stained = transmission.pow(strength) * 2 - 1
    return torch.where(on[:, 4, :, :, None], stained, coloured)


class AdaController:
    """Moves p so that r_t = E[sign D(real)] comes to rest at the target (2006.06676, equation 1).

    r_t near 0: the discriminator guesses; near 1: it has learned the training tiles by heart.
    """

    def __init__(self, target: float, kimg: float, batch: int, interval: int = 4) -> None:
        self.target, self.interval = target, interval
        # the paper lets p go from 0 to 1 in `kimg` thousand images
        self.stride = batch * interval / (kimg * 1000) if kimg > 0 else 0.0
        self.p = 0.0
        self.r_t = 0.0
        self._signs = 0.0
        self._count = 0

    def update(self, real_logits: Tensor, step: int) -> None:
        """Take in the logits of the real batch of step `step`; every `interval` steps p moves."""
        self._signs += float(real_logits.detach().sign().sum())
        self._count += len(real_logits)
        if (step + 1) % self.interval or not self._count:
            return
        self.r_t = self._signs / self._count
        self.p = min(max(self.p + math.copysign(self.stride, self.r_t - self.target), 0.0), 1.0)
        self._signs, self._count = 0.0, 0

    def state(self) -> dict[str, float]:
        """What a resumed training needs."""
        return {"p": self.p, "r_t": self.r_t, "signs": self._signs, "count": self._count}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from `state`."""
        self.p, self.r_t = state["p"], state["r_t"]
        self._signs, self._count = state["signs"], int(state["count"])
