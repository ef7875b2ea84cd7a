"""What a network starts from: ImageNet weights, the shipped weights of simulated tissue, or random numbers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from histosynth.classify.config import Weights
from histosynth.classify.network import SMALL_TILE, architecture_of
from histosynth.core.assets import asset_path, has_asset
from histosynth.core.checkpoint import load_checkpoint
from histosynth.core.errors import CheckpointError, SettingError

Start = Literal["imagenet", "tissue", "scratch"]

TISSUE = "tissue-mobilenet-64.safetensors"
"""The shipped classifier of simulated tissue, whose features can be started from (`histosynth train base`)."""
TISSUE_SHAPE = ("mobilenet-v2", 0.5, 0.25)
"""Architecture, width and depth of that classifier."""


def start(
    network: nn.Module, architecture: str, weights: Weights, *, size: int, width: float, depth: float
) -> tuple[Start, list[str]]:
    """Give `network` the weights that it starts from; its last layer stays random.

    Args:
        weights: as in `ClassifierConfig`.
        size: edge length of the tiles, pixels.
        width: multiplier of its channels.
        depth: multiplier of its blocks.

    Returns:
        What it starts from, and the names of the weights taken (for the card).

    Raises:
        SettingError: weights that do not exist for this network.
        CheckpointError: weights that cannot be had, or are damaged.
    """
    for_imagenet = width == 1.0 and depth == 1.0
    for_tissue = (architecture, width, depth) == TISSUE_SHAPE and size <= SMALL_TILE
    if weights == "imagenet" and not for_imagenet:
        raise SettingError(
            f"weights is 'imagenet', but width is {width} and depth is {depth}.",
            "ImageNet weights exist for width 1.0 and depth 1.0: set both, or use weights none.",
        )
    if weights == "tissue" and not for_tissue:
        raise SettingError(
            f"weights is 'tissue' for {architecture} of width {width} and depth {depth} at {size} px.",
            f"They exist for {TISSUE_SHAPE[0]} of width {TISSUE_SHAPE[1]} and depth {TISSUE_SHAPE[2]}, up to "
            f"{SMALL_TILE} px: use these, or weights none.",
        )
    if weights == "imagenet":
        _download(architecture)
    if weights == "imagenet" or (weights == "auto" and for_imagenet and imagenet_file(architecture).is_file()):
        _load(network, architecture, _read_imagenet(imagenet_file(architecture)))
        return "imagenet", [f"{architecture_of(architecture).origin} of torchvision (BSD-3-Clause; ImageNet)"]
    if weights == "tissue" or (weights == "auto" and for_tissue and has_asset(TISSUE)):
        _load(network, architecture, load_checkpoint(asset_path(TISSUE))[0])
        return "tissue", [f"{TISSUE} (simulated tissue)"]
    return "scratch", []


def for_tiles(weights: Weights, simulated: Any) -> Weights:
    """`weights`, but "none" instead of "auto" for tiles that were simulated.

    The shipped weights learnt from the same simulator, so that a classifier of simulated tiles would know them all.

    Args:
        simulated: what the tile set says of itself (`meta.get("simulated")`).
    """
    return "none" if weights == "auto" and simulated else weights


def imagenet_file(architecture: str) -> Path:
    """Where torch keeps (or would keep) the ImageNet weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(architecture_of(architecture).imagenet).name


def _download(architecture: str) -> None:
    file = imagenet_file(architecture)
    if file.is_file():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(architecture_of(architecture).imagenet, str(file), progress=False)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"The ImageNet weights of {architecture} cannot be downloaded: {error}.",
            f"Put {file.name} into {file.parent}, or use weights none.",
        ) from error


def _read_imagenet(path: Path) -> dict[str, torch.Tensor]:
    # torch publishes each file with the start of its SHA-256 in the name
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem.rsplit("-", 1)[-1]):
        raise CheckpointError(f"{path} is damaged.", "Delete it and fetch it again, or use weights none.")
    # torchvision publishes no safetensors; weights_only reads tensors and runs no code
    return torch.load(path, map_location="cpu", weights_only=True)


def _load(network: nn.Module, architecture: str, tensors: dict[str, torch.Tensor]) -> None:
    """Load all but the last layer, which belongs to other classes."""
    head = architecture_of(architecture).head
    own = {name: tensor for name, tensor in network.state_dict().items() if name.startswith(head)}
    network.load_state_dict({n: t for n, t in tensors.items() if not n.startswith(head)} | own)
