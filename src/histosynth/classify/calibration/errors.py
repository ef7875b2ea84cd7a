"""Calibration errors and the bins of reliability diagrams."""

from __future__ import annotations

from typing import Literal

import numpy as np

from histosynth.classify.calibration.arrays import checked
from histosynth.core.errors import SettingError

Scheme = Literal["width", "mass"]
BINS = 15
"""Bins of the calibration errors, as in Guo et al. 2017."""


def ece(probs: np.ndarray, y: np.ndarray, *, bins: int = BINS, scheme: Scheme = "width") -> float:
    """Expected calibration error of the predicted class, in [0, 1].

    sum_b (n_b / N) |accuracy_b - confidence_b|, over bins of the top probability: of equal width
    (lo, hi] (Naeini et al. 2015; Guo et al. 2017), or of equal mass (Nguyen and O'Connor 2015). It is biased
    upwards for few tiles: even perfect probabilities score up to about 0.4 sqrt(bins / N).
    """
    probs, y = checked(probs, y)
    return _gap(probs.max(axis=1), probs.argmax(axis=1) == y, bins, scheme)


def classwise_ece(probs: np.ndarray, y: np.ndarray, *, bins: int = BINS, scheme: Scheme = "width") -> float:
    """Mean over classes of the calibration error of that class's probability (Kull et al. 2019)."""
    probs, y = checked(probs, y)
    return float(np.mean([_gap(probs[:, k], y == k, bins, scheme) for k in range(probs.shape[1])]))


def reliability_bins(
    probs: np.ndarray, y: np.ndarray, *, bins: int = BINS, scheme: Scheme = "width"
) -> list[dict[str, float | int | None]]:
    """The bins of a reliability diagram of the predicted class.

    Returns:
        One dict a bin, in order: low and high (edges), tiles, confidence (mean top probability) and accuracy;
        the last two are None in an empty bin.
    """
    probs, y = checked(probs, y)
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == y
    edges = _edges(confidence, bins, scheme)
    count, total, hits = _binned(confidence, right, edges)
    return [
        {
            "low": float(edges[b]),
            "high": float(edges[b + 1]),
            "tiles": int(count[b]),
            "confidence": float(total[b] / count[b]) if count[b] else None,
            "accuracy": float(hits[b] / count[b]) if count[b] else None,
        }
        for b in range(len(edges) - 1)
    ]


def _gap(confidence: np.ndarray, right: np.ndarray, bins: int, scheme: Scheme) -> float:
    _, total, hits = _binned(confidence, right, _edges(confidence, bins, scheme))
    return float(np.abs(hits - total).sum() / len(confidence))


def _edges(confidence: np.ndarray, bins: int, scheme: Scheme) -> np.ndarray:
    if bins < 1:
        raise SettingError(f"bins is {bins}.", "Use 1 or more.")
    if scheme == "width":
        return np.linspace(0, 1, bins + 1)
    if scheme == "mass":
        # edges at quantiles keep equal confidences in one bin, so the order of the tiles does not matter
        inner = np.quantile(confidence, np.linspace(0, 1, bins + 1))[1:-1]
        return np.unique(np.concatenate([[0], inner, [1]]))
    raise SettingError(f"scheme is {scheme!r}.", "Use width or mass.")


def _binned(confidence: np.ndarray, right: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tiles, summed confidence and summed hits of every bin (lo, hi]; 0 belongs to the first bin."""
    last = len(edges) - 2
    where = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, last)
    return tuple(np.bincount(where, w, minlength=last + 1) for w in (None, confidence, right))  # type: ignore[return-value]
