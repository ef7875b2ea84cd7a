"""Read image files of any usual kind as 8-bit RGB, and bring tiles to one size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from histosynth.core.errors import DataError
from histosynth.core.files import atomic_path

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"})
MAX_PIXELS = 64_000_000  # a tile is far smaller; a file that claims more is a slide or a bomb
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")


def read_rgb(path: Path | str) -> tuple[np.ndarray, str]:
    """Read an image file.

    16-bit channels are scaled to 8 bits, transparency is laid on white (the slide's background), palettes
    and CMYK become RGB, and the EXIF orientation is applied.

    Returns:
        (uint8 [H, W, 3] RGB, the file's format such as "PNG").

    Raises:
        DataError: the file is missing, is no image, is damaged, or is too large for a tile.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            kind = image.format or ""
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{path} has {image.width} x {image.height} pixels, too many pixels for a tile.",
                    "Cut slides into tiles first.",
                )
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image)), kind
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(f"{path} does not exist or is not a file.", "Check the path.") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} has too many pixels for a tile.", "Cut slides into tiles first.") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is not an image that can be read.", "Replace or remove it.") from error
    # damaged files make the decoders raise nearly anything that is not a bug of ours
    except (
        OSError,
        ValueError,
        SyntaxError,
        TypeError,
        EOFError,
        IndexError,
        KeyError,
        OverflowError,
    ) as error:
        raise DataError(f"{path} is damaged: {error}.", "Replace or remove it.") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        values = np.asarray(image, dtype=np.float64)
        top = 1.0 if image.mode == "F" and values.max() <= 1 else 65535.0 if values.max() > 255 else 255.0
        grey = np.clip(np.nan_to_num(values) / top * 255, 0, 255).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return np.array(image.convert("RGB"))


def write_png(path: Path | str, image: np.ndarray) -> None:
    """Write uint8 [H, W, 3] as PNG, atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG", compress_level=3)


def square(image: np.ndarray, size: int) -> np.ndarray:
    """The central square of uint8 [H, W, 3], resized with antialiasing to [size, size, 3]."""
    height, width = image.shape[:2]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    image = image[top : top + edge, left : left + edge]
    if edge == size:
        return np.ascontiguousarray(image)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))
