"""Streaming moments, and the distances made of them."""

import numpy as np
import pytest

from histosynth.core.errors import DataError
from histosynth.evaluate.frechet import frechet, frechet_distance, frechet_infinity, frechet_of_moments
from histosynth.evaluate.moments import Moments
from histosynth.evaluate.settings import Protocol


def rows(n: int, dim: int, seed: int = 0, offset: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dim)) @ rng.normal(size=(dim, dim)) + offset


@pytest.mark.parametrize("sizes", [[200], [1, 199], [50, 0, 70, 80], [1] * 200])
def test_equal_to_numpy_however_the_rows_come(sizes):
    x = rows(200, 7, offset=1e4)  # sums of squares would lose eight digits here
    found = Moments.of(np.split(x, np.cumsum(sizes)[:-1]))
    assert found.count == 200
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False), rtol=1e-10, atol=1e-10)


def test_float32_batches_are_added_in_float64():
    x = rows(5000, 4, offset=3e3).astype(np.float32)
    found = Moments.of(np.array_split(x, 50)).covariance
    np.testing.assert_allclose(found, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9)


def test_merging_equals_seeing_all():
    x = rows(90, 5)
    parts = [Moments.of([x[a:b]]) for a, b in ((0, 20), (20, 21), (21, 90))]
    merged = Moments().merge(parts[0]).merge(Moments()).merge(parts[1]).merge(parts[2])
    np.testing.assert_allclose(merged.covariance, np.cov(x, rowvar=False), rtol=1e-12)
    assert Moments().merge(parts[0]).count == 20
    assert parts[0].count == 20, "merging leaves the other as it was"


def test_distance_of_moments_is_the_distance_of_the_features():
    x, y = rows(300, 20), rows(280, 20, seed=1)
    streamed = frechet_of_moments(Moments.of(np.array_split(x, 7)), Moments.of(np.array_split(y, 9)))
    assert streamed == pytest.approx(frechet_distance(x, y), rel=1e-9)


def test_refusals():
    with pytest.raises(DataError, match="same encoder"):
        Moments.of([np.zeros((3, 4)), np.zeros((3, 5))])
    with pytest.raises(DataError, match="not finite"):
        Moments.of([np.full((3, 4), np.nan)])
    with pytest.raises(DataError, match="1 tile"):
        _ = Moments.of([np.zeros((1, 4))]).covariance


def test_extrapolation_takes_out_the_bias():
    """Gaussians with commuting covariances: the distance is known, the plain estimate is biased upwards."""
    dim, spread = 16, np.arange(1, 17) ** -0.5
    truth = dim * 0.1**2 + ((0.3 * spread) ** 2).sum()
    plain, extrapolated = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(200, dim)) * spread, rng.normal(size=(200, dim)) * spread * 1.3 + 0.1
        plain.append(frechet_distance(x, y))
        extrapolated.append(frechet_infinity(x, y, Protocol(replicates=0))["frechet_infinity"])
    error = np.std(extrapolated) / np.sqrt(12)
    assert abs(np.mean(extrapolated) - truth) < 3 * error
    assert np.mean(plain) - truth > 5 * error


def test_extrapolation_refuses_few_tiles_and_gives_an_interval():
    x, y = rows(60, 10), rows(60, 10, seed=1)
    got = frechet_infinity(x, y)
    assert got["frechet_infinity_low"] < got["frechet_infinity"] < got["frechet_infinity_high"]
    assert got["frechet_infinity"] < frechet(x, y)["frechet"]
    with pytest.raises(DataError, match="19 tiles a side are fewer than twice the 10 dimensions"):
        frechet_infinity(x[:19], y)


def test_the_peers_give_the_same_distance():
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    pytorch_fid = pytest.importorskip("pytorch_fid.fid_score")
    x, y = rows(200, 30), rows(260, 30, seed=1, offset=0.2)
    ours = frechet_distance(x, y)
    stats = [{"mu": a.mean(0), "sigma": np.cov(a, rowvar=False)} for a in (x, y)]
    theirs = fidelity.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(float(theirs), rel=1e-6)
    second = pytorch_fid.calculate_frechet_distance(*(v for s in stats for v in (s["mu"], s["sigma"])))
    assert ours == pytest.approx(float(second), rel=1e-6)
