"""Quality of tiles: one vectorised function measures everything that the filter and its thresholds look at.

Luminance is Y = .2126 R + .7152 G + .0722 B, 0 to 255; V and S are value and saturation of HSV, 0 to 1.

lap_var          variance of the 4-neighbour Laplacian of Y, border mirrored
entropy          Shannon entropy of the 256-bin histogram of Y, bits
tenengrad        mean squared Sobel gradient of Y
white_ratio      share with V > .95 and S < .10
sat_ratio        share with S > .90
tissue_fraction  share with V < .98 or S > .20
block_spatial    mean step of Y across 8-pixel borders less the mean step inside blocks, at least 0
block_dct        mean over 8 x 8 blocks of the energy in the 2 x 2 lowest DCT frequencies / total energy
focus_tissue     energy of the Laplacian / energy of the gradient, over tissue only
noise            standard deviation of the noise, grey levels
jpeg_quality     quality of the JPEG compression the tile has been through, 3 to 97; 100 for none
ink_ratio        contrast of the strip that looks most like pen ink with the rest of the tile / spread of the rest
fold_ratio       contrast of the strip that is most like two layers with the rest of the tile / spread of the rest
bubble_ratio     contrast of the most bubble-like disc (calm, unsharp, rimmed) with the rest of the tile
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from histosynth.core.errors import DataError
from histosynth.core.files import atomic_path
from histosynth.core.progress import bar, say
from histosynth.core.threads import on_one_thread
from histosynth.tiles.images import read_rgb
from histosynth.tiles.quality import artefacts, blocks

if TYPE_CHECKING:
    import pandas as pd

    from histosynth.tiles.tileset import TileSet

METRICS: tuple[str, ...] = (
    "lap_var", "entropy", "tenengrad", "white_ratio", "sat_ratio", "tissue_fraction", "block_spatial", "block_dct",
    "focus_tissue", "noise", "jpeg_quality", "ink_ratio", "fold_ratio", "bubble_ratio",
)  # fmt: skip
VERSION = 1  # of the metrics; raise it when a value changes, so that cached tables are made anew
MIN_EDGE = 8
_READ_AHEAD = 32  # tiles that a thread reads before it measures them
_CHUNK_PIXELS = 1 << 18  # planes of this many float32 stay in the processor's cache


@on_one_thread
def measure(images: np.ndarray) -> dict[str, np.ndarray]:
    """Measure tiles; a tile's values depend on that tile alone.

    Args:
        images: uint8 [N, 3, H, W] RGB, at least 8 pixels along either side.

    Returns:
        float64 [N] for each of `METRICS`, always finite.

    Raises:
        DataError: another type or shape.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < MIN_EDGE:
        raise DataError(
            f"Tiles to measure have shape {images.shape} and type {images.dtype}.",
            f"They must be uint8 [N, 3, H, W] of at least {MIN_EDGE} px.",
        )
    count = max(1, _CHUNK_PIXELS // (images.shape[2] * images.shape[3]))
    parts = [_measure(np.ascontiguousarray(images[i : i + count])) for i in range(0, len(images), count)]
    return {name: np.concatenate([part[name] for part in parts] or [np.zeros(0)]) for name in METRICS}


def jpeg_quality(images: np.ndarray) -> np.ndarray:
    """The metric jpeg_quality alone, uint8 [N, 3, H, W] -> float64 [N]; ten times as fast as `measure`."""
    return np.asarray(_jpeg_quality(np.asarray(images), _masks(np.asarray(images))["clipped"]), np.float64)


def _jpeg_quality(images: np.ndarray, clipped: np.ndarray) -> np.ndarray:
    red, green, blue = (images[:, c].astype(np.float32) for c in range(3))
    return blocks.jpeg_quality(red * np.float32(0.299) + green * np.float32(0.587) + blue * np.float32(0.114), clipped)


def _measure(images: np.ndarray) -> dict[str, np.ndarray]:
    light = images.astype(np.float32)
    red, green, blue = light[:, 0], light[:, 1], light[:, 2]
    # whole numbers below 2^24 are exact in float32, so a grey level never falls into the wrong bin
    luminance = red * np.float32(2126) + green * np.float32(7152) + blue * np.float32(722)
    found = {"entropy": _entropy(luminance)}
    luminance *= np.float32(1e-4)
    masks = _masks(images)
    found |= {name: _share(masks[name]) for name in ("white_ratio", "sat_ratio", "tissue_fraction")}
    detail, slope, mean = _filtered(luminance)
    found |= _sharpness(detail, slope, mean, masks["tissue_fraction"])
    found["block_spatial"] = blocks.edge_steps(luminance)
    found["block_dct"] = blocks.low_energy(luminance)
    found["noise"] = blocks.noise_sigma(green)
    found["jpeg_quality"] = _jpeg_quality(images, masks["clipped"])
    found["ink_ratio"], found["fold_ratio"] = artefacts.strip_contrasts(light)
    found["bubble_ratio"] = artefacts.ring_contrast(light, detail, slope)
    return {name: np.asarray(found[name], np.float64) for name in METRICS}


def _entropy(scaled: np.ndarray) -> np.ndarray:
    """Entropy in bits of Y, given 10000 Y: 256 bins from 0 to 255."""
    n = len(scaled)
    bins = (scaled.reshape(n, -1) * np.float32(256 / 2550000)).astype(np.int32)
    np.minimum(bins, 255, out=bins)
    bins += np.arange(n, dtype=np.int32)[:, None] * 256
    counts = np.bincount(bins.ravel(), minlength=n * 256).reshape(n, 256)
    share = counts / counts.sum(1, keepdims=True)
    return -(share * np.log2(np.where(share > 0, share, 1))).sum(1) + 0.0


def _masks(images: np.ndarray) -> dict[str, np.ndarray]:
    """The rules on V = max / 255 and S = (max - min) / max in whole numbers; bool [N, H, W]."""
    top = np.maximum(np.maximum(images[:, 0], images[:, 1]), images[:, 2])
    bottom = np.minimum(np.minimum(images[:, 0], images[:, 1]), images[:, 2])
    high, spread = top.astype(np.uint16), (top - bottom).astype(np.uint16) * np.uint16(10)
    return {
        "clipped": (top == 255) | (bottom == 0),
        "white_ratio": (top > 242) & (spread < high),
        "sat_ratio": spread > high * np.uint16(9),
        "tissue_fraction": (top < 250) | (spread > high * np.uint16(2)),
    }


def _filtered(luminance: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squared Laplacian and squared Sobel gradient, float32 [N, H, W], and the Laplacian's mean, float64 [N]."""
    padded = np.pad(luminance, ((0, 0), (1, 1), (1, 1)), mode="symmetric")
    laplacian = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1]
    laplacian += padded[:, 1:-1, :-2]
    laplacian += padded[:, 1:-1, 2:]
    laplacian -= np.float32(4) * luminance
    smooth = padded[:, :-2] + padded[:, 2:]
    smooth += np.float32(2) * padded[:, 1:-1]
    slope = np.square(smooth[:, :, 2:] - smooth[:, :, :-2])
    smooth = padded[:, :, :-2] + padded[:, :, 2:]
    smooth += np.float32(2) * padded[:, :, 1:-1]
    slope += np.square(smooth[:, 2:] - smooth[:, :-2])
    return np.square(laplacian), slope, _mean(laplacian)


def _sharpness(detail: np.ndarray, slope: np.ndarray, mean: np.ndarray, tissue: np.ndarray) -> dict[str, np.ndarray]:
    inside = tissue.astype(np.float32)
    area = _share(tissue)
    # a Sobel gradient is eight times the difference of neighbours; 1 is added so that the noise of an even tile
    # does not count as detail
    focus = _mean(detail * inside) / (_mean(slope * inside) / 64 + np.maximum(area, 1e-9))
    return {"lap_var": np.maximum(0, _mean(detail) - mean**2), "tenengrad": _mean(slope), "focus_tissue": focus}


def _share(mask: np.ndarray) -> np.ndarray:
    """Share of bool [N, H, W] that is true, float64 [N]."""
    flat = mask.reshape(len(mask), -1)
    return np.array([np.count_nonzero(row) for row in flat]) / flat.shape[1]


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean of float32 [N, H, W] over each tile, in float64."""
    return values.reshape(len(values), -1).mean(1).astype(np.float64)


def quality_table(tileset: TileSet, *, workers: int | None = None) -> pd.DataFrame:
    """Measure the kept tiles of a tile set at the size they have on disk; measured once, then read from its cache.

    A tile that cannot be read gets a row of NaN and is reported; it does not stop the others. A prepared set brings
    what was measured when it was made, before its tiles were normalised and resized.

    Args:
        workers: threads, the processors of the machine by default; the values do not depend on it.

    Returns:
        Index id, columns `METRICS`, in the order of `tileset.kept`.
    """
    import pandas as pd
    from threadpoolctl import threadpool_limits

    rows = tileset.kept
    brought = [f"q_{m}" for m in METRICS]
    if tileset.meta.get("metrics_version") == VERSION and set(brought) <= set(rows):
        return pd.DataFrame(rows[brought].to_numpy(float), pd.Index(rows.id, name="id"), list(METRICS))
    key = hashlib.sha256(json.dumps([tileset.digest, VERSION, METRICS, rows.id.tolist()]).encode()).hexdigest()[:16]
    path = tileset.folder / "cache" / f"quality-{key}.parquet"
    if (table := _cached(path, rows.id.tolist())) is not None:
        return table
    files = [tileset.folder / p for p in rows.path]
    groups = [files[i : i + _READ_AHEAD] for i in range(0, len(files), _READ_AHEAD)]
    values, trouble = [], []
    count = workers or os.cpu_count() or 1
    # one thread a matrix product: the pool already keeps the processors busy
    with (
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(count) as pool,
        bar("Measure quality", len(files)) as tick,
    ):
        # a few groups at a time are under way, so that memory does not grow with the number of tiles
        for start in range(0, len(groups), 2 * count):
            for measured, problems in pool.map(_measure_files, groups[start : start + 2 * count]):
                values.append(measured)
                trouble += problems
                tick(len(measured))
    table = pd.DataFrame(
        np.concatenate(values or [np.zeros((0, len(METRICS)))]), pd.Index(rows.id, name="id"), list(METRICS)
    )
    if trouble:
        say(f"{len(trouble)} tile(s) cannot be measured; the first: {trouble[0]}")
    else:  # a tile that cannot be read now may be there again the next time
        with atomic_path(path) as temporary:
            table.to_parquet(temporary)
    return table


def _cached(path: Path, ids: list[str]) -> pd.DataFrame | None:
    import pandas as pd

    if not path.exists():
        return None
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError):
        return None  # a damaged cache is made anew
    return table if table.index.tolist() == ids and tuple(table.columns) == METRICS else None


def _measure_files(files: Sequence[Path]) -> tuple[np.ndarray, list[str]]:
    """Values [N, metrics] and what went wrong; tiles of one size are measured together."""
    values, trouble = np.full((len(files), len(METRICS)), np.nan), []
    by_size: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = {}
    for position, file in enumerate(files):
        try:
            image, _ = read_rgb(file)
            if min(image.shape[:2]) < MIN_EDGE:
                raise DataError(f"{file} has {image.shape[1]} x {image.shape[0]} pixels.", "Too small to measure.")
        except DataError as error:
            trouble.append(error.message)
            continue
        by_size.setdefault(image.shape[:2], []).append((position, image))
    for same in by_size.values():
        measured = measure(np.stack([image.transpose(2, 0, 1) for _, image in same]))
        values[[position for position, _ in same]] = np.stack([measured[m] for m in METRICS], 1)
    return values, trouble
