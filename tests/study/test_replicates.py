"""Scores of replicates are those of tiles drawn again and again, and agree with scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from histosynth.core.errors import DataError, SettingError
from histosynth.study.replicates import Draws, draw, replicate
from histosynth.study.statistics import compare_replicates, one_arm, paired_bootstrap

CLASSES = 3


def scored(
    rng: np.random.Generator, *, skill=(1.0,), patients=20, per=6, runs=2, sharp=1.0, luck=0.2
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """FIXTURE: true classes, probabilities float [S, N, C] of an arm for each skill, patients.

    Some patients are harder than others, for all arms; some trainings are luckier. `sharp` above 1 makes the
    probabilities too sure.
    """
    y = rng.integers(0, CLASSES, patients * per)
    groups = np.repeat(np.arange(patients), per)
    hard = rng.normal(0, 0.4, patients)[groups]
    arms = []
    for one in skill:
        margin = one - hard + rng.normal(0, luck, (runs, 1)) + rng.normal(0, 0.3, (1, patients))[:, groups]
        logits = rng.normal(0, 1, (runs, len(y), CLASSES))
        logits[:, np.arange(len(y)), y] += margin
        powers = np.exp(sharp * logits)
        arms.append(powers / powers.sum(axis=2, keepdims=True))
    return y, arms, groups


def by_hand(metric: str, y: np.ndarray, probs: np.ndarray) -> float:
    """The metric of one run, by scikit-learn or by a loop."""
    if metric == "auroc":
        return float(np.mean([metrics.roc_auc_score(y == k, probs[:, k]) for k in np.unique(y)]))
    if metric == "brier":
        return float(((probs - np.eye(CLASSES)[y]) ** 2).sum(axis=1).mean())
    if metric == "nll":
        return float(metrics.log_loss(y, probs, labels=range(CLASSES)))
    if metric == "balanced_accuracy":
        return float(metrics.balanced_accuracy_score(y, probs.argmax(axis=1)))
    total = 0.0
    sure, right = probs.max(axis=1), probs.argmax(axis=1) == y
    for b in range(15):
        here = (sure > b / 15) & (sure <= (b + 1) / 15)
        if here.any():
            total += here.mean() * abs(right[here].mean() - sure[here].mean())
    return total


METRICS = ("auroc", "brier", "nll", "ece", "balanced_accuracy")


@pytest.mark.parametrize("metric", METRICS)
def test_the_whole_agrees_with_an_independent_implementation(metric, rng):
    y, (probs,), groups = scored(rng)
    found = replicate([metric], y, probs, draw(groups, 2, 10, rng))[metric]
    assert found.whole == pytest.approx([by_hand(metric, y, run) for run in probs], abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_a_replicate_is_the_score_of_the_drawn_tiles(metric, rng):
    y, (probs,), groups = scored(rng)
    probs = probs.round(1) + 0.01  # many ties
    probs /= probs.sum(axis=2, keepdims=True)
    draws = draw(groups, 2, 12, rng)
    found = replicate([metric], y, probs, draws)[metric]
    expected = np.empty((12, 2))
    for i, counts in enumerate(draws.people):
        tiles = np.repeat(np.arange(len(y)), counts[draws.member])
        expected[i] = [by_hand(metric, y[tiles], run[tiles]) for run in probs]
    if metric == "ece":  # whose upward shift is taken out
        expected -= expected.mean(axis=0) - found.whole
    assert found.drawn == pytest.approx(expected, abs=1e-9)


def test_the_order_of_tiles_and_the_names_of_patients_do_not_matter(rng):
    y, (a, b), groups = scored(rng, skill=(1.0, 1.4))
    order = rng.permutation(len(y))
    names = np.array([f"patient-{g:03d}" for g in groups])
    for metric in ("auroc", "ece"):
        there = paired_bootstrap(y, a, b, groups, metric, seed=5, n=200)
        again = paired_bootstrap(y[order], a[:, order], b[:, order], names[order], metric, seed=5, n=200)
        assert again["low"] == pytest.approx(there["low"]) and again["high"] == pytest.approx(there["high"])


def test_a_class_without_tiles_is_left_out_and_one_class_alone_gives_nothing(rng):
    y, (probs,), groups = scored(rng)
    few = y != 2
    found = replicate(["auroc"], y[few], probs[:, few], draw(groups[few], 2, 5, rng))["auroc"]
    mean = [np.mean([metrics.roc_auc_score(y[few] == k, run[few, k]) for k in (0, 1)]) for run in probs]
    assert found.whole == pytest.approx(mean)
    one = y == 0
    draws = draw(groups[one], 2, 5, rng)
    alone = replicate(["auroc"], y[one], probs[:, one], draws)["auroc"]
    assert np.isnan(alone.whole).all()
    assert one_arm(alone, draws) == {"mean": None, "low": None, "high": None}


def test_few_tiles_do_not_shift_the_interval_of_the_calibration_error(rng):
    y, (probs,), groups = scored(rng, patients=15, per=4)
    draws = draw(groups, 2, 500, rng)
    found = one_arm(replicate(["ece"], y, probs, draws)["ece"], draws)
    assert found["low"] < found["mean"] < found["high"]
    assert found["mean"] - found["low"] == pytest.approx(found["high"] - found["mean"], rel=0.6)


def test_probabilities_are_asked_for(rng):
    y, (probs,), groups = scored(rng)
    predicted = probs.argmax(axis=2)
    with pytest.raises(SettingError, match="auroc.*needs probabilities"):
        paired_bootstrap(y, predicted, predicted, groups, "auroc", seed=0)
    with pytest.raises(SettingError, match="Did you mean"):
        paired_bootstrap(y, probs, probs, groups, "aurok", seed=0)
    with pytest.raises(DataError, match="pred_b is not finite"):
        paired_bootstrap(y, probs, np.where(probs > 0.9, np.nan, probs), groups, "ece", seed=0)
    # the same metric, whether from predictions or from probabilities
    there = paired_bootstrap(y, predicted, predicted[::-1], groups, "macro_f1", seed=0, n=100)
    assert paired_bootstrap(y, probs, probs[::-1], groups, "macro_f1", seed=0, n=100) == there


def test_every_patient_drawn_once_gives_the_whole(rng):
    y, (probs,), groups = scored(rng)
    once = Draws(groups, np.ones((1, 20), int), np.ones((1, 2), int))
    for metric, values in replicate(["auroc", "brier", "nll", "macro_f1", "recall:1"], y, probs, once).items():
        assert values.drawn[0] == pytest.approx(values.whole), metric


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["balanced_accuracy", "auroc", "ece", "brier"])
@pytest.mark.parametrize(("runs", "luck"), [(3, 0.05), (3, 0.3), (5, 0.05), (5, 0.3)])
def test_the_intervals_cover_the_truth_about_as_often_as_they_say(metric, runs, luck, capsys):
    """The truth is the mean difference over many studies of this size; the share covered is printed."""
    rng = np.random.default_rng(11)

    def study() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        y, (a, b), groups = scored(rng, skill=(0.8, 1.3), patients=40, runs=runs, luck=luck)
        return y, a, b, groups

    differences = []
    for _ in range(1500):
        y, a, b, groups = study()
        draws = draw(groups, runs, 1, rng)
        values = [replicate([metric], y, arm, draws)[metric].whole.mean() for arm in (a, b)]
        differences.append(values[1] - values[0])
    truth, covered = np.mean(differences), 0
    for seed in range(400):
        y, a, b, groups = study()
        found = paired_bootstrap(y, a, b, groups, metric, seed=seed, n=400)
        covered += found["low"] <= truth <= found["high"]
    with capsys.disabled():
        print(f"\n{metric}, {runs} runs that spread by {luck}: {covered / 4:.1f} % of 400 intervals cover the truth")
    # three runs tell little of how much runs differ: where that is most of it, the interval is too narrow
    assert (0.90 if runs > 3 else 0.86) <= covered / 400 <= 0.99


def test_the_p_value_agrees_with_the_interval(rng):
    for gain in (0.0, 0.1, 0.2, 0.3, 0.5, 2.0):
        y, (a, b), groups = scored(rng, skill=(1.0, 1.0 + gain), runs=3)
        draws = draw(groups, 3, 1000, rng)
        one, other = (replicate(["auroc"], y, arm, draws)["auroc"] for arm in (a, b))
        for level in (0.5, 0.8, 0.95, 0.975):
            found = compare_replicates(one, other, draws, level=level)
            assert (found["p"] < 1 - level) == (found["low"] > 0 or found["high"] < 0)
    assert found["p"] < 1e-4
    assert compare_replicates(one, one, draws)["p"] == 1.0
