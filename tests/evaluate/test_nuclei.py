"""Nuclei: counted and measured on drawn tiles where the truth is known."""

import numpy as np
import pytest

from histosynth.core.errors import DataError
from histosynth.evaluate.nuclei import fit_nuclei, measure_nuclei, nuclei

HAEMATOXYLIN, EOSIN = (np.array(v) / np.linalg.norm(v) for v in ([0.650, 0.704, 0.286], [0.072, 0.990, 0.105]))


def drawn(count: int, radius: float = 4, seed: int = 0, dark: float = 1.0, size: int = 96) -> np.ndarray:
    """A pink tile with so many dark discs that do not touch, uint8 [3, S, S]."""
    rng = np.random.default_rng(seed)
    stain = np.full((size, size), 0.08)
    rows, columns = np.mgrid[:size, :size]
    places: list[np.ndarray] = []
    while len(places) < count:
        place = rng.uniform(radius + 2, size - radius - 2, 2)
        if all(np.hypot(*(place - other)) > 2.3 * radius for other in places):
            places.append(place)
            stain[np.hypot(rows - place[0], columns - place[1]) <= radius] = dark
    density = stain[..., None] * HAEMATOXYLIN + 0.35 * EOSIN
    image = 255 * np.exp(-density) + rng.normal(0, 3, density.shape)
    return image.clip(0, 255).astype(np.uint8).transpose(2, 0, 1)


def sheet(counts: list[int], **how: float) -> np.ndarray:
    return np.stack([drawn(n, seed=i, **how) for i, n in enumerate(counts)])


@pytest.mark.parametrize("radius", [2, 4, 7])
def test_count_area_and_density_of_drawn_discs(radius):
    counts = [0, 4, 10, 16]
    tiles = sheet(counts, radius=radius)
    got = measure_nuclei(tiles, fit_nuclei(tiles))
    np.testing.assert_allclose(got["count"] * tiles[0, 0].size / 1e4, counts)
    assert np.isnan(got["area"][0]) and np.isnan(got["density"][0]) and got["share"][0] == 0
    np.testing.assert_allclose(got["area"][1:], np.pi * radius**2, rtol=0.12)
    np.testing.assert_allclose(got["density"][1:], 1.0, atol=0.05)


def test_scale_comes_from_the_tiles_or_from_the_resolution():
    assert fit_nuclei(sheet([9, 9], radius=2)).radius < fit_nuclei(sheet([9, 9], radius=6)).radius
    assert fit_nuclei(sheet([9, 9]), microns_per_pixel=0.5).radius == pytest.approx(7)


def test_a_tile_is_measured_alike_alone_and_in_any_order():
    tiles = sheet([3, 8, 12])
    model = fit_nuclei(tiles)
    together = measure_nuclei(tiles, model)
    for i in range(3):
        for name, value in measure_nuclei(tiles[[i]], model).items():
            np.testing.assert_array_equal(value, together[name][[i]])


def test_comparison_sees_what_changed_and_nothing_else():
    real = sheet([6, 8, 10, 12] * 3)
    same = nuclei(real, np.stack([drawn(n, seed=90 + i) for i, n in enumerate([6, 8, 10, 12] * 3)]))
    more = nuclei(real, sheet([n + 6 for n in [6, 8, 10, 12] * 3]))
    paler = nuclei(real, sheet([6, 8, 10, 12] * 3, dark=0.8))
    assert abs(same["nuclei_count_shift"]) < 0.2 and more["nuclei_count_shift"] > 2
    assert paler["nuclei_density_shift"] < -2 and abs(paler["nuclei_count_shift"]) < 0.2
    assert nuclei(real, real)["nuclei_distance"] == pytest.approx(0, abs=1e-9)
    assert same["nuclei_distance"] < min(more["nuclei_distance"], paler["nuclei_distance"])


def test_tiles_without_nuclei_and_wrong_tiles():
    white = np.full((3, 3, 32, 32), 255, np.uint8)
    got = nuclei(white, white)
    assert got["nuclei_count_mean"] == 0 and np.isnan(got["nuclei_area_w1"])
    with pytest.raises(DataError, match="one size"):
        nuclei(white, white[..., :16, :16])
    with pytest.raises(DataError, match="uint8"):
        fit_nuclei(white.astype(np.float32))
