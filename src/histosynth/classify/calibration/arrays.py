"""What every file here needs: a softmax, and arrays that fit together."""

from __future__ import annotations

import numpy as np

from histosynth.core.errors import DataError


def softmax(logits: np.ndarray) -> np.ndarray:
    """float [N, K] -> float64 [N, K], rows that sum to 1."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    powers = np.exp(shifted)
    return powers / powers.sum(axis=1, keepdims=True)


def checked(scores: np.ndarray, y: np.ndarray, name: str = "probs") -> tuple[np.ndarray, np.ndarray]:
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
