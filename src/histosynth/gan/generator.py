"""The generator: mapping network z, class -> w, and a synthesis network w -> image with skip connections.

Compact on purpose (see `Shape`): at 64 px the defaults make a network that trains on a laptop's CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from histosynth.core.errors import SettingError
from histosynth.core.seeds import torch_generator
from histosynth.gan.layers import GAIN, EqualLinear, ModulatedConv, activate, normalise, up_2x


@dataclass(frozen=True)
class Shape:
    """What fixes the shape of both networks.

    Channels at r pixels are min(channel_base / r, channel_max), at both networks.
    """

    size: int = 64
    classes: int = 9
    channel_base: int = 4096
    channel_max: int = 128
    z_dim: int = 256
    w_dim: int = 256
    mapping_depth: int = 2

    def __post_init__(self) -> None:
        if self.size not in (16, 32, 64, 128, 256, 512, 1024):
            raise SettingError(f"size is {self.size}.", "Use a power of two from 16 to 1024.")
        for name in ("classes", "channel_base", "channel_max", "z_dim", "w_dim", "mapping_depth"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}.", "Use a positive number.")

    def channels(self, resolution: int) -> int:
        """Feature channels at a resolution."""
        return max(1, min(self.channel_base // resolution, self.channel_max))

    @property
    def resolutions(self) -> tuple[int, ...]:
        """4, 8, ..., size."""
        return tuple(2**k for k in range(2, self.size.bit_length()))


class Mapping(nn.Module):
    """z [N, z_dim] and class [N] -> w [N, w_dim] (1812.04948), and the mean w of every class.

    The mean is kept per class, so that truncation pulls a tile towards its own class and not towards a
    tissue that does not exist.
    """

    w_mean: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(shape.classes, shape.w_dim))
        widths = [shape.z_dim + shape.w_dim] + [shape.w_dim] * shape.mapping_depth
        self.layers = nn.ModuleList(EqualLinear(a, b, lr_multiplier=0.01, active=True) for a, b in pairwise(widths))
        self.z_dim = shape.z_dim
        self.register_buffer("w_mean", torch.zeros(shape.classes, shape.w_dim))

    def forward(self, z: Tensor, labels: Tensor, truncation: float = 1.0) -> Tensor:
        """w, moved towards its class mean: w_mean + truncation (w - w_mean)."""
        x = torch.cat([normalise(z), normalise(self.embedding[labels])], dim=1)
        for layer in self.layers:
            x = layer(x)
        return x if truncation == 1.0 else self.w_mean[labels].lerp(x, truncation)

    @torch.no_grad()
    def measure_mean(self, draws: int = 2048) -> None:
        """Set `w_mean` to the mean over the same `draws` codes of every class."""
        z = torch.randn(draws, self.z_dim, generator=torch_generator(0, "w mean")).to(self.embedding.device)
        for label in range(len(self.embedding)):
            labels = torch.full((draws,), label, device=z.device)
            self.w_mean[label] = self(z, labels).mean(dim=0)


class SynthesisLayer(nn.Module):
    """Modulated 3x3 convolution, noise with a learned strength, bias, rectifier."""

    def __init__(self, inputs: int, outputs: int, w_dim: int, up: bool = False) -> None:
        super().__init__()
        self.conv = ModulatedConv(inputs, outputs, 3, w_dim, up=up)
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """[N, inputs, H, W], [N, w_dim], noise [N, 1, H', W'] or none -> [N, outputs, H', W']."""
        y = self.conv(x, w, gain=GAIN)
        if noise is not None:
            y = y + (noise * (self.noise_strength * GAIN)).to(y.dtype)
        return activate(y + (self.bias * GAIN).to(y.dtype)[:, None, None])


class SynthesisBlock(nn.Module):
    """All layers of one resolution; the first block starts from a learned constant."""

    def __init__(self, inputs: int, outputs: int, w_dim: int) -> None:
        super().__init__()
        if inputs:
            self.const = None
            self.conv0 = SynthesisLayer(inputs, outputs, w_dim, up=True)
        else:
            self.const = nn.Parameter(torch.randn(1, outputs, 4, 4))
        self.conv1 = SynthesisLayer(outputs, outputs, w_dim)
        self.to_rgb = ModulatedConv(outputs, 3, 1, w_dim, demodulate=False)
        self.rgb_bias = nn.Parameter(torch.zeros(3))

    def forward(
        self,
        x: Tensor | None,
        image: Tensor | None,
        w: Sequence[Tensor],
        noise: Sequence[Tensor | None],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Features, and the image so far in float32."""
        if self.const is not None:
            x = self.const.to(dtype).expand(len(w[0]), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        else:
            x = self.conv0(x, w[0], noise[0])
        x = self.conv1(x, w[-2], noise[-1])
        rgb = self.to_rgb(x, w[-1]).float() + self.rgb_bias[:, None, None]
        return x, rgb if image is None else up_2x(image) + rgb


class Generator(nn.Module):
    """z, class -> image. `forward` is for training; see `histosynth.gan.sample` for making tiles."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.mapping = Mapping(shape)
        self.blocks = nn.ModuleDict()
        inputs = 0
        for resolution in shape.resolutions:
            self.blocks[f"b{resolution}"] = SynthesisBlock(inputs, shape.channels(resolution), shape.w_dim)
            inputs = shape.channels(resolution)

    @property
    def layers(self) -> int:
        """Codes w that one image takes: one a 3x3 layer; an image head shares the next layer's."""
        return 2 * len(self.blocks)

    def noise_shapes(self) -> list[int]:
        """Edge length of the noise of every 3x3 layer, in order."""
        return [r for r in self.shape.resolutions for _ in range(1 if r == 4 else 2)]

    def draw_noise(self, count: int, generator: torch.Generator) -> list[Tensor]:
        """Fresh noise [count, 1, r, r] for every layer."""
        total = sum(r * r for r in self.noise_shapes())
        return self.shape_noise(torch.randn(count, total, generator=generator, device=generator.device))

    def seeded_noise(self, seeds: Sequence[int]) -> list[Tensor]:
        """Noise of every tile from its own seed: a tile's noise does not depend on its neighbours."""
        total = sum(r * r for r in self.noise_shapes())
        flat = torch.stack([torch.randn(total, generator=torch_generator(int(s), "noise")) for s in seeds])
        return self.shape_noise(flat)

    def shape_noise(self, flat: Tensor) -> list[Tensor]:
        """[N, sum of r*r] -> a list of [N, 1, r, r] on the network's device."""
        flat = flat.to(self.mapping.embedding.device)
        parts = flat.split([r * r for r in self.noise_shapes()], dim=1)
        return [p.reshape(len(flat), 1, r, r) for p, r in zip(parts, self.noise_shapes(), strict=True)]

    def synthesise(self, w: Tensor, noise: Sequence[Tensor] | None, dtype: torch.dtype = torch.float32) -> Tensor:
        """w [N, w_dim] or [N, layers, w_dim] -> float32 [N, 3, size, size], about [-1, 1], not clamped."""
        codes = list(w.unbind(dim=1)) if w.ndim == 3 else [w] * self.layers
        planes: list[Tensor | None] = list(noise) if noise is not None else [None] * (self.layers - 1)
        x = image = None
        position = 0
        for block in self.blocks.values():
            convs = 1 if block.const is not None else 2
            used = slice(position, position + convs)
            x, image = block(x, image, codes[position : position + convs + 1], planes[used], dtype)
            position += convs
        assert image is not None
        return image

    def forward(
        self,
        z: Tensor,
        labels: Tensor,
        noise: Sequence[Tensor] | None,
        z2: Tensor | None = None,
        crossover: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Images from z [N, z_dim]; with `z2` and `crossover` int64 [N], later layers use z2."""
        w = self.mapping(z, labels)
        if z2 is not None and crossover is not None:
            # style mixing inside the class (1812.04948, section 3.1)
            late = torch.arange(self.layers, device=w.device)[None, :] >= crossover[:, None]
            w = torch.where(late[:, :, None], self.mapping(z2, labels)[:, None], w[:, None])
        return self.synthesise(w, noise, dtype)
