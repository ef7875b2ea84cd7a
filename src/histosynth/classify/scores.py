"""Scores of a classifier: from confusion matrices, from ranks, and from its probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from histosynth.classify import calibration
from histosynth.core.errors import DataError


def confusion_matrix(y: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """int64 [K, K]: row = true class, column = predicted class."""
    return np.bincount(np.asarray(y) * classes + np.asarray(predicted), minlength=classes**2).reshape(classes, classes)


def recalls(confusion: np.ndarray) -> np.ndarray:
    """[..., K, K] -> float [..., K]: the share of each class's tiles that were found; NaN without tiles."""
    return _share(_diagonal(confusion), confusion.sum(axis=-1))


def accuracy(confusion: np.ndarray) -> np.ndarray:
    """[..., K, K] -> float [...]: the share of tiles that were right; NaN without tiles."""
    return _share(_diagonal(confusion).sum(axis=-1), confusion.sum(axis=(-1, -2)))


def balanced_accuracy(confusion: np.ndarray) -> np.ndarray:
    """[..., K, K] -> float [...]: mean recall of the classes that have tiles; NaN without tiles."""
    return _mean_where(recalls(confusion), confusion.sum(axis=-1) > 0)


def f1_scores(confusion: np.ndarray) -> np.ndarray:
    """[..., K, K] -> float [..., K]: 2 TP / (2 TP + FP + FN); NaN if neither present nor predicted."""
    return _share(2 * _diagonal(confusion), confusion.sum(axis=-1) + confusion.sum(axis=-2))


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """[..., K, K] -> float [...]: mean F1 of the classes that have tiles; NaN without tiles."""
    return _mean_where(f1_scores(confusion), confusion.sum(axis=-1) > 0)


def auroc(score: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    Args:
        score: float [N].
        positive: bool [N].

    Returns:
        In [0, 1]; None when there is no positive or no negative.
    """
    positive = np.asarray(positive, dtype=bool)
    many, few = int(positive.sum()), int((~positive).sum())
    if not many or not few:
        return None
    _, where, count = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[where]  # ties share their mean rank
    # Mann and Whitney 1947
    return float((ranks[positive].sum() - many * (many + 1) / 2) / (many * few))


def scores(probs: np.ndarray, y: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """All scores of a classifier on one set of tiles.

    Args:
        probs: float [N, K], rows sum to 1.
        y: int [N].
        classes: K names.

    Returns:
        JSON-ready: tiles, accuracy, balanced_accuracy, macro_f1 (both over the classes that have tiles),
        auroc (macro, one class against the rest), ece, ece_mass, classwise_ece, brier, nll,
        per_class {name: recall, precision, f1, auroc, support}, confusion (rows are true classes), and
        undefined {score: reason} for every score that is None.

    Raises:
        DataError: no tile, or arrays and classes that do not fit together.
    """
    probs, y = np.asarray(probs, dtype=np.float64), np.asarray(y)
    if probs.ndim != 2 or probs.shape[1] != len(classes):
        raise DataError(f"probs have shape {probs.shape} for {len(classes)} classes.", "Give one column a class.")
    calibrated = {
        "ece": calibration.ece(probs, y),
        "ece_mass": calibration.ece(probs, y, scheme="mass"),
        "classwise_ece": calibration.classwise_ece(probs, y),
        "brier": calibration.brier(probs, y),
        "nll": calibration.nll(probs, y),
    }
    matrix = confusion_matrix(y, probs.argmax(axis=1), len(classes))
    support, predicted = matrix.sum(axis=1), matrix.sum(axis=0)
    precision = _share(_diagonal(matrix), predicted)
    areas = [auroc(probs[:, k], y == k) for k in range(len(classes))]
    undefined: dict[str, str] = {}
    per_class: dict[str, dict[str, float | int | None]] = {}
    for k, name in enumerate(classes):
        row = {"recall": recalls(matrix)[k], "precision": precision[k], "f1": f1_scores(matrix)[k]}
        per_class[name] = {
            **{score: None if np.isnan(value) else float(value) for score, value in row.items()},
            "auroc": areas[k],
            "support": int(support[k]),
        }
        if not support[k]:
            undefined[f"{name}.recall"] = "no tile of this class"
        if not predicted[k]:
            undefined[f"{name}.precision"] = "no tile was given this class"
        if not support[k] and not predicted[k]:
            undefined[f"{name}.f1"] = "no tile of this class, and none was given it"
        if areas[k] is None:
            undefined[f"{name}.auroc"] = "needs tiles of this class and of another"
    known = [a for a in areas if a is not None]
    if not known:
        undefined["auroc"] = "needs tiles of two classes"
    return {
        "tiles": len(y),
        "accuracy": float(accuracy(matrix)),
        "balanced_accuracy": float(balanced_accuracy(matrix)),
        "macro_f1": float(macro_f1(matrix)),
        "auroc": float(np.mean(known)) if known else None,
        **calibrated,
        "per_class": per_class,
        "confusion": matrix.tolist(),
        "undefined": undefined,
    }


def _diagonal(confusion: np.ndarray) -> np.ndarray:
    return np.diagonal(confusion, axis1=-2, axis2=-1)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _mean_where(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    return _share(np.where(counted, values, 0.0).sum(axis=-1), counted.sum(axis=-1))
