"""Stain vectors by sparse non-negative matrix factorisation with two atoms.

Vahadane et al. 2016, "Structure-preserving color normalization and sparse stain separation for histological
images", IEEE TMI 35:1962, equation 8: min over W, H >= 0 of |V - W H|^2 / 2 + lambda * sum(H), unit atoms.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from histosynth.tiles.stain.codes import code_matrix, codes, order
from histosynth.tiles.stain.light import Scene
from histosynth.tiles.stain.macenko import EDGE, fan

SPARSITY = 0.1
"""The paper's lambda, for optical densities by the natural logarithm."""
_MEMORY = 4
_ROUGH, _FINE = 5e-3, 2e-3
"""Radians: an extrapolated step shorter than this, from a plain one 16 times shorter, ends the alternation on a sample,
and on all pixels. The first bounds the distance left where the secants are right, the second where they are not."""
_STEPS = 100


def stain_vectors(scene: Scene) -> tuple[NDArray[np.float64], bool]:
    """Stain matrix [2, 3] of a tile, haematoxylin first, and whether it could be found.

    Alternating minimisation starts at the edges of the fan (Macenko et al. 2009), converges on a sample of the
    stained pixels, and then on all of them, which takes few steps from there.
    """
    sample = scene.sample()
    mean = sample[:3].mean(axis=1, dtype=np.float64)
    start, ok = fan(sample[:3], (sample[:3] @ sample[:3].T).astype(np.float64) / sample.shape[1], mean, EDGE)
    if not ok:
        return order(start), False
    solver = _Alternation(start)
    more = sample.shape[1] < scene.count
    solver.run(sample, np.empty_like(sample), _ROUGH if more else _FINE)
    if more:
        solver.run(scene.mask(), scene.work, _FINE)
    w = solver.w
    return order(w), bool(np.isfinite(w).all() and w[0] @ w[1] < np.cos(np.radians(1.0)))


class _Alternation:
    """Codes for the atoms, atoms for the codes, and so on, sped up by extrapolation.

    The fixed point of the alternation is found with Anderson's method (Walker and Ni 2011, SIAM J Numer Anal
    49:1715): the last few steps give secants of the map. They carry over from the sample to all pixels.
    """

    def __init__(self, start: NDArray[np.float64]) -> None:
        self.w = start
        self._secants: list[tuple[NDArray, NDArray]] = []

    def run(self, od: NDArray[np.float32], work: NDArray[np.float32], tolerance: float) -> None:
        last: tuple[NDArray, NDArray] | None = None
        best = np.inf
        for _ in range(_STEPS):
            new = _alternate(self.w, od, work)
            move = (new - self.w).ravel()
            size = float(np.abs(move).max())
            if size > 4 * best:  # the secants mislead; a plain step never does
                self._secants.clear()
                last = None
            best = min(best, size)
            if last is not None:
                self._secants.append((move - last[0], new.ravel() - last[1]))
                del self._secants[:-_MEMORY]
            last = (move, new.ravel())
            old, self.w = self.w, self._extrapolate(new, move)
            if np.abs(self.w - old).max() < tolerance and size < tolerance / 16:
                return

    def _extrapolate(self, new: NDArray, move: NDArray) -> NDArray:
        if not self._secants:
            return new
        moves = np.array([s[0] for s in self._secants])
        gram = moves @ moves.T
        gram.flat[:: len(gram) + 1] += 1e-8 * gram.trace() + 1e-30
        weights = np.linalg.solve(gram, moves @ move)
        step = weights @ np.array([s[1] for s in self._secants])
        w = np.maximum(new - step.reshape(2, 3), 0)
        norm = np.sqrt((w * w).sum(axis=1, keepdims=True))
        if not (norm.min() > 0.3 and np.abs(step).max() < 0.5):
            return new
        return w / norm


def _alternate(w: NDArray[np.float64], od: NDArray[np.float32], work: NDArray[np.float32]) -> NDArray[np.float64]:
    """One step: closed-form codes, then block-coordinate descent over the two atoms."""
    c = codes(od, code_matrix(w, SPARSITY), work)
    cc = (c @ c.T).astype(np.float64)
    cx = (c @ od[:3].T).astype(np.float64)
    w = w.copy()
    for k in (0, 1):
        atom = np.maximum(cx[k] - cc[k, 1 - k] * w[1 - k], 0)
        norm = np.sqrt(atom @ atom)
        if norm > 0:  # an atom that no pixel uses stays where it is
            w[k] = atom / norm
    return w
