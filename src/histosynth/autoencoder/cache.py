"""Latents of tiles, computed once and kept on disk.

Augmentation by the eight symmetries of a tile happens before the autoencoder, which is not equivariant: each tile is
encoded in as many symmetries as keep the cache near 8,192 latents, all eight for small sets, one random symmetry a
tile for large ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
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

Maker = Callable[[Tensor], Tensor]
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


def fill(path: Path, what: str, data: TileArray, views: int, seed: int, network: Maker) -> None:
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


def kept(
    folder: Path,
    data: TileArray,
    makers: Mapping[str, Maker],
    key: Mapping[str, str],
    seed: int,
    views: int | None = None,
) -> dict[str, np.ndarray]:
    """What networks make of tiles in several symmetries; computed when `folder` has none, or that of other tiles or
    networks.

    Args:
        makers: what is made, and by what: uint8 [n, 3, S, S] -> float [n, ...].
        key: identifies the networks.
        views: symmetries a tile; none: as many as keep the cache small.

    Returns:
        float16 [V, N, ...] each, memory maps; entry (v, i) is tile i in its v-th symmetry (see `symmetries`).
    """
    views = views or views_of(len(data))
    names = "\n".join([str(data.images.shape), data.digest(), *data.ids])
    whole = dict(key) | {"tiles": hashlib.sha256(names.encode()).hexdigest(), "views": views, "seed": seed}
    paths, meta = {name: folder / f"{name.replace(' ', '-')}.npy" for name in makers}, folder / "cache.json"
    if not (meta.exists() and all(path.exists() for path in paths.values()) and read_json(meta) == whole):
        meta.unlink(missing_ok=True)
        for name, maker in makers.items():
            fill(paths[name], name, data, views, seed, maker)
        write_json(meta, whole)
    return {name: np.load(path, mmap_mode="r") for name, path in paths.items()}


def latents_of(
    folder: Path, data: TileArray, autoencoder: Autoencoder, seed: int, device: torch.device, precision: Precision
) -> tuple[np.ndarray, np.ndarray]:
    """Latents of tiles in several symmetries, kept in `folder`.

    Returns:
        float16 [V, N, C, h, w], a memory map, and the symmetries of the tiles, int [N, V].
    """

    def encode(images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(device, precision):
            return autoencoder.encode(images.to(device)).float()

    latents = kept(folder, data, {"latents": encode}, {"latent_space": autoencoder.name}, seed)["latents"]
    return latents, symmetries(len(data), len(latents), seed)
