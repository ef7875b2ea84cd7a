"""How scores are taken. Two scores compare only when these settings, the encoder and N are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Better = Literal["lower", "higher", "near one"]


@dataclass(frozen=True)
class Protocol:
    """The settings of every score in a report."""

    metrics: tuple[str, ...] = ("frechet", "kid", "coverage", "diversity")
    """Which metrics to take, by name."""

    k: int = 5
    """Neighbours that set the radius of a tile's ball in precision, recall, density and coverage."""

    kid_subsets: int = 100
    """Random subsets over which the kernel distance is averaged."""

    kid_size: int = 1000
    """Tiles a side in each of those subsets; half of the tiles when there are fewer than twice as many."""

    replicates: int = 40
    """Random half-samples behind the intervals of the other metrics; 0 leaves the intervals out."""

    replicate_size: int = 2000
    """At most so many tiles a side in each half-sample."""

    level: float = 0.95
    """Confidence level of the intervals."""

    max_n: int = 10000
    """At most so many tiles a side."""

    min_per_class: int = 20
    """A class with fewer tiles on any side gets no scores of its own."""


@dataclass(frozen=True)
class Metric:
    """One entry of the table of metrics.

    `measure(reference, other, protocol, seed)` takes two float arrays [N, D] and returns a flat dict: for
    every name in `better` its value, and `<name>_low` and `<name>_high` where the interval is known.
    """

    measure: Callable[[np.ndarray, np.ndarray, Protocol, int], dict[str, float]]
    better: dict[str, Better] = field(default_factory=dict)
