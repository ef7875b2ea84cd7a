"""How far apart the classes lie in a few features, such as the mean colour of a tile.

Used before and after stain normalisation: a normalisation that draws the classes together takes away colour
that tells them apart, one that pushes them apart may write the class into the colour. All functions are pure;
features are float [N, D], labels int [N] in 0 to K - 1, and classes without tiles give NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histosynth.core.errors import DataError

FLOOR = 1e-6
"""Smallest variance along any direction, as a share of the largest (pooled) or of the pooled one (a class):
tiles that are all alike have none, and would lie infinitely far from every other class."""
_CHUNK = 512


@dataclass(frozen=True)
class Separation:
    """Distances between classes, and how much of the features the class explains."""

    counts: NDArray[np.int64]
    """Tiles a class [K]."""
    euclidean: NDArray[np.float64]
    """Distances between the class means [K, K], in the unit of the features."""
    mahalanobis: NDArray[np.float64]
    """The same in units of the spread within classes [K, K]."""
    bhattacharyya: NDArray[np.float64]
    """Distances of the classes as Gaussians [K, K]; NaN for a class with too few tiles for a covariance."""
    silhouette: float
    """Mean silhouette, -1 to 1; NaN with fewer than two classes."""
    kruskal: NDArray[np.float64]
    """Kruskal-Wallis H of each feature [D]."""
    epsilon_squared: NDArray[np.float64]
    """Share of each feature's ranks that the class explains [D]."""


def separation(features: np.ndarray, labels: np.ndarray, count: int) -> Separation:
    """Everything above for `count` classes.

    Raises:
        DataError: shapes that do not fit, values that are not finite, or labels outside 0 to count - 1.
    """
    features, labels = _checked(features, labels, count)
    ranks = [kruskal(column, labels) for column in features.T]
    return Separation(
        np.bincount(labels, minlength=count),
        euclidean(features, labels, count),
        mahalanobis(features, labels, count),
        bhattacharyya(features, labels, count),
        silhouette(features, labels),
        np.array([h for h, _ in ranks]),
        np.array([e for _, e in ranks]),
    )


def mean_rgb(images: np.ndarray) -> NDArray[np.float64]:
    """Mean colour of each tile: uint8 [N, 3, H, W] -> float64 [N, 3] in [0, 1]."""
    return images.reshape(*images.shape[:2], -1).mean(2, dtype=np.float64) / 255


def means(features: np.ndarray, labels: np.ndarray, count: int) -> NDArray[np.float64]:
    """Class means, float64 [K, D]."""
    sums = np.zeros((count, features.shape[1]))
    np.add.at(sums, labels, features)
    sizes = np.bincount(labels, minlength=count)[:, None]
    return np.divide(sums, sizes, out=np.full_like(sums, np.nan), where=sizes > 0)


def euclidean(features: np.ndarray, labels: np.ndarray, count: int) -> NDArray[np.float64]:
    """Distances between class means [K, K]."""
    centres = means(features, labels, count)
    return np.sqrt(((centres[:, None] - centres[None]) ** 2).sum(2))


def pooled_covariance(features: np.ndarray, labels: np.ndarray, count: int) -> NDArray[np.float64]:
    """Covariance within classes [D, D]: squares about the class means, over N less the classes that have tiles.

    NaN when no class has two tiles.
    """
    inner = features - means(features, labels, count)[labels]
    freedom = len(features) - len(np.unique(labels))
    return inner.T @ inner / freedom if freedom > 0 else np.full((features.shape[1],) * 2, np.nan)


def mahalanobis(features: np.ndarray, labels: np.ndarray, count: int) -> NDArray[np.float64]:
    """Distances between class means in units of the pooled deviation [K, K] (Mahalanobis 1936)."""
    return euclidean(_whitened(features, labels, count), labels, count)


