"""Does a tile show what it was asked for: labels, references, pairs."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score

from histosynth.core.errors import DataError
from histosynth.evaluate.consistency import label_consistency, pair_consistency, reference_cosine

CLASSES = ("A", "B", "C")


def predictions(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, n, p=[0.7, 0.2, 0.1])
    values = rng.dirichlet(np.ones(3), n)
    values[np.arange(n), labels] += 0.4
    return values / values.sum(1, keepdims=True), labels


def test_label_consistency_is_balanced_accuracy():
    values, labels = predictions(300)
    got = label_consistency(values, labels, CLASSES)
    assert got["label_consistency"] == pytest.approx(balanced_accuracy_score(labels, values.argmax(1)))
    assert got["label_consistency_low"] < got["label_consistency"] < got["label_consistency_high"]
    mixed = np.random.default_rng(1).permutation(300)
    assert label_consistency(values[mixed], labels[mixed], CLASSES) == pytest.approx(got)


def test_label_consistency_interval_covers():
    truth = label_consistency(*predictions(200_000), CLASSES)["label_consistency"]
    inside = 0
    for seed in range(200):
        got = label_consistency(*predictions(120, seed + 1), CLASSES)
        inside += got["label_consistency_low"] <= truth <= got["label_consistency_high"]
    assert inside >= 180  # 95 % of 200 is 190; fewer than 180 has probability below 0.001


def test_a_few_perfect_tiles_are_no_certainty():
    got = label_consistency(np.eye(3)[[0, 0, 1, 1]], np.array([0, 0, 1, 1]), CLASSES)
    assert got["label_consistency"] == 1 and got["label_consistency_low"] < 0.9
    assert "label_consistency_C" not in got


def test_refuses_logits_and_other_shapes():
    with pytest.raises(DataError, match="sum to 1"):
        label_consistency(np.array([[3.0, -1.0, 0.5]]), np.array([0]), CLASSES)
    with pytest.raises(DataError, match="2 labels and 3 classes"):
        label_consistency(np.eye(3), np.array([0, 1]), CLASSES)


def test_reference_cosine_tells_conditioning_from_class():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 100)
    centres = rng.normal(size=(2, 30)) * 2
    reference = centres[labels] + rng.normal(size=(200, 30))
    follows = reference + 0.1 * rng.normal(size=(200, 30))
    ignores = centres[labels] + rng.normal(size=(200, 30))
    close, apart = reference_cosine(follows, reference, labels), reference_cosine(ignores, reference, labels)
    assert close["reference_cosine"] > 0.98 > close["reference_cosine_other"] + 0.1
    assert apart["reference_cosine"] == pytest.approx(apart["reference_cosine_other"], abs=0.05)
    scaled = reference_cosine(follows * 7, reference / 3, labels)
    assert scaled == pytest.approx(close)
    alone = reference_cosine(follows[:2], reference[:2], np.array([0, 1]))
    assert np.isnan(alone["reference_cosine_other"])
    with pytest.raises(DataError, match="199 references"):
        reference_cosine(follows, reference[1:], labels)


def test_pair_consistency_is_agreement_and_kappa():
    rng = np.random.default_rng(0)
    real = rng.integers(0, 3, 400)
    synthetic = np.where(rng.random(400) < 0.6, real, rng.integers(0, 3, 400))
    got = pair_consistency(real, synthetic, CLASSES)
    assert got["pair_consistency"] == pytest.approx((real == synthetic).mean())
    assert got["pair_consistency_kappa"] == pytest.approx(cohen_kappa_score(real, synthetic))
    assert got["pair_consistency_low"] < got["pair_consistency"] < got["pair_consistency_high"]
    # everything called one class agrees by chance alone
    same = pair_consistency(np.zeros(9, int), np.zeros(9, int), CLASSES)
    assert same["pair_consistency"] == same["pair_consistency_chance"] == 1
    with pytest.raises(DataError, match="indices into the classes"):
        pair_consistency(real, synthetic + 1, CLASSES)
