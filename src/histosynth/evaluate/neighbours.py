"""Exact nearest neighbours in bounded memory.

A matrix product in float32 gives, for every pair of tiles, a number that their squared distance cannot be below
(its rounding error is bounded, and taken off). Only the pairs that this leaves open are measured in float64,
difference by difference: a handful a tile, so the answer is exact at the price of single precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histosynth.core.errors import DataError

_BUDGET = 2**22  # distances held at a time: 32 MB in float64
_BOUNDS_PER_DISTANCE = 8  # bounds are half as long, and long products are faster
_GROUPS = 64
_DENSE = 0.05  # share of open pairs above which a whole product in float64 is cheaper than pair by pair
_UNIT = 2.0**-24  # half the step of float32 at 1


def distance_rows(rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared Euclidean distances of rows [n, D] to columns [m, D], a chunk of rows at a time, in float64.

    |x - y|^2 = |x|^2 + |y|^2 - 2 x.y loses digits far from the origin, so both are centred first, and what
    rounding can have left between equal rows is set to zero.
    """
    for part, squares, _ in _products(rows, columns):
        yield part, squares


def _products(rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """As `distance_rows`, and how far each may be from the truth, [b, m]; what is nearer to zero than that is zero."""
    centre = columns.mean(0, dtype=np.float64)
    columns = columns - centre
    column_norms = np.einsum("ij,ij->i", columns, columns)
    error = max(1e-13, (2 * columns.shape[1] + 16) * 2.0**-53)
    step = max(1, _BUDGET // max(len(columns), 1))
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        chunk = rows[part] - centre
        size = np.einsum("ij,ij->i", chunk, chunk)[:, None] + column_norms
        squares = size - 2 * (chunk @ columns.T)
        size *= error
        squares[squares < size] = 0
        yield part, squares, size


@dataclass
class Bounds:
    """Of some rows to all columns.

    Attributes:
        part: which rows.
        values: float32 [b, m]; values * scale is not above the squared distance.
        scale: float.
    """

    part: slice
    values: NDArray[np.float32]
    scale: float
    rows: np.ndarray
    columns: np.ndarray

    def at_most(self, limits: np.ndarray) -> NDArray[np.bool_]:
        """Pairs whose squared distance can be at most `limits`, squared distances that broadcast to [b, m]."""
        with np.errstate(over="ignore"):
            return self.values <= np.nextafter((limits / self.scale).astype(np.float32), np.float32(np.inf))

    def exact(self, i: np.ndarray, j: np.ndarray) -> NDArray[np.float64]:
        """Squared distances of pairs: positions i within the part and j among the columns -> float64 [len(i)]."""
        return _exact(self.rows[self.part], self.columns, i, j)

    def dense(self) -> Iterator[Dense]:
        """All squared distances of the part, for when the bounds leave too many pairs open."""
        rows = self.rows[self.part]
        for part, squares, error in _products(rows, self.columns):
            whole = slice(self.part.start + part.start, self.part.start + part.stop)
            yield Dense(whole, squares, error, rows[part], self.columns)


@dataclass
class Dense:
    """All squared distances of a few rows.

    Attributes:
        part: which rows.
        squares: float64 [b, m], each right to `error`.
    """

    part: slice
    squares: NDArray[np.float64]
    error: NDArray[np.float64]
    rows: np.ndarray
    columns: np.ndarray

    def settle(self, limits: np.ndarray) -> NDArray[np.float64]:
        """The squares, exact where the error leaves open on which side of `limits` [b, 1] or [m] they are."""
        i, j = np.nonzero((np.abs(self.squares - limits) <= 2 * self.error) & (self.squares > 0))
        self.squares[i, j] = _exact(self.rows, self.columns, i, j)
        return self.squares


def _exact(rows: np.ndarray, columns: np.ndarray, i: np.ndarray, j: np.ndarray) -> NDArray[np.float64]:
    found = np.empty(len(i))
    step = max(1, 2**20 // columns.shape[1])
    for start in range(0, len(i), step):
        pick = slice(start, start + step)
        away = rows[i[pick]].astype(np.float64) - columns[j[pick]]
        found[pick] = np.einsum("ij,ij->i", away, away)
    return found


def bounds(rows: np.ndarray, columns: np.ndarray) -> Iterator[Bounds]:
    """Lower bounds of the squared distances of rows [n, D] to columns [m, D], a chunk of rows at a time.

    With the squared norms as two more columns of the factors, one product gives |x|^2 + |y|^2 - 2 x.y. Summed in
    any order its error is below (D + 2) u times the sum of the absolute terms (Higham 2002, section 3.1), which is
    at most twice |x|^2 + |y|^2; rounding the inputs adds less than 4 u of that.
    """
    count, dim = columns.shape
    centre = columns.mean(0, dtype=np.float64)
    scale = max(_reach(rows, centre), _reach(columns, centre)) or 1.0
    safe = 1 - (2 * dim + 16) * _UNIT
    factor = np.empty((count, dim + 2), np.float32)
    step = max(1, _BOUNDS_PER_DISTANCE * _BUDGET // max(count, 1))
    for start in range(0, count, step):
        part = slice(start, start + step)
        chunk = (columns[part] - centre) / scale
        factor[part, :dim] = chunk
        factor[part, dim] = 1
        factor[part, dim + 1] = np.einsum("ij,ij->i", chunk, chunk) * safe
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        chunk = (rows[part] - centre) / scale
        left = np.empty((len(chunk), dim + 2), np.float32)
        left[:, :dim] = -2 * chunk
        left[:, dim] = np.einsum("ij,ij->i", chunk, chunk) * safe - 1e-30  # what is lost to underflow
        left[:, dim + 1] = 1
        yield Bounds(part, left @ factor.T, scale**2, rows, columns)


def nearest(rows: np.ndarray, columns: np.ndarray, same: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Distance to, and position of, the nearest column of each row: float64 [n], int64 [n].

    Args:
        same: rows and columns are the same tiles, and a tile is not its own neighbour.
    """
    distances, positions = np.empty(len(rows)), np.empty(len(rows), np.int64)
    for bound in bounds(rows, columns):
        if same:
            _blank_self(bound.part, bound.values)
        first = np.arange(len(bound.values))
        limit = bound.exact(first, bound.values.argmin(1))
        open_pairs = bound.at_most(limit[:, None])
        if too_many(open_pairs):
            for dense in bound.dense():
                if same:
                    _blank_self(dense.part, dense.squares)
                squares = dense.settle(dense.squares.min(1, keepdims=True))
                positions[dense.part] = squares.argmin(1)
                distances[dense.part] = np.sqrt(squares.min(1))
            continue
        i, j = np.nonzero(open_pairs)
        squares = bound.exact(i, j)
        order = np.lexsort((j, squares, i))
        best = order[np.searchsorted(i[order], first)]
        positions[bound.part], distances[bound.part] = j[best], np.sqrt(squares[best])
    return distances, positions


def kth_squared(points: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each point to its k-th nearest other point: float64 [n].

    Raises:
        DataError: there are not more than k points.
    """
    if len(points) <= k:
        raise DataError(f"{len(points)} tiles cannot have {k} neighbours each.", "Use more tiles or a smaller k.")
    found = np.empty(len(points))
    for bound in bounds(points, points):
        _blank_self(bound.part, bound.values)
        # the k columns with the least bounds: no point has its k-th neighbour beyond the farthest of these
        some = bound.values <= _some_kth(bound.values, k)[:, None]
        if not too_many(some, k):
            i, j = np.nonzero(some)
            limit = _kth_of_groups(bound.exact(i, j), i, len(some), k)
            open_pairs = bound.at_most(limit[:, None])
            if not too_many(open_pairs, k):
                i, j = np.nonzero(open_pairs)
                found[bound.part] = _kth_of_groups(bound.exact(i, j), i, len(bound.values), k)
                continue
        for dense in bound.dense():
            _blank_self(dense.part, dense.squares)
            squares = dense.settle(np.partition(dense.squares, k - 1, axis=1)[:, k - 1 : k])
            found[dense.part] = np.partition(squares, k - 1, axis=1)[:, k - 1]
    return found


def _some_kth(values: np.ndarray, k: int) -> np.ndarray:
    """For each row a number that at least k of its values do not exceed, close to the least such number.

    The k-th least of the minima of disjoint groups is one, and takes a fraction of the time of a sort.
    """
    count = values.shape[1]
    width = count // _GROUPS
    if width < 4 * k:
        return np.partition(values, k - 1, axis=1)[:, k - 1]
    whole = values[:, : width * _GROUPS].reshape(len(values), _GROUPS, width)
    return np.partition(whole.min(1), k - 1, axis=1)[:, k - 1]


def _kth_of_groups(values: np.ndarray, group: np.ndarray, groups: int, k: int) -> np.ndarray:
    """The k-th least value of each group 0 ... groups - 1, all of which have k."""
    order = np.lexsort((values, group))
    return values[order][np.searchsorted(group[order], np.arange(groups)) + k - 1]


def too_many(open_pairs: np.ndarray, k: int = 1) -> bool:
    """Whether so many pairs [b, m] are open that measuring them one by one is slower than one product of all."""
    return int(np.count_nonzero(open_pairs)) > max(_DENSE * open_pairs.size, 4 * k * len(open_pairs))


def _reach(points: np.ndarray, centre: np.ndarray) -> float:
    """The largest distance from the centre along any axis."""
    if not len(points):
        return 0.0
    return float(max((points.max(0) - centre).max(), (centre - points.min(0)).max()))


def _blank_self(part: slice, values: np.ndarray) -> None:
    values[np.arange(len(values)), np.arange(part.start, part.stop)] = np.inf
