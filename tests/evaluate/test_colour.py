"""Colour statistics: known colours and known shifts."""

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from histosynth.core.errors import DataError
from histosynth.evaluate.colour import channels, colour, wasserstein


def plain(rgb) -> np.ndarray:
    return np.broadcast_to(np.array(rgb, np.uint8)[None, :, None, None], (2, 3, 8, 8))


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [((255, 255, 255), (100, 0, 0)), ((0, 0, 0), (0, 0, 0)), ((255, 0, 0), (53.24, 80.09, 67.20)),
     ((119, 119, 119), (50.03, 0, 0))],
)  # fmt: skip
def test_cie_lab_of_known_colours(rgb, lab):
    assert channels(plain(rgb))[5:, 0] == pytest.approx(lab, abs=0.05)


def test_stains_come_back_from_their_own_colours():
    stain = np.array([0.650, 0.704, 0.286]) / np.linalg.norm([0.650, 0.704, 0.286])
    rgb = np.round(256 * np.exp(-0.8 * stain) - 1)
    haematoxylin, eosin = channels(plain(rgb))[3:5, 0]
    assert haematoxylin == pytest.approx(0.8, abs=0.02)
    assert eosin == pytest.approx(0, abs=0.02)


def test_wasserstein_equals_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.dirichlet(np.ones(40)), rng.dirichlet(np.ones(40))
    centres = np.arange(40) * 0.5
    assert wasserstein(a, b, 0.5) == pytest.approx(wasserstein_distance(centres, centres, a, b))


def test_a_shift_in_density_is_measured():
    rng = np.random.default_rng(1)
    density = rng.uniform(0.2, 0.9, (6, 3, 32, 32))
    first, second = (np.round(256 * np.exp(-d) - 1).astype(np.uint8) for d in (density, density + 0.2))
    got = colour(first, second)
    assert got["od_red_w1"] == pytest.approx(0.2, abs=0.01)
    assert got["od_red_mean_shift"] == pytest.approx(0.2, abs=0.01)
    assert got["lightness_mean_shift"] < 0
    assert colour(first, first)["colour_distance"] == 0
    assert got["colour_distance"] > 0.3


def test_refuses_what_is_no_image():
    with pytest.raises(DataError, match="uint8"):
        colour(np.zeros((2, 3, 8, 8)), plain((1, 2, 3)))
    with pytest.raises(DataError, match="N > 0"):
        colour(np.zeros((0, 3, 8, 8), np.uint8), plain((1, 2, 3)))
