"""The classifier's network: MobileNetV2, at a width that suits the tiles, with a door for uint8 pixels."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models import MobileNet_V2_Weights, MobileNetV2

from histosynth.core.errors import CheckpointError, SettingError

Weights = Literal["auto", "imagenet", "none"]
Initialisation = Literal["imagenet", "scratch"]

SMALL_TILE = 96
"""Up to this edge length (pixels) the last stage keeps its resolution."""

_IMAGENET = MobileNet_V2_Weights.IMAGENET1K_V2
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


def build(
    classes: int, *, size: int, width: float = 0.5, dropout: float = 0.2, weights: Weights = "auto"
) -> tuple[MobileNetV2, Initialisation]:
    """MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) for tiles of `size` pixels.

    The network of the paper halves the resolution five times, for 224 px. On small tiles that leaves a
    2 x 2 map, so up to 96 px the last halving is left out. (Leaving out the first instead costs three
    times the computation for no better accuracy at 64 px; `train.py` has the measurement.) Strides carry
    no weights, so ImageNet weights fit either way.

    Args:
        classes: number of outputs.
        size: edge length of the tiles, pixels.
        width: multiplier of the channels; ImageNet weights exist for 1.0 only.
        dropout: before the last layer.
        weights: "auto" takes ImageNet weights when they are on this disk and fit, "imagenet" insists and
            downloads them, "none" starts from random numbers (torch's global generator).

    Returns:
        The network in training mode, and what it started from.

    Raises:
        SettingError: an unknown `weights`, a width that is not positive, or ImageNet asked at another width.
        CheckpointError: ImageNet weights were asked for and cannot be had.
    """
    if weights not in ("auto", "imagenet", "none"):
        raise SettingError(f"weights is {weights!r}.", "Use auto, imagenet or none.")
    if width <= 0:
        raise SettingError(f"width is {width}.", "Use a positive multiplier, such as 0.5 or 1.0.")
    if weights == "imagenet" and width != 1.0:
        raise SettingError(
            f"weights is 'imagenet' and width is {width}.",
            "ImageNet weights exist for width 1.0: set it, or use weights none.",
        )
    last_stride = 1 if size <= SMALL_TILE else 2
    network = MobileNetV2(
        num_classes=classes,
        width_mult=width,
        dropout=dropout,
        inverted_residual_setting=[  # expansion, channels, blocks, stride: table 2 of the paper
            [1, 16, 1, 1],
            [6, 24, 2, 2],
            [6, 32, 3, 2],
            [6, 64, 4, 2],
            [6, 96, 3, 1],
            [6, 160, 3, last_stride],
            [6, 320, 1, 1],
        ],
    )
    if weights == "none" or width != 1.0:
        return network, "scratch"
    if weights == "imagenet":
        _download()
    if not imagenet_file().is_file():
        return network, "scratch"
    _load_features(network, imagenet_file())
    return network, "imagenet"


def normalise(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> float32, scaled as ImageNet networks expect it, channels last in memory."""
    mean = torch.tensor(_MEAN, device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(_STD, device=images.device).view(1, 3, 1, 1) * 255
    # depthwise convolutions are 1.2 to 1.6 times faster on CPUs in this layout
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def imagenet_file() -> Path:
    """Where torch keeps (or would keep) the ImageNet weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(_IMAGENET.url)


def _download() -> None:
    if imagenet_file().is_file():
        return
    imagenet_file().parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(_IMAGENET.url, str(imagenet_file()), progress=False)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"The ImageNet weights of MobileNetV2 cannot be downloaded: {error}.",
            f"Put {imagenet_file().name} into {imagenet_file().parent}, or use weights none.",
        ) from error


def _load_features(network: MobileNetV2, path: Path) -> None:
    """Load all but the last layer, which belongs to ImageNet's classes."""
    # torch publishes each file with the start of its SHA-256 in the name
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem.rsplit("-", 1)[-1]):
        raise CheckpointError(f"{path} is damaged.", "Delete it and fetch it again.")
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    features = {k.removeprefix("features."): v for k, v in tensors.items() if k.startswith("features.")}
    _features(network).load_state_dict(features)


def _features(network: MobileNetV2) -> nn.Module:
    return network.features
