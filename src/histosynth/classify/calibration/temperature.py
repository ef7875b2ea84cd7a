"""One temperature for all logits: what fits it, and how well it does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from histosynth.classify.calibration.arrays import checked, softmax
from histosynth.classify.calibration.proper import nll
from histosynth.core.errors import SettingError


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
    z, y = checked(logits, y, "logits")
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
