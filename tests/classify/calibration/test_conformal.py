"""Conformal sets against loops written from the papers, and the coverage that they promise."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from histosynth.classify.calibration import Conformal, coverage, dice, fit_conformal, softmax, tune_raps
from histosynth.classify.calibration.conformal import aps_scores, lac_scores, quantile, raps_scores
from histosynth.core.errors import DataError, SettingError
from tests.classify.calibration.simulate import simulated

METHODS = ("lac", "aps", "raps")


def _parted(n, k, seed, sureness=1.0):
    """Probabilities, labels and dice of n tiles to fit on, and of n others."""
    logits, y = simulated(2 * n, k, scale=1.5, seed=seed)
    probs, u = softmax(sureness * logits), np.random.default_rng(seed).random(2 * n)
    return (probs[:n], y[:n], u[:n]), (probs[n:], y[n:], u[n:])


def test_scores_by_loops():
    (probs, _, u), _ = _parted(50, 5, 0)
    for i, row in enumerate(probs):
        ranked = sorted(range(5), key=lambda k: -row[k])
        for place, k in enumerate(ranked):
            above = sum(row[j] for j in ranked[:place])
            assert lac_scores(probs, u)[i, k] == pytest.approx(1 - row[k])
            assert aps_scores(probs, u)[i, k] == pytest.approx(above + u[i] * row[k])
            penalty = 0.2 * max(0, place + 1 - 2)
            assert raps_scores(probs, u, penalty=0.2, rank=2)[i, k] == pytest.approx(above + u[i] * row[k] + penalty)


def test_quantile_of_few_scores():
    scores = np.arange(1, 10) / 10
    assert quantile(scores, 0.1) == 0.9  # the ninth of nine: (9 + 1) * 0.9
    assert quantile(scores, 0.5) == 0.5
    assert quantile(scores, 0.09) == math.inf
    assert quantile(scores[:0], 0.5) == math.inf
    for n in range(1, 60):  # the place is exact where (n + 1)(1 - alpha) is a whole number
        for whole in range(1, n + 1):
            assert quantile(np.arange(1, n + 1), 1 - whole / (n + 1)) == whole


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sureness", [1.0, 4.0])
def test_sets_hold_the_true_class_as_often_as_promised(method, conditional, sureness):
    shares, by_class = [], []
    for seed in range(60):
        fit, new = _parted(150, 3, seed, sureness)
        rule = fit_conformal(*fit, method=method, alpha=0.2, conditional=conditional)
        hit = rule.sets(new[0], new[2])[np.arange(150), new[1]]
        shares.append(hit.mean())
        by_class.append([hit[new[1] == k].mean() for k in range(3)])
    # 60 x 150 tiles of 60 fits: a standard error of about 0.006
    assert 0.78 < np.mean(shares) < (0.83 if conditional else 0.82)
    if conditional:
        assert (np.mean(by_class, axis=0) > 0.77).all()


def test_one_limit_fails_a_class_that_a_limit_a_class_covers():
    rng = np.random.default_rng(0)
    y = (rng.random(8000) < 0.1).astype(int)  # class 1 is rare and is seen as class 0 half of the time
    logits = np.stack([np.zeros(8000), np.where(y == 1, 0.0, -3.0) + rng.normal(size=8000)], axis=1)
    probs, u = softmax(logits), rng.random(8000)
    found = {}
    for conditional in (False, True):
        rule = fit_conformal(probs[:4000], y[:4000], u[:4000], method="lac", conditional=conditional)
        found[conditional] = coverage(rule.sets(probs[4000:], u[4000:]), y[4000:], seed=0)
    rare = {c: f["per_class"][1]["coverage"]["value"] for c, f in found.items()}
    assert rare[False] < 0.8 and rare[True] == pytest.approx(0.9, abs=0.05)
    assert found[True]["size"]["value"] > found[False]["size"]["value"]


def test_too_few_tiles_put_all_classes_in_every_set():
    (probs, y, u), new = _parted(8, 3, 1)
    rule = fit_conformal(probs, y, u, method="aps", alpha=0.1)
    assert rule.sets(new[0], new[2]).all() and "too few" in rule.notes[0]
    y = np.where(y == 2, 0, y)
    (probs, _, u), _ = _parted(100, 3, 2)
    y = np.arange(100) % 2
    rule = fit_conformal(probs, y, u, method="lac", conditional=True)
    assert np.isinf(rule.limits[2]) and np.isfinite(rule.limits[:2]).all()
    assert rule.sets(probs, u)[:, 2].all() and "1 of 3 classes" in rule.notes[0] and "needed: 9" in rule.notes[0]


def test_penalties_of_raps_shorten_long_sets():
    logits, y = simulated(3000, 20, scale=1.2, seed=3)
    probs, u = softmax(3 * logits), np.random.default_rng(3).random(3000)
    options = tune_raps(probs[:1000], y[:1000], u[:1000], alpha=0.1)
    sizes = {}
    for method, more in (("aps", {}), ("raps", options)):
        rule = fit_conformal(probs[1000:2000], y[1000:2000], u[1000:2000], method=method, **more)
        sets = rule.sets(probs[2000:], u[2000:])
        assert sets[np.arange(1000), y[2000:]].mean() == pytest.approx(0.9, abs=0.03)
        sizes[method] = sets.sum(axis=1)
    assert sizes["raps"].mean() < sizes["aps"].mean() and sizes["raps"].std() < sizes["aps"].std()


def test_dice_belong_to_the_tile():
    names = [f"{i}.png" for i in range(2000)]
    u = dice(0, names)
    assert np.array_equal(dice(0, names[::-1])[::-1], u) and (u >= 0).all() and (u < 1).all()
    assert np.abs(np.histogram(u, 10, (0, 1))[0] - 200).max() < 60
    assert abs(np.corrcoef(u, dice(1, names))[0, 1]) < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_json_gives_the_same_sets(method):
    fit, new = _parted(30, 3, 4)
    rule = fit_conformal(*fit, method=method, conditional=True, alpha=0.05)
    assert np.isinf(rule.limits).any()
    again = Conformal.from_json(json.loads(json.dumps(rule.to_json(), allow_nan=False)))
    assert np.array_equal(again.sets(new[0], new[2]), rule.sets(new[0], new[2]))
    assert again.notes == rule.notes


def test_coverage_counts_by_patient():
    sets = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=bool)
    y, groups = np.array([0, 1, 0, 0]), np.array(["a", "a", "b", "b"])
    found = coverage(sets, y, groups, seed=0, replicates=400)
    assert found["coverage"]["value"] == 0.75 and found["size"]["value"] == 1.5
    assert found["sizes"] == [0.25, 0.25, 0.25, 0.25]
    # two patients, one drawn: a has 2 of 2, b has 1 of 2
    assert (found["coverage"]["low"], found["coverage"]["high"]) == (0.5, 1.0)
    first, second, third = found["per_class"]
    assert (
        first["coverage"]["value"] == pytest.approx(2 / 3)
        and first["tiles"] == 3
        and first["size"] == pytest.approx(4 / 3)
    )
    assert second["coverage"] == {"value": 1.0, "low": None, "high": None}  # of one patient
    assert third["coverage"]["value"] is None and third["size"] is None
    assert "2 patients" in found["notes"][0]


def test_unusable_settings_are_refused():
    (probs, y, u), _ = _parted(30, 3, 5)
    for bad in ({"alpha": 0}, {"alpha": 1.0}, {"method": "thr"}, {"penalty": -1}, {"rank": 0}):
        with pytest.raises(SettingError):
            fit_conformal(probs, y, u, **bad)
    with pytest.raises(DataError, match="\\[N, 3\\]"):
        fit_conformal(probs, y, u).sets(probs[:, :2], u)
    with pytest.raises(DataError):
        fit_conformal(probs, y, u).sets(probs, u[:5])
    with pytest.raises(DataError, match="sets"):
        coverage(np.ones((3, 2), dtype=bool), np.array([0, 1]), seed=0)
