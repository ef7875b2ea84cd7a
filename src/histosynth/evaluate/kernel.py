"""Kernel distances between two sets of features: the unbiased squared maximum mean discrepancy.

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

(Gretton et al. 2012, eq. 3). KID (Binkowski et al. 2018) takes k(x, y) = (x.y / D + 1)^3; CMMD (Jayasumana
et al. 2024) a Gaussian kernel. Unlike the Fréchet distance it has no bias in N for tiles drawn at random, and can be
negative. Sides that hold every class in the same fixed number are a little more alike than random draws: that lowers
the value by about 2 (s - d) / N, s and d being the mean kernel within and between classes. It is the same in the
floor, beside which the value is read.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from histosynth.core.errors import DataError
from histosynth.core.seeds import numpy_rng
from histosynth.evaluate.checks import checked_pair
from histosynth.evaluate.intervals import subsample, with_interval
from histosynth.evaluate.settings import Metric, Protocol

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]

_VALUES = 2**22  # kernel values held at a time
CMMD_WIDTH, CMMD_SCALE = 10.0, 1000.0


def kid(reference: np.ndarray, other: np.ndarray, protocol: Protocol | None = None, seed: int = 0) -> dict[str, float]:
    """Kernel Inception distance of two sets of features [N, D], the mean over random subsets.

    Returns:
        kid, kid_low, kid_high, and kid_subset_size.

    Raises:
        DataError: fewer than four tiles on a side, different D, or values that are not finite.
    """
    return _over_subsets("kid", polynomial, reference, other, protocol or Protocol(), seed)


def cmmd(reference: np.ndarray, other: np.ndarray, protocol: Protocol | None = None, seed: int = 0) -> dict[str, float]:
    """The same with a Gaussian kernel, as wide as the median distance between reference tiles.

    Returns:
        cmmd, cmmd_low, cmmd_high, cmmd_subset_size, and cmmd_width, the width of the kernel.

    Raises:
        DataError: as `kid`.
    """
    reference, other = checked_pair(reference, other, at_least=4)
    some = reference[subsample(len(reference), 500, seed, "kernel width")]
    pairs = squared_distances(some, some)[np.triu_indices(len(some), 1)]
    width = float(np.sqrt(np.median(pairs))) or 1.0
    result = _over_subsets("cmmd", gaussian(width), reference, other, protocol or Protocol(), seed)
    return result | {"cmmd_width": width}


def cmmd_paper(
    reference: np.ndarray, other: np.ndarray, protocol: Protocol | None = None, seed: int = 0
) -> dict[str, float]:
    """CMMD as it is published, for comparison with published values: features of unit length, a kernel of width
    10, all tiles, times 1000, and the estimator of the authors' code, biased by less than 40 / N.

    With unit features no two tiles are farther apart than a fifth of that width, so the kernel is almost linear:
    it sees little but the means. `cmmd` adapts its width. Published values use CLIP ViT-L/14 at 336 px and the
    same tiles of COCO; with another encoder or N nothing compares.

    Returns:
        cmmd_paper, cmmd_paper_low, cmmd_paper_high.

    Raises:
        DataError: as `kid`; or features of length zero.
    """
    units = []
    for side in checked_pair(reference, other, at_least=4):
        length = np.linalg.norm(side, axis=1, keepdims=True)
        if not length.all():
            raise DataError("A tile has features of length zero.", "Look at that tile, or encode it again.")
        units.append(side / length)

    def value(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
        return {"cmmd_paper": CMMD_SCALE * mmd2(x, y, gaussian(CMMD_WIDTH), biased=True)}

    return with_interval(value, units[0], units[1], protocol or Protocol(), seed)


def polynomial(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x.y / D + 1)^3 for rows [n, D] and [m, D] -> [n, m]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(width: float) -> Kernel:
    """exp(-|x - y|^2 / (2 width^2))."""
    return lambda x, y: np.exp(squared_distances(x, y) / (-2 * width**2))


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x_i - y_j|^2 for rows [n, D] and [m, D] -> [n, m]."""
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return squares.clip(0)


