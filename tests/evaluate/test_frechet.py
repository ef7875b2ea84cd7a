"""Fréchet distance: closed forms, the usual matrix square root, invariances, intervals."""

import numpy as np
import pytest
from scipy import linalg

from histosynth.core.errors import DataError
from histosynth.evaluate.frechet import frechet, frechet_distance, frechet_from_moments
from histosynth.evaluate.settings import Protocol


def by_matrix_root(x: np.ndarray, y: np.ndarray) -> float:
    """The textbook way, with scipy's square root of a general matrix."""
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.real(linalg.sqrtm(first @ second))
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root))


def samples(n: int, m: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dim, dim)) / np.sqrt(dim)
    return rng.normal(size=(n, dim)) @ mix, rng.normal(size=(m, dim)) * rng.uniform(0.5, 2, dim) + 0.3


@pytest.mark.parametrize(("n", "m", "dim"), [(300, 400, 12), (200, 150, 64), (40, 50, 64), (40, 500, 64)])
def test_equals_the_matrix_square_root(n, m, dim):
    x, y = samples(n, m, dim)
    # sqrtm itself loses digits when the product is singular
    assert frechet_distance(x, y) == pytest.approx(by_matrix_root(x, y), rel=1e-8 if min(n, m) > dim else 1e-4)


def test_gaussians_with_known_moments():
    # commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2
    rng = np.random.default_rng(1)
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    s1, s2, shift = rng.uniform(0.2, 3, 6), rng.uniform(0.2, 3, 6), rng.normal(size=6)
    covariances = [turn @ np.diag(s**2) @ turn.T for s in (s1, s2)]
    got = frechet_from_moments(np.zeros(6), covariances[0], shift, covariances[1])
    assert got == pytest.approx((shift**2).sum() + ((s1 - s2) ** 2).sum())


def test_low_rank_route_agrees_with_moments():
    x, y = samples(30, 45, 50)
    got = frechet_from_moments(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert frechet_distance(x, y) == pytest.approx(got, rel=1e-6)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_constant_feature_and_repeated_feature():
    x, y = samples(100, 100, 8)
    x, y = (np.concatenate([a, a[:, :1], np.full((100, 1), 3.0)], 1) for a in (x, y))
    assert frechet_distance(x, y) == pytest.approx(by_matrix_root(x, y), rel=1e-4)


def test_order_rotation_symmetry_and_self():
    x, y = samples(90, 80, 20)
    rng = np.random.default_rng(3)
    turn, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    value = frechet_distance(x, y)
    assert frechet_distance(rng.permutation(x), rng.permutation(y)) == pytest.approx(value, rel=1e-10)
    assert frechet_distance(x @ turn + 5, y @ turn + 5) == pytest.approx(value, rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(value, rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x * 2, y * 2) == pytest.approx(4 * value, rel=1e-9)


def test_interval_contains_the_truth():
    protocol = Protocol(replicates=30)
    dim, inside = 3, 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(400, dim)), 1.5 * rng.normal(size=(400, dim)) + 0.5
        got = frechet(x, y, protocol, seed)
        inside += got["frechet_low"] <= dim * (0.5**2 + 0.5**2) <= got["frechet_high"]
    assert inside >= 33  # 95 % of 40 is 38; fewer than 33 has probability 0.002


def test_says_when_tiles_are_few():
    x, y = samples(30, 30, 20)
    assert frechet(x, y)["frechet_enough"] == 0
    x, y = samples(50, 50, 20)
    assert frechet(x, y)["frechet_enough"] == 1


def test_refuses_what_it_cannot_judge():
    x, _ = samples(20, 20, 4)
    with pytest.raises(DataError, match="1 tile"):
        frechet(x[:1], x)
    bad = x.copy()
    bad[7, 2] = np.nan
    with pytest.raises(DataError, match=r"other features are not finite in 1 of 20 rows \(7\)"):
        frechet(x, bad)
    with pytest.raises(DataError, match="same encoder"):
        frechet(x, x[:, :3])
    with pytest.raises(DataError, match="shape"):
        frechet(x[:, 0], x)
    assert np.isfinite(frechet(x[:2], x)["frechet"])
