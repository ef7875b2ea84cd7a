"""Two views of a tile: what changes between hospitals, scanners and turns of the glass, and not the tissue.

All on batches in plain torch, every tile with its own numbers from one generator.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

# optical densities of haematoxylin, eosin and a residual (rows; Ruifrok & Johnston 2001), unit length
_STAINS = F.normalize(torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]]), dim=1)
_WHITE = 255.0


def view(images: Tensor, size: int, generator: Generator, strength: float = 1.0) -> Tensor:
    """A random view of each tile.

    Args:
        images: uint8 [N, 3, S, S].
        size: edge length of the view in pixels.
        generator: on the CPU; where every random number comes from.
        strength: of the colour and quality changes; 0 leaves only crops, turns and flips.

    Returns:
        float32 [N, 3, size, size] in [-1, 1].
    """
    pixels = crop_and_turn(images.float(), size, generator)
    if strength > 0:
        pixels = restain(pixels, generator, strength)
        pixels = rebalance(pixels, generator, strength)
        for spoil in (blur, compress):
            some = torch.rand(len(pixels), generator=generator) < 0.5
            if some.any():
                pixels[some] = spoil(pixels[some], generator, strength)
        grain = strength * 4 * _uniform(pixels, generator).square()
        pixels = pixels + grain * torch.randn(pixels.shape, generator=generator)
    return (pixels.clamp(0, 255) / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def crop_and_turn(pixels: Tensor, size: int, generator: Generator) -> Tensor:
    """A turn by any angle, a flip, and a zoom between a part of the tile and slightly more than all of it."""
    n = len(pixels)
    draw = torch.rand(5, n, generator=generator)
    angle = draw[0] * 2 * math.pi
    half = 0.65 + 0.40 * draw[1]  # half width of the crop, where 1 is the whole tile
    flip = torch.where(draw[2] < 0.5, -1.0, 1.0)
    room = (1 - half).clamp_min(0)
    cos, sin = angle.cos() * half, angle.sin() * half
    x, y = (2 * draw[3] - 1) * room, (2 * draw[4] - 1) * room
    transform = torch.stack([torch.stack([cos * flip, -sin, x], 1), torch.stack([sin * flip, cos, y], 1)], 1)
    grid = F.affine_grid(transform, [n, 3, size, size], align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def restain(pixels: Tensor, generator: Generator, strength: float) -> Tensor:
    """Another staining: in optical density, each stain gets another colour and another concentration.

    Beer-Lambert: density = -log(pixel / white) = concentrations @ stain colours, so one 3x3 matrix does it.
    """
    n = len(pixels)
    turned = F.normalize(_STAINS + strength * 0.09 * torch.randn(n, 3, 3, generator=generator), dim=2)
    amount = (strength * 0.30 * torch.randn(n, 3, 1, generator=generator)).clamp(-0.7, 0.7).exp()
    matrix = torch.linalg.inv(_STAINS) @ (amount * turned)
    density = -((pixels + 1) / (_WHITE + 1)).clamp(1 / 256, 1).log()
    density = torch.bmm(matrix.transpose(1, 2), density.flatten(2)).view_as(density)
    return (_WHITE + 1) * (-density.clamp_min(0)).exp() - 1


def rebalance(pixels: Tensor, generator: Generator, strength: float) -> Tensor:
    """Another scanner: white point, gamma, and a small mixing of the channels (hue)."""
    n = len(pixels)
    gain = 1 + strength * (0.12 * torch.rand(n, 1, 1, 1, generator=generator) - 0.10)
    gain = gain + strength * 0.03 * torch.randn(n, 3, 1, 1, generator=generator)
    gamma = (strength * 0.15 * torch.randn(n, 1, 1, 1, generator=generator)).clamp(-0.4, 0.4).exp()
    mix = torch.eye(3) + strength * 0.04 * torch.randn(n, 3, 3, generator=generator)
    mix = mix / mix.sum(2, keepdim=True)  # greys stay grey
    pixels = 255 * (pixels.clamp(0, 255) / 255).pow(gamma) * gain
    return torch.bmm(mix, pixels.flatten(2)).view_as(pixels)


def blur(pixels: Tensor, generator: Generator, strength: float) -> Tensor:
    """Out of focus: a Gaussian of up to 1.4 pixels."""
    n, channels, height, width = pixels.shape
    sigma = (strength * 1.4 * torch.rand(n, generator=generator)).clamp_min(0.05)
    offsets = torch.arange(-3, 4)
    kernel = (-(offsets**2) / (2 * sigma[:, None] ** 2)).exp()
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    planes = F.pad(pixels.reshape(1, n * channels, height, width), (3, 3, 3, 3), mode="reflect")
    planes = F.conv2d(planes, kernel[:, None, None, :], groups=n * channels)
    planes = F.conv2d(planes, kernel[:, None, :, None], groups=n * channels)
    return planes.view_as(pixels)


def compress(pixels: Tensor, generator: Generator, strength: float) -> Tensor:
    """JPEG-like: quantise 8x8 cosine coefficients, the fine ones more coarsely."""
    n, channels, height, width = pixels.shape
    quality = strength * torch.rand(n, 1, 1, 1, 1, 1, generator=generator)
    basis = _cosines()
    blocks = pixels.reshape(n, channels, height // 8, 8, width // 8, 8).permute(0, 1, 2, 4, 3, 5)
    frequency = torch.arange(8)
    step = (quality * (2 + 3.0 * (frequency[:, None] + frequency))).clamp_min(0.01)
    coefficients = basis @ blocks @ basis.T
    blocks = basis.T @ ((coefficients / step).round() * step) @ basis
    return blocks.permute(0, 1, 2, 4, 3, 5).reshape(n, channels, height, width)


def _cosines() -> Tensor:
    """The orthonormal 8-point cosine transform (type II)."""
    k, x = torch.arange(8)[:, None], torch.arange(8)
    basis = torch.cos(math.pi * (2 * x + 1) * k / 16) * math.sqrt(2 / 8)
    basis[0] /= math.sqrt(2)
    return basis


def _uniform(pixels: Tensor, generator: Generator) -> Tensor:
    return torch.rand(len(pixels), 1, 1, 1, generator=generator)
