"""`pathoduet`: the H&E network of PathoDuet (Hua et al. 2024, arXiv:2312.09894).

A ViT-B/16 with two prefix tokens in the order pretext, class, patches. The learned pretext token takes part in every
attention, so a copy without it computes other features. Features are the mean of the patch tokens (from index 2),
after the mean a layer normalisation. Pixels enter in [0, 1], without ImageNet's normalisation.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from histosynth.core.device import pick_device
from histosynth.core.errors import CheckpointError
from histosynth.encoders import card
from histosynth.encoders.door import Door
from histosynth.encoders.frozen import FrozenEncoder, Precision
from histosynth.encoders.weights import file_hash, fit, read_tensors, remedy, require

NAME = "pathoduet"
PREFIX = 2
DOOR = Door(224, "bilinear", (0.0,) * 3, (255.0,) * 3)


class PathoDuet(nn.Module):
    """float [N, 3, 224, 224] in [0, 1] -> float [N, 768]. Names and shapes are those of `checkpoint_HE.pth`."""

    def __init__(self, size: int = 224, patch: int = 16, dim: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__()
        from timm.layers import PatchEmbed
        from timm.models.vision_transformer import Block

        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = PatchEmbed(size, patch, 3, dim)
        self.pretext_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + PREFIX, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.fc_norm = norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x)
        prefix = torch.cat([self.pretext_token, self.cls_token], 1).expand(len(patches), -1, -1)
        tokens = self.blocks(torch.cat([prefix.to(patches.dtype), patches], 1) + self.pos_embed)
        return self.fc_norm(tokens[:, PREFIX:].float().mean(1))


def load(device: str = "auto", weights: Path | None = None, precision: Precision = "float32") -> FrozenEncoder:
    """The encoder.

    Raises:
        CheckpointError: the weights are missing or are not those of this network.
    """
    path = require(card(NAME), weights)
    with torch.device("meta"):
        network = PathoDuet()
    place(network, read_tensors(path), path)
    return wrap(network, path, device, precision)


def place(network: PathoDuet, tensors: dict[str, Tensor], path: Path) -> None:
    """Put the tensors of `checkpoint_HE.pth` into the network; the classification head is left out.

    Raises:
        CheckpointError: they do not fit; without the pretext token they belong to a stripped copy.
    """
    if "cls_token" in tensors and "pretext_token" not in tensors:
        raise CheckpointError(
            f"{path} has no pretext_token, which PathoDuet's attention always sees: its features would be others.",
            remedy(card(NAME)),
        )
    fit(network, tensors, path, card(NAME), ("head.",))


def wrap(network: PathoDuet, path: Path, device: str = "cpu", precision: Precision = "float32") -> FrozenEncoder:
    """An encoder of a network that `place` filled from `path`."""
    return FrozenEncoder(
        card(NAME), network, DOOR, lambda: file_hash(path), pick_device(device), precision, micro_batch=16
    )
