"""Read image files of any usual kind as 8-bit RGB, and bring tiles to one size."""

from __future__ import annotations

import ctypes
import io
import logging
import stat
import struct
import sys
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from histosynth.core.errors import DataError
from histosynth.core.files import atomic_path

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"})
MAX_PIXELS = 64_000_000  # a tile is far smaller; a file that claims more is a slide or a bomb
MAX_BYTES = 1 << 30
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION, _BITS = 0x0112, 258
# What decoders raise for damaged files. Pillow: OSError, ValueError, SyntaxError (chunks), EOFError, TypeError and
# IndexError (tags), AssertionError and AttributeError (states held impossible), RuntimeError (codecs), struct.error;
# tifffile: TiffFileError (a ValueError), ZeroDivisionError, UnboundLocalError, OverflowError, zlib.error, MemoryError.
DAMAGE = (
    OSError, ValueError, SyntaxError, TypeError, EOFError, IndexError, KeyError, OverflowError, ZeroDivisionError,
    AssertionError, AttributeError, RuntimeError, MemoryError, UnboundLocalError, struct.error, zlib.error,
)  # fmt: skip

# damage is an error here; a warning or a line in the log besides, for every tile, would be thousands
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


def _silence_libtiff() -> None:
    """libtiff writes its complaints past Python to standard error; Pillow then raises them as well."""
    try:
        library = ctypes.CDLL(Image.core.__file__)  # finds the symbols of the libtiff that it is linked to
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
            function(None)
    except (AttributeError, OSError, TypeError):
        pass  # linked in a way that hides the symbols: only the messages remain


_silence_libtiff()


@dataclass(frozen=True)
class Decoded:
    """A decoded image file."""

    pixels: np.ndarray
    """uint8 [H, W, 3] RGB."""
    format: str
    """The file's format, such as "PNG"."""
    plain: bool
    """Whether the file is an 8-bit RGB PNG without transparency or a turn: what a tile set stores."""


def read_rgb(source: Path | str | bytes | IO[bytes], name: str = "") -> tuple[np.ndarray, str]:
    """Read an image.

    16-bit channels are scaled to 8 bits, transparency is laid on white (the slide's background), palettes
    and CMYK become RGB, the EXIF orientation is applied, and of several pages the first is taken. Floating-point
    values are taken to be in [0, 1] if none is above 1, else in [0, 255] if none is above 255, else in 16 bits.

    Args:
        source: a path, the bytes of a file, or a file opened for reading bytes.
        name: what messages call it; the path by default.

    Returns:
        (uint8 [H, W, 3] RGB, the file's format such as "PNG").

    Raises:
        DataError: the file is missing, is no image, is damaged, or is too large for a tile.
    """
    if isinstance(source, bytes):
        data, name = source, name or "The image"
    elif isinstance(source, str | Path):
        data, name = read_bytes(Path(source)), name or str(source)
    else:
        data, name = source.read(MAX_BYTES + 1), name or str(getattr(source, "name", "The image"))
    decoded = decode(data, name)
    return decoded.pixels, decoded.format


