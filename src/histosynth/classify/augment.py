"""Histology augmentation: stain jitter, blur and JPEG, a random amount for every tile of a batch.

Flips and quarter turns are part of drawing a batch (`tiles.batches.batch_at`).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from histosynth.classify.config import ClassifierConfig
from histosynth.core.errors import SettingError
from histosynth.encoders.views import view

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


def jpeg(
    images: Tensor, generator: torch.Generator, *, probability: float = 0.3, low: float = 30.0, high: float = 95.0
) -> Tensor:
    """Compress some tiles as JPEG does, at a quality of U(low, high), without writing a file.

    Colours become YCbCr, every 8 x 8 block its cosine coefficients, and these are rounded to multiples of the
    tables of ITU T.81, annex K, scaled to the quality as the Independent JPEG Group's library scales them; colour
    is not subsampled. On average within one grey level of what Pillow writes with `subsampling=0`.

    Args:
        images: float [N, 3, H, W] in [0, 255].
        probability: that a tile is compressed.

    Returns:
        float [N, 3, H, W] in [0, 255].
    """
    chosen = torch.rand(len(images), generator=generator) < probability
    quality = low + (high - low) * torch.rand(len(images), generator=generator)
    picked = chosen.nonzero().squeeze(1)
    if not len(picked):
        return images
    quality, picked = quality[picked].to(images.device), picked.to(images.device)
    tiles, (height, width) = images[picked], images.shape[-2:]
    colour = torch.tensor(_YCBCR, device=images.device)
    tiles = torch.nn.functional.pad(tiles, (0, -width % 8, 0, -height % 8), mode="replicate")
    planes = torch.einsum("yc,nchw->nyhw", colour, tiles).round()
    planes[:, 0] -= 128
    n, _, rows, columns = planes.shape
    blocks = planes.reshape(n, 3, rows // 8, 8, columns // 8, 8).transpose(3, 4)
    basis = _cosines().to(images.device)
    scale = torch.where(quality < 50, 50 / quality, 2 - quality / 50)
    steps = (torch.tensor(_TABLES, device=images.device) * scale.view(-1, 1, 1, 1) + 0.5).floor().clamp(1, 255)
    steps = steps[:, [0, 1, 1], None, None]
    blocks = basis.T @ ((basis @ blocks @ basis.T / steps).round() * steps) @ basis
    planes = blocks.transpose(3, 4).reshape(n, 3, rows, columns).round()
    planes[:, 0] += 128
    tiles = torch.einsum("cy,nyhw->nchw", torch.linalg.inv(colour.cpu()).to(images.device), planes)
    return images.index_copy(0, picked, tiles[..., :height, :width].clamp(0, 255))


def classical(images: Tensor, generator: torch.Generator, config: ClassifierConfig = ClassifierConfig()) -> Tensor:
    """Stain jitter, blur, then JPEG: float [N, 3, H, W] in [0, 255] in and out."""
    images = stain_jitter(images, generator, strength=config.jitter)
    images = blur(images, generator, probability=config.blur)
    return jpeg(images, generator, probability=config.jpeg) if config.jpeg else images


def augmented(images: Tensor, config: ClassifierConfig, generator: torch.Generator) -> Tensor:
    """What `config.augment` does to a batch, but for flips and quarter turns.

    Args:
        images: uint8 [N, 3, S, S].
        generator: on the CPU; where every random number comes from.

    Returns:
        float32 [N, 3, S, S] in [0, 255], on the device of `images`.

    Raises:
        SettingError: strong views of tiles whose edge is no multiple of 8 pixels.
    """
    if config.augment == "strong":
        if images.shape[-1] % 8:
            raise SettingError(
                f"augment is 'strong' for tiles of {images.shape[-1]} px.", "Use a multiple of 8 px, or classical."
            )
        return (view(images.cpu(), images.shape[-1], generator) + 1).mul(127.5).to(images.device)
    return classical(images.float(), generator, config) if config.augment == "classical" else images.float()


@lru_cache(maxsize=1)
def _cosines() -> Tensor:
    """The orthonormal 8-point cosine transform (type II): float32 [8, 8], a frequency a row."""
    k, x = torch.arange(8)[:, None], torch.arange(8)
    basis = torch.cos(math.pi * (2 * x + 1) * k / 16) / 2
    basis[0] /= math.sqrt(2)
    return basis


# ITU T.871: Y, Cb and Cr from red, green and blue
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
# ITU T.81, annex K: quantisation of brightness and of colour at quality 50
_TABLES = (
    (
        (16, 11, 10, 16, 24, 40, 51, 61),
        (12, 12, 14, 19, 26, 58, 60, 55),
        (14, 13, 16, 24, 40, 57, 69, 56),
        (14, 17, 22, 29, 51, 87, 80, 62),
        (18, 22, 37, 56, 68, 109, 103, 77),
        (24, 35, 55, 64, 81, 104, 113, 92),
        (49, 64, 78, 87, 103, 121, 120, 101),
        (72, 92, 95, 98, 112, 100, 103, 99),
    ),
    (
        (17, 18, 24, 47, 99, 99, 99, 99),
        (18, 21, 26, 66, 99, 99, 99, 99),
        (24, 26, 56, 99, 99, 99, 99, 99),
        (47, 66, 99, 99, 99, 99, 99, 99),
        (99, 99, 99, 99, 99, 99, 99, 99),
        (99, 99, 99, 99, 99, 99, 99, 99),
        (99, 99, 99, 99, 99, 99, 99, 99),
        (99, 99, 99, 99, 99, 99, 99, 99),
    ),
)
