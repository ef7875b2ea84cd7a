"""The discriminator: residual blocks, minibatch standard deviation, and the class by projection (1802.05637)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from histosynth.gan.layers import SLOPE, EqualConv, EqualLinear, MinibatchStd, down_2x
from histosynth.gan.mapping import Mapping
from histosynth.gan.residual import JudgingUnit, ResidualJudge
from histosynth.gan.shape import Shape


class DiscriminatorBlock(nn.Module):
    """Two 3x3 convolutions that halve the size, beside a 1x1 shortcut (1912.04958, figure 7c)."""

    def __init__(self, inputs: int, outputs: int, shape: Shape) -> None:
        super().__init__()
        self.conv0 = EqualConv(inputs, inputs, 3, clamp=shape.d_clamp)
        residual = shape.discriminator == "resnet"
        # the sum of two parts of unit variance is scaled back to it: here, in the weights, it costs nothing
        gain = math.sqrt(0.5) if residual else 1.0
        clamp = None if shape.d_clamp is None else shape.d_clamp * gain
        self.conv1 = EqualConv(inputs, outputs, 3, down=True, gain=gain, clamp=clamp)
        self.skip = EqualConv(inputs, outputs, 1, active=False, down=True, gain=gain) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H/2, W/2]."""
        y = self.conv1(self.conv0(x))
        return y if self.skip is None else self.skip(x) + y


class Discriminator(nn.Module):
    """Image, class -> logit, positive for real.

    Lite: one spectrally normalised 4x4 convolution of stride 2 a resolution (1802.05957) and no statistics of the
    batch; residual: see `histosynth.gan.residual`; else StyleGAN2's.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.lite = shape.architecture == "lite"
        channels, clamp = shape.d_channels(4), shape.d_clamp
        residual = shape.architecture == "residual"
        self.from_rgb = None
        if residual:
            self.from_rgb = EqualConv(
                shape.colours, shape.d_channels(shape.canvas), 3, active=False, bias=True, equalised=False
            )
        elif not self.lite:
            self.from_rgb = EqualConv(shape.colours, shape.d_channels(shape.canvas), 1, clamp=clamp)
        self.blocks, self.heads = nn.ModuleDict(), nn.ModuleDict()
        inputs = shape.colours if self.lite else shape.d_channels(shape.canvas)
        for resolution in reversed(shape.resolutions[1:]):
            outputs = shape.d_channels(resolution // 2)
            if self.lite:
                conv = EqualConv(inputs, outputs, 4, stride=2, clamp=clamp, equalised=False)
                self.blocks[f"b{resolution}"] = spectral_norm(conv)
            elif residual:
                self.blocks[f"b{resolution}"] = ResidualJudge(inputs, outputs)
            else:
                self.blocks[f"b{resolution}"] = DiscriminatorBlock(inputs, outputs, shape)
                if shape.discriminator == "skip":
                    last = resolution == 8
                    self.heads[f"b{resolution // 2}"] = EqualConv(
                        shape.colours, outputs, 1, clamp=None if last else clamp
                    )
            inputs = outputs
        self.minibatch_std = self.conv = None
        if not self.lite:
            more = shape.mbstd_channels
            self.minibatch_std = MinibatchStd(shape.mbstd_group, more) if more else None
            self.conv = EqualConv(channels + more, channels, 3, clamp=clamp, equalised=not residual)
        self.last = JudgingUnit(channels) if residual else None
        equalised, width = not (self.lite or residual), channels * (2 if residual else 1)
        self.dense = EqualLinear(channels * 16, width, active=True, equalised=equalised)
        mapped = shape.conditioning == "mapping"
        length = (shape.cmap_dim or channels) if mapped else 1
        self.head = EqualLinear(width, length, equalised=equalised)
        self.embedding = self.mapping = None
        if shape.conditioning == "projection":
            self.embedding = nn.Parameter(torch.randn(shape.classes, width))
        elif mapped:
            depth = shape.d_mapping_depth
            self.mapping = Mapping(0, shape.classes, length, depth, shape.mapping_lr, equalised=not self.lite)
        if self.lite:
            self.dense, self.head = spectral_norm(self.dense), spectral_norm(self.head)

    def features(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Images [N, 3, size, size] in [-1, 1], or latents -> features [N, C, 4, 4] before the batch is looked at."""
        image = images.to(dtype, memory_format=torch.channels_last)
        x = image if self.from_rgb is None else self.from_rgb(image)
        for name, block in self.blocks.items():
            x = block(x)
            below = f"b{int(name[1:]) // 2}"
            if below in self.heads:
                image = down_2x(image)
                x = x + self.heads[below](image)
        return x if self.last is None else F.leaky_relu(self.last(x), SLOPE)

    def forward(self, images: Tensor, labels: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Images in [-1, 1] and int64 [N] -> float32 logits [N]; without conditioning, labels are not read."""
        x = self.features(images, dtype).float()
        x = x if self.minibatch_std is None else self.minibatch_std(x)
        x = x if self.conv is None else self.conv(x)
        x = self.dense(x.flatten(1))
        out = self.head(x)
        if self.mapping is not None:
            return (out * self.mapping(None, labels)).sum(dim=1) / math.sqrt(out.shape[1])
        if self.embedding is not None:
            return out.squeeze(1) + (x * self.embedding[labels]).sum(dim=1) / math.sqrt(x.shape[1])
        return out.squeeze(1)

    def freeze_highest(self, blocks: int) -> None:
        """Freeze-D (2002.10964): the first `blocks` blocks, which see the finest detail, stop learning."""
        frozen = [self.from_rgb, *list(self.blocks.values())[:blocks]] if blocks else []
        for part in frozen:
            if part is not None:
                part.requires_grad_(False)
