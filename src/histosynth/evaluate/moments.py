"""Mean and covariance of features that never are in memory together.

Batches are folded in with the pairwise update of Chan, Golub & LeVeque (1979), in float64: unlike sums of
squares it loses no digits when the mean is large beside the spread.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from histosynth.core.errors import DataError
from histosynth.evaluate.checks import checked


class Moments:
    """Count, mean and scatter of rows seen so far.

    Attributes:
        count: rows seen.
        mean: float64 [D].
        scatter: float64 [D, D], the sum of (x - mean)(x - mean)^T.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: NDArray[np.float64] = np.zeros(0)
        self.scatter: NDArray[np.float64] = np.zeros((0, 0))

    @classmethod
    def of(cls, batches: Iterable[np.ndarray]) -> Moments:
        """The moments of all rows of an iterable of float arrays [n, D]."""
        found = cls()
        for batch in batches:
            found.update(batch)
        return found

    def update(self, batch: np.ndarray) -> Moments:
        """Fold in rows [n, D]; an empty batch changes nothing.

        Raises:
            DataError: other dimensions than before, or values that are not finite.
        """
        if len(batch) == 0:
            return self
        rows = checked(batch, at_least=1)
        centre = rows.mean(0)
        centred = rows - centre
        return self._fold(len(rows), centre, centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        """Fold in the moments of other rows, such as those that another process saw."""
        return self._fold(other.count, other.mean, other.scatter) if other.count else self

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Covariance [D, D] with count - 1 below the line, as all published FID code has it.

        Raises:
            DataError: fewer than two rows were seen.
        """
        if self.count < 2:
            raise DataError(f"{self.count} tile(s) have no covariance.", "Give at least two.")
        return self.scatter / (self.count - 1)

    def _fold(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> Moments:
        if not self.count:
            self.count, self.mean, self.scatter = count, mean.copy(), scatter.copy()
            return self
        if mean.shape != self.mean.shape:
            raise DataError(
                f"Features of {len(mean)} dimensions follow features of {len(self.mean)}.",
                "Encode all tiles with the same encoder.",
            )
        total = self.count + count
        shift = mean - self.mean
        self.mean = self.mean + shift * (count / total)
        self.scatter = self.scatter + scatter + np.outer(shift, shift) * (self.count * count / total)
        self.count = total
        return self
