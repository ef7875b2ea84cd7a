"""Temperature scaling: one number for all logits, which leaves the predicted class as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from histosynth.classify.calibration.arrays import checked, checked_temperature, softmax
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


@dataclass(frozen=True)
class Temperature:
    """The calibrator with one temperature.

    Attributes:
        temperature: logits are divided by it; finite, above 0.
        notes: what was unusual in fitting it.
    """

    temperature: float
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checked_temperature(self.temperature)

    @classmethod
    def fit(cls, logits: np.ndarray, y: np.ndarray) -> Temperature:
        """By `fit_temperature`, with smoothed targets when every tile is right.

        Raises:
            DataError: no tile, or arrays that do not fit together.
        """
        logits, y = checked(logits, y, "logits")
        notes = []
        flawless = bool((logits.argmax(axis=1) == y).all())
        if flawless:
            notes.append("Every validation tile is right, so the temperature was fitted to smoothed targets.")
        found = fit_temperature(logits, y, smoothing=1 / (len(y) + 2) if flawless else 0.0)
        if found.note:
            notes.append(f"Calibration: {found.note}.")
        return cls(found.temperature, tuple(notes))

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """float [N, K] -> float64 [N, K], rows that sum to 1."""
        return softmax(logits, self.temperature)

    def to_json(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "notes": list(self.notes)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Temperature:
        return cls(checked_temperature(value["temperature"]), tuple(value.get("notes", ())))
