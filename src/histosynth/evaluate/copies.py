"""Did the generator copy its training tiles?

Two looks. In feature space: how near is each synthetic tile to its nearest training tile, beside how near
real tiles that were never trained on come (the ratio of medians, the share nearer than the nearest 5 % of
those, and authenticity: Alaa et al. 2022, eq. 8). In pixel space: each synthetic tile, in all eight symmetries,
laid over the training tiles with small shifts and zooms, with the alarm set where only 1 % of the held-out real
tiles would ring it; and pixels equal to the last bit.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from histosynth.core.errors import DataError
from histosynth.evaluate.checks import checked, checked_pair
from histosynth.evaluate.neighbours import nearest

THUMBNAIL = 16
_FALSE_ALARMS = 0.01
_COARSE, _FINE = 8, 32  # cells of the thumbnails that find candidates, and that compare with them
_INNER = 1 / 8  # share of the edge by which a window of a tile may be shifted when candidates are sought
_REACH = 4  # cells of a fine thumbnail by which it is shifted to each side: an eighth of the tile
_WINDOW = _FINE - 2 * _REACH
_SOFT = 1.0  # cells
_ZOOMS = (0.0, 0.05)  # share cut off at each border
_CANDIDATES = 10
_LEAST_CORRELATION = 0.5
_LEAST_SPREAD = 0.01  # variance of a window, in that of its thumbnail, below which it is empty
_CHUNK = 256
# grey levels of contrast below which a thumbnail is noise on an empty tile and shall not be stretched
_LEAST_CONTRAST = 4.0


@dataclass(frozen=True)
class ClosestPairs:
    """For the report's sheet: synthetic tiles beside their nearest training tiles, most suspect first.

    Attributes:
        synthetic: int64 [n], positions in the synthetic set.
        training: int64 [n], positions of their nearest training tiles.
        distance: float64 [n], in feature space.
        alarm: bool [n], nearer in pixels than 99 % of held-out real tiles come, or equal.
    """

    synthetic: NDArray[np.int64]
    training: NDArray[np.int64]
    distance: NDArray[np.float64]
    alarm: NDArray[np.bool_]


def copies(
    train: np.ndarray,
    held_out: np.ndarray,
    synthetic: np.ndarray,
    train_images: np.ndarray | None = None,
    held_out_images: np.ndarray | None = None,
    synthetic_images: np.ndarray | None = None,
    pairs: int = 12,
) -> tuple[dict[str, float], ClosestPairs]:
    """Compare synthetic tiles with the very tiles that the generator was trained on.

    Args:
        train, held_out, synthetic: features [N, D], of all tiles that there are.
        train_images, held_out_images, synthetic_images: uint8 [N, 3, H, W] of the same tiles, or none of them.
        pairs: how many closest pairs to give.

    Returns:
        A flat dict: nn_ratio (median nearest distance, synthetic over held-out; about 1 when nothing is
        copied), nn_below_5pct (share nearer than the 5 % quantile of held-out; about 0.05), authenticity
        (share of synthetic tiles farther from their nearest training tile than that tile is from its own
        nearest), and with images pixel_alarms (share; about 0.01) and pixel_equal (share). And the pairs.

    Raises:
        DataError: fewer than two tiles on a side, different D, values that are not finite, or images that do
            not go with the features.
    """
    train, synthetic = checked_pair(train, synthetic, keep=True)
    _, held_out = checked_pair(train, held_out, keep=True)
    real, _ = nearest(held_out, train)
    found, where = nearest(synthetic, train)
    own, _ = nearest(train, train, same=True)
    result = {
        "nn_ratio": float(np.median(found) / max(np.median(real), np.finfo(float).tiny)),
        "nn_below_5pct": float((found < np.quantile(real, 0.05)).mean()),
        "authenticity": float((found > own[where]).mean()),
    }
    alarm = np.zeros(len(synthetic), bool)
    order = np.argsort(found, kind="stable")
    given = [x is not None for x in (train_images, held_out_images, synthetic_images)]
    if any(given) and not all(given):
        raise DataError("Only some of the three sets came with images.", "Give images of all three, or of none.")
    if train_images is not None and held_out_images is not None and synthetic_images is not None:
        _check_images(train_images, train, "training")
        _check_images(held_out_images, held_out, "held-out")
        _check_images(synthetic_images, synthetic, "synthetic")
        alarm, equal, twin = pixel_copies(train_images, held_out_images, synthetic_images)
        where = np.where(alarm, twin, where)
        order = np.lexsort((found, ~alarm, ~equal))
        result |= {"pixel_alarms": float(alarm.mean()), "pixel_equal": float(equal.mean())}
    top = order[:pairs]
    return result, ClosestPairs(top, where[top], found[top], alarm[top])


def pixel_copies(
    train: np.ndarray, held_out: np.ndarray, synthetic: np.ndarray
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.int64]]:
    """Near and exact copies by pixels: turned, mirrored, shifted and zoomed a little, tinted, blurred, compressed.

    Every tile is laid over the training tiles that its coarse thumbnail resembles most, and its score is the best
    correlation over small shifts and zooms. The alarm rings above what 99 % of the held-out tiles reach.

    Args:
        train, held_out, synthetic: uint8 [N, 3, H, W].

    Returns:
        alarm bool [n], equal bool [n] (to the last bit, in any of the eight symmetries of the square), and the
        training tile that each synthetic tile resembles most, int64 [n].
    """
    known = _Known(train)
    usual, _ = known.closest(held_out)
    found, twin = known.closest(synthetic)
    # tiles without structure correlate with nothing, or with everything that has none
    alarm = found > max(float(np.quantile(usual, 1 - _FALSE_ALARMS)), _LEAST_CORRELATION)
    equal = np.zeros(len(synthetic), bool)
    if train.shape[1:] == synthetic.shape[1:]:
        exact = {hashlib.sha256(np.ascontiguousarray(tile)).digest(): i for i, tile in reversed(list(enumerate(train)))}
        for i, tile in enumerate(synthetic):
            for turned in _symmetries(tile):
                hit = exact.get(hashlib.sha256(np.ascontiguousarray(turned)).digest())
                if hit is not None:
                    equal[i], twin[i] = True, hit
                    break
    return alarm | equal, equal, twin


class _Known:
    """Training tiles, ready to be compared with."""

    def __init__(self, train: np.ndarray) -> None:
        self.coarse = _flat(thumbnails(train, _COARSE, (_INNER / 2, 1 - _INNER / 2)))
        self.fine = [_fine(train, cut) for cut in _ZOOMS]
        self.spreads = [_spreads(fine) for fine in self.fine]

    def closest(self, images: np.ndarray) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Best correlation of each tile, float64 [n], and with which training tile."""
        best, which = np.empty(len(images)), np.empty(len(images), np.int64)
        for start in range(0, len(images), _CHUNK):
            part = slice(start, start + _CHUNK)
            best[part], which[part] = self._closest(images[part])
        return best, which

    def _closest(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n, count = len(images), min(_CANDIDATES, len(self.coarse))
        nearness = np.full((n, len(self.coarse)), -np.inf, np.float32)
        turned = np.zeros((n, len(self.coarse)), np.int8)
        places = (0.0, _INNER / 2, _INNER)
        windows = [
            list(_symmetries(thumbnails(images, _COARSE, (y, y + 1 - _INNER), (x, x + 1 - _INNER))))
            for y, x in itertools.product(places, repeat=2)
        ]
        for k, shifted in enumerate(zip(*windows, strict=True)):
            likeness = _flat(shifted[0]) @ self.coarse.T
            for window in shifted[1:]:
                np.maximum(likeness, _flat(window) @ self.coarse.T, out=likeness)
            turned[likeness > nearness] = k
            np.maximum(nearness, likeness, out=nearness)
        picked = np.argpartition(-nearness, count - 1, axis=1)[:, :count]
        turns = np.take_along_axis(turned, picked, 1)
        scores = np.full((n, count), -np.inf)
        for z, y in ((0, 0), (1, 0), (0, 1)):  # as large, larger, smaller
            variants = np.stack(list(_symmetries(_fine(images, _ZOOMS[z]))))
            middle = variants[..., _REACH:-_REACH, _REACH:-_REACH].reshape(8, n, -1)
            middle = middle - middle.mean(2, keepdims=True)
            middle /= np.sqrt(np.maximum((middle**2).sum(2, keepdims=True), _LEAST_SPREAD * _WINDOW**2))
            for i, candidates in enumerate(picked):
                products = self.windows(y, candidates) @ middle[turns[i], i][:, :, None]
                found = (products[..., 0] / self.spreads[y][candidates]).max(1)
                np.maximum(scores[i], found, out=scores[i])
        top = scores.argmax(1)
        each = np.arange(n)
        return scores[each, top], picked[each, top]

    def windows(self, zoom: int, which: np.ndarray) -> np.ndarray:
        """All windows of these tiles: [n, places, pixels]."""
        views = np.lib.stride_tricks.sliding_window_view(self.fine[zoom][which], (_WINDOW, _WINDOW), axis=(1, 2))
        return views.reshape(len(which), -1, _WINDOW**2)


def _fine(images: np.ndarray, cut: float) -> NDArray[np.float32]:
    """Fine thumbnails, softened so that a small turn or half a cell of shift changes little."""
    return ndimage.gaussian_filter(thumbnails(images, _FINE, (cut, 1 - cut)), (0, _SOFT, _SOFT))


def _spreads(fine: np.ndarray) -> np.ndarray:
    """Root of the sum of squares about the mean of every window: [n, places], from sums over rectangles."""

    def sums(values: np.ndarray) -> np.ndarray:
        table = np.pad(values.astype(np.float64).cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))
        w = _WINDOW
        return table[:, w:, w:] - table[:, w:, :-w] - table[:, :-w, w:] + table[:, :-w, :-w]

    squares = sums(fine**2) - sums(fine) ** 2 / _WINDOW**2
    return np.sqrt(np.maximum(squares, _LEAST_SPREAD * _WINDOW**2)).reshape(len(fine), -1).astype(np.float32)