def bhattacharyya(features: np.ndarray, labels: np.ndarray, count: int) -> NDArray[np.float64]:
    """Bhattacharyya distance of the classes as Gaussians [K, K].

    (m1 - m2)' S^-1 (m1 - m2) / 8 + ln(det S / sqrt(det S1 det S2)) / 2 with S = (S1 + S2) / 2 (Kailath 1967).
    It does not change when the features are mapped linearly, so it is computed on whitened ones, where a
    class's variances are held above `FLOOR`.
    """
    white = _whitened(features, labels, count)
    dims = white.shape[1]
    centres = means(white, labels, count)
    covariances = np.full((count, dims, dims), np.nan)
    for k in range(count):
        own = white[labels == k]
        if len(own) > dims and np.isfinite(own).all():
            values, vectors = np.linalg.eigh(np.cov(own.T).reshape(dims, dims))
            covariances[k] = (vectors * np.maximum(values, FLOOR)) @ vectors.T
    found = np.full((count, count), np.nan)
    known = np.flatnonzero(np.isfinite(covariances[:, 0, 0]))
    logs = {k: np.linalg.slogdet(covariances[k])[1] for k in known}
    for i in known:
        for j in known[known >= i]:
            middle = (covariances[i] + covariances[j]) / 2
            step = centres[i] - centres[j]
            value = step @ np.linalg.solve(middle, step) / 8
            value += (np.linalg.slogdet(middle)[1] - (logs[i] + logs[j]) / 2) / 2
            found[i, j] = found[j, i] = max(value, 0.0)
    return found


def silhouette(features: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette with Euclidean distances (Rousseeuw 1987); a tile alone in its class counts as 0."""
    names, own = np.unique(labels, return_inverse=True)
    sizes = np.bincount(own)
    if len(names) < 2:
        return float("nan")
    member = np.eye(len(names))[own]
    squares = (features**2).sum(1)
    total = 0.0
    for start in range(0, len(features), _CHUNK):
        rows = slice(start, start + _CHUNK)
        gaps = squares[rows, None] + squares[None] - 2 * features[rows] @ features.T
        sums = np.sqrt(np.maximum(gaps, 0)) @ member  # distances to each class, summed
        mine, here = own[rows], np.arange(len(sums))
        inside = sums[here, mine] / np.maximum(sizes[mine] - 1, 1)
        averages = sums / sizes
        averages[here, mine] = np.inf
        outside = averages.min(1)
        larger = np.maximum(inside, outside)
        value = np.divide(outside - inside, larger, out=np.zeros_like(larger), where=larger > 0)
        total += value[sizes[mine] > 1].sum()
    return float(total / len(features))


def kruskal(values: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Kruskal-Wallis H with ties corrected, and eps^2 = (H - k + 1) / (n - k) (Tomczak & Tomczak 2014).

    NaN with fewer than two classes or as many classes as values; (0, 0) when all values are equal.
    """
    _, own = np.unique(labels, return_inverse=True)
    sizes = np.bincount(own)
    n, k = len(values), len(sizes)
    if k < 2 or n <= k:
        return float("nan"), float("nan")
    _, place, repeats = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(repeats)
    ranks = (ends - (repeats - 1) / 2)[place]
    ties = 1 - (repeats.astype(float) ** 3 - repeats).sum() / (float(n) ** 3 - n)
    if ties <= 0:
        return 0.0, 0.0
    sums = np.bincount(own, weights=ranks)
    h = (12 / (n * (n + 1)) * (sums**2 / sizes).sum() - 3 * (n + 1)) / ties
    return float(h), float(max((h - k + 1) / (n - k), 0.0))


def mean_off_diagonal(matrix: np.ndarray) -> float:
    """Mean distance over pairs of different classes that have one; NaN when there is none."""
    values = matrix[~np.eye(len(matrix), dtype=bool)]
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _whitened(features: np.ndarray, labels: np.ndarray, count: int) -> NDArray[np.float64]:
    """Features in which the pooled covariance is the identity, or less where a direction hardly varies."""
    covariance = pooled_covariance(features, labels, count)
    if not np.isfinite(covariance).all():
        return np.full(features.shape, np.nan)
    values, vectors = np.linalg.eigh(covariance)
    if values[-1] <= 0:  # every class is a single point
        return np.full(features.shape, np.nan)
    return (features - features.mean(0)) @ vectors / np.sqrt(np.maximum(values, FLOOR * values[-1]))


def _checked(features: np.ndarray, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    if features.ndim != 2 or labels.shape != (len(features),) or len(features) == 0:
        raise DataError(
            f"Features have shape {features.shape} and labels {labels.shape}.", "Give [N, D] and [N] with N > 0."
        )
    if not np.isfinite(features).all():
        raise DataError("Some features are not finite.", "Leave those tiles out.")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= count:
        raise DataError(f"Labels are {labels.dtype} from {labels.min()} to {labels.max()}.",
                        f"Give integers from 0 to {count - 1}.")  # fmt: skip
    return features, labels.astype(np.int64)
