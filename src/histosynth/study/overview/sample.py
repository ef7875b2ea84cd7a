"""Seeded subsets of a tile set, and one pass over their files for everything that needs pixels."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from histosynth.core.errors import DataError
from histosynth.core.progress import bar
from histosynth.core.seeds import numpy_rng
from histosynth.tiles.images import read_rgb, square
from histosynth.tiles.probes import features as probe_features

if TYPE_CHECKING:
    import pandas as pd

    from histosynth.tiles.tileset import TileSet

_CALIBRATION = 64  # tiles on which the common compression is chosen
_AHEAD = 512  # tiles handed to the threads at a time
_LARGEST = 512  # pixels of a tile's middle that are searched for traces of JPEG
_T = TypeVar("_T")


@dataclass(frozen=True)
class Measured:
    """What was read from the pixels of a subset."""

    rows: pd.DataFrame
    """The tiles that could be read, with the columns of the tile set."""
    labels: np.ndarray
    """Class index, int64 [N]."""
    mean: np.ndarray
    """Mean colour and its products, float64 [N, 9]."""
    histogram: np.ndarray
    """Colour histogram, float64 [N, 125]."""
    traces: np.ndarray
    """Traces of JPEG, float64 [N, 12]; NaN for tiles too small to have any."""
    alike: np.ndarray
    """The same after one common compression, float64 [N, 12]."""
    unreadable: list[str]
    """Why tiles of the subset are missing."""

    @property
    def rgb(self) -> np.ndarray:
        """Mean colour, 0 to 255, float64 [N, 3]."""
        return (self.mean[:, :3] + 0.5) * 255


def spread(rows: pd.DataFrame, count: int, seed: int, purpose: str) -> np.ndarray:
    """Positions of at most `count` rows: equal shares of the classes, and within a class of the patients.

    A class with fewer tiles gives all of them, and the others share what it leaves.
    """
    rng = numpy_rng(seed, "overview", purpose)
    order = rng.permutation(len(rows))
    labels, patients = rows.label.to_numpy(str)[order], rows.patient.to_numpy(str)[order]
    names, members = np.unique(labels, return_counts=True)
    quota = _shares(members, count)
    chosen = []
    for name, share in zip(names, quota, strict=True):
        own = np.flatnonzero(labels == name)
        # the first tile of every patient, then the second of each, and so on
        _, patient = np.unique(patients[own], return_inverse=True)
        turn = np.empty(len(own), dtype=np.int64)
        by_patient = np.argsort(patient, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(patient[by_patient]) > 0])
        turn[by_patient] = np.arange(len(own)) - np.repeat(starts, np.diff(np.r_[starts, len(own)]))
        chosen.append(order[own[np.argsort(turn, kind="stable")[:share]]])
    return np.concatenate(chosen) if chosen else np.zeros(0, np.int64)


def _shares(members: np.ndarray, count: int) -> np.ndarray:
    quota = np.zeros(len(members), dtype=np.int64)
    while (left := count - int(quota.sum())) > 0 and (open_ := np.flatnonzero(quota < members)).size:
        if left < len(open_):
            quota[open_[:left]] += 1
            break
        quota[open_] += np.minimum(members[open_] - quota[open_], left // len(open_))
    return quota


def measure(tileset: TileSet, rows: pd.DataFrame, workers: int | None = None) -> Measured:
    """Colour and traces of compression of these tiles, read one after another at their own size."""
    few = np.unique(np.linspace(0, len(rows) - 1, min(_CALIBRATION, len(rows))).astype(int))
    first = each_tile(tileset, rows.iloc[few], _pixels, "Look for traces of JPEG", workers)
    quality = _common_quality(
        [_middle(i) for i in first if isinstance(i, np.ndarray) and min(i.shape[1:]) >= probe_features.MIN_EDGE]
    )

    def features(image: np.ndarray) -> tuple[np.ndarray, ...]:
        tile = image.transpose(2, 0, 1)[None]
        traces = alike = np.full((1, probe_features.COMPRESSION_DIM), np.nan)
        if min(tile.shape[2:]) >= probe_features.MIN_EDGE:
            middle = _middle(tile[0])[None]
            traces = probe_features.compression(middle)
            alike = probe_features.compression(probe_features.compressed_alike(middle, quality))
        return probe_features.mean_colour(tile)[0], probe_features.colour_histogram(tile)[0], traces[0], alike[0]

    good, found, unreadable = [], [], []
    for position, result in enumerate(each_tile(tileset, rows, features, "Measure colour and JPEG", workers)):
        if isinstance(result, str):
            unreadable.append(result)
        else:
            good.append(position)
            found.append(result)
    if not found:
        raise DataError(f"No tile of {tileset.folder} can be read (first: {unreadable[0]}).", "Import the set again.")
    index = {label: i for i, label in enumerate(tileset.classes)}
    kept = rows.iloc[good].reset_index(drop=True)
    columns = (np.stack(column) for column in zip(*found, strict=True))
    return Measured(kept, kept.label.map(index).to_numpy(np.int64), *columns, unreadable)


def small_tiles(tileset: TileSet, rows: pd.DataFrame, size: int, workers: int | None = None) -> np.ndarray:
    """Tiles at `size` pixels, uint8 [N, 3, size, size]; a tile that cannot be read is left white."""
    found = np.full((len(rows), 3, size, size), 255, dtype=np.uint8)

    def shrink(image: np.ndarray) -> np.ndarray:
        return square(image, size).transpose(2, 0, 1)

    for position, image in enumerate(each_tile(tileset, rows, shrink, "Read tiles", workers)):
        if isinstance(image, np.ndarray):
            found[position] = image
    return found


def each_tile(
    tileset: TileSet, rows: pd.DataFrame, work: Callable[[np.ndarray], _T], what: str, workers: int | None = None
) -> list[_T | str]:
    """`work` on every decoded tile uint8 [H, W, 3], in order; the reason in place of a tile that cannot be read."""

    def one(path: str) -> Any:
        try:
            return work(read_rgb(tileset.folder / path)[0])
        except DataError as error:
            return error.message

    done: list[_T | str] = []
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool, bar(what, len(rows)) as tick:
        for start in range(0, len(rows), _AHEAD):  # memory does not grow with tasks that wait
            for result in pool.map(one, rows.path.iloc[start : start + _AHEAD]):
                done.append(result)
                tick()
    return done


def _pixels(image: np.ndarray) -> np.ndarray:
    return image.transpose(2, 0, 1)


def _middle(tile: np.ndarray) -> np.ndarray:
    """The central part of [3, H, W], cut on the 8 x 8 grid that begins at the corner."""
    top, left = (max(0, (edge - _LARGEST) // 2) // 8 * 8 for edge in tile.shape[1:])
    return tile[:, top : top + _LARGEST, left : left + _LARGEST]


def _common_quality(tiles: Sequence[np.ndarray]) -> int:
    """The compression that comes nearest to that of these tiles, judged on those of the most frequent size."""
    if not tiles:
        return probe_features.QUALITIES[0]
    shapes = [tile.shape for tile in tiles]
    common = max(sorted(set(shapes)), key=shapes.count)
    images = np.stack([tile for tile in tiles if tile.shape == common])
    return probe_features.alike_quality(images, probe_features.compression(images))
