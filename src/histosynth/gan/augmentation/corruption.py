"""What is done to an image as a whole: gains of bands of detail, noise, a hole (2006.06676, appendix B)."""

from __future__ import annotations

import torch
from torch import Tensor

from histosynth.gan.augmentation.draws import Draws
from histosynth.gan.augmentation.geometry import on_some
from histosynth.gan.augmentation.pipe import Pipe
from histosynth.gan.augmentation.wavelets import filters

POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)  # expected share of the bands, from coarse to fine, in natural images


def bands(images: Tensor, pipe: Pipe, draws: Draws) -> Tensor:
    """Amplify or weaken four octaves of detail of float32 [N, 3, S, S]."""
    if not pipe.bands:
        return images
    on = torch.stack([draws.on(f"band {k}") for k in range(len(POWER))]).any(dim=0)
    return on_some(on, images, filtered, band_gains(pipe, draws))


def band_gains(pipe: Pipe, draws: Draws) -> Tensor:
    """[N, 4]: the product of one gain at each band, each brought to the expected power of an unchanged image."""
    power = torch.tensor(POWER, device=draws.numbers.device)
    whole = torch.ones(len(draws), len(POWER), device=draws.numbers.device)
    for band in range(len(POWER)):
        name = f"band {band}"
        gain = torch.where(draws.on(name), torch.exp2(pipe.bands * draws.normal(name)), 1.0)
        here = torch.zeros_like(power)
        here[band] = 1.0
        gains = 1 + (gain[:, None] - 1) * here
        whole = whole * gains * torch.rsqrt((power * gains.square()).sum(dim=1, keepdim=True))
    return whole


def filtered(images: Tensor, gains: Tensor) -> Tensor:
    """[N, 3, S, S] with the gains [N, 4] along rows, then along columns."""
    matrices = filters("bands", images.shape[-1], images.device).to(images.dtype)
    own = (gains @ matrices.flatten(1)).view(len(images), 1, *matrices.shape[1:])
    return own @ images @ own.transpose(2, 3)


def noise(images: Tensor, pipe: Pipe, draws: Draws, generator: torch.Generator) -> Tensor:
    """Add independent normal noise to every value, of a half-normal standard deviation."""
    if not pipe.noise:
        return images
    strength = torch.where(draws.on("noise"), pipe.noise * draws.normal("noise").abs(), 0.0)
    grain = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    return images + grain * strength.to(images.dtype).view(-1, 1, 1, 1)


def cutout(images: Tensor, pipe: Pipe, draws: Draws) -> Tensor:
    """Set a rectangle, its middle anywhere in the image, to 0."""
    if not pipe.cutout:
        return images
    size = images.shape[-1]
    middle = draws.uniform("cutout")[:, :, None]
    place = (torch.arange(size, device=images.device) + 0.5) / size
    inside = (place - middle).abs() < pipe.cutout / 2
    hole = inside[:, 0, None, :] & inside[:, 1, :, None] & draws.on("cutout")[:, None, None]
    return images.masked_fill(hole[:, None], 0.0)