def read_bytes(path: Path) -> bytes:
    """The bytes of a regular file of usual size; never waits for a pipe or a device.

    Raises:
        DataError: it is missing, no file, too large, or cannot be read.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise DataError(f"{path} does not exist or is not a file.", "Check the path.")
        if state.st_size > MAX_BYTES:
            raise DataError(f"{path} has {state.st_size} bytes, too many for a tile.", "Cut slides into tiles first.")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{path} does not exist or is not a file.", "Check the path.") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte or a lone surrogate in the name
        what = getattr(error, "strerror", None) or error
        raise DataError(f"{str(path)!r} cannot be read: {what}.", "Check the path and its permissions.") from error


def decode(data: bytes, name: str) -> Decoded:
    """Decode the bytes of an image file; see `read_rgb`.

    Raises:
        DataError: no image, damaged, or too large for a tile.
    """
    if len(data) > MAX_BYTES:
        raise DataError(f"{name} has more than {MAX_BYTES} bytes, too many for a tile.", "Cut slides into tiles first.")
    try:
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_pixels(name, image.width, image.height)
                if image.format != "TIFF" or max(image.tag_v2.get(_BITS) or (1,)) <= 8:
                    return _from_pillow(image, data)
        except UnidentifiedImageError:
            if not data.startswith(_TIFF):
                raise
        from histosynth.tiles import _tiff  # only for the kinds of TIFF that Pillow cannot hold

        return Decoded(_tiff.decode(data, lambda w, h: _check_pixels(name, w, h)), "TIFF", False)
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} has too many pixels for a tile.", "Cut slides into tiles first.") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not an image that can be read.", "Replace or remove it.") from error
    except DAMAGE as error:
        why = str(error) or type(error).__name__
        raise DataError(f"{name} is damaged or of an unusual kind: {why}.", "Replace or remove it.") from error


def _check_pixels(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"{name} has {width} x {height} pixels, too many pixels for a tile.", "Cut slides first.")
    if width < 1 or height < 1:
        raise DataError(f"{name} has no pixels.", "Replace or remove it.")


def _from_pillow(image: Image.Image, data: bytes) -> Decoded:
    kind = "JPEG" if image.format == "MPO" else image.format or ""
    depth = image.tile[0].args if kind == "PNG" and image.tile else ""
    if isinstance(depth, str) and ";16" in depth:
        pixels = _png16(image, data, depth)
        return Decoded(orient(pixels, _orientation(image)), kind, False)
    image.load()
    turn = 1 if kind == "TIFF" else _orientation(image)  # Pillow has turned TIFFs
    plain = kind == "PNG" and image.mode == "RGB" and "transparency" not in image.info and turn == 1
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return Decoded(orient(np.array(image.convert("RGB")), turn), kind, plain)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except DAMAGE:  # a damaged comment beside whole pixels
        return 1


def orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn [H, W, ...] as its EXIF orientation (1 to 8; others mean 1) says it is to be seen."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    down = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    across = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(pixels[down, across])


def _png16(image: Image.Image, data: bytes, depth: str) -> np.ndarray:
    """All 16 bits of a 16-bit PNG, uint8 [H, W, 3] after rounding."""
    if depth == "I;16B":
        image.load()
        values = np.asarray(image).astype(np.uint16)[..., None]
    elif depth == "LA;16B":  # the four bytes of a pixel, unpacked as they are
        values = _unpacked(image, "RGBA").astype(np.uint16)
        values = values[..., 0::2] << 8 | values[..., 1::2]
    else:
        values = sixteen_bits(image, data)
    alpha = None
    if values.shape[2] in (2, 4):
        values, alpha = values[..., :-1], values[..., -1:]
    elif (key := image.info.get("transparency")) is not None:
        alpha = np.where((values == np.asarray(key)).all(2, keepdims=True), 0, 65535)
    return to_rgb8(values, 65535, alpha)


def sixteen_bits(image: Image.Image, data: bytes) -> np.ndarray:
    """The uint16 [H, W, C] values of an opened image of 16-bit colours, of which Pillow keeps the high bytes.

    Unpacked with the other byte order, the same file gives the low bytes.

    Args:
        image: not yet loaded.
        data: the bytes of its file.

    Raises:
        ValueError: another kind of image.
    """
    arguments = image.tile[0].args
    kind, _, order = (arguments if isinstance(arguments, str) else arguments[0]).partition(";16")
    kind = {"RGBa": "RGBA"}.get(kind, kind)  # the second would be divided by alpha while unpacking
    if kind not in ("RGB", "RGBX", "RGBA", "CMYK") or order not in ("B", "L", "N"):
        raise ValueError(f"its pixels are of the kind {kind};16{order}")
    if order == "N":  # the order of this machine
        order = sys.byteorder[0].upper()
    with Image.open(io.BytesIO(data), formats=_FORMATS) as second:
        low = _unpacked(second, f"{kind};16{'L' if order == 'B' else 'B'}").astype(np.uint16)
    return _unpacked(image, f"{kind};16{order}").astype(np.uint16) << 8 | low


def _unpacked(image: Image.Image, rawmode: str) -> np.ndarray:
    image.tile = [t._replace(args=rawmode if isinstance(t.args, str) else (rawmode, *t.args[1:])) for t in image.tile]
    image.load()
    return np.asarray(image)


def to_rgb8(
    values: np.ndarray, top: float, alpha: np.ndarray | None = None, *, premultiplied: bool = False
) -> np.ndarray:
    """Scale channels to 8 bits and lay them on white.

    Args:
        values: [H, W, 1] grey or [H, W, 3] colour, 0 to `top`.
        top: the value of white.
        alpha: [H, W, 1], 0 to `top`.
        premultiplied: whether the colours are already multiplied by alpha.

    Returns:
        uint8 [H, W, 3].
    """
    scaled = np.nan_to_num(values.astype(np.float64) / top, nan=0.0).clip(0, 1)
    if alpha is not None:
        share = np.nan_to_num(alpha.astype(np.float64) / top, nan=1.0).clip(0, 1)
        scaled = ((scaled if premultiplied else scaled * share) + 1 - share).clip(0, 1)
    grey = (scaled * 255).round().astype(np.uint8)
    return np.repeat(grey, 3, axis=2) if grey.shape[2] == 1 else grey


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
