"""The classifier's network: MobileNetV2, scaled to small tiles and short trainings, and its pixel door."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models import MobileNet_V2_Weights, MobileNetV2

from histosynth.core.errors import CheckpointError, SettingError

Weights = Literal["auto", "imagenet", "none"]
Initialisation = Literal["imagenet", "scratch"]

SMALL_TILE = 96
"""Up to this edge length (pixels) the last halving of the resolution is left out."""

_IMAGENET = MobileNet_V2_Weights.IMAGENET1K_V2
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


def build(
    classes: int,
    *,
    size: int,
    width: float = 1.0,
    depth: float = 1.0,
    dropout: float = 0.2,
    weights: Weights = "none",
) -> tuple[MobileNetV2, Initialisation]:
    """MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) for tiles of `size` pixels.

    The network of the paper halves the resolution five times, for 224 px. On small tiles that leaves a
    2 x 2 map, so up to 96 px the last halving is left out. (Leaving out the first one instead costs two
    to three times the computation.) Strides carry no weights, so ImageNet weights fit either way.

    Args:
        classes: number of outputs.
        size: edge length of the tiles, pixels.
        width: multiplier of the channels.
        depth: multiplier of the blocks a stage, at least one block each.
        dropout: before the last layer.
        weights: "auto" takes ImageNet weights when they are on this disk and fit (width and depth 1.0),
            "imagenet" insists and downloads them, "none" starts from torch's global generator.

    Returns:
        The network in training mode, and what it started from.

    Raises:
        SettingError: an unknown `weights`, a multiplier that is not positive, or ImageNet weights asked
            for a network of another width or depth.
        CheckpointError: ImageNet weights were asked for and cannot be had.
    """
    if weights not in ("auto", "imagenet", "none"):
        raise SettingError(f"weights is {weights!r}.", "Use auto, imagenet or none.")
    if width <= 0 or depth <= 0:
        raise SettingError(f"width is {width} and depth is {depth}.", "Use positive multipliers, up to 1.0.")
    fits = width == 1.0 and depth == 1.0
    if weights == "imagenet" and not fits:
        raise SettingError(
            f"weights is 'imagenet', but width is {width} and depth is {depth}.",
            "ImageNet weights exist for width 1.0 and depth 1.0: set both, or use weights none.",
        )
    last_stride = 1 if size <= SMALL_TILE else 2
    stages = [  # expansion, channels, blocks, stride: table 2 of the paper
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, last_stride),
        (6, 320, 1, 1),
    ]
    network = MobileNetV2(
        num_classes=classes,
        width_mult=width,
        dropout=dropout,
        inverted_residual_setting=[[t, c, math.ceil(n * depth), s] for t, c, n, s in stages],
    )
    if weights == "imagenet":
        _download()
    if weights != "none" and fits and imagenet_file().is_file():
        _load_features(network, imagenet_file())
        return network, "imagenet"
    _start_as_identity(network)
    return network, "scratch"


def normalise(images: Tensor) -> Tensor:
    """[N, 3, H, W] in [0, 255], uint8 or float -> float32, scaled as ImageNet networks expect it."""
    mean = torch.tensor(_MEAN, device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(_STD, device=images.device).view(1, 3, 1, 1) * 255
    # channels last in memory: training is up to 1.6 times faster on a CPU
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def imagenet_file() -> Path:
    """Where torch keeps (or would keep) the ImageNet weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(_IMAGENET.url).name


def _start_as_identity(network: MobileNetV2) -> None:
    """Let every residual block begin as the identity, which speeds up the first steps.

    Goyal et al. 2017 (arXiv:1706.02677), section 5.1: the scale of a block's last batch norm starts at 0.
    """
    for block in network.modules():
        if getattr(block, "use_res_connect", False):
            nn.init.zeros_(block.conv[-1].weight)


def _download() -> None:
    file = imagenet_file()
    if file.is_file():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(_IMAGENET.url, str(file), progress=False)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"The ImageNet weights of MobileNetV2 cannot be downloaded: {error}.",
            f"Put {file.name} into {file.parent}, or use weights none.",
        ) from error


def _load_features(network: MobileNetV2, path: Path) -> None:
    """Load all but the last layer, which belongs to ImageNet's classes."""
    # torch publishes each file with the start of its SHA-256 in the name
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem.rsplit("-", 1)[-1]):
        raise CheckpointError(f"{path} is damaged.", "Delete it and fetch it again, or use weights none.")
    # torchvision publishes no safetensors; weights_only reads tensors and runs no code
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    features = {k.removeprefix("features."): v for k, v in tensors.items() if k.startswith("features.")}
    network.features.load_state_dict(features)
