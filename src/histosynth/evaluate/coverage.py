"""Is the synthetic set inside the real one, and does it fill it?

Balls around tiles that reach to their k-th neighbour stand for where a set lives. Precision: the share of
other tiles inside a ball of the reference; recall: the share of reference tiles inside a ball of the other
set (Kynkäänniemi et al. 2019). Density: how many reference balls hold an other tile, over k; coverage: the
share of reference balls that hold any (Naeem et al. 2020). Two samples of one distribution reach about
1 in density and 1 - 1 / 2^k in coverage, and less than 1 in precision and recall: read them beside the floor.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from histosynth.evaluate.checks import checked_pair
from histosynth.evaluate.intervals import with_interval
from histosynth.evaluate.neighbours import Bounds, bounds, kth_squared, too_many
from histosynth.evaluate.settings import Metric, Protocol


def coverage(
    reference: np.ndarray, other: np.ndarray, protocol: Protocol | None = None, seed: int = 0
) -> dict[str, float]:
    """Precision, recall, density and coverage of `other` [M, D] against `reference` [N, D].

    Returns:
        each of the four, with `_low` and `_high`, and coverage_k. The intervals need 2 k + 2 tiles a side.

    Raises:
        DataError: not more than k tiles on a side, different D, or values that are not finite.
    """
    protocol = protocol or Protocol()
    k = protocol.k
    reference, other = checked_pair(reference, other, keep=True)
    halves_suffice = min(len(reference), len(other)) // 2 > k
    if halves_suffice:
        result = with_interval(lambda a, b: prdc(a, b, k), reference, other, protocol, seed, (0, np.inf))
    else:
        result = prdc(reference, other, k)
    for name in ("precision", "recall", "coverage"):
        if f"{name}_high" in result:
            result[f"{name}_high"] = min(result[f"{name}_high"], 1.0)
    return result | {"coverage_k": float(k)}


def prdc(reference: np.ndarray, other: np.ndarray, k: int) -> dict[str, float]:
    """The four numbers, exactly, from all pairs, in memory that does not grow with the number of pairs."""
    reach, other_reach = kth_squared(reference, k), kth_squared(other, k)
    balls_around = np.empty(len(other))
    recalled = np.zeros(len(reference), bool)
    covered = np.zeros(len(reference), bool)
    for bound in bounds(other, reference):
        for part, rows, columns, squares in _close_pairs(bound, reach, other_reach):
            inside = squares <= reach[columns]
            balls_around[part] = np.bincount(rows[inside], minlength=part.stop - part.start)
            covered[columns[inside]] = True
            recalled[columns[squares <= other_reach[part][rows]]] = True
    return {
        "precision": float((balls_around > 0).mean()),
        "recall": float(recalled.mean()),
        "density": float(balls_around.mean() / k),
        "coverage": float(covered.mean()),
    }


def _close_pairs(
    bound: Bounds, reach: np.ndarray, other_reach: np.ndarray
) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """Every pair that may be in a ball of either side: rows of the part, position in it, column, squared distance."""
    rows = other_reach[bound.part]
    near = bound.at_most(reach[None]) | bound.at_most(rows[:, None])
    if not too_many(near):
        i, j = np.nonzero(near)
        yield bound.part, i, j, bound.exact(i, j)
        return
    for dense in bound.dense():
        limits = other_reach[dense.part, None]
        dense.settle(reach)
        squares = dense.settle(limits)
        i, j = np.nonzero((squares <= reach) | (squares <= limits))
        yield dense.part, i, j, squares[i, j]


METRIC = Metric(coverage, {"precision": "higher", "recall": "higher", "density": "higher", "coverage": "higher"})
