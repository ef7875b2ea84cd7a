"""What every file here needs: a softmax, and arrays that fit together."""

from __future__ import annotations

import math

import numpy as np

from histosynth.core.errors import DataError, SettingError


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """float [N, K] -> float64 [N, K], rows that sum to 1; the logits are divided by `temperature` first.

    Raises:
        SettingError: a temperature that is not above 0, or not finite.
    """
    shifted = np.asarray(logits, dtype=np.float64) / checked_temperature(temperature)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    powers = np.exp(shifted)
    return powers / powers.sum(axis=1, keepdims=True)


def checked_temperature(value: float) -> float:
    """The temperature as a float.

    Raises:
        SettingError: not a finite number above 0.
    """
    # bool is a number for Python, and T = True would silently be 1
    if isinstance(value, (bool, str)) or value is None or not math.isfinite(value) or value <= 0:
        raise SettingError(f"temperature is {value!r}.", "Use a finite number above 0; 1 changes nothing.")
    return float(value)


def checked(scores: np.ndarray, y: np.ndarray, name: str = "probs") -> tuple[np.ndarray, np.ndarray]:
    """float64 [N, K] and int [N], N >= 1; with the name "probs" the rows must be probabilities.

    Raises:
        DataError: other shapes, numbers that are not finite, labels out of range, rows that do not sum to 1.
    """
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


def checked_groups(groups: np.ndarray | None, tiles: int) -> np.ndarray:
    """The patient of every tile as int [N], numbered from 0; each tile its own when `groups` is None.

    Raises:
        DataError: not one patient a tile.
    """
    if groups is None:
        return np.arange(tiles)
    groups = np.asarray(groups)
    if groups.shape != (tiles,):
        raise DataError(f"groups has shape {groups.shape} for {tiles} tiles.", "Give one patient a tile.")
    return np.unique(groups.astype(str), return_inverse=True)[1]
