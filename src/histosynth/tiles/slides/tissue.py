"""Where the tissue is on a slide, from a small picture of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_PAPER_LEVEL = 200  # every channel of unstained glass is at least this bright
_PAPER_SHARE = 0.01  # of the picture that must be glass before its colour is believed
_OTSU_RANGE = (0.05, 0.18)  # limits of the threshold in optical density: noise of the glass, pale tissue
_GREY = 0.8  # least over greatest optical density of a channel; no stain of tissue absorbs all colours alike
_INK_DENSITY = 0.3
_INK_MARGIN = 2  # pixels around ink, where it fades out


@dataclass(frozen=True)
class Tissue:
    """Masks of one picture.

    Attributes:
        mask: bool [h, w], tissue.
        ink: bool [h, w], pen marks; never tissue when they are looked for.
        threshold: the optical density from which a pixel is tissue.
    """

    mask: np.ndarray
    ink: np.ndarray
    threshold: float


def find_tissue(image: np.ndarray, *, smallest: float = 32.0, find_ink: bool = True) -> Tissue:
    """Tell tissue from glass, dust and pen marks.

    The optical density of each channel is taken against the colour of the glass in this very picture. A pixel is
    tissue where the greatest of the three exceeds Otsu's threshold (IEEE Trans. SMC 9:62, 1979) and the three are
    unlike, as with every stain; dust, shadows and black ink absorb all colours alike. The threshold is held between
    0.05 and 0.18, because Otsu's method always finds two groups: on empty glass it would divide noise, on a slide
    full of tissue pale from dark tissue. Small specks are then dropped and holes, such as lumina, filled.

    Ink is what no haematoxylin, eosin or DAB makes: green absorbing less than red and blue (green ink), red far more
    than blue and more than green (blue ink), or black in large areas. Red ink looks like eosin and is not found; blue
    special stains (trichrome, alcian blue) look like blue ink, so use `find_ink=False` with them.

    Args:
        image: uint8 [h, w, 3], about 4 to 16 microns a pixel.
        smallest: area in pixels of the smallest piece of tissue; holes up to twice this size are filled.
        find_ink: whether pen marks are left out.
    """
    from scipy import ndimage

    density = _density(ndimage.gaussian_filter(image.astype(np.float32), (1, 1, 0), mode="nearest"))
    red, green, blue = np.moveaxis(density, 2, 0)
    greatest, least = density.max(2), density.min(2)
    threshold = float(np.clip(otsu(greatest), *_OTSU_RANGE))
    coloured = least < _GREY * greatest
    ink = np.zeros(greatest.shape, bool)
    if find_ink:
        is_green = (red > _INK_DENSITY) & (green < 0.85 * red) & (green < blue + 0.05) & (blue > 0.1)
        is_blue = (red > 1.5 * _INK_DENSITY) & (red > 1.12 * green) & (red > 2.2 * blue)
        is_black = (least > 0.7) & ~coloured
        ink = drop_small(is_green | is_blue | is_black, smallest / 2)
        ink = ndimage.binary_dilation(ink, iterations=_INK_MARGIN) if ink.any() else ink
    mask = (greatest > threshold) & coloured & ~ink
    mask = drop_small(ndimage.binary_opening(mask), smallest)
    mask = ~drop_small(~mask, 2 * smallest, connectivity=1) & ~ink
    return Tissue(mask, ink, threshold)


def _density(image: np.ndarray) -> np.ndarray:
    """Optical density [h, w, 3] against the colour of the glass; never negative."""
    bright = (image.min(2) >= _PAPER_LEVEL) & (np.ptp(image, axis=2) < 40)
    paper = np.full(3, 245.0, np.float32)
    if bright.mean() >= _PAPER_SHARE:
        paper = np.median(image[bright], axis=0)
    return np.maximum(np.log10((paper + 1) / (image + 1)), 0)


def otsu(values: np.ndarray, bins: int = 256) -> float:
    """Otsu's threshold: the one with the greatest variance between the two groups; the value of a constant."""
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return low
    counts, edges = np.histogram(values, bins=bins, range=(low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts, dtype=np.float64)
    sums = np.cumsum(counts * centres)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1:][np.nanargmax(np.where(above > 0, between, -1.0))])


def drop_small(mask: np.ndarray, smallest: float, connectivity: int = 2) -> np.ndarray:
    """Remove connected pieces of fewer than `smallest` pixels."""
    from scipy import ndimage

    labels, count = ndimage.label(mask, ndimage.generate_binary_structure(2, connectivity))
    if count == 0:
        return mask.copy()
    large = np.bincount(labels.ravel()) >= smallest
    large[0] = False
    return large[labels]


def shares(raster: np.ndarray, left: np.ndarray, top: np.ndarray, right: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Mean of a raster over rectangles with fractional borders; zero outside the raster.

    Args:
        raster: bool or number [h, w].
        left, top, right, bottom: [N] in raster pixels, right > left and bottom > top.

    Returns:
        float64 [N].
    """
    height, width = raster.shape
    table = np.zeros((height + 1, width + 1))
    np.cumsum(raster, axis=0, out=table[1:, 1:], dtype=np.float64)
    np.cumsum(table[1:, 1:], axis=1, out=table[1:, 1:])

    def integral(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        # bilinear in between: the exact integral of a function that is constant on pixels
        x, y = np.clip(x, 0, width), np.clip(y, 0, height)
        i, j = np.minimum(x.astype(int), width - 1), np.minimum(y.astype(int), height - 1)
        u, v = x - i, y - j
        upper = table[j, i] * (1 - u) + table[j, i + 1] * u
        lower = table[j + 1, i] * (1 - u) + table[j + 1, i + 1] * u
        return upper * (1 - v) + lower * v

    area = (right - left) * (bottom - top)
    total = integral(right, bottom) - integral(left, bottom) - integral(right, top) + integral(left, top)
    return np.clip(total / area, 0.0, 1.0)
