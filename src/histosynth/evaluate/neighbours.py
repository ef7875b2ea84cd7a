"""Exact nearest neighbours in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from histosynth.core.errors import DataError

_BUDGET = 2**22  # distances held at a time: 32 MB in float64


def distance_rows(rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared Euclidean distances of rows [n, D] to columns [m, D], a chunk of rows at a time.

    |x - y|^2 = |x|^2 + |y|^2 - 2 x.y loses digits far from the origin, so both are centred first, and what
    rounding can have left between equal rows is set to zero.
    """
    centre = columns.mean(0)
    rows, columns = rows - centre, columns - centre
    row_norms, column_norms = (rows**2).sum(1), (columns**2).sum(1)
    step = max(1, _BUDGET // max(len(columns), 1))
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        size = row_norms[part, None] + column_norms
        squares = size - 2 * rows[part] @ columns.T
        squares[squares < 1e-13 * size] = 0
        yield part, squares


def nearest(rows: np.ndarray, columns: np.ndarray, same: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Distance to, and position of, the nearest column of each row: float64 [n], int64 [n].

    Args:
        same: rows and columns are the same tiles, and a tile is not its own neighbour.
    """
    distances, positions = np.empty(len(rows)), np.empty(len(rows), np.int64)
    for part, squares in distance_rows(rows, columns):
        if same:
            _blank_self(part, squares)
        positions[part] = squares.argmin(1)
        distances[part] = np.sqrt(squares[np.arange(len(squares)), positions[part]])
    return distances, positions


def kth_squared(points: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each point to its k-th nearest other point: float64 [n].

    Raises:
        DataError: there are not more than k points.
    """
    if len(points) <= k:
        raise DataError(f"{len(points)} tiles cannot have {k} neighbours each.", "Use more tiles or a smaller k.")
    found = np.empty(len(points))
    for part, squares in distance_rows(points, points):
        _blank_self(part, squares)
        found[part] = np.partition(squares, k - 1, axis=1)[:, k - 1]
    return found


def _blank_self(part: slice, squares: np.ndarray) -> None:
    squares[np.arange(len(squares)), np.arange(part.start, part.stop)] = np.inf
