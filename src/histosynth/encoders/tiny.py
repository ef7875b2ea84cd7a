"""`tissue-tiny`: a small residual network that this project trained itself on simulated tissue.

It ships with the package and runs anywhere, so it is the default encoder. It was asked to name nine tissue
classes, to measure nuclei, glands and stain, and to give two views of a tile the same features whatever
their stain, turn, blur or compression (`train_tiny.py`).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from histosynth.core.assets import asset_path
from histosynth.core.checkpoint import load_checkpoint, require_kind
from histosynth.core.device import pick_device
from histosynth.core.errors import DataError
from histosynth.core.files import sha256_file
from histosynth.encoders import card
from histosynth.encoders.frozen import whole_float32
from histosynth.encoders.weights import fit, require

INPUT = 64
DIM = 256
WIDTHS = (32, 64, 128, 256)
SMALLEST = 32
ASSET = "tissue-tiny.safetensors"
# one fixed batch, the last one padded: a tile's features do not depend on how many come with it
_MICRO_BATCH = 32


class Block(nn.Module):
    """Residual block (He et al. 2016): two 3x3 convolutions, the first of which may halve the size."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = _conv(inside, outside, 3, stride)
        self.second = _conv(outside, outside, 3, 1)
        self.skip = nn.Identity() if inside == outside and stride == 1 else _conv(inside, outside, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x).relu()) + self.skip(x)).relu()


class TinyNetwork(nn.Module):
    """float [N, 3, 64, 64] in [-1, 1] -> features [N, 256], each about standardised over simulated tissue."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, WIDTHS[0], 5, 2)
        inside = (WIDTHS[0], *WIDTHS[:-1])
        self.stages = nn.Sequential(
            *(Block(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(zip(inside, WIDTHS, strict=True)))
        )
        self.head = nn.Linear(WIDTHS[-1], DIM)
        # without affine: every feature weighs the same in a distance between tiles
        self.standardise = nn.BatchNorm1d(DIM, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x).relu())
        return self.standardise(self.head(x.mean((2, 3))))


class TissueTiny:
    """The frozen encoder around `TinyNetwork`; `weights_hash` names its weights in feature caches."""

    def __init__(self, network: TinyNetwork, weights_hash: str, device: torch.device | None = None) -> None:
        self.card = card("tissue-tiny")
        self.weights_hash = weights_hash
        self.device = device or torch.device("cpu")
        network = _fold(network.eval()).requires_grad_(False)
        self.network = network.to(self.device).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W], H and W at least 32 -> float32 [N, 256] on the CPU.

        Raises:
            DataError: another type, shape or size.
        """
        _check(images, torch.uint8)
        features = [torch.empty(0, DIM)]
        for chunk in images.split(_MICRO_BATCH):
            padded = F.pad(chunk, (0, 0, 0, 0, 0, 0, 0, _MICRO_BATCH - len(chunk)))
            features.append(self.differentiable(padded.float() / 127.5 - 1)[: len(chunk)].cpu())
        return torch.cat(features)

    def differentiable(self, images: Tensor) -> Tensor:
        """float [N, 3, H, W] in [-1, 1] -> float32 [N, 256] on the encoder's device, with gradients to the images.

        Raises:
            DataError: another type, shape or size.
        """
        x = self._ready(images)
        with whole_float32():
            return self.network(x)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps after each of the four stages, finest first, with gradients to the images.

        Args:
            images: as for `differentiable`.

        Returns:
            [N, 32, 32, 32], [N, 64, 16, 16], [N, 128, 8, 8] and [N, 256, 4, 4], none of them negative; float32, or
            the type of the autocast around the call.

        Raises:
            DataError: another type, shape or size.
        """
        found = []
        x = self._ready(images)
        with whole_float32():
            x = self.network.stem(x).relu()
            for stage in self.network.stages:
                x = stage(x)
                found.append(x)
        return found

    def _ready(self, images: Tensor) -> Tensor:
        """Checked, at the size of the network, on its device."""
        _check(images, torch.float32)
        x = images.to(self.device, torch.float32)
        if x.shape[-2:] != (INPUT, INPUT):
            x = F.interpolate(x, (INPUT, INPUT), mode="bilinear", antialias=True, align_corners=False)
        return x.contiguous(memory_format=torch.channels_last)


def load(device: str = "cpu", weights: Path | None = None) -> TissueTiny:
    """The shipped encoder, or one that `train_tiny.py` trained (`weights`).

    Raises:
        CheckpointError: the weights are missing or damaged.
    """
    path = require(card("tissue-tiny"), weights) if weights else asset_path(ASSET)
    tensors, made = load_checkpoint(path)
    require_kind(made, "encoder", path)
    network = TinyNetwork()
    fit(network, tensors, path, card("tissue-tiny"))
    return TissueTiny(network, sha256_file(path), pick_device(device))


def _conv(inside: int, outside: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outside))


def _fold(network: TinyNetwork) -> TinyNetwork:
    """Fold every batch normalisation into the convolution before it: the same numbers, a tenth faster."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Sequential) and isinstance(child[-1], nn.BatchNorm2d):
                convolution, norm = child
                setattr(module, name, fuse_conv_bn_eval(convolution, norm))
    return network


def _check(images: Tensor, dtype: torch.dtype) -> None:
    right_type = images.dtype == dtype if dtype == torch.uint8 else images.is_floating_point()
    if images.ndim != 4 or images.shape[1] != 3 or not right_type:
        raise DataError(
            f"tissue-tiny got images of shape {tuple(images.shape)} and type {images.dtype}.",
            f"Give {dtype} [N, 3, H, W].",
        )
    if min(images.shape[-2:]) < SMALLEST:
        raise DataError(
            f"tissue-tiny got tiles of {images.shape[-2]} x {images.shape[-1]} px.",
            f"It needs at least {SMALLEST} px: import the tiles at a larger size.",
        )