def mmd2(x: np.ndarray, y: np.ndarray, kernel: Kernel = polynomial, biased: bool = False) -> float:
    """The squared MMD of all rows of x [n, D] and y [m, D].

    Args:
        biased: count each tile as a pair with itself too (Gretton et al. 2012, eq. 5).
    """
    if biased:
        means = [_mean(a, b, kernel) for a, b in ((x, x), (y, y), (x, y))]
        return means[0] + means[1] - 2 * means[2]
    everything = [np.ones((1, len(x))), np.ones((1, len(y)))]
    return float(_subset_mmd2(x, y, kernel, *everything)[0])


def _over_subsets(
    name: str, kernel: Kernel, reference: np.ndarray, other: np.ndarray, protocol: Protocol, seed: int
) -> dict[str, float]:
    x, y = checked_pair(reference, other, at_least=4)
    smallest = min(len(x), len(y))
    size = min(smallest // 2, protocol.kid_size)
    subsets = max(protocol.kid_subsets, 2)
    rng = numpy_rng(seed, "kernel subsets")
    picks = [[rng.permutation(len(side))[:size] for side in (x, y)] for _ in range(subsets)]
    if subsets * size**2 < len(x) * len(y):
        values = np.array([mmd2(x[i], y[j], kernel) for i, j in picks])
    else:
        # every kernel value is wanted by several subsets: compute each once and add it up by membership
        members = [np.zeros((subsets, len(side))) for side in (x, y)]
        for row, pick in enumerate(picks):
            members[0][row, pick[0]] = 1
            members[1][row, pick[1]] = 1
        values = _subset_mmd2(x, y, kernel, *members)
    # subsets overlap: see intervals.with_interval for the factor
    factor = np.mean([np.sqrt(size / (len(side) - size)) for side in (x, y)])
    half_width = NormalDist().inv_cdf((1 + protocol.level) / 2) * float(factor * values.std(ddof=1))
    value = float(values.mean())
    return {
        name: value,
        f"{name}_low": value - half_width,
        f"{name}_high": value + half_width,
        f"{name}_subset_size": float(size),
    }


def _subset_mmd2(x: np.ndarray, y: np.ndarray, kernel: Kernel, in_x: np.ndarray, in_y: np.ndarray) -> np.ndarray:
    """Unbiased squared MMD of each subset; membership in_x [S, n] and in_y [S, m] of zeros and ones."""
    n, m = in_x.sum(1), in_y.sum(1)
    within_x = _member_sum(x, x, kernel, in_x, in_x, skip_self=True) / (n * (n - 1))
    within_y = _member_sum(y, y, kernel, in_y, in_y, skip_self=True) / (m * (m - 1))
    return within_x + within_y - 2 * _member_sum(x, y, kernel, in_x, in_y) / (n * m)


def _mean(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> float:
    """Of the kernel over all pairs."""
    return float(_member_sum(x, y, kernel, np.ones((1, len(x))), np.ones((1, len(y))))[0]) / (len(x) * len(y))


def _member_sum(
    x: np.ndarray, y: np.ndarray, kernel: Kernel, in_x: np.ndarray, in_y: np.ndarray, skip_self: bool = False
) -> np.ndarray:
    """For each subset, the sum of k(x_i, y_j) over its members; by row chunks, so memory stays bounded."""
    total = np.zeros(len(in_x))
    step = max(1, _VALUES // len(y))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        values = kernel(x[rows], y)
        if skip_self:
            values[np.arange(len(values)), np.arange(len(values)) + start] = 0
        total += ((in_x[:, rows] @ values) * in_y).sum(1)
    return total


KID = Metric(kid, {"kid": "lower"})
CMMD = Metric(cmmd, {"cmmd": "lower"})
CMMD_PAPER = Metric(cmmd_paper, {"cmmd_paper": "lower"})
