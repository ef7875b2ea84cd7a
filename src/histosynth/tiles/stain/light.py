"""Light and tissue: the white point, optical density, and which pixels are tissue.

Stains absorb, so they add up in optical density, OD = -ln(I / I0) (Beer-Lambert; Ruifrok and Johnston 2001, Anal
Quant Cytol Histol 23:291). I0 is the light that passes through empty glass. Luminosity standardisation, as in
StainTools, scales every tile so that a high percentile of its luminosity is white. Here the brightest pixels give
the colour of I0 itself, so that brightness and tint are both divided out, and no pixel outside the tissue changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from histosynth.core.errors import DataError, SettingError
from histosynth.core.seeds import numpy_rng
from histosynth.tiles.stain.codes import EOSIN

MIN_PIXELS = 32
"""A tile with fewer stained pixels is left alone, however small it is."""
_LUMA = (54, 183, 19)  # Rec. 709 weights in units of 1 / 256
_DARK = -np.log(np.maximum(np.arange(256), 1)).astype(np.float32)  # black is taken as 1, so that OD stays finite
_EOSIN_TINT = float(EOSIN[1] - (EOSIN[0] + EOSIN[2]) / 2)


@dataclass(frozen=True)
class LightConfig:
    """What counts as light and what as tissue."""

    white: tuple[float, float, float] | None = None
    """Grey levels of empty glass (R, G, B), 1 to 255; none estimates them for each tile."""
    bright: float = 99.0
    """Percentile of the luminosity above which pixels show the light source."""
    luminosity: float = 0.85
    """Stains are estimated from pixels darker than this share of the white point's luminosity."""
    density: float = 0.15
    """Tissue has more than this optical density (natural logarithm) in some channel; the rest is background."""
    share: float = 0.01
    """A tile with a smaller share of stained pixels passes through unchanged."""
    samples: int = 4096
    """Stained pixels of a tile from which the estimate of its stains starts."""

    def __post_init__(self) -> None:
        if self.white is not None and not (len(self.white) == 3 and all(1 <= w <= 255 for w in self.white)):
            raise SettingError(f"white is {self.white}.", "Give three grey levels from 1 to 255, or none.")
        for name, low, high in (("bright", 50, 100), ("luminosity", 0.1, 1), ("density", 0.01, 2), ("share", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise SettingError(f"{name} is {getattr(self, name)}.", f"Use {low} to {high}.")
        if self.samples < MIN_PIXELS:
            raise SettingError(f"samples is {self.samples}.", f"Use at least {MIN_PIXELS}.")


def check_images(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`images` as a contiguous array. Raises DataError unless it is uint8 [N, 3, H, W] with H, W > 0."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise DataError(
            f"images are {images.dtype} {list(images.shape)}, not uint8 [N, 3, H, W].", "Give 8-bit RGB tiles."
        )
    return np.ascontiguousarray(images)


def luminosity(pixels: NDArray) -> NDArray[np.uint8]:
    """Rec. 709 luma uint8 [P] of pixels uint8 [3, P]."""
    total = pixels[0].astype(np.uint16) * np.uint16(_LUMA[0])
    total += pixels[1] * np.uint16(_LUMA[1])
    total += pixels[2] * np.uint16(_LUMA[2])
    total >>= 8
    return total.astype(np.uint8)


def white_point(pixels: NDArray[np.uint8], luma: NDArray[np.uint8], config: LightConfig) -> NDArray[np.float64]:
    """[3] grey levels of empty glass: the median colour of the brightest pixels, freed of stain.

    A tile without glass has stained pixels for its brightest. Both stains absorb green most, which no usual lamp
    lacks, so a shortage of green against red and blue is read as that much eosin and taken off (published vector).
    """
    if config.white is not None:
        return np.array(config.white, np.float64)
    above = np.cumsum(np.bincount(luma, minlength=256)[::-1])
    edge = 255 - int(np.searchsorted(above, len(luma) * (1 - config.bright / 100), side="right"))
    bright = np.flatnonzero(luma >= max(edge, 0))
    bright = bright[:: max(1, len(bright) // 512)]
    white = np.maximum(np.median(pixels[:, bright], axis=1), 1.0)
    shortage = max(0.0, 0.5 * np.log(white[0] * white[2]) - np.log(white[1]))
    return np.minimum(white * np.exp(shortage / _EOSIN_TINT * EOSIN), 255.0)


class Scene:
    """One tile as optical densities. The buffers are reused from tile to tile of the same size."""

    def __init__(self, size: int, config: LightConfig) -> None:
        self.config = config
        self.od = np.ones((4, size), np.float32)
        """[4, P]: optical densities of R, G, B, and ones."""
        self.stained_od = np.ones((4, size), np.float32)
        """[4, P]: the same, but 0 (and 1) at pixels that the stains are not estimated from."""
        self.work = np.empty((4, size), np.float32)
        self.dense = np.empty(size, np.float32)
        """[P] the largest of the three optical densities."""

    def read(self, pixels: NDArray[np.uint8], white: NDArray[np.float64] | None = None) -> Scene:
        """Take the pixels uint8 [3, P] of a tile; a given `white` [3] is used as it is."""
        self.pixels = pixels
        luma = luminosity(pixels)
        self.white = white_point(pixels, luma, self.config) if white is None else np.asarray(white, np.float64)
        for c in range(3):
            table = np.maximum(_DARK + np.float32(np.log(self.white[c])), 0)
            np.take(table, pixels[c], out=self.od[c], mode="wrap")
        np.maximum(self.od[0], self.od[1], out=self.dense)
        np.maximum(self.dense, self.od[2], out=self.dense)
        top = sum(w * v for w, v in zip(_LUMA, self.white, strict=True)) / 256
        self.stained = (self.dense > self.config.density) & (luma < self.config.luminosity * top)
        self.count = int(np.count_nonzero(self.stained))
        self.enough = self.count >= max(MIN_PIXELS, self.config.share * len(luma))
        return self

    def sample(self) -> NDArray[np.float32]:
        """[4, K] of at most `samples` stained pixels, at random but the same for the same tile.

        One pixel is drawn from each of K equal runs of the stained pixels; the draws depend on K alone.
        """
        where = np.flatnonzero(self.stained)
        k = self.config.samples
        if len(where) > k:
            where = where[((np.arange(k) + _draws(k)) * (len(where) / k)).astype(np.intp)]
        return self.od.take(where, axis=1)

    def mask(self) -> NDArray[np.float32]:
        """`stained_od`, filled in: pixels that hold nothing add nothing to sums over codes."""
        np.multiply(self.od[:3], self.stained, out=self.stained_od[:3])
        return self.stained_od

    def blend(self, colours: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
        """Write new colours float32 [3, P] into `out` uint8 [3, P], in full where tissue is dense.

        Up to `density` a pixel keeps its bytes; from there the new colour comes in linearly until twice that
        density, so that the border of the tissue shows no seam. `colours` is overwritten.
        """
        share = np.subtract(self.dense, self.config.density, out=self.dense)
        share *= 1 / self.config.density
        np.clip(share, 0, 1, out=share)
        colours -= self.pixels
        colours *= share
        colours += self.pixels
        np.rint(colours, out=colours)
        np.clip(colours, 0, 255, out=colours)
        np.copyto(out, colours, casting="unsafe")


@lru_cache(maxsize=8)
def _draws(count: int) -> NDArray[np.float64]:
    return numpy_rng(0, "stain samples", count).random(count)
