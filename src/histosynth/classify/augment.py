"""Classical histology augmentation: stain jitter and blur, a random amount for every tile of a batch.

Flips and quarter turns are part of drawing a batch (`tiles.batches.batch_at`).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Optical densities of haematoxylin, eosin and a residual (DAB), one stain a row, for red, green and blue:
# Ruifrok and Johnston 2001, "Quantification of histochemical staining by color deconvolution".
_STAINS = ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776))


def stain_jitter(images: Tensor, generator: torch.Generator, *, strength: float = 0.1) -> Tensor:
    """Make each tile's stains a little stronger or weaker, as another laboratory would.

    Every stain's concentration c becomes a c + b, with a ~ U(1 - strength, 1 + strength) and
    b ~ U(-strength / 5, strength / 5) drawn for each tile and stain (Tellez et al. 2018, "Whole-slide
    mitosis detection in H&E breast histology using PHH3 as a reference", HED augmentation).

    Args:
        images: float [N, 3, H, W] in [0, 255], RGB.

    Returns:
        float [N, 3, H, W] in [0, 255].
    """
    stains = torch.nn.functional.normalize(torch.tensor(_STAINS), dim=1)
    gain = 1 + strength * (2 * torch.rand(len(images), 3, generator=generator) - 1)
    shift = strength / 5 * (2 * torch.rand(len(images), 3, generator=generator) - 1)
    # density = stains^T c for a pixel, so jittering c is one 3 x 3 matrix and an offset for each tile
    mix = stains.T @ torch.diag_embed(gain) @ torch.linalg.inv(stains.T)
    offset = shift @ stains
    density = -torch.log((images + 1) / 256)
    mix, offset = mix.to(images.device), offset.to(images.device)
    density = torch.baddbmm(offset.unsqueeze(2), mix, density.flatten(2)).view_as(images)
    return (256 * torch.exp(-density) - 1).clamp(0, 255)


def blur(images: Tensor, generator: torch.Generator, *, probability: float = 0.3, sigma: float = 1.0) -> Tensor:
    """Blur some tiles by a Gaussian of standard deviation U(0, sigma) pixels.

    Args:
        images: float [N, 3, H, W].
        probability: that a tile is blurred.
    """
    chosen = torch.rand(len(images), generator=generator) < probability
    sigmas = sigma * torch.rand(len(images), generator=generator) + 1e-3
    picked = chosen.nonzero().squeeze(1)
    if not len(picked):
        return images
    taps = torch.arange(-2, 3, dtype=torch.float32)
    kernels = torch.exp(-0.5 * (taps / sigmas[picked, None]) ** 2)
    kernels = (kernels / kernels.sum(1, keepdim=True)).to(images)
    picked = picked.to(images.device)
    tiles = images[picked]
    for dim in (2, 3):
        padded = torch.nn.functional.pad(tiles, (0, 0, 2, 2) if dim == 2 else (2, 2, 0, 0), mode="reflect")
        shifted = torch.stack([padded.narrow(dim, k, images.shape[dim]) for k in range(5)], dim=1)
        tiles = (kernels.view(-1, 5, 1, 1, 1) * shifted).sum(dim=1)
    return images.index_copy(0, picked, tiles)


def classical(images: Tensor, generator: torch.Generator) -> Tensor:
    """Stain jitter, then blur: float [N, 3, H, W] in [0, 255] in and out."""
    return blur(stain_jitter(images, generator), generator)
