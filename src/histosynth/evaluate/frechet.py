"""Fréchet distance between two Gaussians fitted to features (Dowson & Landau 1982; FID: Heusel et al. 2017).

    d = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2)

The trace of the square root needs no matrix square root: with any S1 = L L^T, the eigenvalues of S1 S2 are
those of the symmetric L^T S2 L. And with the centred features X1 [n1, D], X2 [n2, D] themselves,
tr sqrt(S1 S2) is the nuclear norm of X1 X2^T / sqrt((n1 - 1)(n2 - 1)), which is smaller, and exact, when
there are fewer tiles than dimensions.
"""

from __future__ import annotations

import numpy as np
from scipy import linalg

from histosynth.core.errors import DataError
from histosynth.core.seeds import numpy_rng
from histosynth.evaluate.checks import checked_pair
from histosynth.evaluate.intervals import with_interval
from histosynth.evaluate.moments import Moments
from histosynth.evaluate.settings import Metric, Protocol

_SIZES, _DRAWS = 5, 4  # of the subsets behind the extrapolation


def frechet(
    reference: np.ndarray, other: np.ndarray, protocol: Protocol | None = None, seed: int = 0
) -> dict[str, float]:
    """Fréchet distance of two sets of features [N, D].

    Returns:
        frechet, frechet_low, frechet_high, and frechet_enough: 0 when a side has fewer than 2 D tiles. The
        estimate is biased upwards by about D^2 / N terms, so it then compares only with scores at the same N.

    Raises:
        DataError: fewer than two tiles on a side, different D, or values that are not finite.
    """
    reference, other = checked_pair(reference, other)
    result = with_interval(
        lambda a, b: {"frechet": frechet_distance(a, b)}, reference, other, protocol or Protocol(), seed, (0, np.inf)
    )
    enough = min(len(reference), len(other)) >= 2 * reference.shape[1]
    return result | {"frechet_enough": float(enough)}


def frechet_distance(reference: np.ndarray, other: np.ndarray) -> float:
    """The distance alone, in float64, covariances with n - 1 (as all published FID code)."""
    reference, other = checked_pair(reference, other)
    shift = reference.mean(0) - other.mean(0)
    first = (reference - reference.mean(0)) / np.sqrt(len(reference) - 1)
    second = (other - other.mean(0)) / np.sqrt(len(other) - 1)
    spread = np.vdot(first, first) + np.vdot(second, second)
    dim = reference.shape[1]
    if len(first) < dim or len(second) < dim:
        cross = first @ second.T
        # the eigenvalues of C C^T are the squared singular values of C, and cost a twentieth of them
        root = _sum_of_roots(cross @ cross.T if len(first) <= len(second) else cross.T @ cross)
    else:
        root = trace_sqrt_product(first.T @ first, second.T @ second)
    # the smallest possible value is 0; rounding can leave it a hair below
    return max(float(shift @ shift + spread - 2 * root), 0.0)


def frechet_infinity(
    reference: np.ndarray, other: np.ndarray, protocol: Protocol | None = None, seed: int = 0
) -> dict[str, float]:
    """The Fréchet distance that endless tiles would give (Chong & Forsyth 2020).

    The bias of the estimate goes with 1 / N, so a line through the distances of random subsets of several
    sizes, drawn over 1 / N, meets 1 / N = 0 at the value without bias. Both sides shrink together here, since
    both are finite; the value can therefore fall a little below zero for two equal distributions.

    Returns:
        frechet_infinity, with frechet_infinity_low and frechet_infinity_high.

    Raises:
        DataError: fewer than 2 D tiles on a side, where the bias is no line over 1 / N; or as `frechet`.
    """
    reference, other = checked_pair(reference, other)
    n, dim = min(len(reference), len(other)), reference.shape[1]
    if n < 2 * dim:
        raise DataError(
            f"{n} tiles a side are fewer than twice the {dim} dimensions.",
            "Extrapolation needs more tiles; use the kernel distance (kid) instead.",
        )
    return with_interval(
        lambda a, b: {"frechet_infinity": _extrapolated(a, b, seed)}, reference, other, protocol or Protocol(), seed
    )


def _extrapolated(reference: np.ndarray, other: np.ndarray, seed: int) -> float:
    n, rng = min(len(reference), len(other)), numpy_rng(seed, "extrapolation")
    # evenly spaced in 1 / N, from half of the tiles to all: smaller subsets bend the line when D is large
    sizes = [round(n / x) for x in np.linspace(1, 2, _SIZES) for _ in range(_DRAWS)]
    values = [
        frechet_distance(*(side[rng.permutation(len(side))[:size]] for side in (reference, other))) for size in sizes
    ]
    return float(np.polyfit(1 / np.array(sizes), values, 1)[1])


def frechet_of_moments(first: Moments, second: Moments) -> float:
    """The distance of two sets that were seen batch by batch."""
    return frechet_from_moments(first.mean, first.covariance, second.mean, second.covariance)


def frechet_from_moments(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray
) -> float:
    """The distance from stored means [D] and covariances [D, D]."""
    shift = np.asarray(mean, np.float64) - other_mean
    traces = np.trace(covariance) + np.trace(other_covariance)
    return max(float(shift @ shift + traces - 2 * trace_sqrt_product(covariance, other_covariance)), 0.0)


def trace_sqrt_product(first: np.ndarray, second: np.ndarray) -> float:
    """tr sqrt(S1 S2) of two symmetric positive semidefinite matrices [D, D]."""
    try:
        factor = linalg.cholesky(first, lower=True, check_finite=False)
    except linalg.LinAlgError:  # singular: constant or repeated features
        values, vectors = linalg.eigh(first, check_finite=False)
        factor = vectors * np.sqrt(values.clip(0))
    return _sum_of_roots(factor.T @ second @ factor)


def _sum_of_roots(matrix: np.ndarray) -> float:
    # LAPACK's plain QR iteration: four times as fast here as scipy's default driver when only values are wanted
    values = linalg.eigvalsh(matrix, driver="ev", check_finite=False, overwrite_a=True)
    return float(np.sqrt(values.clip(0)).sum())


METRIC = Metric(frechet, {"frechet": "lower"})
INFINITY = Metric(frechet_infinity, {"frechet_infinity": "lower"})
