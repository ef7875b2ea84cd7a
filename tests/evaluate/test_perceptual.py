"""Diversity within a class: known answers, independent pairs, and an SSIM that scikit-image agrees with."""

import itertools

import numpy as np
import pytest
import torch

from histosynth.core.errors import CheckpointError, DataError, SettingError
from histosynth.evaluate.perceptual import (
    DISTANCES,
    lpips_diversity,
    ms_ssim_distance,
    pair_distance,
    ssim_terms,
)

CLASSES = ("ADI", "LYM", "TUM")


def grey(one, two):
    """Difference of mean grey level."""
    return np.abs(one.mean((1, 2, 3)) - two.mean((1, 2, 3)))


def flat(levels) -> np.ndarray:
    """Tiles of one grey level each."""
    return np.broadcast_to(np.asarray(levels, np.uint8)[:, None, None, None], (len(levels), 3, 12, 12))


def textures(n: int, size: int, seed: int = 0) -> np.ndarray:
    from scipy import ndimage

    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(n, 3, size, size)), (0, 0, 2, 2))
    return (150 + 40 * noise / noise.std()).clip(0, 255).astype(np.uint8)


def test_known_answer():
    """Two grey levels in each class: a pair differs in half of the cases."""
    labels = np.repeat([0, 1], 2000)
    levels = np.concatenate([np.tile([100, 110], 1000), np.tile([20, 80], 1000)])
    got = lpips_diversity(flat(levels), labels, CLASSES[:2], grey, pairs=1000)
    assert got["diversity_grey_ADI"] == pytest.approx(5, abs=0.5)
    assert got["diversity_grey_LYM"] == pytest.approx(30, abs=3)
    assert got["diversity_grey"] == pytest.approx((got["diversity_grey_ADI"] + got["diversity_grey_LYM"]) / 2)
    assert got["diversity_grey_low"] < 17.5 < got["diversity_grey_high"]
    assert got["diversity_grey_pairs"] == 1000


def test_pairs_are_of_one_class_and_disjoint():
    seen = []

    def spy(one, two):
        seen.append(np.stack([one[:, 0, 0, 0], two[:, 0, 0, 0]], 1))
        return np.ones(len(one))

    labels = np.arange(231) % 3
    lpips_diversity(flat(np.arange(231)), labels, CLASSES, spy, pairs=38)
    pairs = np.concatenate(seen)
    assert len(pairs) == 3 * 38
    assert len(np.unique(pairs)) == pairs.size, "a tile in two pairs would make them dependent"
    assert (pairs[:, 0] % 3 == pairs[:, 1] % 3).all()


def test_interval_covers_the_truth():
    inside = 0
    for seed in range(60):
        levels = np.random.default_rng(seed).integers(0, 201, 200)
        got = lpips_diversity(flat(levels), np.zeros(200, int), CLASSES[:1], grey, seed=seed)
        truth = 201 / 3 - 1 / (3 * 201)  # mean difference of two integers of 0 ... 200
        inside += got["diversity_grey_low"] <= truth <= got["diversity_grey_high"]
    assert inside >= 52


def test_order_of_tiles_of_other_classes_changes_nothing_and_seeds_do():
    images, labels = flat(np.arange(90)), np.repeat([0, 1, 2], 30)
    base = lpips_diversity(images, labels, CLASSES, grey, pairs=10)
    without = lpips_diversity(images[:60], labels[:60], CLASSES, grey, pairs=10)
    assert without["diversity_grey_ADI"] == base["diversity_grey_ADI"]
    assert base == lpips_diversity(images, labels, CLASSES, grey, pairs=10)
    assert base != lpips_diversity(images, labels, CLASSES, grey, pairs=10, seed=1)


@pytest.mark.parametrize("name", ["ms-ssim", "tissue-tiny"])
def test_a_collapsed_class_has_none(name):
    distance = pair_distance(name)
    varied, one = textures(16, 64), np.repeat(textures(1, 64, 1), 16, axis=0)
    key = f"diversity_{name.replace('-', '_')}"
    got = lpips_diversity(np.concatenate([varied, one]), np.repeat([0, 1], 16), CLASSES, distance)
    assert got[f"{key}_LYM"] == pytest.approx(0, abs=1e-6)
    assert got[f"{key}_ADI_low"] > 0.05
    assert f"{key}_TUM" not in got


def test_ssim_is_that_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    one = textures(2, 40)
    two = (one * 0.8 + textures(2, 40, 3) * 0.2).astype(np.uint8)
    light, structure = ssim_terms(torch.from_numpy(one).double(), torch.from_numpy(two).double())
    ours = (light * structure).mean((1, 2, 3)).numpy()
    for i in range(2):
        theirs = metrics.structural_similarity(
            one[i], two[i], channel_axis=0, data_range=255, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )  # fmt: skip
        assert ours[i] == pytest.approx(theirs, rel=1e-6)


def test_ms_ssim_grows_with_the_difference_and_stays_in_range():
    one = torch.from_numpy(textures(4, 180))
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 1, one.shape))
    values = [ms_ssim_distance(one, (one + s * noise).clamp(0, 255).byte()) for s in (0, 5, 15, 40)]
    assert values[0].abs().max() < 1e-9
    assert all((a < b).all() for a, b in itertools.pairwise(values))
    opposite = ms_ssim_distance(one, 255 - one)
    assert (opposite > 0.5).all() and (opposite <= 1).all()
    assert (ms_ssim_distance(one[..., :20, :20], one[..., :20, :20].flip(-1)) > 0).all()


def test_a_module_gets_tensors():
    class Net(torch.nn.Module):
        net = "alex"

        def forward(self, one, two):
            assert one.dtype == two.dtype == torch.uint8
            return (one.float() - two.float()).abs().mean((1, 2, 3))

    got = lpips_diversity(flat(np.arange(8)), np.zeros(8, int), ["A"], Net())
    assert set(got) >= {"diversity_lpips_alex", "diversity_lpips_alex_low", "diversity_lpips_alex_A"}


def test_refusals(tmp_path, monkeypatch):
    images, labels = flat(np.arange(12)), np.zeros(12, int)
    with pytest.raises(DataError, match="float64"):
        lpips_diversity(images / 255, labels, CLASSES, grey)
    with pytest.raises(DataError, match=r"labels \(5,\)"):
        lpips_diversity(images, labels[:5], CLASSES, grey)
    with pytest.raises(DataError, match="labels"):
        lpips_diversity(images, labels + 3, CLASSES, grey)
    with pytest.raises(DataError, match="four tiles"):
        lpips_diversity(images[:3], labels[:3], CLASSES, grey)
    with pytest.raises(SettingError, match="pairs is 1"):
        lpips_diversity(images, labels, CLASSES, grey, pairs=1)
    for wrong in (lambda a, b: grey(a, b)[:-1], lambda a, b: grey(a, b) * np.nan, lambda a, b: grey(a, b) - 300):
        with pytest.raises(DataError, match="zero or more"):
            lpips_diversity(images, labels, CLASSES, wrong)
    with pytest.raises(DataError, match="11 px"):
        ms_ssim_distance(torch.zeros(1, 3, 8, 8).byte(), torch.zeros(1, 3, 8, 8).byte())
    with pytest.raises(SettingError, match="lpips-alex"):
        pair_distance("lpips-alexx")
    assert "ms-ssim" in DISTANCES
    monkeypatch.setenv("HISTOSYNTH_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="alexnet"):
        pair_distance("lpips-alex")