def thumbnails(
    images: np.ndarray,
    cells: int = THUMBNAIL,
    rows: tuple[float, float] = (0.0, 1.0),
    columns: tuple[float, float] | None = None,
) -> NDArray[np.float32]:
    """Grey thumbnails without brightness and contrast: uint8 [N, 3, H, W] -> float32 [N, cells, cells].

    Args:
        rows, columns: which part of the tile, as shares of its edge; the columns are as the rows by default.
    """
    n, _, height, width = images.shape
    grey = np.empty((n, cells, cells), np.float32)
    down, across = _averaging(height, cells, rows), _averaging(width, cells, columns or rows)
    for start in range(0, n, _CHUNK):
        part = np.asarray(images[start : start + _CHUNK]).mean(1, dtype=np.float32)
        grey[start : start + _CHUNK] = down @ part @ across.T
    grey -= grey.mean((1, 2), keepdims=True)
    return grey / np.maximum(grey.std((1, 2), keepdims=True), _LEAST_CONTRAST)


def _flat(thumbs: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(thumbs).reshape(len(thumbs), -1)


def _symmetries(images: np.ndarray) -> Iterator[np.ndarray]:
    for flipped in (images, images[..., ::-1]):
        for k in range(4):
            yield np.rot90(flipped, k, axes=(-2, -1))


def _averaging(length: int, cells: int, part: tuple[float, float]) -> NDArray[np.float32]:
    """[cells, length]: row i averages the pixels of the i-th cell of that part, edge pixels by their share."""
    edges = np.linspace(part[0] * length, part[1] * length, cells + 1)
    pixel = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    overlap = overlap.clip(0)
    return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)


def _check_images(images: np.ndarray, features: np.ndarray, name: str) -> None:
    checked(features, f"{name} features")
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8 or len(images) != len(features):
        raise DataError(
            f"The {name} images are {images.dtype} {images.shape} beside {len(features)} features.",
            "Give uint8 [N, 3, H, W], one image a row of features.",
        )
