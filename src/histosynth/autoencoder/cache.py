"""Latents of tiles, computed once and kept on disk.

Augmentation by the eight symmetries of a tile happens before the autoencoder, which is not equivariant: each tile is
encoded in as many symmetries as keep the cache near 8,192 latents, all eight for small sets, one random symmetry a
tile for large ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from histosynth.autoencoder.network import Autoencoder
from histosynth.core.files import atomic_path, new_array, read_json, write_json
from histosynth.core.precision import Precision, autocast
from histosynth.core.progress import bar
from histosynth.core.seeds import numpy_rng
from histosynth.tiles.batches import TileArray, turned

_BUDGET = 8192
_PIXELS = 32 * 64 * 64
"""Pixels that the autoencoder takes at a time; at 256 px and more this is what keeps its memory small."""


def chunk_of(size: int) -> int:
    """Tiles of `size` pixels that the autoencoder takes at a time."""
    return max(1, _PIXELS // size**2)


def views_of(count: int) -> int:
    """In how many of its symmetries each of `count` tiles is encoded."""
    return max(1, min(8, _BUDGET // max(1, count)))


def symmetries(count: int, views: int, seed: int) -> np.ndarray:
    """Which symmetries each tile is encoded in: int [N, V], all different in a row."""
    rng = numpy_rng(seed, "symmetries")
    return np.stack([rng.permutation(8)[:views] for _ in range(count)])


def fill(path: Path, what: str, data: TileArray, views: int, seed: int, network: Callable[[Tensor], Tensor]) -> None:
    """Write network(tiles) as float16 [V, N, ...], a few tiles at a time."""
    turns, chunk = symmetries(len(data), views, seed), chunk_of(data.size)
    shape = tuple(network(torch.from_numpy(np.array(data.images[:1]))).shape[1:])
    with atomic_path(path) as temporary, bar(what[:1].upper() + what[1:], total=len(data)) as tick:
        out = new_array(temporary, (views, len(data), *shape), np.float16)
        for at in range(0, len(data), chunk):
            part = slice(at, min(at + chunk, len(data)))
            images = torch.from_numpy(np.array(data.images[part]))
            for view in range(views):
                out[view, part] = network(turned(images, turns[part, view])).cpu().numpy()
            tick(part.stop - part.start)
        out.flush()
        del out


def latents_of(
    folder: Path, data: TileArray, autoencoder: Autoencoder, seed: int, device: torch.device, precision: Precision
) -> tuple[np.ndarray, np.ndarray]:
    """Latents of tiles in several symmetries; computed when `folder` has none, or those of other tiles or networks.

    Returns:
        float16 [V, N, C, h, w], a memory map, and the symmetries of the tiles, int [N, V].
    """
    views = views_of(len(data))
    ids = hashlib.sha256("\n".join([data.digest(), *data.ids]).encode()).hexdigest()
    key = {"tiles": ids, "latent_space": autoencoder.name, "views": views, "seed": seed}
    path, meta = folder / "latents.npy", folder / "latents.json"
    if not (path.exists() and meta.exists() and read_json(meta) == key):
        meta.unlink(missing_ok=True)

        def encode(images: Tensor) -> Tensor:
            with torch.no_grad(), autocast(device, precision):
                return autoencoder.encode(images.to(device)).float()

        fill(path, "latents", data, views, seed, encode)
        write_json(meta, key)
    return np.load(path, mmap_mode="r"), symmetries(len(data), views, seed)
