"""The parts of the pathology head that learn, and the fixed mixing before them."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histosynth.core.seeds import torch_generator
from histosynth.gan.layers import SLOPE, blur

GRID = 4
"""Judges on maps look at GRID x GRID places, whatever the size of the map, so that every depth weighs the same."""


class SpectralConv(nn.Conv2d):
    """A convolution with its weight divided by the largest singular value (1802.05957), in the dtype of its input.

    One power iteration for every forward in which the weight learns. The vector is in the state dict, and forwards
    that do not learn leave it alone, so that a resumed training goes on exactly.
    """

    u: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding)
        self.register_buffer("u", F.normalize(torch.randn(outputs), dim=0))
        with torch.no_grad():
            for _ in range(15):  # so that the first steps are normalised too
                self._iterate(self.weight.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, h, w]."""
        matrix = self.weight.flatten(1)
        learns = self.training and self.weight.requires_grad and torch.is_grad_enabled()
        with torch.no_grad():
            if learns:
                self._iterate(matrix)
            # clones: the next forward moves u, and the gradient of this one may come later
            u = self.u.clone()
            v = F.normalize(matrix.t() @ u, dim=0)
        weight = self.weight / (u @ (matrix @ v))
        return F.conv2d(x, weight.to(x.dtype), self.bias.to(x.dtype), self.stride, self.padding)  # type: ignore[union-attr]

    def _iterate(self, matrix: Tensor) -> None:
        self.u.copy_(F.normalize(matrix @ F.normalize(matrix.t() @ self.u, dim=0), dim=0))


class Judge(nn.Module):
    """A small conditional discriminator on one feature map: [N, C, h, w] and labels -> float32 logits [N, k].

    A 3x3 convolution (1x1 on a single pixel), then halvings down to about `grid` pixels, then a logit for every place:
    a linear one plus the inner product with the embedding of the class (1802.05637).

    Args:
        channels, size: of the map.
        classes: 0 or 1: no embedding.
        width, widest: channels after the first convolution; each halving doubles them, up to `widest`. Width 0: no
            convolution at all, the logits are linear in the map.
        smooth: low-pass filter before each halving, as in StyleGAN2; without it a 4x4 convolution of stride 2 does
            both, and aliases.
        lean: no first convolution where a halving follows: nothing is computed at the full size of the map.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        classes: int,
        width: int = 64,
        widest: int = 128,
        grid: int = GRID,
        smooth: bool = False,
        lean: bool = False,
    ) -> None:
        super().__init__()
        self.grid, self.smooth = grid, smooth
        kernel = 3 if size > 1 else 1
        self.layers = nn.ModuleList()
        if width and not (lean and size >= 2 * grid):
            self.layers.append(SpectralConv(channels, width, kernel, padding=kernel // 2))
            channels = width
        while width and size >= 2 * grid:
            wider = min(2 * channels, widest)
            halving = SpectralConv(channels, wider, 3, 2) if smooth else SpectralConv(channels, wider, 4, 2, 1)
            self.layers.append(halving)
            channels, size = wider, size // 2
        self.out = SpectralConv(channels, 1, kernel, padding=kernel // 2)
        self.embedding = nn.Parameter(0.5 * torch.randn(classes, channels)) if classes > 1 else None

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """`labels` int64 [N]; those below 0, and None, are tiles without a class, judged without the projection."""
        for layer in self.layers:
            x = F.leaky_relu(layer(blur(x, 2) if self.smooth and layer.stride == (2, 2) else x), SLOPE)
        x = x.float()
        logits = self.out(x)[:, 0]
        if self.embedding is not None and labels is not None:
            known = (labels >= 0).to(x.dtype)[:, None]
            direction = self.embedding[labels.clamp_min(0)] * (known / math.sqrt(x.shape[1]))
            logits = logits + torch.einsum("nchw,nc->nhw", x, direction)
        if logits.shape[-2:] != (self.grid, self.grid):
            logits = F.adaptive_avg_pool2d(logits, self.grid)
        return logits.flatten(1)


class Mixing(nn.Module):
    """Fixed random mixing of feature maps (2111.01007, section 3): 1x1 convolutions across the channels of every map,
    then, from the deepest up, `kernel` x `kernel` convolutions across scales. A discriminator on the maps themselves
    would attend only to a few channels and ignore the depths that are hard; here, every channel of what it sees holds
    them all.

    The weights are drawn from `seed` and kept in the state dict as buffers, so nothing trains them.

    Args:
        channels: of every map, finest first.
        kernel: 3 as in the paper, or 1, which can go before the enlargement and costs a thirty-sixth of it.
    """

    def __init__(
        self, channels: list[int], width: int = 64, widest: int = 128, kernel: Literal[1, 3] = 3, seed: int = 0
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.widths = [min(max(c, width), widest) for c in channels]
        draw = torch_generator(seed, "pathology head", "mixing")
        for i, (c, w) in enumerate(zip(channels, self.widths, strict=True)):
            self.register_buffer(f"channel{i}", torch.randn(w, c, 1, 1, generator=draw) / math.sqrt(c))
        for i, (finer, coarser) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            mix = torch.randn(finer, coarser, kernel, kernel, generator=draw) / math.sqrt(kernel * kernel * coarser)
            self.register_buffer(f"scale{i}", mix)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """[N, C, h, w] each, finest first -> as many maps of the same sizes, with `widths` channels."""
        mixed = [F.conv2d(x, self._weight(f"channel{i}", x)) for i, x in enumerate(maps)]
        for i in range(len(mixed) - 2, -1, -1):
            weight = self._weight(f"scale{i}", mixed[i])
            below = F.conv2d(mixed[i + 1], weight) if self.kernel == 1 else mixed[i + 1]
            below = F.interpolate(below, mixed[i].shape[-2:], mode="bilinear", align_corners=False)
            # a 1x1 convolution and an enlargement may change places
            mixed[i] = mixed[i] + (below if self.kernel == 1 else F.conv2d(below, weight, padding=1))
        return mixed

    def _weight(self, name: str, like: Tensor) -> Tensor:
        return self.get_buffer(name).to(like.dtype)
