"""Isotonic regression: a rising step function for each class's probability."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from histosynth.classify.calibration.arrays import checked, softmax
from histosynth.core.errors import DataError

_FEW = 100


@dataclass(frozen=True, eq=False)
class Isotonic:
    """One class against the rest, then rows divided by their sum (Zadrozny and Elkan 2002, KDD).

    Attributes:
        curves: K pairs of rising arrays, softmax probability and what it becomes; straight lines between the
            points, level beyond the ends.
        notes: what was unusual in fitting them.
    """

    curves: tuple[tuple[np.ndarray, np.ndarray], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        kept = []
        for x, v in self.curves:
            x, v = np.asarray(x, dtype=np.float64), np.asarray(v, dtype=np.float64)
            whole = x.ndim == 1 and x.shape == v.shape and len(x) and np.isfinite(x).all() and np.isfinite(v).all()
            if not whole or (np.diff(x) < 0).any() or (np.diff(v) < 0).any() or v[0] <= 0 or v[-1] >= 1:
                raise DataError("A curve of isotonic regression is damaged.", "Fit the calibrators again.")
            kept.append((x, v))
        object.__setattr__(self, "curves", tuple(kept))

    @classmethod
    def fit(cls, logits: np.ndarray, y: np.ndarray) -> Isotonic:
        """On the softmax of the logits.

        The targets are those of Platt (1999), (N+ + 1) / (N+ + 2) and 1 / (N- + 2) in the place of 1 and 0, so
        that no probability becomes 0, which would make the likelihood of one tile infinitely bad.

        Raises:
            DataError: no tile, or arrays that do not fit together.
        """
        from sklearn.isotonic import IsotonicRegression

        logits, y = checked(logits, y, "logits")
        probs = softmax(logits)
        curves = []
        counts = np.bincount(y, minlength=probs.shape[1])
        for k, many in enumerate(counts):
            low, high = 1 / (len(y) - many + 2), (many + 1) / (many + 2)
            found = IsotonicRegression(out_of_bounds="clip").fit(probs[:, k], np.where(y == k, high, low))
            curves.append((found.X_thresholds_, found.y_thresholds_))
        notes = []
        few = [int(n) for n in counts if n < _FEW]
        if few:
            notes.append(
                f"Isotonic regression: {len(few)} classes have fewer than {_FEW} validation tiles (least: {min(few)}); "
                "its steps follow chance there."
            )
        return cls(tuple(curves), tuple(notes))

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """float [N, K] -> float64 [N, K], rows that sum to 1.

        Raises:
            DataError: another number of classes.
        """
        probs = softmax(logits)
        if probs.shape[1] != len(self.curves):
            raise DataError(f"Logits have {probs.shape[1]} classes.", f"This calibrator has {len(self.curves)}.")
        bent = np.stack([np.interp(probs[:, k], x, v) for k, (x, v) in enumerate(self.curves)], axis=1)
        return bent / bent.sum(axis=1, keepdims=True)

    def to_json(self) -> dict[str, Any]:
        return {"curves": [[x.tolist(), v.tolist()] for x, v in self.curves], "notes": list(self.notes)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Isotonic:
        return cls(tuple((np.asarray(x), np.asarray(v)) for x, v in value["curves"]), tuple(value.get("notes", ())))
