"""Intervals by patient: the same numbers as the plain functions, and the truth inside as often as is said."""

from __future__ import annotations

import json

import numpy as np
import pytest

from histosynth.classify import calibration
from histosynth.classify.calibration import MEASURES, bootstrap, measure, reliability_intervals, softmax
from histosynth.core.errors import DataError, SettingError
from tests.classify.calibration.simulate import hospital


def _direct(probs, y, bins=15):
    parts = calibration.brier_decomposition(probs, y, bins=bins)
    return {
        "accuracy": (probs.argmax(1) == y).mean(),
        "nll": calibration.nll(probs, y),
        "brier": calibration.brier(probs, y),
        "brier_reliability": parts["reliability"],
        "brier_resolution": parts["resolution"],
        "ece": calibration.ece(probs, y, bins=bins),
        "ece_debiased": calibration.ece_debiased(probs, y, bins=bins),
        "ece_mass": calibration.ece(probs, y, bins=bins, scheme="mass"),
        "ece_mass_debiased": calibration.ece_debiased(probs, y, bins=bins, scheme="mass"),
        "ece_debiased_l2": calibration.ece_debiased(probs, y, bins=bins, scheme="mass", norm="l2"),
        "classwise_ece": calibration.classwise_ece(probs, y, bins=bins),
        "mce": calibration.mce(probs, y, bins=bins),
    }


@pytest.mark.parametrize("bins", [5, 15])
def test_values_are_those_of_the_plain_functions(bins):
    logits, y, groups = hospital(12, 15, sureness=2.0, seed=0)
    found = measure(softmax(logits), y, groups, seed=0, replicates=20, bins=bins)
    values = {name: row["value"] for name, row in found["measures"]["probs"].items()}
    assert set(values) == set(MEASURES)
    expected = _direct(softmax(logits), y, bins)
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, abs=1e-12), name
    assert found["patients"] == 12 and found["tiles"] == 180 and found["notes"] == []
    json.dumps(found, allow_nan=False)


def test_a_replicate_is_the_measure_of_its_tiles():
    logits, y, groups = hospital(6, 10, sureness=2.0, seed=1)
    probs = softmax(logits)
    sums = bootstrap._summed(probs, y, groups, 15)
    drawn = next(bootstrap.draws(3, 4, 6))
    found = bootstrap._measures(sums, drawn @ sums.matrix(6))
    for r, weights in enumerate(drawn):
        own = np.repeat(np.arange(len(y)), weights[groups].astype(int))
        for name in ("accuracy", "nll", "brier", "ece", "classwise_ece", "mce", "brier_reliability", "ece_debiased"):
            assert found[name][r] == pytest.approx(_direct(probs[own], y[own])[name], abs=1e-12), name


def test_order_of_tiles_names_of_patients_and_chunks_do_not_matter(monkeypatch):
    logits, y, groups = hospital(9, 11, sureness=2.0, seed=2)
    probs = softmax(logits)
    first = measure(probs, y, groups, seed=5, replicates=60)
    order = np.random.default_rng(0).permutation(len(y))
    again = measure(probs[order], y[order], np.array([f"p{g}" for g in groups])[order], seed=5, replicates=60)
    monkeypatch.setattr(bootstrap, "_CHUNK", 1)
    small = measure(probs, y, groups, seed=5, replicates=60)
    for other in (again, small):
        for name, row in first["measures"]["probs"].items():
            assert other["measures"]["probs"][name] == pytest.approx(row, abs=1e-12), name
    assert measure(probs, y, groups, seed=6, replicates=60) != first


def test_differences_are_paired():
    logits, y, groups = hospital(30, 20, sureness=2.5, seed=3)
    found = measure(
        {"none": softmax(logits), "same": softmax(logits), "mended": softmax(logits, 2.5)}, y, groups, seed=0
    )
    same, mended = found["differences"]["same"], found["differences"]["mended"]
    assert all(row == {"value": 0, "low": 0, "high": 0} for row in same.values())
    assert mended["ece_debiased"]["high"] < 0 and mended["nll"]["high"] < 0
    assert mended["accuracy"] == {"value": 0, "low": 0, "high": 0}
    assert "none" not in found["differences"]


def test_tiles_of_a_patient_are_not_independent():
    logits, y, groups = hospital(10, 1, sureness=1.0, seed=4)
    many = np.repeat(np.arange(10), 30)  # each tile thirty times over: no more is known than before
    few = measure(softmax(logits), y, groups, seed=0)["measures"]["probs"]["brier"]
    copies = measure(softmax(logits)[many], y[many], groups[many], seed=0)["measures"]["probs"]["brier"]
    assert copies == pytest.approx(few)
    single = measure(softmax(logits)[many], y[many], seed=0)
    assert "too narrow" in single["notes"][0] and single["patients"] is None
    narrow = single["measures"]["probs"]["brier"]
    assert narrow["high"] - narrow["low"] < 0.5 * (few["high"] - few["low"])


def test_one_patient_has_no_interval():
    logits, y, groups = hospital(1, 30, sureness=1.0, seed=5)
    found = measure({"a": softmax(logits), "b": softmax(2 * logits)}, y, groups, seed=0)
    assert found["measures"]["a"]["ece"]["low"] is None and found["differences"]["b"]["ece"]["high"] is None
    assert "one patient" in found["notes"][0]
    assert all(row["accuracy_low"] is None for row in reliability_intervals(softmax(logits), y, groups, seed=0))


def test_reliability_intervals_hold_the_accuracy():
    logits, y, groups = hospital(20, 20, sureness=1.0, seed=6)
    rows = reliability_intervals(softmax(logits), y, groups, seed=0)
    plain = calibration.reliability_bins(softmax(logits), y)
    assert [{k: r[k] for k in plain[0]} for r in rows] == plain
    for row in rows:
        if row["accuracy_low"] is not None:
            assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    assert any(row["accuracy_low"] is not None for row in rows) and rows[0]["accuracy"] is None


def test_unusable_settings_are_refused():
    logits, y, groups = hospital(4, 5, sureness=1.0, seed=7)
    with pytest.raises(SettingError, match="replicates"):
        measure(softmax(logits), y, groups, seed=0, replicates=1)
    with pytest.raises(SettingError, match="level"):
        measure(softmax(logits), y, groups, seed=0, level=1)
    with pytest.raises(DataError, match="one patient a tile"):
        measure(softmax(logits), y, groups[:-1], seed=0)
    with pytest.raises(DataError, match="at least one"):
        measure({}, y, groups, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(("patients", "tiles"), [(10, 30), (40, 10), (40, 40)])
@pytest.mark.parametrize("sureness", [1.0, 2.0])
def test_intervals_hold_the_truth(patients, tiles, sureness):
    """The 95 % interval of the true calibration error, of patients that differ, in 150 hospitals."""
    logits, y, _ = hospital(3000, 60, sureness=sureness, seed=1)
    one = np.zeros(len(y), dtype=int)
    truth = {k: v["value"] for k, v in measure(softmax(logits), y, one, seed=0)["measures"]["probs"].items()}
    inside = dict.fromkeys(MEASURES, 0)
    for trial in range(150):
        logits, y, groups = hospital(patients, tiles, sureness=sureness, seed=100 + trial)
        found = measure(softmax(logits), y, groups, seed=trial, replicates=400)["measures"]["probs"]
        for name, row in found.items():
            inside[name] += row["low"] <= truth[name] <= row["high"]
    shares = {name: round(n / 150, 2) for name, n in inside.items() if name != "mce"}
    print(patients, tiles, sureness, shares)
    assert min(shares.values()) >= 0.88
