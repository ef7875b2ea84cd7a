"""The classifier's networks, scaled to small tiles and short trainings, and their pixel door.

A network costs one function and one line in `ARCHITECTURES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models import (
    EfficientNet,
    EfficientNet_B0_Weights,
    MobileNet_V2_Weights,
    MobileNetV2,
    ResNet18_Weights,
)
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.resnet import BasicBlock

from histosynth.core.errors import SettingError, did_you_mean

SMALL_TILE = 96
"""Up to this edge length (pixels) the last halving of the resolution is left out."""

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Architecture:
    """A network that can be trained.

    Attributes:
        make: `make(classes, width, depth, dropout, last_stride) -> network`, new and random.
        head: how the names of the last layer's tensors begin, which belong to the classes.
        imagenet: address of the ImageNet weights, whose file name ends with the start of its SHA-256.
        origin: what these weights are called in a card.
    """

    make: Callable[[int, float, float, float, int], nn.Module]
    head: str
    imagenet: str
    origin: str


def build(
    architecture: str, classes: int, *, size: int, width: float = 1.0, depth: float = 1.0, dropout: float = 0.2
) -> nn.Module:
    """A network with random weights, from torch's global generator, for tiles of `size` pixels.

    These networks halve the resolution five times, for 224 px. On small tiles that leaves a 2 x 2 map, so up to
    96 px the last halving is left out. (Leaving out the first one instead costs two to three times the
    computation.) Strides carry no weights, so weights of either kind fit.

    Args:
        architecture: a name in `ARCHITECTURES`.
        classes: number of outputs.
        size: edge length of the tiles, pixels.
        width: multiplier of the channels.
        depth: multiplier of the blocks a stage, at least one block each.
        dropout: before the last layer.

    Returns:
        The network in training mode: float [N, 3, size, size], scaled by `normalise` -> logits [N, classes].

    Raises:
        SettingError: an unknown architecture, or a multiplier that is not positive.
    """
    known = architecture_of(architecture)
    if width <= 0 or depth <= 0:
        raise SettingError(f"width is {width} and depth is {depth}.", "Use positive multipliers, up to 1.0.")
    network = known.make(classes, width, depth, dropout, 1 if size <= SMALL_TILE else 2)
    _start_as_identity(network)
    return network


def architecture_of(name: str) -> Architecture:
    """The architecture called `name`.

    Raises:
        SettingError: there is none (near names are suggested).
    """
    if name not in ARCHITECTURES:
        raise SettingError(f"The classifier is {name!r}.", did_you_mean(name, ARCHITECTURES))
    return ARCHITECTURES[name]


def normalise(images: Tensor) -> Tensor:
    """[N, 3, H, W] in [0, 255], uint8 or float -> float32, scaled as ImageNet networks expect it."""
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1) * 255
    # channels last in memory: training is up to 1.6 times faster on a CPU
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def _mobilenet_v2(classes: int, width: float, depth: float, dropout: float, last_stride: int) -> nn.Module:
    """Sandler et al. 2018, arXiv:1801.04381."""
    stages = [  # expansion, channels, blocks, stride: table 2 of the paper
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, last_stride),
        (6, 320, 1, 1),
    ]
    return MobileNetV2(
        num_classes=classes,
        width_mult=width,
        dropout=dropout,
        inverted_residual_setting=[[t, c, math.ceil(n * depth), s] for t, c, n, s in stages],
    )


def _efficientnet_b0(classes: int, width: float, depth: float, dropout: float, last_stride: int) -> nn.Module:
    """Tan and Le 2019, arXiv:1905.11946; whole blocks are dropped with the probability `dropout` too."""
    stages = [  # expansion, kernel, stride, channels in and out, blocks: table 1 of the paper
        (1, 3, 1, 32, 16, 1),
        (6, 3, 2, 16, 24, 2),
        (6, 5, 2, 24, 40, 2),
        (6, 3, 2, 40, 80, 3),
        (6, 5, 1, 80, 112, 3),
        (6, 5, last_stride, 112, 192, 4),
        (6, 3, 1, 192, 320, 1),
    ]
    return EfficientNet(
        [MBConvConfig(*stage, width_mult=width, depth_mult=depth) for stage in stages],
        dropout=dropout,
        stochastic_depth_prob=dropout,
        num_classes=classes,
    )


class ResNet18(nn.Module):
    """He et al. 2016, arXiv:1512.03385, with torchvision's names, so that its weights fit.

    (torchvision's own class has no multiplier of the channels for basic blocks.)
    """

    def __init__(self, classes: int, width: float, depth: float, dropout: float, last_stride: int) -> None:
        super().__init__()
        channels = [max(8, round(c * width / 8) * 8) for c in (64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(3, channels[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        blocks = math.ceil(2 * depth)
        before = channels[0]
        for i, (now, stride) in enumerate(zip(channels, (1, 2, 2, last_stride), strict=True), start=1):
            setattr(self, f"layer{i}", _stage(before, now, blocks, stride))
            before = now
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.dropout(x.mean((2, 3))))


def _stage(inside: int, outside: int, blocks: int, stride: int) -> nn.Sequential:
    skip = None
    if inside != outside or stride != 1:
        skip = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
    first = BasicBlock(inside, outside, stride, skip)
    return nn.Sequential(first, *(BasicBlock(outside, outside) for _ in range(blocks - 1)))


def _start_as_identity(network: nn.Module) -> None:
    """Let every residual block begin as the identity, which speeds up the first steps.

    Goyal et al. 2017 (arXiv:1706.02677), section 5.1: the scale of a block's last batch norm starts at 0.
    """
    for block in network.modules():
        if isinstance(block, BasicBlock):
            nn.init.zeros_(block.bn2.weight)
        elif getattr(block, "use_res_connect", False):
            norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
            nn.init.zeros_(norms[-1].weight)


ARCHITECTURES = {
    "mobilenet-v2": Architecture(
        _mobilenet_v2, "classifier.", MobileNet_V2_Weights.IMAGENET1K_V2.url, "MobileNetV2 IMAGENET1K_V2"
    ),
    "efficientnet-b0": Architecture(
        _efficientnet_b0, "classifier.", EfficientNet_B0_Weights.IMAGENET1K_V1.url, "EfficientNet-B0 IMAGENET1K_V1"
    ),
    "resnet-18": Architecture(ResNet18, "fc.", ResNet18_Weights.IMAGENET1K_V1.url, "ResNet-18 IMAGENET1K_V1"),
}
