"""How much of a tile's layout is kept: against formulas written out, and on drawn tiles."""

import numpy as np
import pytest

from histosynth.core.errors import DataError
from histosynth.evaluate.layout import colour_gap, correlation, layout, structure

HAEMATOXYLIN, EOSIN = np.array([0.650, 0.704, 0.286]), np.array([0.072, 0.990, 0.105])


def drawn(count: int, seed: int) -> np.ndarray:
    """Dark discs on pink, uint8 [3, 64, 64]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:64, :64]
    stain = np.full((64, 64), 0.08)
    for row, column in rng.uniform(6, 58, (count, 2)):
        stain[np.hypot(rows - row, columns - column) <= 4] = 1.0
    image = 255 * np.exp(-(stain[..., None] * HAEMATOXYLIN + 0.35 * EOSIN)) + rng.normal(0, 2, (64, 64, 3))
    return image.clip(0, 255).astype(np.uint8).transpose(2, 0, 1)


def test_structure_against_the_formula_written_out(rng):
    """SSIM's structure term at one pixel, with the Gaussian window of Wang et al. 2004."""
    x, y = rng.uniform(0, 100, (2, 31, 31))
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for row in range(5, 26):
        for column in range(5, 26):
            a, b = (z[row - 5 : row + 6, column - 5 : column + 6] for z in (x, y))
            means = (window * a).sum(), (window * b).sum()
            spreads = [np.sqrt((window * (z - m) ** 2).sum()) for z, m in zip((a, b), means, strict=True)]
            both = (window * (a - means[0]) * (b - means[1])).sum()
            values.append((both + 4.5) / (spreads[0] * spreads[1] + 4.5))
    whole = structure(x[None], y[None])[0]
    # the whole image also has a border, which the formula above leaves out
    assert abs(whole - np.mean(values)) < 0.03


def test_structure_ignores_brightness_and_contrast(rng):
    x = rng.uniform(0, 100, (2, 40, 40))
    np.testing.assert_allclose(structure(x, x), 1)
    assert (structure(x, 0.5 * x + 20) > 0.97).all() and (structure(x, 100 - x) < -0.9).all()


def test_correlation_against_numpy(rng):
    x, y = rng.normal(size=(2, 3, 8, 8))
    expected = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(correlation(x, y), expected)
    assert correlation(np.ones((1, 4, 4)), y[:1, :4, :4]).tolist() == [0.0]


def test_a_new_stain_keeps_the_layout_and_a_new_tile_does_not():
    tiles = np.stack([drawn(n, n) for n in (14, 17, 20, 23)])
    paler = (255 - (255 - tiles.astype(float)) * np.array([0.7, 0.9, 0.6])[:, None, None]).astype(np.uint8)
    same, restained, other = layout(tiles, tiles), layout(tiles, paler), layout(tiles, np.roll(tiles, 1, axis=0))
    assert same["layout_structure"] == pytest.approx(1) and same["layout_nuclei"] == pytest.approx(1)
    for name in ("layout_structure", "layout_nuclei"):
        assert restained[name] > 0.8 > 0.5 > other[name]
        assert restained[f"{name}_low"] <= restained[name] <= restained[f"{name}_high"] + 1e-9
        assert restained[f"{name}_other"] < 0.5
    assert np.isnan(layout(tiles[:1], tiles[:1])["layout_nuclei_other"])


def test_colour_gap(rng):
    white, black = np.full((2, 3, 8, 8), 255, np.uint8), np.zeros((2, 3, 8, 8), np.uint8)
    np.testing.assert_allclose(colour_gap(white, black), 100, atol=0.1)  # L* of white
    tile = drawn(9, 0)[None]
    shuffled = rng.permutation(tile.reshape(3, -1), axis=1).reshape(tile.shape)
    assert colour_gap(tile, shuffled)[0] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    "wrong", [np.zeros((1, 3, 8, 8)), np.zeros((0, 3, 8, 8), np.uint8), np.zeros((1, 3, 9, 8), np.uint8)]
)
def test_wrong_tiles(wrong):
    with pytest.raises(DataError):
        layout(np.zeros((1, 3, 8, 8), np.uint8), wrong)
