"""Whole-slide images behind one small protocol: any region, at any resolution, never a whole large level.

OpenSlide reads what scanners write, tifffile (`tiff.py`) what OpenSlide does not (OME-TIFF, strips, planes,
16 bits), and Pillow plain PNG and JPEG files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from histosynth.core.errors import DataError
from histosynth.tiles.images import DAMAGE, MAX_PIXELS, read_rgb

TIFF_SUFFIXES = frozenset({".tif", ".tiff", ".btf", ".tf8"})
SCANNER_SUFFIXES = frozenset(
    {".svs", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".dcm", ".czi", ".zvi"}
)
PLAIN_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NEXT_FINER = 1.02  # a level this much too coarse still counts: levels are rarely exact powers of two
_SAME = 0.005  # 0.499 and 0.5 microns are the same: resampling by so little would only blur
_BLOCK_PIXELS = 4_000_000  # read at once while the overview is made
_PLAUSIBLE_MPP = (0.01, 50.0)  # 72 dots an inch, which programs write unasked, would be 353 microns


@dataclass(frozen=True)
class Level:
    """One resolution of a slide: width and height in pixels, and how many level-0 pixels one pixel spans."""

    width: int
    height: int
    down_x: float
    down_y: float


class SlideReader(Protocol):
    """An open slide.

    Attributes:
        kind: what read it, such as "openslide aperio".
        levels: from the finest to the coarsest.
        mpp: microns per pixel of level 0, horizontal and vertical; None where the file does not say.
        hint: words on the resolution for an error message, such as the objective.
        bounds: left, top, width and height of the scanned part in level-0 pixels.
        block: width and height in level-0 pixels that are cheap to read together.
    """

    kind: str
    levels: tuple[Level, ...]
    mpp: tuple[float, float] | None
    hint: str
    bounds: tuple[int, int, int, int]
    block: tuple[int, int]

    def read(self, level: int, left: int, top: int, width: int, height: int) -> np.ndarray:
        """A region in the level's own pixels, uint8 [height, width, 3]; white outside the slide.

        Raises:
            DataError: that part of the file is damaged.
        """
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class OpenSlideReader:
    """Formats of scanners, through OpenSlide."""

    def __init__(self, path: Path) -> None:
        import openslide

        with _openslide_errors(path):
            self._slide = openslide.OpenSlide(str(path))
            properties = dict(self._slide.properties)
            sizes, downs = self._slide.level_dimensions, self._slide.level_downsamples
        self._path = path
        self.kind = f"openslide {properties.get('openslide.vendor', '')}".strip()
        self.levels = tuple(Level(w, h, d, d) for (w, h), d in zip(sizes, downs, strict=True))
        self.mpp = _pair(properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y")) or _pair(
            properties.get("aperio.MPP"), None
        )
        power = properties.get("openslide.objective-power")
        self.hint = f" Its objective was {power}x." if power else ""
        width, height = sizes[0]
        keys = ("x", "y", "width", "height")
        bounds = [properties.get(f"openslide.bounds-{k}") for k in keys]
        self.bounds = tuple(int(float(b)) for b in bounds) if all(bounds) else (0, 0, width, height)
        edge = int(properties.get("openslide.level[0].tile-width") or 512)
        self.block = (edge, int(properties.get("openslide.level[0].tile-height") or edge))

    def read(self, level: int, left: int, top: int, width: int, height: int) -> np.ndarray:
        down = self.levels[level].down_x
        with _openslide_errors(self._path):
            region = self._slide.read_region((round(left * down), round(top * down)), level, (width, height))
        alpha = region.getchannel("A")
        if alpha.getextrema() == (255, 255):
            return np.asarray(region.convert("RGB"))
        canvas = Image.new("RGB", region.size, (255, 255, 255))
        canvas.paste(region, mask=alpha)
        return np.asarray(canvas)

    def close(self) -> None:
        self._slide.close()


class PlainReader:
    """A PNG or JPEG file, decoded whole: the last resort."""

    def __init__(self, path: Path) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(path) as image:
                    self.kind = f"pillow {image.format or ''}".strip()
                    dots = image.info.get("dpi", (0, 0))
                    small = image.width * image.height <= MAX_PIXELS
                    self._pixels = read_rgb(path)[0] if small else np.asarray(image.convert("RGB"))
        except Image.DecompressionBombError as error:
            raise DataError(f"{path.name} is too large to be decoded whole.", "Convert it to a tiled TIFF.") from error
        except DAMAGE as error:
            raise DataError(f"{path.name} is damaged or no image: {error}.", "Replace or remove it.") from error
        height, width = self._pixels.shape[:2]
        self.levels = (Level(width, height, 1.0, 1.0),)
        self.mpp = _pair(*(25400 / float(d) if d else None for d in dots[:2]))
        self.hint = ""
        self.bounds = (0, 0, width, height)
        self.block = (512, 512)

    def read(self, level: int, left: int, top: int, width: int, height: int) -> np.ndarray:
        return cut_out(self._pixels, left, top, width, height)

    def close(self) -> None:
        self._pixels = np.zeros((0, 0, 3), np.uint8)


def open_slide(path: Path | str) -> SlideReader:
    """Open a slide with the first reader that can.

    Raises:
        DataError: the file is missing, damaged, or in no known format.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file.", "Check the path.")
    from histosynth.tiles.slides.tiff import TiffReader, check_tiff

    with open(path, "rb") as stream:
        tiff = stream.read(4) in _TIFF_MAGIC
    if path.suffix.lower() in PLAIN_SUFFIXES and not tiff:
        return PlainReader(path)
    readers: list[type] = [OpenSlideReader]
    if tiff:
        suits = check_tiff(path)
        readers = [OpenSlideReader, TiffReader]
        if path.suffix.lower() in TIFF_SUFFIXES and not suits:
            readers = [TiffReader]
    reasons = []
    for reader in readers:
        try:
            return reader(path)
        except DataError as error:
            reasons.append(error.message)
    raise DataError(" ".join(dict.fromkeys(reasons)), "Replace or remove the file, or convert it to a tiled TIFF.")


