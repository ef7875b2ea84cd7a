"""Latents and embeddings of the training tiles, computed once and kept on disk.

Both networks that make them are frozen, so computing them in every step would be most of a step's work. Embeddings are
those of the upright tile: a condition says what tissue there is, not which way up it lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from histosynth.autoencoder.cache import kept
from histosynth.core.precision import autocast
from histosynth.core.types import Encoder
from histosynth.diffusion.backbone import Backbone
from histosynth.diffusion.config import DiffusionConfig
from histosynth.encoders.store import features, weights_hash
from histosynth.tiles.batches import TileArray


class Mapper(Protocol):
    """Makes feature maps of tiles."""

    name: str
    """Identifies the maps."""

    def mapper(self, images: Tensor) -> Tensor:
        """uint8 [n, 3, S, S] -> float [n, K, h, w]."""
        ...


@dataclass(frozen=True)
class Cache:
    """What training reads.

    Attributes:
        latents: float16 [V, N, C, h, w], a memory map; entry (v, i) is tile i in its v-th symmetry.
        embeddings: float32 [N, dim], raw.
        maps: float16 [V, N, K, h, w] feature maps of the same views, a memory map; or none.
    """

    latents: np.ndarray
    embeddings: np.ndarray
    maps: np.ndarray | None = None

    def batch(self, tiles: np.ndarray, views: np.ndarray) -> Tensor:
        """Latents float32 [n, C, h, w] of these tiles in these views."""
        return torch.from_numpy(self.latents[views, tiles].astype(np.float32))

    def maps_of(self, tiles: np.ndarray, views: np.ndarray) -> Tensor | None:
        """Feature maps float32 [n, K, h, w] of the same, if they were asked for."""
        return None if self.maps is None else torch.from_numpy(self.maps[views, tiles].astype(np.float32))


def embed(folder: Path, data: TileArray, encoder: Encoder) -> np.ndarray:
    """Raw embeddings float32 [N, dim] of the upright tiles; a killed call goes on where it stopped.

    Raises:
        DataError: the encoder gives another width than its card says, or values that are not finite.
    """
    return features(encoder, data.images, data.ids, data.digest(), folder / "embeddings")


def open_cache(
    folder: Path,
    data: TileArray,
    backbone: Backbone,
    embeddings: np.ndarray,
    config: DiffusionConfig,
    device: torch.device,
    maps: Mapper | None = None,
    views: int | None = None,
) -> Cache:
    """The cache in `folder`; computed when it is absent or belongs to other tiles or networks.

    Args:
        embeddings: what `embed` gave.
        maps: what makes feature maps, kept beside the latents.
        views: symmetries a tile; by default as many as keep the cache small.
    """

    def encode(images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(device, config.precision):
            return backbone.encode(images.to(device)).cpu()

    makers = {"latents": encode} | ({"feature maps": maps.mapper} if maps else {})
    key = {"latent_space": backbone.latent_space, "maps": maps.name if maps else ""}
    found = kept(folder, data, makers, key, config.seed, views)
    return Cache(found["latents"], embeddings, found.get("feature maps"))


def encoder_key(encoder: Encoder) -> str:
    """Name and weights of an encoder."""
    return f"{encoder.card.name} {weights_hash(encoder)}"
