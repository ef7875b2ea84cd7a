"""How near a round trip through an autoencoder comes: PSNR, SSIM, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from histosynth.autoencoder.cache import chunk_of
from histosynth.autoencoder.network import Autoencoder, to_uint8
from histosynth.core.files import atomic_path

_SMALLEST = 11
"""Edge of SSIM's window."""
_GAP = 2


@torch.no_grad()
def round_trip(model: Autoencoder, images: Tensor, where: torch.device) -> Tensor:
    """uint8 tiles [N, 3, S, S] through the autoencoder and back, a few at a time, on the CPU."""
    chunk = chunk_of(images.shape[-1])
    return torch.cat([to_uint8(model.decode(model.encode(part.to(where)))).cpu() for part in images.split(chunk)])


def round_trip_figures(model: Autoencoder, images: np.ndarray, where: torch.device) -> dict[str, float]:
    """psnr_db and, for tiles of at least 11 px, ssim of uint8 tiles [N, 3, S, S] against their round trip."""
    before = torch.from_numpy(np.array(images))
    after = round_trip(model, before, where)
    figures = {"psnr_db": round(psnr(before, after), 2)}
    if before.shape[-1] >= _SMALLEST:
        figures["ssim"] = round(ssim(before, after), 4)
    return figures


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of uint8 images [N, 3, H, W], a mean over images."""
    error = (a.float() - b.float()).square().mean(dim=(1, 2, 3)).clamp_min(1e-6)
    return (10 * torch.log10(255.0**2 / error)).mean().item()


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity (Wang et al. 2004: Gaussian window of 11 px, deviation 1.5) of uint8 images."""
    x, y = a.float(), b.float()
    line = torch.exp(-(torch.arange(11) - 5.0).square() / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2
    kernel = window.expand(3, 1, 11, 11).contiguous()

    def blur(z: Tensor) -> Tensor:
        return F.conv2d(z, kernel, groups=3)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    value = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return value.mean().item()


def save_panel(path: Path, rows: Sequence[Tensor]) -> Path:
    """Write rows of uint8 tiles [n, 3, S, S] as one PNG; rows may differ in length."""
    size = rows[0].shape[-1]
    columns = max(len(row) for row in rows)
    step = size + _GAP
    canvas = np.full((len(rows) * step - _GAP, columns * step - _GAP, 3), 255, dtype=np.uint8)
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            canvas[r * step : r * step + size, c * step : c * step + size] = tile.permute(1, 2, 0).cpu().numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(canvas).save(temporary)
    return path
