"""The same numbers from netcal, torchmetrics and MAPIE, which share no code with ours."""

from __future__ import annotations

import numpy as np
import pytest

from histosynth.classify.calibration import classwise_ece, ece, fit_conformal, fit_temperature, mce, softmax
from tests.classify.calibration.simulate import simulated

_CASES = [(500, 4, 1.5, 0), (2000, 9, 4.0, 1), (40, 2, 1.0, 2), (300, 3, 30.0, 3)]


@pytest.mark.parametrize(("n", "k", "scale", "seed"), _CASES)
@pytest.mark.parametrize("bins", [10, 15])
def test_netcal(n, k, scale, seed, bins):
    metrics = pytest.importorskip("netcal.metrics")
    logits, y = simulated(n, k, scale=scale, seed=seed)
    probs = softmax(1.7 * logits)
    # of two columns netcal takes the second one for the probability of "yes": give it the confidence then
    theirs = (probs, y) if k > 2 else (probs.max(axis=1), (probs.argmax(axis=1) == y).astype(int))
    assert ece(probs, y, bins=bins) == pytest.approx(metrics.ECE(bins).measure(*theirs), abs=1e-9)
    assert mce(probs, y, bins=bins) == pytest.approx(metrics.MCE(bins).measure(*theirs), abs=1e-9)
    columns = [metrics.ECE(bins).measure(probs[:, c], (y == c).astype(int)) for c in range(k)]
    assert classwise_ece(probs, y, bins=bins) == pytest.approx(np.mean(columns), abs=1e-9)


@pytest.mark.parametrize(("n", "k", "scale", "seed"), _CASES)
@pytest.mark.parametrize("bins", [10, 15])
def test_torchmetrics(n, k, scale, seed, bins):
    torch = pytest.importorskip("torch")
    error = pytest.importorskip("torchmetrics.functional.classification").multiclass_calibration_error
    logits, y = simulated(n, k, scale=scale, seed=seed)
    probs = softmax(1.7 * logits)
    for norm, ours in (("l1", ece), ("max", mce)):
        theirs = error(torch.from_numpy(probs), torch.from_numpy(y), num_classes=k, n_bins=bins, norm=norm)
        assert ours(probs, y, bins=bins) == pytest.approx(float(theirs), abs=1e-6)


def test_temperature_of_netcal():
    scaling = pytest.importorskip("netcal.scaling").TemperatureScaling
    logits, y = simulated(3000, 4, scale=2.0, seed=5)
    probs = softmax(2.5 * logits)
    ours = softmax(2.5 * logits, fit_temperature(2.5 * logits, y).temperature)
    theirs = scaling()
    theirs.fit(probs, y)
    np.testing.assert_allclose(ours, theirs.transform(probs), atol=2e-3)


def test_least_ambiguous_sets_of_mapie():
    mapie = pytest.importorskip("mapie.classification")
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):
        """A classifier whose input is its output."""

        classes_ = np.arange(5)
        n_features_in_ = 5

        def fit(self, x, y):
            return self

        def predict_proba(self, x):
            return x

        def predict(self, x):
            return x.argmax(axis=1)

        def __sklearn_is_fitted__(self):
            return True

    logits, y = simulated(800, 5, scale=1.5, seed=6)
    probs, none = softmax(logits), np.zeros(400)
    for alpha in (0.05, 0.1, 0.3):
        theirs = mapie.SplitConformalClassifier(
            Given(), confidence_level=1 - alpha, conformity_score="lac", prefit=True
        ).conformalize(probs[:400], y[:400])
        sets = theirs.predict_set(probs[400:])[1][:, :, 0]
        ours = fit_conformal(probs[:400], y[:400], none, method="lac", alpha=alpha).sets(probs[400:], none)
        assert np.array_equal(ours, sets)
