"""How varied is a set in itself, beside a reference of the same size?

The Vendi score (Friedman & Dieng 2023) is the exponential of the entropy of the eigenvalues of a similarity
matrix over N: the effective number of different tiles. With the cosine kernel those eigenvalues are also
those of the D x D matrix of normalised features, so the smaller of the two is used.
"""

from __future__ import annotations

import numpy as np
from scipy import linalg

from histosynth.evaluate.checks import checked, checked_pair
from histosynth.evaluate.intervals import subsample, with_interval
from histosynth.evaluate.neighbours import distance_rows
from histosynth.evaluate.settings import Metric, Protocol

_ROWS = 4096


def diversity(
    reference: np.ndarray, other: np.ndarray, protocol: Protocol | None = None, seed: int = 0
) -> dict[str, float]:
    """Diversity of `other` [N, D] as a share of that of `reference` [N, D]; 1 is as varied, below is poorer.

    Both sides are compared at the same N, since the Vendi score grows with N.

    Returns:
        vendi_ratio and spread_ratio (mean pairwise distance), each with `_low` and `_high`.

    Raises:
        DataError: fewer than two tiles on a side, different D, or values that are not finite.
    """
    reference, other = checked_pair(reference, other, keep=True)
    n = min(len(reference), len(other))
    reference, other = (
        side if len(side) == n else side[subsample(len(side), n, seed, f"diversity {name}")]
        for name, side in (("reference", reference), ("other", other))
    )
    return with_interval(_ratios, reference, other, protocol or Protocol(), seed, (0, np.inf))


def vendi(features: np.ndarray, centre: np.ndarray | float = 0.0) -> float:
    """The Vendi score of features [N, D] with the cosine kernel: 1 (all alike) to N (all different).

    Args:
        centre: [D], taken off each tile first.
    """
    features = checked(features, keep=True)
    n, dim = features.shape
    if n < dim:
        unit = _unit(features, centre)
        gram = unit @ unit.T
    else:
        gram = np.zeros((dim, dim))
        for start in range(0, n, _ROWS):
            unit = _unit(features[start : start + _ROWS], centre)
            gram += unit.T @ unit
    values = linalg.eigvalsh(gram / n, driver="ev", check_finite=False, overwrite_a=True)
    values = values[values > 1e-12]
    values = values / values.sum()
    return float(np.exp(-(values * np.log(values)).sum()))


def mean_pairwise(features: np.ndarray) -> float:
    """Mean Euclidean distance between two different tiles of features [N, D]."""
    features = checked(features, keep=True)
    n, total = len(features), 0.0
    for start in range(0, n, _ROWS):
        rows = features[start : start + _ROWS]
        # each pair once: a block with itself holds its pairs twice
        for _, squares in distance_rows(rows, features[start:]):
            roots = np.sqrt(squares, out=squares)
            total += float(roots.sum()) - 0.5 * float(roots[:, : len(rows)].sum())
    return 2 * total / (n * (n - 1))


def _unit(rows: np.ndarray, centre: np.ndarray | float) -> np.ndarray:
    away = np.asarray(rows, np.float64) - centre
    length = np.linalg.norm(away, axis=1, keepdims=True)
    away /= np.where(length > 0, length, 1)
    return away


def _ratios(reference: np.ndarray, other: np.ndarray) -> dict[str, float]:
    # one centre for both sides, without which the cosine would measure how far the origin is
    centre = reference.mean(0, dtype=np.float64)
    tiny = np.finfo(np.float64).tiny
    return {
        "vendi_ratio": vendi(other, centre) / vendi(reference, centre),
        "spread_ratio": mean_pairwise(other) / max(mean_pairwise(reference), tiny),
    }


METRIC = Metric(diversity, {"vendi_ratio": "near one", "spread_ratio": "near one"})
