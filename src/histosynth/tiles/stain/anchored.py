"""Stain vectors nearest the truth: published vectors in the tile's own plane, moved by what the tile shows.

Two stains span a plane through the origin of optical densities, and a tile shows that plane to a fraction of a
degree. Where in the plane the pure stains lie, it does not show: nuclei hold some eosin, so no pixel is pure, and
the edges of the data (Macenko), still more the atoms of a sparse factorisation (Vahadane, drawn inwards by the
penalty), lie between the pure stains, the further in the less a tile holds of a stain. So published vectors say
where in the plane. For haematoxylin, which the nuclei of nearly every tile show, they count as much as the edge of
the data, taken to hold `EOSIN_IN_NUCLEI`; and no vector may lie inside the data.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from histosynth.tiles.stain.codes import EOSIN, HAEMATOXYLIN, STANDARD, order
from histosynth.tiles.stain.light import Scene
from histosynth.tiles.stain.macenko import EDGE, MIN_FAN

_STRONG = 25.0
"""Percentile of the density above which a pixel's angle is sharp enough to count as an edge."""
EOSIN_IN_NUCLEI = 0.15
"""Share of the way from haematoxylin to eosin at which the bluest pixels lie."""


def stain_vectors(scene: Scene) -> tuple[NDArray[np.float64], bool]:
    """Stain matrix [2, 3] of a tile, haematoxylin first, and whether it could be found."""
    od = scene.mask()
    plane = np.linalg.eigh((od[:3] @ od[:3].T).astype(np.float64))[1][:, :0:-1]
    plane = plane * np.sign(np.array([STANDARD.sum(axis=0), HAEMATOXYLIN - EOSIN]) @ plane).diagonal()
    x, y = plane.T.astype(np.float32) @ scene.sample()[:3]
    strength = x * x + y * y
    angle = np.arctan2(y, x)[strength >= np.percentile(strength, _STRONG)]
    edges = np.percentile(angle, [100 - EDGE, EDGE])
    published = np.arctan2(*(STANDARD @ plane).T[::-1])
    nuclei = edges[0] + EOSIN_IN_NUCLEI * (published[0] - published[1])
    high, low = max(edges[0], (published[0] + nuclei) / 2), min(edges[1], published[1])
    w = np.maximum(np.array([[np.cos(a), np.sin(a)] for a in (high, low)]) @ plane.T, 0)
    norm = np.linalg.norm(w, axis=1, keepdims=True)
    ok = edges[0] - edges[1] > MIN_FAN and norm.min() > 0.5
    return order(w / np.maximum(norm, 1e-6)), bool(ok)
