"""Vendi score and spread: known answers."""

import numpy as np
import pytest

from histosynth.evaluate.diversity import diversity, mean_pairwise, vendi
from histosynth.evaluate.settings import Protocol


def test_vendi_counts_different_tiles():
    assert vendi(np.eye(7)) == pytest.approx(7)
    assert vendi(np.repeat(np.eye(3), 5, axis=0)) == pytest.approx(3)
    assert vendi(np.ones((6, 4))) == pytest.approx(1)
    assert vendi(np.zeros((6, 4))) == pytest.approx(1)


def test_vendi_equals_its_definition():
    x = np.random.default_rng(0).normal(size=(30, 50))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for y in (unit, unit[:, :10] / np.linalg.norm(unit[:, :10], axis=1, keepdims=True)):
        values = np.linalg.eigvalsh(y @ y.T / len(y)).clip(1e-300)
        assert vendi(y) == pytest.approx(np.exp(-(values * np.log(values)).sum()), rel=1e-6)


def test_mean_pairwise_equals_the_loop():
    x = np.random.default_rng(1).normal(size=(20, 5))
    pairs = [np.linalg.norm(a - b) for i, a in enumerate(x) for b in x[:i]]
    assert mean_pairwise(x) == pytest.approx(np.mean(pairs))


def test_ratios_see_a_collapse():
    rng = np.random.default_rng(2)
    real = rng.normal(size=(120, 6))
    same = diversity(real, rng.normal(size=(150, 6)), Protocol(replicates=10))
    assert same["vendi_ratio"] == pytest.approx(1, abs=0.1)
    assert same["spread_ratio_low"] <= 1 <= same["spread_ratio_high"] + 0.05
    collapsed = diversity(real, np.repeat(rng.normal(size=(2, 6)), 60, axis=0))
    assert collapsed["vendi_ratio"] < 0.5
