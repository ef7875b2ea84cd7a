"""Stain vectors at the edges of the fan that optical densities span in their main plane.

Macenko et al. 2009, "A method for normalizing histology slides for quantitative analysis", ISBI.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from histosynth.tiles.stain.codes import order
from histosynth.tiles.stain.light import Scene

EDGE = 1.0
MIN_FAN = np.radians(2.0)
"""A tile whose colours span a smaller angle has one stain only (or one colour)."""


def fan(od: NDArray[np.float32], moments: NDArray, mean: NDArray, edge: float) -> tuple[NDArray[np.float64], bool]:
    """Unit vectors [2, 3] at the `edge` and 100 - `edge` percentiles of the angle, and whether they differ.

    od: [3, K]; moments: [3, 3], whose two largest eigenvectors span the plane; mean: [3].
    """
    plane = np.linalg.eigh(moments)[1][:, :0:-1]
    plane = plane * np.where(mean @ plane < 0, -1.0, 1.0)
    x, y = plane.astype(np.float32).T @ od
    low, high = np.percentile(np.arctan2(y, x), [edge, 100 - edge])
    w = np.maximum(np.array([[np.cos(a), np.sin(a)] for a in (low, high)]) @ plane.T, 0)
    norm = np.linalg.norm(w, axis=1, keepdims=True)
    return w / np.maximum(norm, 1e-6), bool(high - low > MIN_FAN and norm.min() > 1e-3)


def stain_vectors(scene: Scene) -> tuple[NDArray[np.float64], bool]:
    """Stain matrix [2, 3] of a tile, haematoxylin first, and whether it could be found.

    The plane is that of the two largest eigenvectors of the covariance of all stained pixels.
    """
    od = scene.mask()
    sums = (od @ od.T).astype(np.float64)
    mean = sums[:3, 3] / scene.count
    w, ok = fan(scene.od[:3, scene.stained], sums[:3, :3] / scene.count - np.outer(mean, mean), mean, EDGE)
    return order(w), ok
