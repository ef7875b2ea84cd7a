"""Kernel distances: a naive double loop, no bias, and its intervals."""

import numpy as np
import pytest

from histosynth.core.errors import DataError
from histosynth.evaluate.kernel import cmmd, gaussian, kid, mmd2, polynomial
from histosynth.evaluate.settings import Protocol


def naive(x, y, kernel):
    within = [np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]) for z in (x, y)]
    return sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def cubic(a, b):
    return (a @ b / len(a) + 1) ** 3


def test_equals_the_double_loop():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(23, 7)), rng.normal(size=(17, 7)) + 0.4
    assert mmd2(x, y) == pytest.approx(naive(x, y, cubic), rel=1e-10)
    width = 1.7
    bell = lambda a, b: np.exp(-((a - b) ** 2).sum() / (2 * width**2))  # noqa: E731
    assert mmd2(x, y, gaussian(width)) == pytest.approx(naive(x, y, bell), rel=1e-9)


def test_both_ways_of_summing_subsets_agree():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(60, 5)), rng.normal(size=(60, 5)) + 0.2
    few = kid(x, y, Protocol(kid_subsets=2, kid_size=20), seed=5)  # a subset at a time
    many = kid(x, y, Protocol(kid_subsets=40, kid_size=20), seed=5)  # all kernel values once
    picks = np.random.default_rng(0)
    assert few["kid_subset_size"] == many["kid_subset_size"] == 20
    assert many["kid"] == pytest.approx(mmd2(x, y), rel=0.3)
    # the two routes on the very same subsets
    from histosynth.evaluate.kernel import _subset_mmd2

    chosen = [(picks.permutation(60)[:20], picks.permutation(60)[:20]) for _ in range(6)]
    members = np.zeros((2, 6, 60))
    for row, pair in enumerate(chosen):
        members[0, row, pair[0]] = members[1, row, pair[1]] = 1
    together = _subset_mmd2(x, y, polynomial, *members)
    assert together == pytest.approx([mmd2(x[i], y[j]) for i, j in chosen])


def test_unbiased_at_zero_and_positive_when_different():
    values = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        values.append(kid(rng.normal(size=(40, 16)), rng.normal(size=(40, 16)), Protocol(kid_subsets=20))["kid"])
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(60)
    assert min(values) < 0
    rng = np.random.default_rng(9)
    got = kid(rng.normal(size=(200, 16)), rng.normal(size=(200, 16)) + 0.5)
    assert got["kid_low"] > 0


def test_interval_contains_the_truth():
    # for k(x, y) = (xy + 1)^3 in one dimension the squared MMD is a sum over the first three moments:
    # (xy)^3 + 3 (xy)^2 + 3 xy + 1 = sum_p c_p (E x^p - E y^p)^2
    first, second = [0, 1, 0], [0.5, 1.25, 1.625]  # moments of N(0, 1) and N(0.5, 1)
    truth = sum(c * (a - b) ** 2 for c, a, b in zip((3, 3, 1), first, second, strict=True))
    inside = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(200, 1)), rng.normal(size=(200, 1)) + 0.5
        got = kid(x, y, Protocol(kid_subsets=40), seed=seed)
        inside += got["kid_low"] <= truth <= got["kid_high"]
    assert inside >= 33


def test_gaussian_kernel_tells_sets_apart():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(150, 6))
    near, far = cmmd(x, rng.normal(size=(150, 6))), cmmd(x, rng.normal(size=(150, 6)) * 2)
    assert abs(near["cmmd"]) < far["cmmd"]
    assert far["cmmd_low"] > 0
    assert near["cmmd_width"] == pytest.approx(np.sqrt(12), rel=0.1)


def test_order_does_not_matter_for_the_full_estimate():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(50, 4)), rng.normal(size=(30, 4))
    assert mmd2(rng.permutation(x), rng.permutation(y)) == pytest.approx(mmd2(x, y), rel=1e-9)


def test_refuses_too_few():
    with pytest.raises(DataError, match="at least 4"):
        kid(np.zeros((3, 2)), np.zeros((9, 2)))
