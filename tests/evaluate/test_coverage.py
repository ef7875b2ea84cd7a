"""Precision, recall, density, coverage against the definitions written out, and on sets with known answers."""

import numpy as np
import pytest

from histosynth.core.errors import DataError
from histosynth.evaluate import neighbours
from histosynth.evaluate.coverage import coverage, prdc
from histosynth.evaluate.settings import Protocol


def naive(real, fake, k):
    def between(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    real_reach = np.sort(between(real, real), 1)[:, k]
    fake_reach = np.sort(between(fake, fake), 1)[:, k]
    cross = between(real, fake)
    return {
        "precision": (cross <= real_reach[:, None]).any(0).mean(),
        "recall": (cross <= fake_reach[None]).any(1).mean(),
        "density": (cross <= real_reach[:, None]).sum(0).mean() / k,
        "coverage": (cross.min(1) <= real_reach).mean(),
    }


@pytest.mark.parametrize("budget", [2**22, 100])
def test_equals_the_definitions(monkeypatch, budget):
    monkeypatch.setattr(neighbours, "_BUDGET", budget)  # the second splits rows into many chunks
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(70, 6)), rng.normal(size=(55, 6)) * 0.8 + 0.3
    for k in (1, 3, 5):
        assert prdc(real, fake, k) == pytest.approx(naive(real, fake, k))


def test_far_from_the_origin_nothing_changes():
    rng = np.random.default_rng(1)
    real, fake = rng.normal(size=(60, 4)), rng.normal(size=(60, 4))
    assert prdc(real + 1e6, fake + 1e6, 5) == pytest.approx(prdc(real, fake, 5))


def test_known_answers():
    rng = np.random.default_rng(2)
    real = rng.normal(size=(400, 8))
    same = prdc(real, rng.normal(size=(400, 8)), 5)
    assert same["density"] == pytest.approx(1, abs=0.1)
    assert same["coverage"] == pytest.approx(1 - 0.5**5, abs=0.03)
    assert prdc(real, real + 100, 5) == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    # one mode of two: everything it makes is right, half of the real set is missed
    half = real.copy()
    half[200:] += 50
    dropped = prdc(half, rng.normal(size=(400, 8)), 5)
    assert dropped["precision"] > 0.8
    assert dropped["recall"] < 0.55 and dropped["coverage"] < 0.55
    # identical tiles have balls of radius zero, which still hold their copies
    assert prdc(np.ones((10, 3)), np.ones((10, 3)), 2)["coverage"] == 1


def test_order_and_rotation():
    rng = np.random.default_rng(3)
    real, fake = rng.normal(size=(80, 5)), rng.normal(size=(70, 5)) * 1.2
    turn, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    value = prdc(real, fake, 5)
    assert prdc(rng.permutation(real) @ turn, rng.permutation(fake) @ turn, 5) == pytest.approx(value)


def test_intervals():
    rng = np.random.default_rng(4)
    got = coverage(rng.normal(size=(200, 4)), rng.normal(size=(200, 4)) + 0.3, Protocol(replicates=20))
    for name in ("precision", "recall", "density", "coverage"):
        assert 0 <= got[f"{name}_low"] <= got[name] <= got[f"{name}_high"]
    assert got["precision_high"] <= 1 and got["coverage_k"] == 5
    few = coverage(rng.normal(size=(8, 4)), rng.normal(size=(8, 4)))
    assert "precision_low" not in few


def test_refuses_fewer_tiles_than_neighbours():
    with pytest.raises(DataError, match="cannot have 5 neighbours"):
        coverage(np.eye(5), np.eye(5))
