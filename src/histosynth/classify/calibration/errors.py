"""Calibration errors and the bins of reliability diagrams.

Every error here is a function of three numbers a bin: tiles, summed confidence and hits. `gap`, `largest_gap`,
`debiased_l1` and `debiased_l2` take them as arrays [..., B], so that the bootstrap can use them on all its replicates
at once.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.special import erf

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
    return float(gap(*_top(probs, y, bins, scheme)))


def mce(probs: np.ndarray, y: np.ndarray, *, bins: int = BINS, scheme: Scheme = "width") -> float:
    """Maximum calibration error: the largest |accuracy_b - confidence_b| of a bin that has tiles, in [0, 1].

    (Naeini et al. 2015.) One tile in a bin can decide it: read it beside the counts of the bins.
    """
    return float(largest_gap(*_top(probs, y, bins, scheme)))


def ece_debiased(
    probs: np.ndarray, y: np.ndarray, *, bins: int = BINS, scheme: Scheme = "width", norm: Literal["l1", "l2"] = "l1"
) -> float:
    """Calibration error of the predicted class less the part that few tiles alone would cause, in [0, 1].

    l1: `ece` less its expected excess if a_b were normal around the observed gap: in closed form, what the package
    of Kumar et al. draws for this norm. It takes away about half of the bias.
    l2: the root of sum_b (n_b / N) ((a_b - c_b)^2 - a_b (1 - a_b) / (n_b - 1)), bins of one tile left out, and 0
    when the sum is negative (Kumar, Liang and Ma 2019, arXiv:1909.10155, definition 4.1; a accuracy, c confidence;
    they use equal mass). Its square has no bias; it weighs large gaps more and is not on the scale of `ece`.
    """
    if norm not in ("l1", "l2"):
        raise SettingError(f"norm is {norm!r}.", "Use l1 or l2.")
    return float((debiased_l2 if norm == "l2" else debiased_l1)(*_top(probs, y, bins, scheme)))


def classwise_ece(probs: np.ndarray, y: np.ndarray, *, bins: int = BINS, scheme: Scheme = "width") -> float:
    """Mean over classes of the calibration error of that class's probability (Kull et al. 2019)."""
    probs, y = checked(probs, y)
    errors = []
    for k in range(probs.shape[1]):
        column = probs[:, k]
        errors.append(gap(*binned(column, y == k, edges_of(column, bins, scheme))))
    return float(np.mean(errors))


def reliability_bins(
    probs: np.ndarray, y: np.ndarray, *, bins: int = BINS, scheme: Scheme = "width"
) -> list[dict[str, float | int | None]]:
    """The bins of a reliability diagram of the predicted class.

    Returns:
        One dict a bin, in order: low and high (edges), tiles, confidence (mean top probability) and accuracy;
        the last two are None in an empty bin.
    """
    probs, y = checked(probs, y)
    confidence, right = top_label(probs, y)
    edges = edges_of(confidence, bins, scheme)
    count, total, hits = binned(confidence, right, edges)
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


def gap(count: np.ndarray, total: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """[..., B] -> [...]: the mean distance of accuracy from confidence, bins weighted by their tiles."""
    return np.abs(hits - total).sum(axis=-1) / count.sum(axis=-1)


def largest_gap(count: np.ndarray, total: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """[..., B] -> [...]: the largest distance of accuracy from confidence."""
    return np.abs(_per(hits - total, count)).max(axis=-1)


def debiased_l2(count: np.ndarray, total: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """[..., B] -> [...]: see `ece_debiased`."""
    accuracy, away = _per(hits, count), _per(hits - total, count)
    # in a bin of one tile the noise cannot be told from the gap
    square = np.where(count > 1, away**2 - _per(accuracy * (1 - accuracy), count - 1), 0)
    return np.sqrt(np.maximum((count * square).sum(axis=-1) / count.sum(axis=-1), 0))


def debiased_l1(count: np.ndarray, total: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """[..., B] -> [...]: see `ece_debiased`."""
    accuracy, away = _per(hits, count), np.abs(_per(hits - total, count))
    noise = np.sqrt(np.maximum(_per(accuracy * (1 - accuracy), count), 0))
    z = _per(away, noise * np.sqrt(2))
    # the mean of |X| for X normal with mean `away` (the folded normal distribution)
    folded = np.where(noise > 0, noise * np.sqrt(2 / np.pi) * np.exp(-(z**2)) + away * erf(z), away)
    return np.maximum((count * (2 * away - folded)).sum(axis=-1) / count.sum(axis=-1), 0)


def top_label(probs: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence float [N] of the predicted class, and whether it is right, bool [N]."""
    return probs.max(axis=1), probs.argmax(axis=1) == y


def edges_of(confidence: np.ndarray, bins: int, scheme: Scheme) -> np.ndarray:
    """Edges of at most `bins` bins that cover [0, 1]: float [B + 1].

    Raises:
        SettingError: bins below 1, or an unknown scheme.
    """
    if bins < 1:
        raise SettingError(f"bins is {bins}.", "Use 1 or more.")
    if scheme == "width":
        return np.linspace(0, 1, bins + 1)
    if scheme == "mass":
        # edges at quantiles keep equal confidences in one bin, so the order of the tiles does not matter
        inner = np.quantile(confidence, np.linspace(0, 1, bins + 1))[1:-1]
        return np.unique(np.concatenate([[0], inner, [1]]))
    raise SettingError(f"scheme is {scheme!r}.", "Use width or mass.")


def place(confidence: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The bin (lo, hi] of every confidence, int; 0 belongs to the first bin."""
    return np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, len(edges) - 2)


def binned(confidence: np.ndarray, right: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tiles, summed confidence and summed hits of every bin, float64 [B] each."""
    where, size = place(confidence, edges), len(edges) - 1
    return tuple(np.bincount(where, w, minlength=size) for w in (np.ones(len(where)), confidence, right))  # type: ignore[return-value]


def _top(probs: np.ndarray, y: np.ndarray, bins: int, scheme: Scheme) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    confidence, right = top_label(*checked(probs, y))
    return binned(confidence, right, edges_of(confidence, bins, scheme))


def _per(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, and 0 where there is nothing to divide by."""
    return np.divide(part, whole, out=np.zeros(np.broadcast_shapes(np.shape(part), np.shape(whole))), where=whole > 0)
