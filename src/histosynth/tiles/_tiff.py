"""TIFFs that Pillow cannot hold: more than 8 bits a channel, floating point, planes one after another."""

from __future__ import annotations

import io
import logging
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from histosynth.tiles.images import orient, sixteen_bits, to_rgb8

_MAX_SEGMENTS = 100_000  # strips or tiles; decoding them is a Python loop
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _SEPARATED = 0, 1, 2, 5
_ASSOCIATED, _UNASSOCIATED = 1, 2  # kinds of alpha: multiplied into the colours, or not
_NONE, _LZW, _DEFLATES, _PACKBITS = 1, 5, (8, 32946), 32773
_CHANNELS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _SEPARATED: 4}

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # damage is an error here, not a line in the log


def decode(data: bytes, check_pixels: Callable[[int, int], None]) -> np.ndarray:
    """The first page of a TIFF as uint8 [H, W, 3].

    Args:
        data: the bytes of the file.
        check_pixels: called with width and height before anything is decoded; raises if they are too large.

    Raises:
        ValueError: a kind that is not read; and whatever tifffile raises for damaged files (`images.DAMAGE`).
    """
    import tifffile

    with np.errstate(all="ignore"), tifffile.TiffFile(io.BytesIO(data)) as file:
        page: Any = file.pages.first
        check_pixels(page.imagewidth, page.imagelength)
        _check_layout(page, len(data))
        _check_unpacked(page, data)
        orientation = _orientation(page)
        try:
            values = page.asarray(maxworkers=1)
        except ValueError as error:
            if "imagecodecs" not in str(error):  # a compression that tifffile leaves to another package
                raise
            values = _with_libtiff(data)
            orientation = 1  # Pillow has turned it
        else:
            if page.planarconfig == 2 and page.samplesperpixel > 1:
                values = np.moveaxis(values, 0, -1)
        values = values.reshape(*values.shape[:2], -1)
        return orient(_colours(values, page), orientation)


def _check_layout(page: Any, length: int) -> None:
    """Refuse size tags that would cost much time or memory for nothing."""
    segments = math.prod(page.chunked)
    area = page.imagewidth * page.imagelength
    if (
        page.imagedepth != 1
        or not 1 <= page.samplesperpixel <= 16
        or page.bitspersample > 64
        or segments > _MAX_SEGMENTS
        or len(page.dataoffsets) != segments
        or math.prod(page.chunks) > 16 * max(area, 1 << 20)
    ):
        raise ValueError("its size tags make no sense")
    if int(page.photometric) not in _CHANNELS or page.samplesperpixel < _CHANNELS[int(page.photometric)]:
        raise ValueError(f"its colours are of the kind {page.photometric!s} with {page.samplesperpixel} channels")
    if int(page.compression) not in (_NONE, _LZW, *_DEFLATES, _PACKBITS):
        raise ValueError(f"its compression is {page.compression!s}")
    if any(n < 1 or o + n > length for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)):
        raise EOFError("it ends too early")


def _check_unpacked(page: Any, data: bytes) -> None:
    """Refuse deflated strips that unfold to more than they should; tifffile unpacks them without a limit."""
    if int(page.compression) not in _DEFLATES:
        return
    most = math.prod(page.chunks) * -(-page.bitspersample // 8)
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if len(zlib.decompressobj().decompress(data[offset : offset + count], most + 1)) > most:
            raise ValueError("a strip unpacks to more than its size")


def _with_libtiff(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
        if image.mode in ("RGB", "RGBA", "CMYK"):
            return sixteen_bits(image, data)
        image.load()
        return np.asarray(image)


def _colours(values: np.ndarray, page: Any) -> np.ndarray:
    """Channels [H, W, C] of any type as uint8 [H, W, 3]."""
    colours = int(page.photometric)
    count = _CHANNELS[colours]
    paint = values[..., :count]
    if values.dtype.kind == "f":
        most = paint[np.isfinite(paint)].max(initial=0)
        top = 1.0 if most <= 1 else 255.0 if most <= 255 else 65535.0
    elif values.dtype.kind in "iu":
        top = float((1 << (page.bitspersample - (values.dtype.kind == "i"))) - 1)
    else:
        raise ValueError(f"its values are of the type {values.dtype}")
    paint = np.nan_to_num(paint.astype(np.float64)).clip(0, top)
    if colours == _WHITE_IS_ZERO:
        paint = top - paint
    elif colours == _SEPARATED:  # the inks that stay out of a channel, times black
        paint = (top - paint[..., :3]) * (1 - paint[..., 3:] / top)
    extras = [int(e) for e in page.extrasamples]
    kind = next((e for e in extras if e in (_ASSOCIATED, _UNASSOCIATED)), None)
    place = None if kind is None else page.samplesperpixel - len(extras) + extras.index(kind)
    alpha = values[..., place : place + 1] if place is not None and place < values.shape[2] else None
    return to_rgb8(paint, top, alpha, premultiplied=kind == _ASSOCIATED)


def _orientation(page: Any) -> int:
    tag = page.tags.get(274)
    return int(tag.value) if tag is not None and isinstance(tag.value, int) else 1