def microns(slide: SlideReader, name: str, given: float | None) -> tuple[float, float]:
    """Microns per pixel of level 0: what the slide says, else what was given.

    Raises:
        DataError: neither says anything plausible.
    """
    low, high = _PLAUSIBLE_MPP
    if slide.mpp and all(low <= m <= high for m in slide.mpp):
        return slide.mpp
    if given:
        return given, given
    said = f"says {slide.mpp[0]:.4g}, which cannot be right" if slide.mpp else "does not say it"
    raise DataError(
        f"The microns per pixel of {name} are unknown: the file {said}.{slide.hint}",
        "Give it with --slide-mpp (scanners have about 0.25 at 40x and 0.5 at 20x).",
    )


def read_field(slide: SlideReader, left: int, top: int, width: float, height: float, size: int) -> np.ndarray:
    """A field of a slide at a wanted resolution.

    The next finer level is read and reduced with an antialiasing (Lanczos) filter; within 0.5 % of a level's own
    resolution the pixels are those of the file.

    Args:
        left, top: corner in level-0 pixels.
        width, height: extent in level-0 pixels; they differ where pixels are not square.
        size: edge length of the result.

    Returns:
        uint8 [size, size, 3], white outside the slide.
    """
    index = level_for(slide, width / size, height / size)
    level = slide.levels[index]
    x0, y0 = left / level.down_x, top / level.down_y
    x1, y1 = x0 + width / level.down_x, y0 + height / level.down_y
    if _nearly(x1 - x0, size) and _nearly(y1 - y0, size):
        return slide.read(index, round(x0), round(y0), size, size)
    column, row = int(np.floor(x0)), int(np.floor(y0))
    pixels = slide.read(index, column, row, int(np.ceil(x1)) - column, int(np.ceil(y1)) - row)
    box = (x0 - column, y0 - row, min(x1 - column, pixels.shape[1]), min(y1 - row, pixels.shape[0]))
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS, box=box))


def _nearly(length: float, size: int) -> bool:
    return abs(length - size) < max(0.25, _SAME * size)


def level_for(slide: SlideReader, down_x: float, down_y: float) -> int:
    """The coarsest level that is no coarser than wanted (level 0 where all are)."""
    fits = [
        i
        for i, level in enumerate(slide.levels)
        if level.down_x <= down_x * _NEXT_FINER and level.down_y <= down_y * _NEXT_FINER
    ]
    return max(fits, key=lambda i: slide.levels[i].down_x, default=0)


def overview(slide: SlideReader, pixel: float) -> tuple[np.ndarray, tuple[float, float]]:
    """The whole slide, small: block means of the coarsest level that is fine enough, read piece by piece.

    Args:
        pixel: wanted size of a pixel of the result in level-0 pixels; the result is as fine or finer.

    Returns:
        (uint8 [h, w, 3], the size of its pixels in level-0 pixels, horizontal and vertical).
    """
    index = level_for(slide, pixel, pixel)
    level = slide.levels[index]
    f = max(1, int(min(pixel / level.down_x, pixel / level.down_y) * _NEXT_FINER))
    out = np.full((-(-level.height // f), -(-level.width // f), 3), 255, np.uint8)
    if slide.block[0] >= slide.levels[0].width:  # strips: whole rows are cheap
        step_x = out.shape[1]
        step_y = max(1, _BLOCK_PIXELS // (level.width * f))
    else:
        step_x = step_y = max(1, 2048 // f)
    for y in range(0, out.shape[0], step_y):
        for x in range(0, out.shape[1], step_x):
            rows, columns = min(step_y, out.shape[0] - y), min(step_x, out.shape[1] - x)
            region = slide.read(index, x * f, y * f, columns * f, rows * f)
            out[y : y + rows, x : x + columns] = np.asarray(Image.fromarray(region).reduce(f))
    return out, (level.down_x * f, level.down_y * f)


def cut_out(pixels: np.ndarray, left: int, top: int, width: int, height: int) -> np.ndarray:
    """A region of [H, W, 3], white where it lies outside."""
    out = np.full((height, width, 3), 255, np.uint8)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + width, pixels.shape[1]), min(top + height, pixels.shape[0])
    if x1 > x0 and y1 > y0:
        out[y0 - top : y1 - top, x0 - left : x1 - left] = pixels[y0:y1, x0:x1]
    return out


def _pair(x: str | float | None, y: str | float | None) -> tuple[float, float] | None:
    """Two positive numbers from what a file says; the first one counts for both where the second is absent."""
    try:
        first = float(x or 0)
        second = float(y or 0) or first
    except (TypeError, ValueError):
        return None
    return (first, second) if 0 < first < np.inf and 0 < second < np.inf else None


@contextmanager
def _openslide_errors(path: Path) -> Iterator[None]:
    import openslide

    try:
        yield
    except (openslide.OpenSlideError, OSError, ValueError) as error:
        raise DataError(f"{path.name} cannot be read: {error or 'unknown format'}.", "Replace or remove it.") from error
