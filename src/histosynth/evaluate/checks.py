"""What every metric asks of features before it computes anything."""

from __future__ import annotations

import numpy as np

from histosynth.core.errors import DataError


def checked(features: np.ndarray, name: str = "features", at_least: int = 2, keep: bool = False) -> np.ndarray:
    """Features as float64 [N, D].

    Args:
        keep: leave float32 as it is, for what converts a chunk at a time: half the memory, and no copy.

    Raises:
        DataError: not two dimensions, fewer than `at_least` tiles, or a value that is not finite.
    """
    array = np.asarray(features)
    if not (keep and array.dtype == np.float32):
        array = np.asarray(array, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] == 0:
        raise DataError(f"The {name} have shape {array.shape}.", "Give one row of numbers a tile: [N, D].")
    if len(array) < at_least:
        raise DataError(f"The {name} hold {len(array)} tile(s).", f"This score needs at least {at_least} on each side.")
    # a sum is finite unless a value is not, or many are huge: no array of truth values as large as the features
    with np.errstate(invalid="ignore", over="ignore"):
        rows = array.sum(1)
    doubtful = np.flatnonzero(~np.isfinite(rows))
    bad = doubtful[~np.isfinite(array[doubtful]).all(axis=1)]
    if len(bad):
        named = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        raise DataError(
            f"The {name} are not finite in {len(bad)} of {len(array)} rows ({named}).",
            "Look at those tiles, or encode them again.",
        )
    return array


def checked_pair(
    reference: np.ndarray, other: np.ndarray, at_least: int = 2, keep: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Both sides as float64 [N, D] of the same D; `keep` as in `checked`.

    Raises:
        DataError: as `checked`, or the two sides have different dimensions.
    """
    first = checked(reference, "reference features", at_least, keep)
    second = checked(other, "other features", at_least, keep)
    if first.shape[1] != second.shape[1]:
        raise DataError(
            f"The two sides have {first.shape[1]} and {second.shape[1]} features a tile.",
            "Encode both with the same encoder.",
        )
    return first, second
