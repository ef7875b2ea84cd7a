"""Measures of what should not lie on tissue: pen ink, folds, air bubbles.

A tile is brought to a grid of 28 x 28 cells, and a fixed bank of shapes (straight and bent strips, rings) is laid
over it. Each measure is the largest contrast of a shape with the rest of the tile in units of the rest's spread,
so that the tile's own tissue is the yardstick and staining matters little.
"""

from __future__ import annotations

from functools import lru_cache, reduce

import numpy as np

GRID = 28
# Absorbance (R, G, B) of what may lie there: stains after Ruifrok and Johnston 2001, melanin, and four pens.
_HAEMATOXYLIN, _EOSIN, _MELANIN = (0.65, 0.70, 0.29), (0.10, 0.95, 0.30), (0.45, 0.70, 1.00)
_PENS = np.array([(1.2, 0.4, 1.0), (1.5, 0.9, 0.1), (1.0, 1.0, 1.0), (0.05, 1.2, 1.2)])
_FLOOD = np.array([2.0, 2.9, 2.3, 0.75], np.float32)  # filter output of each pen that no stained tile reaches
_INK_SPREAD, _FOLD_SPREAD, _BUBBLE_SPREAD = np.float32(0.3), np.float32(0.05), np.float32(0.05)


def cells(planes: np.ndarray, how: np.ufunc = np.add) -> np.ndarray:
    """[N, C, H, W] reduced to float32 [N, C, 28, 28]: the mean of each cell, or np.maximum or np.minimum of it.

    Smaller tiles repeat pixels.
    """
    height, width = planes.shape[2:]
    down, right = np.arange(GRID) * height // GRID, np.arange(GRID) * width // GRID
    if height % GRID or width % GRID:
        found = how.reduceat(how.reduceat(planes, down, axis=2), right, axis=3)
    else:
        rows = how.reduce(planes.reshape(*planes.shape[:2], GRID, height // GRID, width), axis=3)
        # NumPy reduces a short last axis element by element, whole strided rows are several times faster
        found = reduce(how, [rows[..., k :: width // GRID] for k in range(width // GRID)])
    found = found.astype(np.float32)
    if how is np.add:
        counts = np.maximum(np.diff(np.append(down, height)), 1)[:, None]
        found /= (counts * np.maximum(np.diff(np.append(right, width)), 1)).astype(np.float32)
    return found


def density(light: np.ndarray) -> np.ndarray:
    """Optical density (natural logarithm) of light from 0 to 255, 0 to 5.5."""
    return np.log(np.float32(256)) - np.log(light + np.float32(1))


def strip_contrasts(light: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Evidence of pen ink and of folds, each float [N]; 0 for an even tile, about 0.5 for sound tissue.

    Ink: an adaptive matched filter (Manolakis and Shaw 2002, IEEE Signal Process Mag 19:29) for each pen, with
    haematoxylin, eosin and melanin as the clutter, so that strong or unusual staining is not taken for ink.
    Folds: in two layers of tissue both the lightest and the darkest spots are darker than elsewhere, in blue light,
    which both stains let pass; and the density grows by the same factor in all three colours, unlike where another
    tissue begins.

    Args:
        light: float32 [N, 3, H, W], 0 to 255.
    """
    n, blue = len(light), light[:, 2:]
    layers = density(np.concatenate([cells(blue, np.maximum), cells(blue, np.minimum), cells(light)], 1))
    layers = layers.reshape(n, 5, -1)
    ink = np.matmul(_filters(), layers[:, 2:])
    bank, share = _strips()
    inside, outside, spread = _contrast(np.concatenate([ink, layers], 1), bank, share)
    step = inside - outside
    stroke = step[:, :4] / (spread[:, :4] + _INK_SPREAD)
    growth = step[:, 6:] / (outside[:, 6:] + np.float32(0.1))
    same = np.clip(growth.min(1) / np.maximum(growth.max(1), np.float32(1e-3)), 0, 1)
    crease = (step[:, 4:6] / (spread[:, 4:6] + _FOLD_SPREAD)).mean(1) * same
    # a tile that is all ink has no rest to stand out from, but no tissue has such a colour
    flood = 5 * (np.median(ink, axis=2) - _FLOOD).max(1)
    return np.maximum(np.maximum(stroke.max((1, 2)), flood), 0), np.maximum(crease.max(1), 0)


def ring_contrast(light: np.ndarray, detail: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Evidence of an air bubble: a disc less sharp and less varied than the rest, with a rim; float [N].

    0 for an even tile, 1 to 2 for sound tissue. The rim may be darker or brighter than both its sides.

    Args:
        light: float32 [N, 3, H, W], 0 to 255.
        detail, slope: float32 [N, H, W] squared Laplacian and squared gradient.
    """
    n = len(light)
    dark = density(cells(light[:, 2:])).reshape(n, 1, -1)
    fine, coarse = cells(detail[:, None]), cells(slope[:, None])
    unsharp = np.log((coarse + np.float32(4)) / (fine + np.float32(1))).reshape(n, 1, -1)
    maps = np.concatenate([dark, unsharp], 1)
    (rim, _), (disc, disc_spread), (rest, rest_spread) = (_moments(maps, bank) for bank in _rings())
    least = _BUBBLE_SPREAD
    above_rest = (rim[:, 0] - rest[:, 0]) / (rest_spread[:, 0] + least)
    above_disc = (rim[:, 0] - disc[:, 0]) / (disc_spread[:, 0] + least)
    edge = np.maximum(np.minimum(above_rest, above_disc), np.minimum(-above_rest, -above_disc))
    calm = np.log((rest_spread[:, 0] + least) / (disc_spread[:, 0] + least))
    blur = (disc[:, 1] - rest[:, 1]) / (rest_spread[:, 1] + disc_spread[:, 1] + np.float32(0.1))
    return np.maximum((calm + blur + np.float32(0.35) * edge).max(1), 0)


@lru_cache(maxsize=1)
def _filters() -> np.ndarray:
    """float32 [pens, 3]: weights on optical density that answer to a pen and not to stains or melanin."""
    clutter = 0.01 * np.eye(3)
    for spectrum, weight in ((_HAEMATOXYLIN, 0.3), (_EOSIN, 0.3), (_MELANIN, 0.1)):
        clutter += weight * np.outer(spectrum, spectrum)
    weights = np.linalg.solve(clutter, _PENS.T).T
    return (weights / np.sqrt((weights * _PENS).sum(1, keepdims=True))).astype(np.float32)


@lru_cache(maxsize=1)
def _strips() -> tuple[np.ndarray, np.ndarray]:
    """Strips at ten angles, straight and bent: float32 [cells, K], each a mean, and the share of cells [K]."""
    y, x = np.mgrid[:GRID, :GRID] - (GRID - 1) / 2
    masks = []
    for angle in np.arange(10) * np.pi / 10:
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        for bend in (-0.5, 0.0, 0.5):
            away = across + bend * along**2 / GRID
            for width, step in ((3, 2), (6, 3), (11, 4))[: 3 if bend == 0 else 2]:
                for offset in np.arange(-12 // step * step, 12.1, step):
                    mask = np.abs(away - offset) <= width / 2
                    if 0.6 * GRID * width < mask.sum() < 0.5 * GRID**2:
                        masks.append(mask.ravel())
    chosen = np.unique(np.array(masks), axis=0)
    share = chosen.mean(1)
    bank = (chosen / chosen.sum(1, keepdims=True)).T
    return np.ascontiguousarray(bank, np.float32), share.astype(np.float32)


@lru_cache(maxsize=1)
def _rings() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rim, disc and surroundings of circles of which at least half the rim is on the tile: float32 [cells, K]."""
    y, x = np.mgrid[:GRID, :GRID]
    banks: tuple[list, list, list] = ([], [], [])
    for radius in (4.5, 6.5, 8.5, 10.5, 13):
        step = 2.5 if radius < 7 else 3
        for centre_y in np.arange(0.5, GRID, step):
            for centre_x in np.arange(0.5, GRID, step):
                distance = np.hypot(y - centre_y, x - centre_x)
                masks = (np.abs(distance - radius) <= 1, distance < radius - 1.5, distance > radius + 1.5)
                if masks[0].sum() >= 2 * np.pi * radius and masks[2].sum() >= 60:
                    for bank, mask in zip(banks, masks, strict=True):
                        bank.append(mask.ravel() / mask.sum())
    first, second, third = (np.ascontiguousarray(np.array(bank).T, np.float32) for bank in banks)
    return first, second, third


def _moments(maps: np.ndarray, bank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread of maps [N, C, cells] under each mask of a bank, float32 [N, C, K]."""
    middle = maps.mean(2, keepdims=True)  # taken off first, as the squares of large numbers would cancel badly
    mean, square = _product(maps - middle, bank)
    return mean + middle, np.sqrt(np.maximum(square - np.square(mean), 0))


def _contrast(maps: np.ndarray, bank: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean under each mask, and mean and spread of the rest of the tile, float32 [N, C, K]."""
    middle = maps.mean(2, keepdims=True)
    maps = maps - middle
    mean, square = _product(maps, bank)
    rest = -share * mean / (1 - share)
    rest_square = (np.square(maps).mean(2, keepdims=True) - share * square) / (1 - share)
    return mean + middle, rest + middle, np.sqrt(np.maximum(rest_square - np.square(rest), 0))


def _product(maps: np.ndarray, bank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of maps and of their squares under each mask."""
    # a product a tile: how a row is rounded depends on its place among the rows of a product
    found = np.matmul(np.concatenate([maps, np.square(maps)], axis=1), bank)
    return found[:, : maps.shape[1]], found[:, maps.shape[1] :]
