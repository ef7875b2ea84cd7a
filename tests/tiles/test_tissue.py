"""The tissue mask on drawn slides with a known truth, and averages over rectangles."""

import numpy as np
import pytest
from skimage.filters import threshold_otsu

from histosynth.tiles.slides.tissue import drop_small, find_tissue, otsu, shares

PINK, PURPLE, GLASS = (225, 150, 190), (130, 90, 160), (243, 242, 244)


def slide(height=200, width=200, seed=0):
    rng = np.random.default_rng(seed)
    return np.clip(np.array(GLASS) + rng.normal(0, 3, (height, width, 3)), 0, 255).astype(np.uint8)


def disc(height=200, width=200, y=100, x=100, radius=50):
    rows, columns = np.ogrid[:height, :width]
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def paint(image, where, colour, seed=1):
    rng = np.random.default_rng(seed)
    values = np.array(colour) + rng.normal(0, 8, image.shape)
    return np.where(where[..., None], np.clip(values, 0, 255).astype(np.uint8), image)


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def test_stained_tissue_is_found_and_glass_is_not():
    where = disc()
    for colour in (PINK, PURPLE, (170, 120, 80)):
        assert overlap(find_tissue(paint(slide(), where, colour)).mask, where) > 0.93
    assert not find_tissue(slide()).mask.any()
    assert not find_tissue(np.full((50, 60, 3), 255, np.uint8)).mask.any()
    assert not find_tissue(np.zeros((50, 60, 3), np.uint8)).mask.any()


def test_a_nearly_empty_and_an_all_tissue_slide():
    small = disc(radius=9)
    assert overlap(find_tissue(paint(slide(), small, PINK)).mask, small) > 0.7
    full = paint(paint(slide(), np.ones((200, 200), bool), PINK), disc(radius=40), PURPLE)
    assert find_tissue(full).mask.mean() > 0.99


def test_tinted_or_dim_glass_does_not_count():
    tinted = np.clip(slide().astype(int) - (4, 12, 26), 0, 255).astype(np.uint8)
    found = find_tissue(paint(tinted, disc(), PURPLE)).mask
    assert overlap(found, disc()) > 0.93


def test_specks_are_dropped_and_lumina_filled():
    image = paint(slide(), disc(radius=60), PINK)
    image = paint(image, disc(radius=3), GLASS)
    image = paint(image, disc(y=20, x=20, radius=2), PURPLE)
    mask = find_tissue(image).mask
    assert mask[100, 100] and not mask[20, 20]
    big = paint(paint(slide(), disc(radius=60), PINK), disc(radius=30), GLASS)
    assert not find_tissue(big).mask[100, 100]


@pytest.mark.parametrize("colour", [(30, 140, 70), (20, 110, 100), (30, 60, 170), (15, 15, 18), (70, 200, 120)])
def test_ink_is_left_out_and_tissue_beside_it_kept(colour):
    tissue = disc(y=60, radius=45)
    image = paint(slide(), tissue, PURPLE)
    line = np.zeros((200, 200), bool)
    line[130:150, 20:180] = True
    found = find_tissue(paint(image, line, colour))
    assert found.ink[line].mean() > 0.95 and not found.mask[line].any()
    assert overlap(found.mask, tissue) > 0.9
    if min(colour) > 20:  # black is grey, and so never tissue
        assert find_tissue(paint(image, line, colour), find_ink=False).mask[line].any()


def test_haematoxylin_dab_and_eosin_are_not_taken_for_ink():
    for colour in (PINK, PURPLE, (90, 60, 140), (110, 105, 170), (120, 70, 40), (200, 60, 110)):
        assert not find_tissue(paint(slide(), disc(), colour)).ink.any(), colour


def test_otsu_agrees_with_scikit_image(rng):
    values = np.concatenate([rng.normal(0.1, 0.03, 4000), rng.normal(0.5, 0.1, 1000)])
    assert otsu(values) == pytest.approx(threshold_otsu(values), abs=(values.max() - values.min()) / 128)
    assert otsu(np.full(10, 0.3)) == 0.3


def test_drop_small_keeps_pieces_of_that_size():
    mask = np.zeros((20, 20), bool)
    mask[2:4, 2:4] = mask[10:13, 10:13] = True
    assert drop_small(mask, 5).sum() == 9 and drop_small(mask, 4).sum() == 13 and drop_small(mask, 10).sum() == 0


def test_shares_are_exact_for_fractional_rectangles(rng):
    raster = rng.integers(0, 2, (9, 13)).astype(bool)
    fine = np.kron(raster, np.ones((20, 20)))
    for _ in range(50):
        left, top = rng.integers(-40, 200), rng.integers(-40, 140)
        width, height = rng.integers(1, 120), rng.integers(1, 120)
        inside = fine[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)].sum()
        box = [np.array([v / 20]) for v in (left, top, left + width, top + height)]
        assert shares(raster, *box)[0] == pytest.approx(inside / (width * height), abs=1e-9)
