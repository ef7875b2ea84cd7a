"""The one place where grey levels become what a network wants: resize, then shift and scale, once.

Everything here takes grey levels from 0 to 255. `FrozenEncoder` brings uint8 tiles and tiles in [-1, 1] to that scale,
so that both ways into a network pass the same door and nothing can be scaled twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Resize = Literal["bicubic", "bilinear", "legacy-pytorch", "legacy-tf"]

IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""Mean and deviation of ImageNet's channels, in grey levels."""


@dataclass(frozen=True)
class Door:
    """How grey levels become the input of a network.

    The resizes:
        bicubic, bilinear: antialiased, what Pillow does on floating-point channels (a = -0.5), as clean-fid does;
            values that overshoot are cut to [0, 255].
        legacy-pytorch: bilinear without antialiasing, half-pixel centres: what pytorch-fid does.
        legacy-tf: bilinear without antialiasing, corners at the origin: what TensorFlow 1 and torch-fidelity do.

    Tiles that already have the size are not touched. Others are stretched to a square, without cropping.
    """

    size: int
    """Edge length of the network's input, pixels."""
    resize: Resize
    """Which resize."""
    mean: tuple[float, ...]
    """A channel's value, in grey levels, that becomes 0."""
    std: tuple[float, ...]
    """How many grey levels make 1."""

    def __call__(self, grey: Tensor) -> Tensor:
        """float [N, 3, H, W] in [0, 255] -> float [N, 3, size, size], scaled; differentiable."""
        if grey.shape[-2:] != (self.size, self.size):
            grey = self._resized(grey)
        mean, std = (grey.new_tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (grey - mean) / std

    def _resized(self, grey: Tensor) -> Tensor:
        to = (self.size, self.size)
        if self.resize in ("bicubic", "bilinear"):
            # planes that lie together are resized twice as fast as pixels that do
            grey = F.interpolate(grey.contiguous(), to, mode=self.resize, antialias=True, align_corners=False)
            return grey.clamp(0, 255)
        if self.resize == "legacy-pytorch":
            return F.interpolate(grey, to, mode="bilinear", align_corners=False)
        rows, columns = (_corner_bilinear(n, self.size).to(grey) for n in grey.shape[-2:])
        return rows @ (grey @ columns.T)


def _corner_bilinear(inside: int, outside: int) -> Tensor:
    """[outside, inside]: output pixel i lies at i * inside / outside, between that pixel and the next."""
    # in float32, as the original: near whole numbers the rounding decides between two pixels
    place = torch.arange(outside, dtype=torch.float32) * torch.tensor(inside / outside, dtype=torch.float32)
    low = place.floor().long().clamp_max(inside - 1)
    high = (low + 1).clamp_max(inside - 1)
    share = place - low
    weights = torch.zeros(outside, inside)
    row = torch.arange(outside)
    weights.index_put_((row, low), 1 - share, accumulate=True)
    weights.index_put_((row, high), share, accumulate=True)
    return weights
