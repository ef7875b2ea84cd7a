"""What synthetic tiles are worth in real ones, read off the baseline's learning curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from histosynth.study.replicates import Draws, Replicated

DIP = 0.01
"""A curve that falls by more than this on the way is not read off."""


def readable(curve: Sequence[float], rise: float) -> str:
    """Why a learning curve cannot be read off, or "" if it can.

    Args:
        curve: scores by growing numbers of real tiles.
        rise: how much it must rise from its first to its last point.
    """
    values = np.asarray(curve)
    if len(values) < 2:
        return "it has one point only"
    if values[-1] - values[0] < rise:
        return f"more real tiles raise it by less than {100 * rise:g} points"
    if (np.maximum.accumulate(values) - values).max() > DIP:
        return f"it falls by more than {100 * DIP:g} point on the way"
    return ""


def worth(
    tiles: Sequence[float],
    baseline: Sequence[Replicated],
    arms: Mapping[Any, tuple[float, Replicated]],
    draws: Draws,
    *,
    level: float = 0.95,
) -> list[dict[str, Any]]:
    """How many more real tiles a class the baseline needs to score as an arm does.

    The baseline's curve is made to rise and read linearly in the logarithm of the tiles, in every replicate.

    Args:
        tiles: real tiles a class of the baseline's points, ascending.
        baseline: the score of the baseline at these points.
        arms: key -> real tiles a class of the arm, and its score.

    Returns:
        For each arm: key, at (its own real tiles a class), tiles, low, high (percentile interval); and whether each
        lies off the curve: `off` and `low_off`, `high_off` are "below", "above" or "". A number that lies above the
        curve's last point is a least number, one below its first point a largest.
    """
    x = np.log(np.asarray(tiles, dtype=np.float64))
    whole = _rising(np.array([[b.whole.mean() for b in baseline]]))[0]
    drawn = _rising(np.stack([_both(b, draws) for b in baseline], axis=1))

    def read(values: np.ndarray, curves: np.ndarray) -> np.ndarray:
        found = np.exp([np.interp(v, c, x) for v, c in zip(values, curves, strict=True)])
        return np.clip(found, tiles[0], tiles[-1])

    def off(found: float | None) -> str:
        if found is None:
            return ""
        return "above" if found >= tiles[-1] else "below" if found <= tiles[0] else ""

    rows = []
    for key, (at, score) in arms.items():
        values = _both(score, draws)
        usable = np.isfinite(values) & np.isfinite(drawn).all(axis=1)
        every = read(values[usable], drawn[usable])
        low = high = None
        if len(every):
            low, high = (float(q) for q in np.quantile(every, [(1 - level) / 2, (1 + level) / 2]))
        mean = float(read(score.whole.mean(keepdims=True), whole[None])[0])
        ends = {name: None if v is None else v - at for name, v in (("tiles", mean), ("low", low), ("high", high))}
        rows.append({"key": key, "at": at, **ends, "off": off(mean), "low_off": off(low), "high_off": off(high)})
    return rows


def _both(values: Replicated, draws: Draws) -> np.ndarray:
    """float [n]: each replicate's mean over its drawn runs."""
    return (values.drawn * draws.runs).sum(axis=1) / draws.runs.sum(axis=1)


def _rising(curves: np.ndarray) -> np.ndarray:
    """Curves [n, P] made to rise: halfway between the running maximum and the running minimum from the right."""
    least = np.minimum.accumulate(curves[:, ::-1], axis=1)[:, ::-1]
    return (np.maximum.accumulate(curves, axis=1) + least) / 2
