"""The same features through our functions and through the packages that the field uses, to 1e-6; and what must
not matter: order, batches, precision of the input, duplicates, which side is which, one thread or two."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, spatial

from histosynth.core.errors import DataError
from histosynth.evaluate import METRICS, neighbours
from histosynth.evaluate.coverage import prdc
from histosynth.evaluate.diversity import mean_pairwise, vendi
from histosynth.evaluate.frechet import frechet_distance, frechet_of_moments
from histosynth.evaluate.kernel import cmmd_paper, gaussian, kid, mmd2, polynomial
from histosynth.evaluate.moments import Moments
from histosynth.evaluate.neighbours import bounds, kth_squared, nearest
from histosynth.evaluate.settings import Protocol

SHAPES = [(300, 260, 48, 3), (260, 300, 200, 5), (150, 400, 7, 10)]


def encoded(n: int, dim: int, seed: int, clusters: int = 4) -> np.ndarray:
    """Features as encoders give: clusters, a decaying spectrum, and positive like a pooled activation."""
    rng = np.random.default_rng(seed)
    middle = np.random.default_rng(99).normal(size=(clusters, dim))
    rows = middle[rng.integers(clusters, size=n)] + rng.normal(size=(n, dim))
    return np.abs(rows * np.arange(1, dim + 1) ** -0.5) + 0.3


@pytest.fixture(params=SHAPES, ids=str)
def sides(request):
    n, m, dim, k = request.param
    return encoded(n, dim, 1), encoded(m, dim, 2) * 1.05 + 0.02, k


def test_frechet_is_that_of_the_peers(sides):
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    pytorch_fid = pytest.importorskip("pytorch_fid.fid_score")
    x, y, _ = sides
    ours = frechet_distance(x, y)
    first, second = ({"mu": a.mean(0), "sigma": np.cov(a, rowvar=False)} for a in (x, y))
    theirs = fidelity.fid_statistics_to_metric(first, second, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(float(theirs), rel=1e-6)
    if x.shape[1] < len(x):  # a covariance of full rank; else its square root is theirs to approximate
        value = pytorch_fid.calculate_frechet_distance(first["mu"], first["sigma"], second["mu"], second["sigma"])
        assert ours == pytest.approx(float(value), rel=1e-6)


def test_kernel_distance_of_all_tiles_is_that_of_torch_fidelity(sides):
    peer = pytest.importorskip("torch_fidelity.metric_kid")
    x, y, _ = sides
    n = min(len(x), len(y))  # it wants equal sides
    for name, kernel, theirs in (
        ("poly", polynomial, {}),
        ("rbf", gaussian(2.5), {"kid_kernel": "rbf", "kid_kernel_rbf_sigma": 2.5}),
    ):
        expected = peer.kernel_mmd(x[:n], y[:n], **theirs)
        assert mmd2(x[:n], y[:n], kernel) == pytest.approx(float(expected), rel=1e-6), name


def test_kernel_distance_over_subsets_is_that_of_torch_fidelity(sides, monkeypatch):
    """The very subsets that torch-fidelity draws, through our way of adding them up."""
    peer = pytest.importorskip("torch_fidelity.metric_kid")
    x, y, _ = sides
    size, subsets = 60, 30
    theirs = peer.kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subset_size=size, kid_subsets=subsets, rng_seed=7, verbose=False
    )
    state = np.random.RandomState(7)  # the generator that torch-fidelity draws from

    class Same:
        @staticmethod
        def permutation(count):
            return state.choice(count, size, replace=False)

    monkeypatch.setattr("histosynth.evaluate.kernel.numpy_rng", lambda *_: Same)
    for counts in ((30,), (2, 2)):  # all kernel values once; one subset at a time
        values = []
        state.seed(7)
        for count in counts:
            got = kid(x, y, Protocol(kid_subsets=count, kid_size=size))
            values.append(got["kid"])
        if counts == (30,):
            assert values[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    expected = peer.kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subset_size=size, kid_subsets=4, rng_seed=7, verbose=False
    )
    assert np.mean(values) == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)


def test_precision_and_recall_are_those_of_torch_fidelity(sides):
    peer = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake, k = sides
    ours = prdc(real, fake, k)
    for save in (True, False):
        theirs = peer.prc_features_to_metric(
            torch.from_numpy(fake), torch.from_numpy(real), prc_neighborhood=k, save_cpu_ram=save, verbose=False
        )
        assert ours["precision"] == pytest.approx(theirs["precision"], rel=1e-6)
        assert ours["recall"] == pytest.approx(theirs["recall"], rel=1e-6)


def test_density_and_coverage_are_those_of_prdc(sides, capsys):
    peer = pytest.importorskip("prdc")
    real, fake, k = sides
    assert prdc(real, fake, k) == pytest.approx(peer.compute_prdc(real, fake, k), rel=1e-6)


def test_vendi_is_the_entropy_of_the_similarity_matrix(sides):
    for x in sides[:2]:
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        singular = linalg.svd(unit / np.sqrt(len(x)), compute_uv=False)
        shares = singular**2 / (singular**2).sum()
        entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
        assert vendi(x) == pytest.approx(np.exp(entropy), rel=1e-6)


def test_mean_pairwise_is_that_of_scipy(sides, monkeypatch):
    monkeypatch.setattr("histosynth.evaluate.diversity._ROWS", 64)
    for x in sides[:2]:
        assert mean_pairwise(x) == pytest.approx(spatial.distance.pdist(x).mean(), rel=1e-9)


def test_published_cmmd_is_the_formula_of_the_paper(sides):
    x, y, _ = sides
    unit_x, unit_y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))

    def mean(a, b):
        return np.exp(-spatial.distance.cdist(a, b, "sqeuclidean") / (2 * 10**2)).mean()

    expected = 1000 * (mean(unit_x, unit_x) + mean(unit_y, unit_y) - 2 * mean(unit_x, unit_y))
    got = cmmd_paper(x, y, Protocol(replicates=4))
    assert got["cmmd_paper"] == pytest.approx(expected, rel=1e-6)
    assert got["cmmd_paper_low"] < got["cmmd_paper"] < got["cmmd_paper_high"]
    assert cmmd_paper(3 * x, y, Protocol(replicates=0))["cmmd_paper"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(DataError, match="length zero"):
        cmmd_paper(np.zeros((5, 3)), np.ones((5, 3)))


def naive_neighbours(rows, columns, k):
    squares = ((rows[:, None].astype(float) - columns[None]) ** 2).sum(-1)
    return squares, np.sort(squares, 1)[:, k]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(6, 60), dim=st.integers(1, 30), k=st.integers(1, 4), repeats=st.integers(1, 6),
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6, 1e15]), offset=st.sampled_from([0.0, 1.0, 1e4]),
    single=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_neighbours_are_exact_whatever_the_features(n, dim, k, repeats, scale, offset, single, seed):
    """Also where float32 sees nothing: far from the origin, tiny or huge, repeated, in tight clusters."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, dim))
    points[: n // 2] *= 1e-5
    points = np.repeat(points, repeats, axis=0)[rng.permutation(n * repeats)]
    points = (points + offset) * scale
    if single:
        points = points.astype(np.float32)
    others = points[rng.permutation(len(points))[: max(4, len(points) // 2)]] * points.dtype.type(1.01)
    squares, expected = naive_neighbours(points, points, k)
    # what is nearer than 1e-6 of the spread of the whole set may count as equal
    slack = 2e-12 * ((points - points.mean(0, dtype=float)) ** 2).sum(1).max()
    np.testing.assert_allclose(kth_squared(points, k), expected, rtol=1e-9, atol=slack)
    squares, _ = naive_neighbours(others, points, 1)
    distance, where = nearest(others, points)
    np.testing.assert_allclose(distance**2, squares.min(1), rtol=1e-9, atol=slack)
    np.testing.assert_allclose(squares[np.arange(len(others)), where], squares.min(1), rtol=1e-9, atol=slack)


def test_bounds_are_below_the_distances_and_close():
    x, y = (encoded(200, 64, seed).astype(np.float32) for seed in (1, 2))
    y[:50] = x[:50]
    squares = spatial.distance.cdist(y.astype(float), x.astype(float), "sqeuclidean")
    for bound in bounds(y, x):
        below = bound.values * bound.scale
        assert (below <= squares[bound.part]).all()
        assert (squares[bound.part] - below < 1e-3 * squares.max()).all()


def test_two_tiles_apart_by_less_than_float32_can_tell():
    """Neighbours at 1 + 1e-10 and at 1: single precision cannot order them, the answer must."""
    points = np.zeros((40, 3))
    points[:, 0] = 1000 * np.arange(40)
    points[1] = [1 + 1e-10, 0, 0]
    points[2] = [0, 1, 0]
    assert nearest(points, points, same=True)[1][0] == 2
    assert kth_squared(points, 1)[0] == 1


@pytest.mark.parametrize("budget", [2**22, 300])
def test_chunks_and_the_dense_way_change_nothing(monkeypatch, budget, sides):
    real, fake, k = sides
    value = prdc(real, fake, k), nearest(fake, real)[1], mean_pairwise(real)
    monkeypatch.setattr(neighbours, "_BUDGET", budget)
    monkeypatch.setattr(neighbours, "_DENSE", -1.0)
    monkeypatch.setattr(neighbours, "too_many", lambda *_: True)
    monkeypatch.setattr("histosynth.evaluate.coverage.too_many", lambda *_: True)
    assert prdc(real, fake, k) == value[0]
    assert prdc(real, real, k)["density"] == pytest.approx((k + 1) / k), "ties at the very radius count"
    np.testing.assert_array_equal(nearest(fake, real)[1], value[1])
    assert mean_pairwise(real) == pytest.approx(value[2], rel=1e-12)


def test_memory_does_not_grow_with_the_number_of_pairs(monkeypatch):
    monkeypatch.setattr(neighbours, "_BUDGET", 2**14)
    monkeypatch.setattr("histosynth.evaluate.diversity._ROWS", 256)
    monkeypatch.setattr("histosynth.evaluate.kernel._VALUES", 2**14)
    x, y = (encoded(2000, 8, seed).astype(np.float32) for seed in (1, 2))
    for measure in (lambda: prdc(x, y, 5), lambda: nearest(x, y), lambda: mean_pairwise(x), lambda: vendi(x),
                    lambda: mmd2(x, y)):  # fmt: skip
        tracemalloc.start()
        measure()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2000 * 2000, "an array of all pairs would hold 16 to 32 MB"


def full_values(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Every score without the randomness of subsets and intervals."""
    return {
        "frechet": frechet_distance(x, y),
        "kid": mmd2(np.asarray(x, float), np.asarray(y, float)),
        "cmmd_paper": cmmd_paper(x, y, Protocol(replicates=0))["cmmd_paper"],
        "vendi": vendi(y),
        "spread": mean_pairwise(y),
        **prdc(x, y, 5),
    }


def test_order_does_not_matter(sides, rng):
    x, y, _ = sides
    assert full_values(rng.permutation(x), rng.permutation(y)) == pytest.approx(full_values(x, y), rel=1e-8)


def test_float32_input_gives_what_its_values_give_in_float64(sides):
    x, y = (side.astype(np.float32) for side in sides[:2])
    assert full_values(x, y) == pytest.approx(full_values(x.astype(float), y.astype(float)), rel=1e-9)


def test_batches_do_not_matter(sides):
    x, y, _ = sides
    for parts in (1, 3, 50):
        streamed = frechet_of_moments(*(Moments.of(np.array_split(side, parts)) for side in (x, y)))
        assert streamed == pytest.approx(frechet_distance(x, y), rel=1e-6)


def test_which_side_is_which(sides):
    x, y, k = sides
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)
    assert mmd2(x, y) == pytest.approx(mmd2(y, x), rel=1e-9)
    one, two = prdc(x, y, k), prdc(y, x, k)
    assert (one["precision"], one["recall"]) == (two["recall"], two["precision"])


def test_repeating_every_tile_changes_no_distribution(sides):
    x, y, _ = sides
    twice = np.repeat(y, 2, axis=0)
    assert vendi(twice) == pytest.approx(vendi(y), rel=1e-9)
    biased = [mmd2(x, z, gaussian(3.0), biased=True) for z in (y, twice)]
    assert biased[0] == pytest.approx(biased[1], rel=1e-9)
    assert prdc(x, twice, 5)["precision"] == prdc(x, y, 5)["precision"]
    assert prdc(x, twice, 5)["density"] == pytest.approx(prdc(x, y, 5)["density"])
    assert prdc(x, twice, 5)["coverage"] == prdc(x, y, 5)["coverage"]


def test_a_set_beside_itself(sides):
    x, _, k = sides
    got = prdc(x, x, k)
    assert (got["precision"], got["recall"], got["coverage"]) == (1, 1, 1)
    # each tile lies in its own ball and in those of the k that count it a neighbour: k + 1 of them on average
    assert got["density"] == pytest.approx((k + 1) / k)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert nearest(x, x)[0].max() == 0


def test_every_metric_refuses_the_same_wrong_input():
    good = encoded(40, 6, 0)
    bad = good.copy()
    bad[7, 2] = np.nan
    for name in METRICS.names():
        measure = METRICS.load(name).measure
        for dtype in (np.float32, np.float64):
            with pytest.raises(DataError, match=r"not finite in 1 of 40 rows \(7\)"):
                measure(good.astype(dtype), bad.astype(dtype), Protocol(replicates=0), 0)
            with pytest.raises(DataError, match="6 and 5 features"):
                measure(good.astype(dtype), good[:, :5].astype(dtype), Protocol(replicates=0), 0)
            with pytest.raises(DataError, match=r"shape \(40,\)"):
                measure(good[:, 0].astype(dtype), good.astype(dtype), Protocol(replicates=0), 0)
            with pytest.raises(DataError, match="1 tile"):
                measure(good.astype(dtype), good[:1].astype(dtype), Protocol(replicates=0), 0)
