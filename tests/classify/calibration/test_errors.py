"""Calibration against answers known by hand, by simulation, and by scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from histosynth.classify.calibration import (
    brier,
    brier_decomposition,
    classwise_ece,
    ece,
    ece_debiased,
    mce,
    nll,
    reliability_bins,
    softmax,
)
from histosynth.core.errors import DataError, SettingError
from tests.classify.calibration.simulate import simulated

# confidences .9 .9 .6 .6; right, wrong, right, right
_PROBS = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.6, 0.4]])
_Y = np.array([0, 1, 1, 0])


def test_hand_computed_example():
    assert mce(_PROBS, _Y, bins=10) == pytest.approx(0.4)
    # two of four in the bin of .9: |.5 - .9|; two in the bin of .6: |1 - .6|
    assert ece(_PROBS, _Y, bins=10) == pytest.approx(0.4)
    assert brier(_PROBS, _Y) == pytest.approx((2 * 0.01 + 2 * 0.81 + 2 * 0.16 + 2 * 0.16) / 4)
    assert nll(_PROBS, _Y) == pytest.approx(-np.log([0.9, 0.1, 0.6, 0.6]).mean())
    bins = reliability_bins(_PROBS, _Y, bins=10)
    assert len(bins) == 10 and sum(b["tiles"] for b in bins) == 4
    assert bins[8] == {
        "low": pytest.approx(0.8),
        "high": pytest.approx(0.9),
        "tiles": 2,
        "confidence": pytest.approx(0.9),
        "accuracy": 0.5,
    }
    assert bins[0]["confidence"] is None and bins[0]["accuracy"] is None


@pytest.mark.parametrize("scheme", ["width", "mass"])
def test_perfect_probabilities_have_an_error_within_sampling(scheme):
    logits, y = simulated(20_000, 5, scale=2.0, seed=0)
    probs = softmax(logits)
    assert ece(probs, y, scheme=scheme) < 0.02
    assert classwise_ece(probs, y, scheme=scheme) < 0.02
    assert ece(softmax(4 * logits), y, scheme=scheme) > 0.1


def test_agrees_with_scikit_learn():
    logits, y = simulated(500, 4, scale=1.5, seed=1)
    probs = softmax(logits)
    assert nll(probs, y) == pytest.approx(metrics.log_loss(y, probs))
    parts = [metrics.brier_score_loss(y == k, probs[:, k]) for k in range(4)]
    assert brier(probs, y) == pytest.approx(sum(parts))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(2, 5), st.integers(0, 10_000), st.sampled_from(["width", "mass"]))
def test_errors_are_bounded_and_the_order_of_tiles_does_not_matter(n, k, seed, scheme):
    rng = np.random.default_rng(seed)
    probs = softmax(np.round(rng.normal(size=(n, k)), 1))
    y = rng.integers(0, k, n)
    order = rng.permutation(n)
    for error in (ece, classwise_ece, mce, ece_debiased):
        value = error(probs, y, scheme=scheme)
        assert 0 <= value <= 1
        assert error(probs[order], y[order], scheme=scheme) == pytest.approx(value)
    assert (
        ece_debiased(probs, y, scheme=scheme)
        <= ece(probs, y, scheme=scheme) + 1e-12
        <= mce(probs, y, scheme=scheme) + 1e-9
    )
    assert 0 <= brier(probs, y) <= 2
    parts = brier_decomposition(probs, y, scheme=scheme)
    whole = parts["reliability"] - parts["resolution"] + parts["uncertainty"]
    whole += parts["within_variance"] - parts["within_covariance"]
    assert whole == pytest.approx(brier(probs, y)) == parts["brier"]
    assert sum(b["tiles"] for b in reliability_bins(probs, y, scheme=scheme)) == n


def test_unusable_arrays_are_refused():
    with pytest.raises(DataError, match="not finite"):
        ece(np.array([[np.nan, 1.0]]), np.array([0]))
    with pytest.raises(DataError, match="values from 0 to 2"):
        brier(_PROBS, np.array([0, 1, 2, 0]))
    with pytest.raises(DataError, match="at least one tile"):
        nll(np.zeros((0, 2)), np.zeros(0, dtype=int))
    with pytest.raises(DataError, match="softmax"):
        ece(np.array([[2.0, -1.0]]), np.array([0]))
    with pytest.raises(SettingError, match="scheme"):
        ece(_PROBS, _Y, scheme="other")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="norm"):
        ece_debiased(_PROBS, _Y, norm="max")  # type: ignore[arg-type]
    for temperature in (0, -1, np.inf, np.nan, True, "2"):
        with pytest.raises(SettingError, match="temperature"):
            softmax(_PROBS, temperature)


def test_decomposition_of_murphy_by_hand():
    # forecasts 0.8 (three times, rain twice) and 0.2 (once, no rain): one value a bin, so nothing varies within
    p, rain = np.array([0.8, 0.8, 0.8, 0.2]), np.array([1, 1, 0, 0])
    parts = brier_decomposition(np.stack([1 - p, p], axis=1), rain, bins=10)
    assert parts["reliability"] == pytest.approx(2 * (3 * (0.8 - 2 / 3) ** 2 + 0.2**2) / 4)
    assert parts["resolution"] == pytest.approx(2 * (3 * (2 / 3 - 0.5) ** 2 + 0.5**2) / 4)
    assert parts["uncertainty"] == pytest.approx(2 * 0.25)
    assert parts["within_variance"] == pytest.approx(0) and parts["within_covariance"] == pytest.approx(0)


def test_debiasing_takes_the_excess_of_few_tiles_away():
    perfect, skewed = [], []
    for seed in range(60):
        logits, y = simulated(200, 3, scale=2.0, seed=seed)
        for probs, found in ((softmax(logits), perfect), (softmax(3 * logits), skewed)):
            l2 = ece_debiased(probs, y, scheme="mass", norm="l2")
            found.append((ece(probs, y), ece_debiased(probs, y), l2))
    plain, debiased, root = np.mean(perfect, axis=0)
    assert plain > 0.05 and debiased < 0.75 * plain and root < 0.75 * plain
    logits, y = simulated(100_000, 3, scale=2.0, seed=99)
    assert np.mean(skewed, axis=0)[1] == pytest.approx(ece(softmax(3 * logits), y), rel=0.06)


def test_debiased_square_has_no_bias():
    # one bin, accuracy 0.9, confidence 0.6: far from the floor at 0
    rng = np.random.default_rng(0)
    squares = []
    for _ in range(4000):
        right = rng.random(400) < 0.9
        probs = np.tile([[0.6, 0.4]], (400, 1))
        squares.append(ece_debiased(probs, np.where(right, 0, 1), bins=1, norm="l2") ** 2)
    assert np.mean(squares) == pytest.approx(0.09, rel=0.01)
