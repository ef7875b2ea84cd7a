"""Proper scores, best in expectation for the true probabilities, and what the Brier score is made of."""

from __future__ import annotations

import numpy as np

from histosynth.classify.calibration.arrays import checked
from histosynth.classify.calibration.errors import BINS, Scheme, edges_of, place


def nll(probs: np.ndarray, y: np.ndarray) -> float:
    """Negative log-likelihood of the true classes: their mean -log p, nats, in [0, inf)."""
    return float(surprise(*checked(probs, y)).mean())


def brier(probs: np.ndarray, y: np.ndarray) -> float:
    """Brier score of all classes (Brier 1950): mean over tiles of sum_k (p_k - [y = k])^2, in [0, 2]."""
    return float(squares(*checked(probs, y)).mean())


def brier_decomposition(
    probs: np.ndarray, y: np.ndarray, *, bins: int = BINS, scheme: Scheme = "width"
) -> dict[str, float]:
    """What the Brier score is made of, summed over classes.

    brier = reliability - resolution + uncertainty + within_variance - within_covariance: the three parts of
    Murphy (1973) over bins of each class's probability, and the two that make the sum exact when probabilities
    differ within a bin (Stephenson, Coelho and Jolliffe 2008, Weather and Forecasting 23, 752-757). Reliability is the
    squared distance of frequency from probability (0 is best), resolution how far the frequencies of the bins
    lie from the overall ones (more is better), uncertainty what knowing only the overall ones would score.

    Returns:
        brier and the five parts, each a float.
    """
    probs, y = checked(probs, y)
    tables = [
        moments(probs[:, k], y == k, place(probs[:, k], edges), len(edges) - 1)
        for k in range(probs.shape[1])
        for edges in [edges_of(probs[:, k], bins, scheme)]
    ]
    parts = [brier_parts(table) for table in tables]
    return {name: float(sum(part[name] for part in parts)) for name in parts[0]}


def surprise(probs: np.ndarray, y: np.ndarray) -> np.ndarray:
    """-log p of the true class of every tile, nats, float64 [N]."""
    # a probability that float64 rounded to 0 would make the mean infinite for one tile
    return -np.log(np.maximum(probs[np.arange(len(y)), y], np.finfo(np.float64).tiny))


def squares(probs: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The Brier score of every tile, float64 [N]."""
    return ((probs - np.eye(probs.shape[1])[y]) ** 2).sum(axis=1)


def moments(p: np.ndarray, hit: np.ndarray, where: np.ndarray, bins: int) -> np.ndarray:
    """float64 [5, B]: tiles, sum of p, of hits, of p^2 and of p times hit in each bin."""
    return np.stack([np.bincount(where, w, minlength=bins) for w in (np.ones(len(p)), p, hit, p**2, p * hit)]).astype(
        np.float64
    )


def brier_parts(table: np.ndarray) -> dict[str, np.ndarray]:
    """The decomposition of one class from its `moments` [..., 5, B]: every part [...]."""
    n, p, hits, p2, ph = (table[..., i, :] for i in range(5))
    tiles = n.sum(axis=-1)
    filled = np.where(n > 0, n, 1)
    base = hits.sum(axis=-1) / tiles
    parts = {
        "reliability": (p - hits) ** 2 / filled,
        "resolution": (hits - n * base[..., None]) ** 2 / filled,
        "within_variance": p2 - p**2 / filled,
        "within_covariance": 2 * (ph - p * hits / filled),
    }
    found = {name: part.sum(axis=-1) / tiles for name, part in parts.items()}
    return {
        "brier": (p2 - 2 * ph + hits).sum(axis=-1) / tiles,
        "reliability": found["reliability"],
        "resolution": found["resolution"],
        "uncertainty": base * (1 - base),
        "within_variance": found["within_variance"],
        "within_covariance": found["within_covariance"],
    }
