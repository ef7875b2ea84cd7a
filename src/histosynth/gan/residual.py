"""Residual networks for small budgets, after R3GAN (2501.05441): `architecture` "residual".

StyleGAN2's generator is hard to fit: shown pairs of a code and a latent, it needs several times the steps of a plain
residual one of its size, and 35 minutes on a CPU teach it texture and little layout (docs/results.md). Here a block is
an identity plus a correction that starts small. The code w sets the channels between the convolutions of a unit, and
weights are used as they are (no equalised learning rate), so that learning rates are smaller than those of StyleGAN2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histosynth.gan.layers import SLOPE, EqualConv
from histosynth.gan.shape import Shape

_PLAIN = 1 / math.sqrt(3)  # deviation of torch's own initial weights, times the root of the fan
_KAIMING = math.sqrt(2 / (1 + SLOPE**2))
_SMALL = 0.3  # of the last convolution of a unit, so that an unlearned unit changes little


def _conv(inputs: int, outputs: int, kernel: int, gain: float) -> EqualConv:
    return EqualConv(inputs, outputs, kernel, active=False, bias=True, equalised=False, gain=gain)


class ChannelNorm(nn.Module):
    """Group normalisation (1803.08494) in the dtype of its input."""

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.groups = math.gcd(8, channels)
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape, each group of channels normalised before the affine map."""
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        return F.group_norm(x, self.groups, weight, bias)


class StyledUnit(nn.Module):
    """Two 3x3 convolutions beside an identity; w scales and shifts what is between them, noise comes before it."""

    def __init__(self, channels: int, resolution: int, shape: Shape) -> None:
        super().__init__()
        self.resolution, self.noisy = resolution, shape.noise
        self.norm0, self.norm1 = ChannelNorm(channels), ChannelNorm(channels, affine=False)
        self.conv0 = _conv(channels, channels, 3, _PLAIN)
        self.conv1 = _conv(channels, channels, 3, _PLAIN * _SMALL)
        self.style = nn.Linear(shape.w_dim, 2 * channels)
        nn.init.normal_(self.style.weight, std=0.3 / math.sqrt(shape.w_dim))
        nn.init.zeros_(self.style.bias)
        if self.noisy:
            self.noise_strength = nn.Parameter(torch.randn(channels, 1, 1) * 0.1)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """[N, C, H, W], [N, w_dim], noise [N or 1, 1, H, W] or none -> [N, C, H, W]."""
        scale, shift = self.style(w).to(x.dtype)[:, :, None, None].chunk(2, dim=1)
        y = self.conv0(F.silu(self.norm0(x)))
        if noise is not None:
            y = y + (noise * self.noise_strength).to(y.dtype)
        return x + self.conv1(F.silu(torch.addcmul(shift, self.norm1(y), 1 + scale)))


class ResidualSynthesis(nn.Module):
    """All of the generator at one resolution; as `SynthesisBlock`, but that it leaves the image to `ImageHead`."""

    def __init__(self, inputs: int, outputs: int, resolution: int, shape: Shape) -> None:
        super().__init__()
        self.start = None if inputs else nn.Linear(shape.w_dim, outputs * 16)
        self.widen = _conv(inputs, outputs, 1, 1.0) if inputs not in (0, outputs) else None
        self.unit = StyledUnit(outputs, resolution, shape)

    @property
    def convs(self) -> list[StyledUnit]:
        """What takes a code and noise."""
        return [self.unit]

    def forward(
        self,
        x: Tensor | None,
        image: Tensor | None,
        w: Sequence[Tensor],
        noise: Sequence[Tensor | None],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        """Features, and `image` as it came; `w` begins with the code of this block."""
        if self.start is not None:
            x = self.start(w[0]).view(len(w[0]), -1, 4, 4).to(dtype).contiguous(memory_format=torch.channels_last)
        else:
            assert x is not None
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = x if self.widen is None else self.widen(x)
        return self.unit(x, w[0], noise[0]), image


class ImageHead(nn.Module):
    """The last features -> the image, in float32; the same weights whatever the size."""

    def __init__(self, channels: int, shape: Shape) -> None:
        super().__init__()
        self.norm, self.conv = ChannelNorm(channels), _conv(channels, shape.colours, 3, _PLAIN)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] -> [N, colours, H, W]."""
        return self.conv(F.silu(self.norm(x))).float()


class JudgingUnit(nn.Module):
    """Two 3x3 convolutions beside an identity, without normalisation, which would hide what R1 and R2 limit."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv0 = _conv(channels, channels, 3, _KAIMING)
        self.conv1 = _conv(channels, channels, 3, _KAIMING * _SMALL)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        return x + self.conv1(F.leaky_relu(self.conv0(F.leaky_relu(x, SLOPE)), SLOPE))


class ResidualJudge(nn.Module):
    """All of the discriminator at one resolution, and the way down to half of it by means of four."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.unit = JudgingUnit(inputs)
        self.widen = _conv(inputs, outputs, 1, 1.0) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H/2, W/2]."""
        x = F.avg_pool2d(self.unit(x), 2)
        return x if self.widen is None else self.widen(x)
