"""What PixCell can be told: the embedding of a reference tile, of a class, or of something between two tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from histosynth.core.errors import DataError, SettingError
from histosynth.core.types import Encoder

PART = 256
"""Edge of the parts of a large tile that get an embedding each, pixels."""


def embed(encoder: Encoder, images: Tensor, tokens: int = 1) -> Tensor:
    """The embeddings of tiles as PixCell takes them, float32 [N, T, dim] on the CPU.

    Args:
        encoder: UNI2-h for the published weights.
        images: uint8 [N, 3, H, W]. With T > 1 they are cut into a grid of T parts, row by row (at 1024 px into 4 x 4
            parts of 256 px).
        tokens: T.

    Raises:
        DataError: another type or shape, or an edge that the grid does not divide.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise DataError(
            f"The reference tiles have the shape {tuple(images.shape)} and type {images.dtype}.",
            "Give uint8 [N, 3, H, W].",
        )
    edge = math.isqrt(tokens)
    height, width = images.shape[-2:]
    if height % edge or width % edge:
        raise DataError(
            f"The reference tiles have {height} x {width} px, which a grid of {edge} x {edge} does not divide.",
            f"Resize them to {edge * PART} px.",
        )
    parts = images.unfold(2, height // edge, height // edge).unfold(3, width // edge, width // edge)
    parts = parts.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, height // edge, width // edge)
    return encoder.encode(parts.contiguous()).float().cpu().view(len(images), tokens, -1)


def references(data: Any, size: int) -> Tensor:
    """Tiles of any size -> uint8 [N, 3, size, size]: what a model of several tokens is given.

    Args:
        data: uint8 [N, 3, H, W], a tensor or an array.
    """
    images = torch.as_tensor(data)
    if images.shape[-2:] == (size, size):
        return images
    grey = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return grey.clamp(0, 255).round().to(torch.uint8)


def prototype(embeddings: Tensor) -> Tensor:
    """The mean of a class's embeddings: float [N, T, dim] -> [T, dim].

    Raises:
        DataError: there are none.
    """
    if len(embeddings) == 0:
        raise DataError("A class without reference tiles has no prototype.", "Leave it out, or use no condition.")
    return embeddings.float().mean(dim=0)


def prototypes(embeddings: Tensor, labels: Sequence[int], classes: Sequence[str]) -> dict[str, Tensor]:
    """The prototype of every class that has tiles.

    Args:
        embeddings: float [N, T, dim].
        labels: N indices into `classes`.
    """
    index = torch.as_tensor(list(labels), dtype=torch.long)
    return {name: prototype(embeddings[index == i]) for i, name in enumerate(classes) if bool((index == i).any())}


def interpolate(one: Tensor, other: Tensor, share: float) -> Tensor:
    """Between two embeddings on the great circle (Shoemake 1985), the length between theirs: [..., dim] -> [..., dim].

    The straight line passes nearer to the origin than any tile lies, where the embedding means no tissue.

    Args:
        share: 0 gives `one`, 1 gives `other`.

    Raises:
        SettingError: a share outside 0 to 1.
        DataError: embeddings of different shapes.
    """
    if not 0 <= share <= 1:
        raise SettingError(f"share is {share}.", "Give 0 to 1.")
    if one.shape != other.shape:
        raise DataError(f"Embeddings of shapes {tuple(one.shape)} and {tuple(other.shape)} were to be mixed.", "")
    one, other = one.float(), other.float()
    lengths = one.norm(dim=-1, keepdim=True), other.norm(dim=-1, keepdim=True)
    a, b = (v / n.clamp_min(1e-12) for v, n in zip((one, other), lengths, strict=True))
    angle = (a * b).sum(-1, keepdim=True).clamp(-1, 1).acos()
    # nearly parallel (or opposite, where no great circle is singled out): the straight line
    straight = angle.sin() < 1e-4
    sine = torch.where(straight, 1.0, angle.sin())
    weights = ((1 - share) * angle).sin() / sine, (share * angle).sin() / sine
    direction = torch.where(straight, (1 - share) * a + share * b, weights[0] * a + weights[1] * b)
    return direction * ((1 - share) * lengths[0] + share * lengths[1])
