"""Logits whose true probabilities are known."""

from __future__ import annotations

import numpy as np

from histosynth.classify.calibration import softmax


def simulated(n: int, k: int, *, scale: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax is the true distribution of the labels."""
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(n, k))
    return logits, drawn(softmax(logits), rng)


def drawn(probs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A label for each row of probabilities."""
    return (probs.cumsum(axis=1) < rng.random((len(probs), 1))).sum(axis=1).clip(0, probs.shape[1] - 1)


def hospital(
    patients: int, tiles: int, *, sureness: float, seed: int, k: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, labels and patients; patients differ, and logits are `sureness` times what they should be."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(patients), tiles)
    logits = 2 * rng.normal(size=(len(groups), k))
    y = drawn(softmax(logits + 0.5 * rng.normal(size=(patients, k))[groups]), rng)
    return sureness * logits, y, groups
