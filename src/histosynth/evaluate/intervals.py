"""Equal N on both sides, and intervals from random half-samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import NormalDist

import numpy as np
from threadpoolctl import threadpool_limits

from histosynth.core.seeds import numpy_rng
from histosynth.evaluate.settings import Protocol

Statistic = Callable[[np.ndarray, np.ndarray], Mapping[str, float]]


def subsample(count: int, n: int, seed: int, name: str) -> np.ndarray:
    """`n` of `count` positions without replacement, sorted; all of them when n >= count."""
    if n >= count:
        return np.arange(count)
    return np.sort(numpy_rng(seed, "subsample", name).choice(count, n, replace=False))


def with_interval(
    statistic: Statistic,
    reference: np.ndarray,
    other: np.ndarray,
    protocol: Protocol,
    seed: int,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> dict[str, float]:
    """The statistic on all tiles, with `<name>_low` and `<name>_high` from random half-samples.

    A half-sample is drawn without replacement from each side. Unlike a bootstrap sample it holds no tile
    twice, which would put neighbours at distance zero and shrink covariances. For m of n tiles the spread
    over subsets, times sqrt(m / (n - m)), is the standard error at n (the delete-d jackknife: Shao & Wu
    1989), and the factor is 1 for halves. The interval is centred on the estimate, because a half-sample
    has another bias.
    """
    values = dict(statistic(reference, other))
    smallest = min(len(reference), len(other))
    if protocol.replicates < 2 or smallest < 4:
        return values
    rng = numpy_rng(seed, "half-samples")
    draws: dict[str, list[float]] = {name: [] for name in values}
    sizes = [min(len(side) // 2, protocol.replicate_size) for side in (reference, other)]
    # matrices this small gain nothing from a second thread, and on a busy machine waiting threads cost tenfold
    with threadpool_limits(1 if reference.shape[1] <= 512 else None, user_api="blas"):
        for _ in range(protocol.replicates):
            halves = [side[rng.permutation(len(side))[:m]] for side, m in zip((reference, other), sizes, strict=True)]
            for name, value in statistic(*halves).items():
                draws[name].append(value)
    factor = np.mean([np.sqrt(m / (len(s) - m)) for s, m in zip((reference, other), sizes, strict=True)])
    z = NormalDist().inv_cdf((1 + protocol.level) / 2)
    result = {}
    for name, value in values.items():
        half_width = z * float(factor) * float(np.std(draws[name], ddof=1))
        result[name] = value
        result[f"{name}_low"] = max(value - half_width, bounds[0])
        result[f"{name}_high"] = min(value + half_width, bounds[1])
    return result
