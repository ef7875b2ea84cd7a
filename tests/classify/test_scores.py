"""Scores against scikit-learn, and what they say when they are undefined."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn import metrics

from histosynth.classify.calibration import softmax
from histosynth.classify.scores import (
    accuracy,
    auroc,
    balanced_accuracy,
    confusion_matrix,
    macro_f1,
    scores,
)
from histosynth.core.errors import DataError

_CLASSES = ("A", "B", "C", "D")


def test_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    probs = softmax(np.round(rng.normal(size=(300, 4)), 1))  # rounded: ties
    y = rng.integers(0, 4, 300)
    predicted = probs.argmax(axis=1)
    result = scores(probs, y, _CLASSES)
    assert result["accuracy"] == pytest.approx(metrics.accuracy_score(y, predicted))
    assert result["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(y, predicted))
    assert result["macro_f1"] == pytest.approx(metrics.f1_score(y, predicted, average="macro"))
    assert result["auroc"] == pytest.approx(metrics.roc_auc_score(y, probs, multi_class="ovr"))
    assert np.array_equal(result["confusion"], metrics.confusion_matrix(y, predicted))
    p, r, f, s = metrics.precision_recall_fscore_support(y, predicted)
    for k, name in enumerate(_CLASSES):
        row = result["per_class"][name]
        assert [row["precision"], row["recall"], row["f1"]] == pytest.approx([p[k], r[k], f[k]])
        assert row["support"] == s[k]
    assert result["undefined"] == {}


def test_a_class_without_tiles_is_left_out_and_said():
    probs = np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1]])
    result = scores(probs, np.array([0, 1, 1]), ("A", "B", "C"))
    assert result["balanced_accuracy"] == pytest.approx(0.75)
    assert result["per_class"]["C"] == {
        "recall": None,
        "precision": None,
        "f1": None,
        "auroc": None,
        "support": 0,
    }
    assert set(result["undefined"]) == {"C.recall", "C.precision", "C.f1", "C.auroc"}
    json.dumps(result, allow_nan=False)


def test_one_class_has_no_auroc():
    result = scores(np.array([[0.7, 0.3], [0.4, 0.6]]), np.array([0, 0]), ("A", "B"))
    assert result["auroc"] is None and "auroc" in result["undefined"]
    assert auroc(np.array([0.1, 0.2]), np.array([True, True])) is None


def test_many_confusions_at_once():
    rng = np.random.default_rng(1)
    stack = rng.integers(0, 9, (5, 7, 4, 4))
    for score in (accuracy, balanced_accuracy, macro_f1):
        assert score(stack).shape == (5, 7)
        assert score(stack)[2, 3] == pytest.approx(score(stack[2, 3]))
    assert np.isnan(balanced_accuracy(np.zeros((3, 3))))


def test_confusion_rows_are_true_classes():
    assert confusion_matrix(np.array([0, 0, 1]), np.array([1, 1, 1]), 2).tolist() == [[0, 2], [0, 1]]


def test_classes_must_fit():
    with pytest.raises(DataError, match="3 classes"):
        scores(_two := np.array([[0.5, 0.5]]), np.array([0]), ("A", "B", "C"))
    assert _two.shape == (1, 2)
