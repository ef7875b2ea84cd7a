"""The discriminator: residual blocks, minibatch standard deviation, class projection (1802.05637)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from histosynth.gan.generator import Shape
from histosynth.gan.layers import EqualConv, EqualLinear, MinibatchStd


class DiscriminatorBlock(nn.Module):
    """Two 3x3 convolutions that halve the size, beside a 1x1 shortcut (1912.04958, figure 7c)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv0 = EqualConv(inputs, inputs, 3)
        self.conv1 = EqualConv(inputs, outputs, 3, down=True)
        self.skip = EqualConv(inputs, outputs, 1, active=False, down=True)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H/2, W/2]."""
        return (self.conv1(self.conv0(x)) + self.skip(x)) * math.sqrt(0.5)


class Discriminator(nn.Module):
    """Image, class -> logit, positive for real."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.from_rgb = EqualConv(3, shape.channels(shape.size), 1)
        self.blocks = nn.ModuleDict()
        for resolution in reversed(shape.resolutions[1:]):
            self.blocks[f"b{resolution}"] = DiscriminatorBlock(
                shape.channels(resolution), shape.channels(resolution // 2)
            )
        channels = shape.channels(4)
        self.minibatch_std = MinibatchStd()
        self.conv = EqualConv(channels + 1, channels, 3)
        self.dense = EqualLinear(channels * 16, channels, active=True)
        self.head = EqualLinear(channels, 1)
        self.embedding = nn.Parameter(torch.randn(shape.classes, channels))

    def features(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Images [N, 3, size, size] in [-1, 1] -> features [N, C, 4, 4] before the batch is looked at."""
        x = self.from_rgb(images.to(dtype, memory_format=torch.channels_last))
        for block in self.blocks.values():
            x = block(x)
        return x

    def forward(self, images: Tensor, labels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Images in [-1, 1] and int64 [N] -> float32 logits [N]."""
        x = self.conv(self.minibatch_std(self.features(images, dtype).float()))
        x = self.dense(x.flatten(1))
        projection = (x * self.embedding[labels]).sum(dim=1) / math.sqrt(x.shape[1])
        return self.head(x).squeeze(1) + projection

    def freeze_highest(self, blocks: int) -> None:
        """Freeze-D (2002.10964): the first `blocks` blocks, which see the finest detail, stop learning."""
        frozen = [self.from_rgb, *list(self.blocks.values())[:blocks]] if blocks else []
        for part in frozen:
            part.requires_grad_(False)
