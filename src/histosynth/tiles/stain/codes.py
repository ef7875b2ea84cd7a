"""Two stains a pixel: their order, concentrations in closed form, and high percentiles of these."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from histosynth.core.errors import DataError

_PUBLISHED = np.array(
    [
        [[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]],  # Ruifrok and Johnston 2001
        [[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]],  # Macenko et al. 2009
    ]
)
CODE_SPARSITY = 0.01
"""Weight of the sum of concentrations in tiles whose stain vectors are known."""
_mean = (_PUBLISHED / np.linalg.norm(_PUBLISHED, axis=2, keepdims=True)).mean(axis=0)
STANDARD = _mean / np.linalg.norm(_mean, axis=1, keepdims=True)
"""[2, 3] mean published unit optical densities (R, G, B) of haematoxylin and of eosin."""
HAEMATOXYLIN, EOSIN = STANDARD


def order(matrix: NDArray[np.floating]) -> NDArray[np.float64]:
    """The stain matrix [2, 3] with haematoxylin first.

    Of the two ways to name the rows, the one with the larger sum of cosines to the published vectors.
    """
    swap = (matrix[0] - matrix[1]) @ (HAEMATOXYLIN - EOSIN) < 0
    return np.array(matrix[::-1] if swap else matrix, np.float64)


def check_matrices(matrices: NDArray[np.floating], n: int) -> NDArray[np.float64]:
    """Stain matrices as float64 [n, 2, 3]. Raises DataError for another shape, or rows that are not of unit length."""
    array = np.asarray(matrices, np.float64)
    if array.shape not in ((2, 3), (n, 2, 3)):
        raise DataError(f"matrices are {list(array.shape)}, not [{n}, 2, 3] or [2, 3].", "Use those of stain_matrix.")
    if not np.allclose(np.linalg.norm(array, axis=-1), 1, atol=1e-3):
        raise DataError("matrices have rows that are not of unit length.", "Divide each row by its length.")
    return np.broadcast_to(array, (n, 2, 3))


def code_matrix(matrix: NDArray[np.floating], sparsity: float) -> NDArray[np.float32]:
    """[4, 4] whose product with [OD; 1] holds two rows of the joint solution, then two of the single ones.

    The non-negative lasso min over c >= 0 of |x - W'c|^2 / 2 + sparsity * sum(c), for two unit atoms with
    g = w1.w2 >= 0, has the solution c = max(0, min(p, u)) with u = W x - sparsity and p = (W W')^-1 u: p solves it
    while both coefficients are positive, u while the other is 0, and p1 - u1 = -g p2, so that the smaller one is
    always the right one.
    """
    w = np.asarray(matrix, np.float64)
    g = min(max(float(w[0] @ w[1]), 0.0), 1 - 1e-6)
    single = np.concatenate([w, [[-sparsity], [-sparsity]]], axis=1)
    joint = np.array([[1, -g], [-g, 1]]) @ single / (1 - g * g)
    return np.concatenate([joint, single]).astype(np.float32)


def codes(od: NDArray[np.float32], matrix: NDArray[np.float32], work: NDArray[np.float32]) -> NDArray[np.float32]:
    """Concentrations [2, P] of [OD; 1] [4, P] by a `code_matrix`, in the first rows of `work` [4, P]."""
    np.matmul(matrix, od, out=work)
    c = np.minimum(work[:2], work[2:], out=work[:2])
    return np.maximum(c, 0, out=c)


def high_percentile(values: NDArray[np.float32], where: NDArray[np.bool_], percentile: float) -> float:
    """The exact percentile of `values` [P] at the pixels `where`, with linear interpolation.

    Only the tail is sorted: it is cut off above a bound that a sample of the pixels gives.
    """
    count = int(np.count_nonzero(where))
    position = (count - 1) * percentile / 100
    below = int(position)
    need = count - below
    probe = values[:: max(1, len(values) // 2048)]
    bound = np.partition(probe, k := max(0, int(len(probe) * (1 - 1.6 * need / len(values)) - 8)))[k]
    tail = np.flatnonzero(values >= bound)
    tail = values[tail[where[tail]]]
    if len(tail) < need:
        tail = values[where]
    tail.partition(sorted({len(tail) - need, min(len(tail) - need + 1, len(tail) - 1)}))
    low, high = tail[len(tail) - need], tail[min(len(tail) - need + 1, len(tail) - 1)]
    return float(low + (high - low) * (position - below))
