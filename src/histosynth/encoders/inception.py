"""`inception-v3`: the network of the Fréchet Inception Distance.

It is the classifier of 5 December 2015 with 1008 outputs, not the Inception-v3 that torchvision ships. The two have
the same layers and other weights, and differ in how they pool: the older one leaves the padding out of its
averages, and takes a maximum in its last block. Features are the 2048 averages before the last layer.

Szegedy et al. 2016 (arXiv:1512.00567) for the blocks; Heusel et al. 2017 (arXiv:1706.08500) for the distance;
Parmar et al. 2022 (arXiv:2104.11222) for why the resize matters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from histosynth.core.device import pick_device
from histosynth.encoders import card
from histosynth.encoders.door import Door
from histosynth.encoders.frozen import FrozenEncoder, Precision
from histosynth.encoders.weights import file_hash, fit, read_tensors, require

SIZE = 299
_CLASSES = 1008
# (network's value) = (grey level - mean) / std; the graph of 2015 and its ports divide by 128, pytorch-fid by 127.5
DOORS = {
    "inception-v3": Door(SIZE, "bicubic", (128.0,) * 3, (128.0,) * 3),
    "inception-v3-legacy": Door(SIZE, "legacy-pytorch", (127.5,) * 3, (127.5,) * 3),
    "inception-v3-legacy-tf": Door(SIZE, "legacy-tf", (128.0,) * 3, (128.0,) * 3),
}
# what follows the input of a block, by the names of its layers; a tuple splits the end of a path in two
_PATHS: dict[str, list[list[str | tuple[str, str]]]] = {
    "A": [
        ["branch1x1"],
        ["branch5x5_1", "branch5x5_2"],
        ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
    ],
    "B": [["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]],
    "C": [
        ["branch1x1"],
        ["branch7x7_1", "branch7x7_2", "branch7x7_3"],
        [f"branch7x7dbl_{i}" for i in range(1, 6)],
    ],
    "D": [["branch3x3_1", "branch3x3_2"], [f"branch7x7x3_{i}" for i in range(1, 5)]],
    "E": [
        ["branch1x1"],
        ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
        ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")],
    ],
}
_BLOCKS = [
    *(("Mixed_5" + c, "A", "average") for c in "bcd"),
    ("Mixed_6a", "B", "halve"),
    *(("Mixed_6" + c, "C", "average") for c in "bcde"),
    ("Mixed_7a", "D", "halve"),
    ("Mixed_7b", "E", "average"),
    ("Mixed_7c", "E", "maximum"),
]


class FidInception(nn.Module):
    """float [N, 3, 299, 299], scaled as the network wants it -> float [N, 2048].

    Made from the layers of torchvision's `Inception3`, whose names the weight file uses. Batch normalisation is
    folded into the convolutions, and the 1 x 1 convolutions that read the same input are one.
    """

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        layers = layers.eval()
        stem = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")
        self.stem = nn.ModuleList(_fold(getattr(layers, f"Conv2d_{name}")) for name in stem)
        self.blocks = nn.Sequential(
            *(_Block(getattr(layers, name), _PATHS[kind], pool) for name, kind, pool in _BLOCKS)
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, convolution in enumerate(self.stem):
            x = _rectify(convolution(x))
            if i in (2, 4):
                x = F.max_pool2d(x, 3, stride=2)
        return self.blocks(x).float().mean((2, 3))


class _Block(nn.Module):
    """Paths of convolutions beside each other, and one that pools; their channels are stacked in this order."""

    def __init__(self, layers: nn.Module, paths: list[list[str | tuple[str, str]]], pool: str) -> None:
        super().__init__()
        self.pool = pool
        folded = [[_fold_step(layers, step) for step in path] for path in paths]
        self.merged: nn.Conv2d | None = None
        self.sizes: list[int] = []
        last = [] if pool == "halve" else [_fold(layers.branch_pool)]
        firsts = [path[0] for path in folded] + (last if pool == "average" else [])
        if pool != "halve":
            # an average of 1 x 1 convolutions is the 1 x 1 convolution of the average, and has fewer channels
            self.merged = _merge(firsts)
            self.sizes = [c.out_channels for c in firsts]
            folded = [path[1:] for path in folded]
        self.last = last[0] if pool == "maximum" else None
        self.paths = nn.ModuleList(nn.ModuleList(path) for path in folded)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        pooled = None
        starts: list[Tensor] = [x] * len(self.paths)
        if self.merged is not None:
            parts = self.merged(x).split(self.sizes, 1)
            starts = [_rectify(part) for part in parts[: len(self.paths)]]
            if self.pool == "average":
                pooled = F.relu(F.avg_pool2d(parts[-1], 3, stride=1, padding=1, count_include_pad=False))
        for start, path in zip(starts, self.paths, strict=True):
            value = start
            for step in path:
                pair = isinstance(step, nn.ModuleList)
                value = torch.cat([_rectify(s(value)) for s in step], 1) if pair else _rectify(step(value))
            found.append(value)
        if self.pool == "halve":
            pooled = F.max_pool2d(x, 3, stride=2)
        elif self.last is not None:
            pooled = _rectify(self.last(F.max_pool2d(x, 3, stride=1, padding=1)))
        return torch.cat([*found, pooled], 1)


def build() -> nn.Module:
    """The layers under the names of the weight file, with random weights."""
    from torchvision.models.inception import Inception3

    return Inception3(num_classes=_CLASSES, aux_logits=False, init_weights=False)


def load(
    device: str = "auto",
    weights: Path | None = None,
    precision: Precision = "float32",
    name: str = "inception-v3",
) -> FrozenEncoder:
    """The encoder `name`, one of `DOORS`; they differ in the resize.

    Raises:
        CheckpointError: the weights are missing or are not those of this network.
    """
    path = require(card(name), weights)
    layers = build()
    fit(layers, read_tensors(path), path, card(name))
    return wrap(layers, name, device, precision, lambda: file_hash(path))


def wrap(
    layers: nn.Module, name: str, device: str, precision: Precision, weights_hash: str | Callable[[], str]
) -> FrozenEncoder:
    """An encoder of layers that `build` made."""
    return FrozenEncoder(
        card(name), FidInception(layers), DOORS[name], weights_hash, pick_device(device), precision, micro_batch=16
    )


legacy = partial(load, name="inception-v3-legacy")
legacy_tf = partial(load, name="inception-v3-legacy-tf")


def _fold(layer: nn.Module) -> nn.Conv2d:
    return fuse_conv_bn_eval(layer.conv, layer.bn)


def _fold_step(layers: nn.Module, step: str | tuple[str, str]) -> nn.Module:
    if isinstance(step, str):
        return _fold(getattr(layers, step))
    return nn.ModuleList(_fold(getattr(layers, name)) for name in step)


def _merge(convolutions: list[nn.Conv2d]) -> nn.Conv2d:
    first = convolutions[0]
    merged = nn.Conv2d(first.in_channels, sum(c.out_channels for c in convolutions), 1)
    merged.weight = nn.Parameter(torch.cat([c.weight for c in convolutions]))
    merged.bias = nn.Parameter(torch.cat([c.bias for c in convolutions]))
    return merged


def _rectify(x: Tensor) -> Tensor:
    return F.relu(x, inplace=not torch.is_grad_enabled())
