"""Calibration against answers known by hand, by simulation, and by scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from histosynth.classify.calibration import (
    brier,
    classwise_ece,
    ece,
    fit_temperature,
    nll,
    reliability_bins,
    softmax,
)
from histosynth.core.errors import DataError, SettingError


def _simulated(n: int, k: int, *, scale: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax is the true distribution of the labels."""
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(n, k))
    draws = rng.random((n, 1))
    y = (softmax(logits).cumsum(axis=1) < draws).sum(axis=1).clip(0, k - 1)
    return logits, y


# confidences .9 .9 .6 .6; right, wrong, right, right
_PROBS = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.6, 0.4]])
_Y = np.array([0, 1, 1, 0])


def test_hand_computed_example():
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
    logits, y = _simulated(20_000, 5, scale=2.0, seed=0)
    probs = softmax(logits)
    assert ece(probs, y, scheme=scheme) < 0.02
    assert classwise_ece(probs, y, scheme=scheme) < 0.02
    assert ece(softmax(4 * logits), y, scheme=scheme) > 0.1


def test_agrees_with_scikit_learn():
    logits, y = _simulated(500, 4, scale=1.5, seed=1)
    probs = softmax(logits)
    assert nll(probs, y) == pytest.approx(metrics.log_loss(y, probs))
    parts = [metrics.brier_score_loss(y == k, probs[:, k]) for k in range(4)]
    assert brier(probs, y) == pytest.approx(sum(parts))


@pytest.mark.parametrize("truth", [0.4, 1.0, 2.5])
def test_temperature_is_recovered_and_the_prediction_unchanged(truth):
    logits, y = _simulated(20_000, 6, scale=2.0, seed=2)
    fit = fit_temperature(truth * logits, y)
    assert fit.temperature == pytest.approx(truth, rel=0.04)
    assert fit.nll_after <= fit.nll_before and fit.note == ""
    assert np.array_equal((truth * logits / fit.temperature).argmax(1), logits.argmax(1))


def test_temperature_stands_at_the_minimum():
    logits, y = _simulated(300, 3, scale=3.0, seed=3)
    best = fit_temperature(logits, y)
    for factor in (0.98, 1.02):
        assert nll(softmax(logits / (best.temperature * factor)), y) > best.nll_after


def test_flawless_logits_need_smoothed_targets():
    y = np.arange(30) % 3
    logits = 5 * np.eye(3)[y]
    assert fit_temperature(logits, y).temperature < 0.2  # it only stops where float64 does
    assert "lies below" in fit_temperature(logits / 10, y).note
    smoothed = fit_temperature(logits, y, smoothing=1 / 32)
    assert smoothed.note == "" and 0.3 < smoothed.temperature < 3


def test_wrong_logits_stop_at_the_upper_bound():
    y = np.arange(30) % 3
    assert "lies above" in fit_temperature(-5 * np.eye(3)[y], y).note


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(2, 5), st.integers(0, 10_000), st.sampled_from(["width", "mass"]))
def test_errors_are_bounded_and_the_order_of_tiles_does_not_matter(n, k, seed, scheme):
    rng = np.random.default_rng(seed)
    probs = softmax(np.round(rng.normal(size=(n, k)), 1))
    y = rng.integers(0, k, n)
    order = rng.permutation(n)
    for error in (ece, classwise_ece):
        value = error(probs, y, scheme=scheme)
        assert 0 <= value <= 1
        assert error(probs[order], y[order], scheme=scheme) == pytest.approx(value)
    assert 0 <= brier(probs, y) <= 2
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
    with pytest.raises(SettingError, match="bounds"):
        fit_temperature(_PROBS, _Y, bounds=(0, 1))
