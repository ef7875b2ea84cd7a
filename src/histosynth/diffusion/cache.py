"""Latents and embeddings of the training tiles, computed once and kept on disk.

Both networks that make them are frozen, so computing them in every step would be most of a step's work.
Augmentation by the eight symmetries of a tile happens before the autoencoder (which is not equivariant):
each tile is encoded in as many symmetries as keep the cache near 8,192 latents, all eight for small sets,
one random symmetry a tile for large ones. Embeddings are those of the upright tile: a condition says what
tissue there is, not which way up it lies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from histosynth.core.files import atomic_path, new_array, read_json, write_json
from histosynth.core.progress import bar
from histosynth.core.seeds import numpy_rng
from histosynth.core.types import Encoder
from histosynth.diffusion.backbone import Backbone
from histosynth.diffusion.config import DiffusionConfig
from histosynth.diffusion.precision import autocast
from histosynth.encoders.store import features, weights_hash
from histosynth.tiles.batches import TileArray, turned

_BUDGET = 8192
_PIXELS = 32 * 64 * 64
"""Pixels that the autoencoder takes at a time; at 256 px and more this is what keeps its memory small."""


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


def chunk_of(size: int) -> int:
    """Tiles of `size` pixels that the autoencoder takes at a time."""
    return max(1, _PIXELS // size**2)


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
    views = views or max(1, min(8, _BUDGET // len(data)))
    key = {
        "tiles": hashlib.sha256("\n".join([str(data.images.shape), data.digest(), *data.ids]).encode()).hexdigest(),
        "latent_space": backbone.latent_space,
        "views": views,
        "seed": config.seed,
        "maps": maps.name if maps else "",
    }
    names = ["latents", *(["maps"] if maps else [])]
    paths = {name: folder / f"{name}.npy" for name in names}
    meta = folder / "cache.json"
    if not (meta.exists() and all(p.exists() for p in paths.values()) and read_json(meta) == key):
        meta.unlink(missing_ok=True)

        def encode(images: Tensor) -> Tensor:
            with torch.no_grad(), autocast(device, config.precision):
                return backbone.encode(images.to(device)).cpu()

        _fill(paths["latents"], "latents", data, views, config.seed, encode)
        if maps:
            _fill(paths["maps"], "feature maps", data, views, config.seed, maps.mapper)
        write_json(meta, key)
    arrays: dict[str, Any] = {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
    return Cache(arrays["latents"], embeddings, arrays.get("maps"))


def encoder_key(encoder: Encoder) -> str:
    """Name and weights of an encoder."""
    return f"{encoder.card.name} {weights_hash(encoder)}"


def symmetries(count: int, views: int, seed: int) -> np.ndarray:
    """Which symmetries each tile is encoded in: int [N, V], all different in a row."""
    rng = numpy_rng(seed, "symmetries")
    return np.stack([rng.permutation(8)[:views] for _ in range(count)])


def _fill(path: Path, what: str, data: TileArray, views: int, seed: int, network: Callable[[Tensor], Tensor]) -> None:
    """Write network(tiles) as float16 [V, N, ...], a few tiles at a time."""
    turns, chunk = symmetries(len(data), views, seed), chunk_of(data.size)
    shape = tuple(network(torch.from_numpy(np.array(data.images[:1]))).shape[1:])
    with atomic_path(path) as temporary, bar(f"diffusion: {what}", total=len(data)) as tick:
        out = new_array(temporary, (views, len(data), *shape), np.float16)
        for at in range(0, len(data), chunk):
            part = slice(at, min(at + chunk, len(data)))
            images = torch.from_numpy(np.array(data.images[part]))
            for view in range(views):
                out[view, part] = network(turned(images, turns[part, view])).cpu().numpy()
            tick(part.stop - part.start)
        out.flush()
        del out
