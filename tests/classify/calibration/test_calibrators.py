"""Calibrators against the truth that their data were drawn from, and other programs for the same optimum."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.isotonic import IsotonicRegression

from histosynth.classify.calibration import (
    CALIBRATORS,
    Isotonic,
    Temperature,
    Vector,
    brier,
    choose_calibrator,
    classwise_ece,
    fit_calibrator,
    fit_temperature,
    load_calibrator,
    nll,
    save_calibrator,
    softmax,
)
from histosynth.core.errors import DataError, SettingError
from tests.classify.calibration.simulate import hospital, simulated

SCALE, OFFSET = np.array([0.5, 1.0, 2.0, 1.0]), np.array([1.0, 0.0, -1.0, 0.0])


def _bent(n, seed):
    """Logits that vector scaling with `SCALE` and `OFFSET` makes perfect."""
    logits, y = simulated(n, 4, scale=2.0, seed=seed)
    return (logits - OFFSET) / SCALE, y


@pytest.mark.parametrize("truth", [0.4, 1.0, 2.5])
def test_temperature_is_recovered_and_the_prediction_unchanged(truth):
    logits, y = simulated(20_000, 6, scale=2.0, seed=2)
    fit = fit_temperature(truth * logits, y)
    assert fit.temperature == pytest.approx(truth, rel=0.04)
    assert fit.nll_after <= fit.nll_before and fit.note == ""
    assert np.array_equal((truth * logits / fit.temperature).argmax(1), logits.argmax(1))


def test_temperature_stands_at_the_minimum():
    logits, y = simulated(300, 3, scale=3.0, seed=3)
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


def test_the_temperature_calibrator_is_the_fit():
    logits, y = simulated(300, 3, scale=3.0, seed=3)
    assert Temperature.fit(logits, y).temperature == fit_temperature(logits, y).temperature
    y = np.arange(30) % 3
    fitted = Temperature.fit(5 * np.eye(3)[y], y)
    assert "smoothed targets" in fitted.notes[0] and fitted.temperature > 0.3
    for bad in (0.0, -2.0, np.inf, np.nan):
        with pytest.raises(SettingError, match="temperature"):
            Temperature(bad)
    with pytest.raises(SettingError, match="bounds"):
        fit_temperature(logits, np.zeros(300, dtype=int), bounds=(0, 1))


def test_vector_scaling_finds_the_truth():
    fitted = Vector.fit(*_bent(30_000, 0))
    np.testing.assert_allclose(fitted.scale, SCALE, rtol=0.06)
    np.testing.assert_allclose(fitted.offset - fitted.offset.mean(), OFFSET, atol=0.08)
    assert fitted.notes == ()


@pytest.mark.parametrize("n", [25, 300])
def test_vector_scaling_stands_at_the_minimum_that_scipy_finds(n):
    logits, y = _bent(n, 1)
    z = logits / Temperature.fit(logits, y).temperature

    def loss(theta):
        probs = softmax(z * theta[:4] + theta[4:])
        return nll(probs, y) * n + 0.5 * ((theta[:4] - 1) ** 2).sum() + 0.5 * (theta[4:] ** 2).sum()

    found = minimize(loss, np.r_[np.ones(4), np.zeros(4)], method="BFGS", options={"gtol": 1e-7})
    theirs = softmax(z * found.x[:4] + found.x[4:])
    np.testing.assert_allclose(Vector.fit(logits, y)(logits), theirs, atol=2e-5)


def test_isotonic_regression_is_that_of_scikit_learn():
    logits, y = _bent(2000, 2)
    probs, columns = softmax(logits), []
    for k in range(4):
        many = (y == k).sum()
        low, high = 1 / (2000 - many + 2), (many + 1) / (many + 2)
        plain = IsotonicRegression(out_of_bounds="clip").fit(probs[:, k], y == k)
        other, _ = _bent(500, 3)
        columns.append(low + (high - low) * plain.predict(softmax(other)[:, k]))
    expected = np.stack(columns, axis=1)
    fitted = Isotonic.fit(logits, y)
    np.testing.assert_allclose(fitted(other), expected / expected.sum(1, keepdims=True), atol=1e-12)
    assert fitted(other).min() > 0


@pytest.mark.parametrize("kind", CALIBRATORS)
def test_each_mends_what_it_can(kind):
    logits, y = _bent(4000, 4)
    other, truth = _bent(4000, 5)
    before, after = softmax(other), fit_calibrator(kind, logits, y)(other)
    np.testing.assert_allclose(after.sum(axis=1), 1)
    assert nll(after, truth) < nll(before, truth) and brier(after, truth) < brier(before, truth)
    if kind != "temperature":  # one number cannot mend classes that are wrong in different ways
        assert classwise_ece(after, truth) < 0.7 * classwise_ece(before, truth)


@pytest.mark.parametrize("kind", CALIBRATORS)
def test_shifted_and_shuffled_logits_give_the_same(kind):
    logits, y = _bent(400, 6)
    first = fit_calibrator(kind, logits, y)(logits)
    order = np.random.default_rng(0).permutation(400)
    np.testing.assert_allclose(fit_calibrator(kind, logits[order], y[order])(logits), first, atol=1e-7)
    if kind != "isotonic":  # its input is the plain softmax
        np.testing.assert_allclose(fit_calibrator(kind, 3 * logits, y)(3 * logits), first, atol=1e-6)


@pytest.mark.parametrize("kind", CALIBRATORS)
def test_files_give_the_same_probabilities(kind, tmp_path):
    logits, y = _bent(60, 7)
    y = np.where(y == 3, 0, y)  # the last class has no tile
    fitted = fit_calibrator(kind, logits, y)
    save_calibrator(tmp_path / "one.json", fitted, "abcd")
    again, classes = load_calibrator(tmp_path / "one.json")
    assert classes == ("a", "b", "c", "d") and again.notes == fitted.notes
    assert np.array_equal(again(logits), fitted(logits))
    assert np.isfinite(np.log(fitted(logits))).all()


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("temperature", {"temperature": 0}),
        ("temperature", {"temperature": "2"}),
        ("temperature", {"temperature": None}),
        ("vector", {"scale": [1.0, 2.0]}),
        ("vector", {"scale": "abc"}),
        ("isotonic", {"curves": [[[0.0, 1.0], [0.9, 0.1]]]}),
        ("isotonic", {"curves": 3}),
        ("temperature", {"kind": "temprature"}),
    ],
)
def test_damaged_files_are_refused(kind, change, tmp_path):
    path = tmp_path / "one.json"
    save_calibrator(path, fit_calibrator(kind, *_bent(60, 8)), "abcd")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="one.json"):
        load_calibrator(path)


def test_another_number_of_classes_is_refused():
    logits, y = _bent(60, 9)
    for kind in ("vector", "isotonic"):
        with pytest.raises(DataError, match="4"):
            fit_calibrator(kind, logits, y)(logits[:, :3])
    with pytest.raises(SettingError, match="'temperature'"):
        fit_calibrator("temprature", logits, y)


def test_choice_is_made_on_other_patients_and_prefers_what_is_simple():
    logits, y = _bent(1500, 10)
    groups = np.arange(1500) // 15
    chosen, worth = choose_calibrator(logits, y, groups, seed=0)
    assert chosen == "vector" and list(worth) == ["none", *CALIBRATORS]
    assert worth["none"] == pytest.approx(nll(softmax(logits), y))
    picks = {1.0: [], 2.0: []}
    for sureness, found in picks.items():
        for seed in range(10):
            logits, y, groups = hospital(12, 15, sureness=sureness, seed=seed)
            chosen, worth = choose_calibrator(logits, y, groups, seed=0)
            found.append(chosen)
            assert worth["isotonic"] > min(worth.values())  # flexible ones follow chance
    assert picks[1.0].count("none") >= 7 and picks[2.0].count("temperature") >= 8
    assert choose_calibrator(logits, y, np.zeros(len(y)), seed=0)[0] == "none"
    with pytest.raises(SettingError, match="folds"):
        choose_calibrator(logits, y, groups, seed=0, folds=1)
