"""Fréchet distance at 2048 dimensions: ours against scipy's general matrix square root, on the same features.

    python benchmarks/frechet.py [DIM] [N]

Prints both values, both times, and the ratio.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from scipy import linalg

from histosynth.evaluate.frechet import frechet_distance, trace_sqrt_product


def main(dim: int = 2048, n: int = 5000) -> None:
    """Time both on features with a decaying spectrum, as encoders give."""
    rng = np.random.default_rng(0)
    decay = np.arange(1, dim + 1) ** -0.7
    x = rng.normal(size=(n, dim)) * decay
    y = (rng.normal(size=(n, dim)) + 0.1) * rng.permutation(decay)
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)

    start = time.perf_counter()
    ours = trace_sqrt_product(first, second)
    ours_s = time.perf_counter() - start
    start = time.perf_counter()
    theirs = float(np.trace(np.real(linalg.sqrtm(first @ second))))
    theirs_s = time.perf_counter() - start
    start = time.perf_counter()
    value = frechet_distance(x, y)
    whole_s = time.perf_counter() - start

    print(f"tr sqrt(S1 S2), {dim} dimensions: ours {ours:.10g} in {ours_s:.2f} s")
    print(f"                          scipy sqrtm {theirs:.10g} in {theirs_s:.2f} s")
    print(f"relative difference {abs(ours - theirs) / theirs:.1e}, ratio of times {theirs_s / ours_s:.1f}")
    print(f"whole distance from {n} tiles a side: {value:.6g} in {whole_s:.2f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
