"""Did the generator copy its training tiles?

Two looks. In feature space: how near is each synthetic tile to its nearest training tile, beside how near
real tiles that were never trained on come (the ratio of medians, the share nearer than the nearest 5 % of
those, and authenticity: Alaa et al. 2022, eq. 8). In pixel space: small thumbnails of each synthetic tile, in
all eight symmetries, against those of the training tiles, with the alarm set where only 1 % of the held-out
real tiles would ring it; and pixels equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histosynth.core.errors import DataError
from histosynth.evaluate.checks import checked, checked_pair
from histosynth.evaluate.neighbours import nearest

THUMBNAIL = 16
_FALSE_ALARMS = 0.01
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
    train, synthetic = checked_pair(train, synthetic)
    _, held_out = checked_pair(train, held_out)
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
    """Near and exact copies by pixels, in any of the eight symmetries of the square.

    Args:
        train, held_out, synthetic: uint8 [N, 3, H, W].

    Returns:
        alarm bool [n], equal bool [n], and the nearest training tile by thumbnail int64 [n], one a synthetic
        tile.
    """
    known = thumbnails(train)
    usual, _, _ = _nearest_symmetric(thumbnails(held_out), known)
    found, twin, turn = _nearest_symmetric(thumbnails(synthetic), known)
    alarm = found < np.quantile(usual, _FALSE_ALARMS)
    equal = np.zeros(len(synthetic), bool)
    if train.shape[1:] == synthetic.shape[1:]:
        for i in np.flatnonzero(found < 1e-6):
            equal[i] = np.array_equal(list(_symmetries(synthetic[i]))[turn[i]], train[twin[i]])
    return alarm | equal, equal, twin


def thumbnails(images: np.ndarray) -> NDArray[np.float64]:
    """uint8 [N, 3, H, W] -> grey thumbnails float64 [N, 16, 16] without brightness and contrast."""
    n, _, height, width = images.shape
    grey = np.empty((n, THUMBNAIL, THUMBNAIL))
    down = [_averaging(length) for length in (height, width)]
    for start in range(0, n, 256):
        part = np.asarray(images[start : start + 256]).mean(1)
        grey[start : start + 256] = down[0] @ part @ down[1].T
    grey -= grey.mean((1, 2), keepdims=True)
    return grey / np.maximum(grey.std((1, 2), keepdims=True), _LEAST_CONTRAST)


def _nearest_symmetric(
    rows: np.ndarray, columns: np.ndarray
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Root mean square distance to the nearest column under any symmetry of the row, which, and how turned."""
    flat = columns.reshape(len(columns), -1)
    best, which, turn = np.full(len(rows), np.inf), np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    for k, turned in enumerate(_symmetries(rows)):
        distance, position = nearest(np.ascontiguousarray(turned).reshape(len(rows), -1), flat)
        nearer = distance < best
        best[nearer], which[nearer], turn[nearer] = distance[nearer], position[nearer], k
    return best / THUMBNAIL, which, turn


def _symmetries(images: np.ndarray) -> Iterator[np.ndarray]:
    for flipped in (images, images[..., ::-1]):
        for k in range(4):
            yield np.rot90(flipped, k, axes=(-2, -1))


def _averaging(length: int) -> NDArray[np.float64]:
    """[16, length]: row i averages the pixels that lie in the i-th sixteenth, edge pixels by their share."""
    edges = np.linspace(0, length, THUMBNAIL + 1)
    pixel = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    overlap = overlap.clip(0)
    return overlap / overlap.sum(1, keepdims=True)


def _check_images(images: np.ndarray, features: np.ndarray, name: str) -> None:
    checked(features, f"{name} features")
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8 or len(images) != len(features):
        raise DataError(
            f"The {name} images are {images.dtype} {images.shape} beside {len(features)} features.",
            "Give uint8 [N, 3, H, W], one image a row of features.",
        )
