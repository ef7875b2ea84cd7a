"""Calibration: does a confidence of 80 % mean right in 80 of 100 cases? Pure functions on numpy arrays.

Throughout, `probs` is float [N, K] with rows that sum to 1, and `y` is int [N], the true classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from histosynth.core.errors import DataError, SettingError

Scheme = Literal["width", "mass"]
BINS = 15
"""Bins of the calibration errors, as in Guo et al. 2017."""


@dataclass(frozen=True)
class TemperatureFit:
    """A temperature, and what it did to the tiles that it was fitted on.

    Attributes:
        temperature: divide logits by it. Above 1 the network was over-confident, below 1 under-confident.
        nll_before: negative log-likelihood of the logits as they are, nats.
        nll_after: the same at `temperature`.
        tiles: how many tiles it was fitted on.
        note: what was unusual, or "".
    """

    temperature: float
    nll_before: float
    nll_after: float
    tiles: int
    note: str = ""


def softmax(logits: np.ndarray) -> np.ndarray:
    """float [N, K] -> float64 [N, K], rows that sum to 1."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    powers = np.exp(shifted)
    return powers / powers.sum(axis=1, keepdims=True)


def fit_temperature(
    logits: np.ndarray,
    y: np.ndarray,
    *,
    bounds: tuple[float, float] = (0.05, 20.0),
    smoothing: float = 0.0,
) -> TemperatureFit:
    """The temperature that minimises the negative log-likelihood (Guo et al. 2017, arXiv:1706.04599).

    The likelihood is convex in the inverse temperature b: its slope, the mean of sum_k (p_k - q_k) z_k with
    p = softmax(b z) and q the targets, only rises. So its zero is found by bisection, to rounding.

    Args:
        logits: float [N, K].
        y: int [N].
        bounds: the temperatures to look between.
        smoothing: probability moved from each true class to all classes alike. When every tile is right
            the likelihood has no minimum above temperature 0; Platt (1999) keeps it finite with 1 / (N + 2).

    Raises:
        DataError: no tile, or arrays that do not fit together.
        SettingError: bounds that are not 0 < low < high, or smoothing outside [0, 1).
    """
    low, high = bounds
    if not (0 < low < high and 0 <= smoothing < 1):
        raise SettingError(
            f"bounds are {bounds} and smoothing is {smoothing}.", "Use 0 < low < high and 0 <= smoothing < 1."
        )
    z, y = _checked(logits, y, "logits")
    target = np.full(z.shape, smoothing / z.shape[1])
    target[np.arange(len(y)), y] += 1 - smoothing

    def slope(b: float) -> float:
        return float(((softmax(b * z) - target) * z).sum(axis=1).mean())

    cold, warm = 1 / high, 1 / low
    note = ""
    if slope(warm) < 0:
        inverse, note = warm, f"the best temperature lies below {low:g}, where the search ends"
    elif slope(cold) > 0:
        inverse, note = cold, f"the best temperature lies above {high:g}, where the search ends"
    else:
        for _ in range(60):
            middle = (cold + warm) / 2
            cold, warm = (middle, warm) if slope(middle) < 0 else (cold, middle)
        inverse = (cold + warm) / 2
    return TemperatureFit(1 / inverse, nll(softmax(z), y), nll(softmax(inverse * z), y), len(y), note)


def nll(probs: np.ndarray, y: np.ndarray) -> float:
    """Negative log-likelihood of the true classes: their mean -log p, nats, in [0, inf)."""
    probs, y = _checked(probs, y)
    # a probability that float64 rounded to 0 would make the mean infinite for one tile
    return float(-np.log(np.maximum(probs[np.arange(len(y)), y], np.finfo(np.float64).tiny)).mean())


def brier(probs: np.ndarray, y: np.ndarray) -> float:
    """Brier score of all classes (Brier 1950): mean over tiles of sum_k (p_k - [y = k])^2, in [0, 2]."""
    probs, y = _checked(probs, y)
    return float(((probs - np.eye(probs.shape[1])[y]) ** 2).sum(axis=1).mean())


def ece(probs: np.ndarray, y: np.ndarray, *, bins: int = BINS, scheme: Scheme = "width") -> float:
    """Expected calibration error of the predicted class, in [0, 1].

    sum_b (n_b / N) |accuracy_b - confidence_b|, over bins of the top probability: of equal width
    (lo, hi] (Naeini et al. 2015; Guo et al. 2017), or of equal mass (Nguyen and O'Connor 2015). It is biased
    upwards for few tiles: even perfect probabilities score up to about 0.4 sqrt(bins / N).
    """
    probs, y = _checked(probs, y)
    return _gap(probs.max(axis=1), probs.argmax(axis=1) == y, bins, scheme)


def classwise_ece(probs: np.ndarray, y: np.ndarray, *, bins: int = BINS, scheme: Scheme = "width") -> float:
    """Mean over classes of the calibration error of that class's probability (Kull et al. 2019)."""
    probs, y = _checked(probs, y)
    return float(np.mean([_gap(probs[:, k], y == k, bins, scheme) for k in range(probs.shape[1])]))


def reliability_bins(
    probs: np.ndarray, y: np.ndarray, *, bins: int = BINS, scheme: Scheme = "width"
) -> list[dict[str, float | int | None]]:
    """The bins of a reliability diagram of the predicted class.

    Returns:
        One dict a bin, in order: low and high (edges), tiles, confidence (mean top probability) and accuracy;
        the last two are None in an empty bin.
    """
    probs, y = _checked(probs, y)
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


def _checked(scores: np.ndarray, y: np.ndarray, name: str = "probs") -> tuple[np.ndarray, np.ndarray]:
    scores, y = np.asarray(scores, dtype=np.float64), np.asarray(y)
    if scores.ndim != 2 or y.shape != (len(scores),) or len(y) == 0:
        raise DataError(
            f"{name} have shape {scores.shape} and y has shape {y.shape}.",
            "Give [N, K] and [N], with at least one tile.",
        )
    if not np.isfinite(scores).all():
        bad = int((~np.isfinite(scores)).any(axis=1).sum())
        raise DataError(f"{name} of {bad} tiles are not finite.", "Check the training: it may have diverged.")
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= scores.shape[1]:
        raise DataError(
            f"y has type {y.dtype} and values from {y.min()} to {y.max()}, for {scores.shape[1]} classes.",
            f"Use integers from 0 to {scores.shape[1] - 1}.",
        )
    if name == "probs" and (scores.min() < 0 or np.abs(scores.sum(axis=1) - 1).max() > 1e-3):
        raise DataError("Some rows of probs are negative or do not sum to 1.", "Apply a softmax to the logits first.")
    return scores, y
