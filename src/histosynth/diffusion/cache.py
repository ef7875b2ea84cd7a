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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from histosynth.core.errors import DataError
from histosynth.core.files import atomic_path, new_array, read_json, write_json
from histosynth.core.progress import bar
from histosynth.core.seeds import numpy_rng
from histosynth.core.types import Encoder
from histosynth.diffusion.autoencoder import Autoencoder
from histosynth.diffusion.precision import Precision, autocast
from histosynth.tiles.batches import TileArray, symmetry

_BUDGET = 8192
_CHUNK = 32


@dataclass(frozen=True)
class Cache:
    """What training reads.

    Attributes:
        latents: float16 [V, N, C, h, w], a memory map; entry (v, i) is tile i in its v-th symmetry.
        embeddings: float32 [N, dim], raw.
    """

    latents: np.ndarray
    embeddings: np.ndarray

    def batch(self, tiles: np.ndarray, views: np.ndarray) -> Tensor:
        """Latents float32 [n, C, h, w] of these tiles in these views."""
        return torch.from_numpy(self.latents[views, tiles].astype(np.float32))


def open_cache(
    folder: Path,
    data: TileArray,
    autoencoder: Autoencoder,
    encoder: Encoder,
    *,
    seed: int,
    device: torch.device,
    precision: Precision,
) -> Cache:
    """The cache in `folder`; computed when it is absent or belongs to other tiles or networks.

    Raises:
        DataError: the encoder gives another width than its card says.
    """
    views = max(1, min(8, _BUDGET // len(data)))
    key = {
        "tiles": hashlib.sha256("\n".join([str(data.images.shape), *data.ids]).encode()).hexdigest(),
        "latent_space": autoencoder.name,
        "encoder": encoder.card.name,
        "views": views,
        "seed": seed,
    }
    paths = folder / "latents.npy", folder / "embeddings.npy"
    meta = folder / "cache.json"
    if not (meta.exists() and all(p.exists() for p in paths) and read_json(meta) == key):
        meta.unlink(missing_ok=True)
        _encode_all(paths[0], data, autoencoder, views, seed, device, precision)
        _embed_all(paths[1], data, encoder)
        write_json(meta, key)
    return Cache(np.load(paths[0], mmap_mode="r"), np.load(paths[1]))


def _encode_all(
    path: Path,
    data: TileArray,
    autoencoder: Autoencoder,
    views: int,
    seed: int,
    device: torch.device,
    precision: Precision,
) -> None:
    edge, channels = data.size // 4, autoencoder.shape.channels
    rng = numpy_rng(seed, "symmetries")
    turns = np.stack([rng.permutation(8)[:views] for _ in range(len(data))])  # [N, V]

    def fill(out: np.ndarray, part: slice, images: Tensor) -> None:
        for view in range(views):
            turned = torch.stack([symmetry(tile, int(k)) for tile, k in zip(images, turns[part, view], strict=True)])
            with torch.no_grad(), autocast(device, precision):
                out[view, part] = autoencoder.encode(turned.to(device)).cpu().numpy()

    _fill(path, "latents", (views, len(data), channels, edge, edge), np.float16, data, fill)


def _embed_all(path: Path, data: TileArray, encoder: Encoder) -> None:
    def fill(out: np.ndarray, part: slice, images: Tensor) -> None:
        features = encoder.encode(images)
        if features.shape[1:] != out.shape[1:]:
            raise DataError(
                f"The encoder {encoder.card.name!r} gave features of shape {tuple(features.shape)}, but its card "
                f"says {encoder.card.dim}.",
                "Mend the encoder's card.",
            )
        out[part] = features.cpu().numpy()

    _fill(path, "embeddings", (len(data), encoder.card.dim), np.float32, data, fill)


def _fill(
    path: Path,
    what: str,
    shape: tuple[int, ...],
    dtype: Any,
    data: TileArray,
    fill: Callable[[np.ndarray, slice, Tensor], None],
) -> None:
    with atomic_path(path) as temporary, bar(f"diffusion: {what}", total=len(data)) as tick:
        out = new_array(temporary, shape, dtype)
        for at in range(0, len(data), _CHUNK):
            part = slice(at, min(at + _CHUNK, len(data)))
            fill(out, part, torch.from_numpy(np.array(data.images[part])))
            tick(part.stop - part.start)
        out.flush()
        del out
