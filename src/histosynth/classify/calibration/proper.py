"""Proper scores: best in expectation for the true probabilities."""

from __future__ import annotations

import numpy as np

from histosynth.classify.calibration.arrays import checked


def nll(probs: np.ndarray, y: np.ndarray) -> float:
    """Negative log-likelihood of the true classes: their mean -log p, nats, in [0, inf)."""
    probs, y = checked(probs, y)
    # a probability that float64 rounded to 0 would make the mean infinite for one tile
    return float(-np.log(np.maximum(probs[np.arange(len(y)), y], np.finfo(np.float64).tiny)).mean())


def brier(probs: np.ndarray, y: np.ndarray) -> float:
    """Brier score of all classes (Brier 1950): mean over tiles of sum_k (p_k - [y = k])^2, in [0, 2]."""
    probs, y = checked(probs, y)
    return float(((probs - np.eye(probs.shape[1])[y]) ** 2).sum(axis=1).mean())
