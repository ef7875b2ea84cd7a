"""The interval covers what it should, finds what is there, and the word always agrees with it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from histosynth.core.errors import DataError, SettingError
from histosynth.study.replicates import Replicated, draw
from histosynth.study.statistics import compare_replicates, holm, intervals, paired_bootstrap, verdict

_CLASSES = 4


def _study(gain: float, rng: np.random.Generator, *, patients=40, runs=4, per=8, luck=0.02):
    """Two arms whose chances to be right differ by `gain`; patients and runs have effects of their own."""
    y = rng.integers(0, _CLASSES, (patients, per))
    hard = rng.normal(0, 0.08, (patients, 1))  # shared by both arms: pairing takes it out
    arms = []
    taste = rng.normal(0, 0.05, (2, 1, patients, 1))  # a patient suits one arm better than the other
    fortune = rng.normal(0, luck, (2, runs, 1, 1))  # of a training
    for arm in (0, 1):
        chance = np.clip(0.6 + gain * arm + hard + taste[arm] + fortune[arm], 0.05, 0.95)
        right = rng.random((runs, patients, per)) < chance
        wrong = (y + rng.integers(1, _CLASSES, (runs, patients, per))) % _CLASSES
        arms.append(np.where(right, y, wrong).reshape(runs, -1))
    return y.ravel(), arms[0], arms[1], np.repeat(np.arange(patients), per)


@pytest.mark.parametrize("luck", [0.02, 0.06])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(luck):
    rng = np.random.default_rng(0)
    covered = []
    for seed in range(200):
        y, a, b, groups = _study(0.05, rng, runs=3, luck=luck)
        found = paired_bootstrap(y, a, b, groups, "accuracy", seed=seed, n=300)
        covered.append(found["low"] <= 0.05 <= found["high"])
    assert 0.89 <= np.mean(covered) <= 0.99


def test_a_known_difference_is_found_and_none_is_mostly_not():
    rng = np.random.default_rng(1)
    words = {}
    for gain in (0.15, 0.0, -0.15):
        words[gain] = [
            verdict(paired_bootstrap(*_study(gain, rng), "balanced_accuracy", seed=seed, n=300), name="GAN").word
            for seed in range(40)
        ]
    assert words[0.15].count("helps") >= 36
    assert words[-0.15].count("hurts") >= 36
    assert words[0.0].count("no evidence") >= 35


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "macro_f1", "recall:2"])
def test_the_difference_agrees_with_scikit_learn(metric):
    y, a, b, groups = _study(0.1, np.random.default_rng(2))
    reference = {
        "accuracy": metrics.accuracy_score,
        "balanced_accuracy": metrics.balanced_accuracy_score,
        "macro_f1": lambda t, p: metrics.f1_score(t, p, average="macro"),
        "recall:2": lambda t, p: metrics.recall_score(t, p, labels=[2], average="macro"),
    }[metric]
    found = paired_bootstrap(y, a, b, groups, metric, seed=0, n=200)
    assert found["value_a"] == pytest.approx(np.mean([reference(y, p) for p in a]))
    assert found["value_b"] == pytest.approx(np.mean([reference(y, p) for p in b]))
    assert found["mean"] == pytest.approx(found["value_b"] - found["value_a"])
    assert found["low"] < found["mean"] < found["high"]
    assert (found["tiles"], found["patients"], found["seeds"]) == (320, 40, 4)
    json.dumps(found, allow_nan=False)


def test_the_same_arm_twice_differs_by_nothing():
    y, a, _, groups = _study(0.0, np.random.default_rng(3))
    found = paired_bootstrap(y, a, a, groups, "macro_f1", seed=0)
    assert (found["mean"], found["low"], found["high"]) == (0.0, 0.0, 0.0)
    assert verdict(found, name="Copies").word == "no evidence"


def test_swapping_the_arms_changes_the_sign_and_a_seed_repeats_itself():
    y, a, b, groups = _study(0.1, np.random.default_rng(4))
    there = paired_bootstrap(y, a, b, groups, "balanced_accuracy", seed=7, n=200)
    back = paired_bootstrap(y, b, a, groups, "balanced_accuracy", seed=7, n=200)
    assert back["mean"] == -there["mean"] and back["low"] == pytest.approx(-there["high"])
    assert paired_bootstrap(y, a, b, groups, "balanced_accuracy", seed=7, n=200) == there
    assert paired_bootstrap(y, a, b, groups, "balanced_accuracy", seed=8, n=200)["low"] != there["low"]


def test_tiles_of_a_patient_are_not_independent():
    rng = np.random.default_rng(5)
    # each patient is all right or all wrong in arm b: forty facts, not 320
    y, a, _, groups = _study(0.0, rng)
    b = np.where(rng.random(40)[groups] < 0.6, y, (y + 1) % _CLASSES)[None].repeat(4, axis=0)
    by_patient = paired_bootstrap(y, a, b, groups, "accuracy", seed=0, n=500)
    by_tile = paired_bootstrap(y, a, b, np.arange(len(y)), "accuracy", seed=0, n=500)
    width = [f["high"] - f["low"] for f in (by_patient, by_tile)]
    assert width[0] > 1.8 * width[1]


def test_runs_that_disagree_widen_the_interval():
    y, a, _, groups = _study(0.0, np.random.default_rng(6))
    wrong = (y + 1) % _CLASSES
    mixed = np.stack([y, wrong, y, wrong])
    steady = np.stack([np.where(np.arange(len(y)) % 2, y, wrong)] * 4)
    wide, narrow = (paired_bootstrap(y, a, b, groups, "accuracy", seed=0, n=500) for b in (mixed, steady))
    assert wide["high"] - wide["low"] > 2 * (narrow["high"] - narrow["low"])


def test_few_patients_and_single_runs_are_said():
    y, a, b, groups = _study(0.1, np.random.default_rng(7), patients=3, runs=1)
    found = paired_bootstrap(y, a, b, groups, "accuracy", seed=0, n=100)
    assert any("Only 3 patients" in note for note in found["notes"])
    assert any("One run" in note for note in found["notes"])
    assert "Fewer than five patients" in verdict(found, name="GAN").sentence
    alone = paired_bootstrap(y, a, b, np.zeros(len(y), dtype=int), "accuracy", seed=0, n=100)
    assert alone["low"] is None and alone["high"] is None
    assert verdict(alone, name="GAN").word == "no evidence"


def test_a_class_that_few_patients_have_can_drop_out_of_a_replicate():
    y = np.array([0, 0, 0, 0, 0, 1])
    a = np.zeros((2, 6), dtype=int)
    found = paired_bootstrap(y, a, y[None].repeat(2, axis=0), np.arange(6), "recall:1", seed=0, n=200)
    assert found["mean"] == 1.0 and any("left out" in note for note in found["notes"])
    right = y[None].repeat(2, axis=0)
    whole = paired_bootstrap(y, a, right, np.arange(6), "balanced_accuracy", seed=0, n=200)
    assert whole["low"] is not None


@given(
    st.floats(-1, 1),
    st.floats(-1, 1),
    st.floats(0, 1),
    st.integers(1, 500),
    st.integers(1, 9),
)
def test_the_word_always_agrees_with_the_interval(one, other, where, tiles, patients):
    low, high = sorted((one, other))
    mean = low + where * (high - low)
    row = {"mean": mean, "low": low, "high": high, "level": 0.95, "metric": "balanced_accuracy"}
    spoken = verdict(row | {"tiles": tiles, "patients": patients, "seeds": 3}, name="GAN")
    assert (spoken.word == "helps") == (low > 0)
    assert (spoken.word == "hurts") == (high < 0)
    assert (spoken.word == "no evidence") == (low <= 0 <= high)
    claims = [word for word in ("helps", "hurts", "No evidence") if word in spoken.sentence]
    assert claims == [spoken.word if spoken.word != "no evidence" else "No evidence"]
    # the numbers in the sentence must not contradict the word by their rounding
    said = [float(x) for x in re.search(r"interval (\S+) to (\S+) ", spoken.sentence).groups()]
    assert (said[0] > 0) == (low > 0) and (said[1] < 0) == (high < 0)


def test_sentences():
    row = {"metric": "balanced_accuracy", "level": 0.95, "tiles": 412, "patients": 53, "seeds": 3}
    helps = verdict(row | {"mean": 0.041, "low": 0.012, "high": 0.07}, name="GAN")
    assert helps.sentence == (
        "GAN helps: balanced accuracy +4.1 points, 95 % interval +1.2 to +7.0 (412 tiles, 53 patients, 3 runs)."
    )
    unsure = verdict(row | {"mean": 0.01, "low": -0.02, "high": 0.04}, name="GAN")
    assert unsure.sentence.startswith("No evidence that GAN changes balanced accuracy: +1.0 points, 95 % inter")
    assert "+0.02 to" in verdict(row | {"mean": 0.01, "low": 0.0002, "high": 0.04}, name="GAN").sentence


def test_unusable_input_is_refused():
    y, a, b, groups = _study(0.0, np.random.default_rng(8), patients=4)
    with pytest.raises(DataError, match="same training seeds"):
        paired_bootstrap(y, a[:2], b, groups, "accuracy", seed=0)
    with pytest.raises(DataError, match="one patient a tile"):
        paired_bootstrap(y, a, b, groups[:-1], "accuracy", seed=0)
    with pytest.raises(DataError, match="pred_b"):
        paired_bootstrap(y, a, b - 4, groups, "accuracy", seed=0)
    with pytest.raises(SettingError, match="balanced_accuracy"):
        paired_bootstrap(y, a, b, groups, "balanced_acuracy", seed=0)
    with pytest.raises(DataError, match="no tile is of class 9"):
        paired_bootstrap(y, a, b, groups, "recall:9", seed=0)
    with pytest.raises(SettingError, match="level"):
        paired_bootstrap(y, a, b, groups, "accuracy", seed=0, level=1.0)


def test_intervals_of_one_arm_hold_its_scores():
    y, a, _, groups = _study(0.0, np.random.default_rng(9))
    found = intervals(y, a, groups, ["accuracy", "recall:1"], seed=0, n=300)
    for metric, truth in (("accuracy", a == y), ("recall:1", (a == y)[:, y == 1])):
        low, high = found[metric]
        assert low < truth.mean() < high and high - low < 0.25
    one = np.zeros(len(y), dtype=int)
    assert intervals(y, a, one, ["accuracy"], seed=0) == {"accuracy": (None, None)}


@given(st.floats(-0.2, 0.2), st.floats(-0.2, 0.2), st.floats(0.001, 0.1))
def test_with_a_margin_the_word_and_what_is_ruled_out_agree_with_the_interval(one, other, margin):
    low, high = sorted((one, other))
    row = {"mean": (low + high) / 2, "low": low, "high": high, "level": 0.95, "metric": "balanced_accuracy"}
    counts = {"tiles": 90, "patients": 12, "seeds": 3}
    spoken, plain = verdict(row | counts, name="GAN", margin=margin), verdict(row | counts, name="GAN")
    inside = -margin < low and high < margin
    assert spoken.word == ("no relevant difference" if inside and plain.word == "no evidence" else plain.word)
    assert ("smaller than" in spoken.sentence) == inside
    assert ("Ruled out" in spoken.sentence) == (spoken.word == "no evidence")
    assert ("gain may be as small" in spoken.sentence) == (spoken.word == "helps" and not inside)


def test_sentences_with_a_margin():
    row = {"metric": "balanced_accuracy", "level": 0.95, "tiles": 412, "patients": 53, "seeds": 3}

    def said(mean, low, high):
        return verdict(row | {"mean": mean, "low": low, "high": high}, name="GAN", margin=0.02).sentence

    assert said(0.01, -0.02, 0.04).endswith(
        "Ruled out: a gain of more than 4 points, and a loss of more than 2 points."
    )
    assert said(0.001, -0.012, 0.014).startswith("GAN makes no relevant difference to balanced accuracy: +0.1 points,")
    assert said(0.001, -0.012, 0.014).endswith("Whatever the effect, it is smaller than 2 points.")
    assert said(0.041, 0.01, 0.07).endswith("The gain may be as small as 1 point.")
    assert said(-0.041, -0.07, -0.012).endswith("The loss may be as small as 1.2 points.")
    assert said(0.008, 0.002, 0.015).startswith("GAN helps:") and "smaller than 2 points" in said(0.008, 0.002, 0.015)


def test_holm():
    # by hand: 0.01 x 4, 0.02 x 3, then never less than the one before
    assert holm([0.02, 0.01, None, 0.03, 0.9]) == pytest.approx([0.06, 0.04, None, 0.06, 0.9], nan_ok=True)
    assert holm([]) == [] and holm([0.7, 0.8]) == [1.0, 1.0]


def test_a_difference_that_never_varies_needs_enough_patients():
    for patients, known in ((3, False), (5, False), (6, True), (12, True)):
        y, groups = np.tile([0, 1], 2 * patients), np.repeat(np.arange(patients), 4)
        wrong = np.where(np.arange(len(y)) % 4 == 0, 1 - y, y)
        for other, word in ((wrong, "no relevant difference"), (y, "helps")):
            found = paired_bootstrap(y, wrong[None], other[None], groups, "accuracy", seed=0, n=100)
            assert (found["low"] == found["high"] == found["mean"]) == known
            assert (found["low"] is None) == (not known) == any("too few to say" in note for note in found["notes"])
            assert verdict(found, name="X", margin=0.02).word == (word if known else "no evidence")


def test_the_order_of_a_sum_is_no_difference():
    groups = np.repeat(np.arange(12), 10)
    draws = draw(groups, 1, 100, np.random.default_rng(0))
    a = Replicated(np.array([0.1 + 0.2 + 0.3]), np.full((100, 1), 0.1 + 0.2 + 0.3))
    b = Replicated(np.array([0.3 + 0.2 + 0.1]), np.full((100, 1), 0.3 + 0.2 + 0.1))
    assert (b - a).whole[0] != 0
    found = compare_replicates(a, b, draws)
    assert found["mean"] == found["low"] == found["high"] == 0 and found["p"] == 1
