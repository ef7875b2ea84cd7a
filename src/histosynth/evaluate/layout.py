"""Did a tile that was stained anew keep its layout?

Structure: the third term of SSIM (Wang et al. 2004), which neither brightness nor contrast changes, on lightness.
Nuclei: correlation of the haematoxylin images at the scale of a nucleus. Both are read beside what another tile of
the same set gives.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from histosynth.core.errors import DataError
from histosynth.core.seeds import numpy_rng
from histosynth.evaluate.colour import CHANNELS, channels
from histosynth.evaluate.nuclei import fit_nuclei

_PLACES = {name: i for i, (name, _, _) in enumerate(CHANNELS)}
_WINDOW = 1.5  # deviation of SSIM's window, pixels
_REACH = 3.5  # its radius is 5 pixels
_FLAT = (0.03 * 100) ** 2 / 2  # SSIM's constant C3 = C2 / 2 for lightness from 0 to 100


def layout(before: np.ndarray, after: np.ndarray, seed: int = 0) -> dict[str, float]:
    """How much of their layout tiles kept, both uint8 [N, 3, H, W], pair by pair.

    Returns:
        layout_structure and layout_nuclei (means over tiles, 1 is unchanged), each with _low and _high (5 % and 95 %
        of the tiles) and _other (against the next tile in a random ring; NaN for a single tile).

    Raises:
        DataError: not uint8 [N, 3, H, W], no tile, or other shapes on the two sides.
    """
    for images in (before, after):
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8 or images.size == 0:
            raise DataError(f"Images for the layout are {images.dtype} {images.shape}.", "Give uint8 [N, 3, H, W].")
    if before.shape != after.shape:
        raise DataError(f"{before.shape} tiles came with {after.shape} tiles.", "Give one tile a tile.")
    radius = fit_nuclei(before).radius
    lightness, stains = ([_images(side, name) for side in (before, after)] for name in ("lightness", "haematoxylin"))
    found: dict[str, float] = {}
    for name, measure, sides in (
        ("structure", structure, lightness),
        ("nuclei", correlation, [_smooth(side, radius / np.sqrt(2)) for side in stains]),
    ):
        values = measure(*sides)
        found |= {
            f"layout_{name}": float(values.mean()),
            f"layout_{name}_low": float(np.quantile(values, 0.05)),
            f"layout_{name}_high": float(np.quantile(values, 0.95)),
            f"layout_{name}_other": float("nan"),
        }
        if len(before) > 1:
            ring = numpy_rng(seed, "another tile").permutation(len(before))
            found[f"layout_{name}_other"] = float(measure(sides[0][ring], sides[1][np.roll(ring, 1)]).mean())
    return found


def colour_gap(one: np.ndarray, other: np.ndarray) -> NDArray[np.float64]:
    """Distance of the mean colours (CIE L*a*b*) of each pair of tiles uint8 [N, 3, H, W]: float64 [N]."""
    sides = []
    for tiles in (one, other):
        parts = [_images(tiles, name) for name in ("lightness", "green_red", "blue_yellow")]
        sides.append(np.stack([part.mean(axis=(1, 2), dtype=np.float64) for part in parts], axis=1))
    return np.linalg.norm(sides[0] - sides[1], axis=1)


def structure(x: np.ndarray, y: np.ndarray) -> NDArray[np.float64]:
    """Mean structure term of SSIM of each pair of images float [N, H, W] (lightness, 0 to 100): float64 [N]."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    mean_x, mean_y = _smooth(x, _WINDOW), _smooth(y, _WINDOW)
    spread_x = np.sqrt(np.maximum(_smooth(x * x, _WINDOW) - mean_x**2, 0))
    spread_y = np.sqrt(np.maximum(_smooth(y * y, _WINDOW) - mean_y**2, 0))
    both = _smooth(x * y, _WINDOW) - mean_x * mean_y
    return ((both + _FLAT) / (spread_x * spread_y + _FLAT)).mean(axis=(1, 2))


def correlation(x: np.ndarray, y: np.ndarray) -> NDArray[np.float64]:
    """Pearson correlation of each pair of images float [N, H, W]: float64 [N]; 0 where one of them is flat."""
    x, y = (side.reshape(len(side), -1).astype(np.float64) for side in (x, y))
    x, y = (side - side.mean(axis=1, keepdims=True) for side in (x, y))
    size = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    return np.divide((x * y).sum(axis=1), size, out=np.zeros(len(x)), where=size > 1e-9)


def _images(tiles: np.ndarray, channel: str) -> NDArray[np.float32]:
    n, _, height, width = tiles.shape
    return channels(tiles)[_PLACES[channel]].reshape(n, height, width)


def _smooth(images: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(images, (0, sigma, sigma), truncate=_REACH)
