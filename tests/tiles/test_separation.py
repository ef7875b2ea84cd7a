"""Class separation: against scipy and scikit-learn, against a closed form, and under changes that must not matter."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import mahalanobis as scipy_mahalanobis
from scipy.stats import kruskal as scipy_kruskal
from sklearn.covariance import EmpiricalCovariance
from sklearn.metrics import silhouette_score

from histosynth.core.errors import DataError
from histosynth.tiles.probes import separation as s


def clouds(seed: int = 0, sizes: tuple[int, ...] = (40, 25, 60), dims: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    parts = [rng.normal(size=(n, dims)) @ rng.normal(size=(dims, dims)) + rng.normal(0, 2, dims) for n in sizes]
    return np.concatenate(parts), np.repeat(np.arange(len(sizes)), sizes)


def test_distances_agree_with_scipy_and_scikit_learn() -> None:
    x, y = clouds()
    found = s.separation(x, y, 3)
    centres = np.array([x[y == k].mean(0) for k in range(3)])
    within = np.concatenate([x[y == k] - centres[k] for k in range(3)])
    pooled = EmpiricalCovariance(assume_centered=True).fit(within).covariance_ * len(x) / (len(x) - 3)
    inverse = np.linalg.inv(pooled)
    for i in range(3):
        for j in range(3):
            assert found.euclidean[i, j] == pytest.approx(np.linalg.norm(centres[i] - centres[j]))
            assert found.mahalanobis[i, j] == pytest.approx(scipy_mahalanobis(centres[i], centres[j], inverse))
    assert found.silhouette == pytest.approx(silhouette_score(x, y))
    assert found.counts.tolist() == [40, 25, 60]


def test_bhattacharyya_agrees_with_the_overlap_of_the_densities() -> None:
    # the distance is -ln of the integral of sqrt(p q); Monte Carlo over p gives it without the closed form
    x, y = clouds(3, (200, 200))
    found = s.bhattacharyya(x, y, 2)
    a, b = (x[y == k] for k in range(2))
    means, covariances = [v.mean(0) for v in (a, b)], [np.cov(v.T) for v in (a, b)]

    def log_density(points: np.ndarray, k: int) -> np.ndarray:
        step = points - means[k]
        return -0.5 * (np.einsum("ni,ij,nj->n", step, np.linalg.inv(covariances[k]), step)
                       + np.linalg.slogdet(covariances[k])[1])  # fmt: skip

    middle = (np.array(means).mean(0), 2 * (covariances[0] + covariances[1]) + np.cov(np.array(means).T))
    draw = np.random.default_rng(0).multivariate_normal(*middle, 400_000)
    step = draw - middle[0]
    log_middle = -0.5 * (np.einsum("ni,ij,nj->n", step, np.linalg.inv(middle[1]), step)
                         + np.linalg.slogdet(middle[1])[1])  # fmt: skip
    overlap = np.exp((log_density(draw, 0) + log_density(draw, 1)) / 2 - log_middle).mean()
    assert found[0, 1] == pytest.approx(-np.log(overlap), rel=0.03)
    assert found[0, 0] == pytest.approx(0, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_kruskal_agrees_with_scipy_with_and_without_ties(seed: int, ties: bool) -> None:
    x, y = clouds(seed, (12, 7, 20, 5), 1)
    values = np.round(x[:, 0]) if ties else x[:, 0]
    h, epsilon = s.kruskal(values, y)
    assert h == pytest.approx(scipy_kruskal(*(values[y == k] for k in range(4))).statistic)
    assert epsilon == pytest.approx(max((h - 3) / (len(y) - 4), 0))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_a_linear_map_of_the_features_changes_no_relative_distance(seed: int) -> None:
    x, y = clouds(seed)
    rng = np.random.default_rng(seed + 1)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    mapped = x @ (turn * rng.uniform(0.3, 3, 3)) @ turn.T + rng.normal(size=3)
    for measure in (s.mahalanobis, s.bhattacharyya):
        assert np.allclose(measure(mapped, y, 3), measure(x, y, 3), rtol=1e-6, atol=1e-9)
    assert s.silhouette(x @ turn * 5 + 1, y) == pytest.approx(s.silhouette(x, y))
    assert s.kruskal(np.exp(x[:, 0]), y) == pytest.approx(s.kruskal(x[:, 0], y))


def test_the_order_of_tiles_and_of_classes_does_not_matter() -> None:
    x, y = clouds(5)
    order = np.random.default_rng(0).permutation(len(x))
    swap = np.array([2, 0, 1])
    for measure in (s.euclidean, s.mahalanobis, s.bhattacharyya):
        assert np.allclose(measure(x[order], y[order], 3), measure(x, y, 3))
        assert np.allclose(measure(x, swap[y], 3)[np.ix_(swap, swap)], measure(x, y, 3))


def test_small_chunks_give_the_same_silhouette(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = clouds(7)
    whole = s.silhouette(x, y)
    monkeypatch.setattr(s, "_CHUNK", 7)
    assert s.silhouette(x, y) == pytest.approx(whole)


def test_a_class_of_one_tile_and_an_empty_class_are_left_out_and_nothing_else_is() -> None:
    x, y = clouds(1, (30, 30))
    x, y = np.vstack([x, [[9.0, 9, 9]]]), np.append(y, 2)
    found = s.separation(x, y, 4)
    assert np.isfinite(found.mahalanobis[:3, :3]).all() and np.isnan(found.mahalanobis[3]).all()
    assert np.isfinite(found.bhattacharyya[:2, :2]).all() and np.isnan(found.bhattacharyya[2:]).all()
    assert found.silhouette == pytest.approx(silhouette_score(x, y))
    assert found.mahalanobis[0, 1] == pytest.approx(s.mahalanobis(x[:60], y[:60], 2)[0, 1])
    assert np.isfinite(s.mean_off_diagonal(found.bhattacharyya))


def test_tiles_that_are_all_alike_are_far_but_not_infinitely_far() -> None:
    x, y = clouds(2, (50, 50))
    x[y == 1] = [1.0, 2, 3]  # such as white background
    found = s.bhattacharyya(x, y, 2)
    assert np.isfinite(found).all() and found[0, 1] > 3
    flat = np.tile(np.arange(100.0)[:, None], 3)  # one line in colour space: the covariance has rank one
    assert np.isfinite(s.separation(flat, y, 2).mahalanobis).all()
    alone = s.separation(np.eye(3), np.arange(3), 3)
    assert np.isnan(alone.mahalanobis).all() and np.isnan(alone.kruskal).all() and np.isfinite(alone.euclidean).all()
    points = s.separation(np.repeat(np.eye(2), 5, axis=0), np.repeat([0, 1], 5), 2)
    assert points.euclidean[0, 1] > 1 and np.isnan(points.bhattacharyya).all() and points.silhouette == 1
    constant = s.separation(np.zeros((6, 2)), np.repeat([0, 1], 3), 2)
    assert constant.epsilon_squared.tolist() == [0, 0] and constant.silhouette == 0
    assert np.isnan(s.separation(np.ones((4, 2)), np.zeros(4, int), 1).silhouette)


def test_wrong_input_is_named() -> None:
    with pytest.raises(DataError, match="shape"):
        s.separation(np.zeros((3, 2)), np.zeros(4, int), 2)
    with pytest.raises(DataError, match="not finite"):
        s.separation(np.full((3, 2), np.nan), np.zeros(3, int), 2)
    with pytest.raises(DataError, match="from 0 to 5"):
        s.separation(np.zeros((2, 2)), np.array([0, 5]), 2)


def test_mean_colour() -> None:
    tile = np.zeros((2, 3, 4, 4), np.uint8)
    tile[1, 0], tile[1, 2, :2] = 255, 255
    assert s.mean_rgb(tile).tolist() == [[0, 0, 0], [1, 0, 0.5]]
    assert np.isnan(s.mean_off_diagonal(np.zeros((1, 1))))
