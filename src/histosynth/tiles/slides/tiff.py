"""TIFF files that OpenSlide does not read: OME-TIFF, strips, separate planes, 16 bits, palettes.

Only the tiles or strips that a region touches are decoded. tifffile decodes what zlib and LZMA can; JPEG, JPEG 2000
and LZW segments go to Pillow in a TIFF file of their own, so that no further codec library is needed.
"""

from __future__ import annotations

import io
import logging
import math
import re
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from histosynth.core.errors import DataError
from histosynth.tiles.images import DAMAGE, to_rgb8
from histosynth.tiles.slides.reader import Level

_CACHE_BYTES = 192_000_000
_MAX_SEGMENT = 1_000_000_000  # bytes of one decoded tile or strip
_MAX_EDGE = 4_000_000
_MAX_TILE = 1 << 26
_PILLOW_CODECS = {5: "LZW", 6: "old JPEG", 7: "JPEG", 33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000"}
_UNITS = {
    "": 1.0, "µm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0, "\\u00b5m": 1.0, "nm": 1e-3,
    "mm": 1e3, "cm": 1e4, "m": 1e6, "inch": 25400.0, "å": 1e-4,
}  # fmt: skip
_RESOLUTION_UNITS = {2: 25400.0, 3: 10_000.0, 4: 1000.0, 5: 1.0}


class TiffReader:
    """A TIFF file with one brightfield image, with or without a pyramid."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._cached = 0
        try:
            self._file = _open(path)
            try:
                self._levels = _levels(self._file)
                self._check()
                first = self._levels[0][0].keyframe
                self.mpp = _mpp(self._file, first)
            except (*DAMAGE, DataError):
                self._file.close()
                raise
        except DAMAGE as error:
            raise self._damaged(error) from error
        self.kind = f"tifffile {'OME-TIFF' if self._file.is_ome else 'TIFF'}"
        self.hint = ""
        sizes = [(pages[0].keyframe.imagewidth, pages[0].keyframe.imagelength) for pages in self._levels]
        width, height = sizes[0]
        self.levels = tuple(Level(w, h, _down(width, w), _down(height, h)) for w, h in sizes)
        self.bounds = (0, 0, width, height)
        self.block = (first.tilewidth, first.tilelength) if first.is_tiled else (width, first.rowsperstrip)
        self._top = _brightest(self._file, first)

    def read(self, level: int, left: int, top: int, width: int, height: int) -> np.ndarray:
        page = self._levels[level][0].keyframe
        out = np.full((height, width, 3), 255, np.uint8)
        x0, y0 = max(left, 0), max(top, 0)
        x1, y1 = min(left + width, page.imagewidth), min(top + height, page.imagelength)
        if x1 <= x0 or y1 <= y0:
            return out
        try:
            planes = [self._plane(level, p, s, x0, y0, x1, y1) for p, s in self._planes(level)]
            values = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
            out[y0 - top : y1 - top, x0 - left : x1 - left] = self._rgb(page, values)
        except DAMAGE as error:
            raise self._damaged(error) from error
        return out

    def close(self) -> None:
        self._file.close()
        self._cache.clear()

    def _damaged(self, error: BaseException) -> DataError:
        return DataError(f"{self._path.name} cannot be read: {error}.", "Replace or remove it.")

    def _check(self) -> None:
        """Refuse what is no brightfield image, before anything is decoded."""
        page = self._levels[0][0].keyframe
        for pages in self._levels:
            _check_sizes(pages[0].keyframe)
        channels = len(self._levels[0]) if len(self._levels[0]) > 1 else page.samplesperpixel
        if channels not in (1, 2, 3, 4) or (len(self._levels[0]) > 1 and channels == 2):
            raise DataError(f"{self._path.name} has {channels} channels.", "Only brightfield RGB slides can be cut.")
        if page.dtype is None or page.dtype.kind not in "ubf":
            raise DataError(f"{self._path.name} has pixels of type {page.dtype}.", "Convert it to 8 or 16 bits.")
        rows = page.tilelength if page.is_tiled else page.rowsperstrip
        columns = page.tilewidth if page.is_tiled else page.imagewidth
        bytes_ = min(rows, page.imagelength) * columns * page.samplesperpixel * page.dtype.itemsize
        if bytes_ > _MAX_SEGMENT and not page.is_memmappable:
            raise DataError(
                f"{self._path.name} keeps {bytes_ / 1e9:.1f} GB in one compressed piece.", "Convert it to a tiled TIFF."
            )

    def _planes(self, level: int) -> list[tuple[int, int]]:
        """(page, separate sample) of each plane that makes up the image."""
        pages = self._levels[level]
        if len(pages) > 1:
            return [(p, 0) for p in range(len(pages))]
        page = pages[0].keyframe
        return [(0, s) for s in range(page.samplesperpixel)] if _separate(page) else [(0, 0)]

    def _plane(self, level: int, number: int, sample: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        """Values [y1 - y0, x1 - x0, samples] of one plane."""
        page = self._levels[level][number]
        key = page.keyframe
        contiguous = 1 if _separate(key) else key.samplesperpixel
        if not key.is_tiled and key.is_memmappable and not _separate(key):
            shape = (key.imagelength, key.imagewidth, contiguous)
            kind = key.dtype.newbyteorder(self._file.byteorder)
            return np.memmap(self._path, kind, "r", offset=page.dataoffsets[0], shape=shape)[y0:y1, x0:x1]
        tile_w = key.tilewidth if key.is_tiled else key.imagewidth
        tile_h = key.tilelength if key.is_tiled else min(key.rowsperstrip, key.imagelength)
        across, down = -(-key.imagewidth // tile_w), -(-key.imagelength // tile_h)
        out = np.zeros((y1 - y0, x1 - x0, contiguous), key.dtype)
        for row in range(y0 // tile_h, -(-y1 // tile_h)):
            for column in range(x0 // tile_w, -(-x1 // tile_w)):
                segment = self._segment(level, number, sample * across * down + row * across + column)
                left, top = column * tile_w, row * tile_h
                a, b = max(y0, top), min(y1, top + tile_h, top + segment.shape[0])
                c, d = max(x0, left), min(x1, left + tile_w, left + segment.shape[1])
                out[a - y0 : b - y0, c - x0 : d - x0] = segment[a - top : b - top, c - left : d - left]
        return out

    def _segment(self, level: int, number: int, index: int) -> np.ndarray:
        place = (level, number, index)
        if place in self._cache:
            self._cache.move_to_end(place)
            return self._cache[place]
        page = self._levels[level][number]
        key = page.keyframe
        if index >= len(page.dataoffsets):
            raise ValueError(f"piece {index} of the image is missing")
        self._file.filehandle.seek(page.dataoffsets[index])
        wanted = page.databytecounts[index]
        data = self._file.filehandle.read(wanted)
        if len(data) < wanted:
            raise ValueError("the file is shorter than its table of contents says")
        if not data:  # a sparse file leaves out pieces without content
            rows, columns = (key.tilelength, key.tilewidth) if key.is_tiled else (key.rowsperstrip, key.imagewidth)
            samples = 1 if _separate(key) else key.samplesperpixel
            found = np.full((rows, columns, samples), _white(key), key.dtype)
        elif key.compression in _PILLOW_CODECS:
            found = _by_pillow(page, data, index)
        else:
            found = key.decode(data, index, _fullsize=False)[0][0]
        self._cache[place] = found
        self._cached += found.nbytes
        while self._cached > _CACHE_BYTES and len(self._cache) > 1:
            self._cached -= self._cache.popitem(last=False)[1].nbytes
        return found

    def _rgb(self, page: Any, values: np.ndarray) -> np.ndarray:
        """Values [h, w, c] as uint8 [h, w, 3]: scaled to 8 bits, palette applied, transparency laid on white."""
        if page.photometric == 3 and page.colormap is not None:
            table = (np.asarray(page.colormap).T // 256).astype(np.uint8)
            return table[values[..., 0]]
        top = self._top
        if page.photometric == 0:
            values = values.dtype.type(top) - values
        if page.photometric == 5 and values.shape[2] == 4:  # four printing inks, none of which is white
            ink = values / top
            values, top = (1 - ink[..., :3]) * (1 - ink[..., 3:]), 1.0
        alpha = values[..., -1:] if values.shape[2] in (2, 4) and page.extrasamples else None
        colours = values[..., :3] if values.shape[2] >= 3 else values[..., :1]
        if colours.dtype == np.uint8 and top == 255 and alpha is None:
            return colours
        return to_rgb8(colours, top, alpha, premultiplied=bool(page.extrasamples and page.extrasamples[0] == 1))


def check_tiff(path: Path) -> bool:
    """Look at the directory of a TIFF file before OpenSlide does, which ends the process when sizes are absurd.

    Returns:
        Whether it holds what OpenSlide reads in full: tiles of 8-bit RGB, no OME.

    Raises:
        DataError: the directory is damaged.
    """
    try:
        with _open(path) as file:
            for page in file.pages:
                _check_sizes(page.keyframe)
            page = file.pages[0]
            levels = file.is_svs or file.is_philips or file.is_bif or not page.subifds
            eight = page.bitspersample == 8 and page.photometric in (2, 6) and page.samplesperpixel == 3
            return bool(page.is_tiled and eight and levels and not file.is_ome and not _separate(page))
    except DAMAGE as error:
        raise DataError(f"{path.name} cannot be read: {error}.", "Replace or remove it.") from error


def _check_sizes(page: Any) -> None:
    """Refuse sizes that no scanner makes and that would not fit into memory."""
    width, height = page.imagewidth, page.imagelength
    if not (0 < width <= _MAX_EDGE and 0 < height <= _MAX_EDGE):
        raise ValueError(f"it claims {width} x {height} pixels")
    if page.is_tiled and not 0 < page.tilewidth * page.tilelength <= _MAX_TILE:
        raise ValueError(f"it claims tiles of {page.tilewidth} x {page.tilelength} pixels")
    if page.is_tiled and len(page.dataoffsets) < math.prod(page.chunked):  # reading the rest would take for ever
        raise ValueError(f"it claims {width} x {height} pixels but has {len(page.dataoffsets)} tiles only")


def _open(path: Path) -> Any:
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # damage is reported by this module's errors
    return tifffile.TiffFile(path)


def _levels(file: Any) -> list[list[Any]]:
    """The pages of each level: one page, or one a channel."""
    series = max(file.series, key=lambda s: s.levels[0].shape[-2] * s.levels[0].shape[-1] if _is_image(s) else 0)
    levels = [_channels(level) for level in series.levels]
    if len(levels) == 1:  # pyramids of plain TIFF files: reduced copies among the pages that follow
        first = levels[0][0].keyframe
        others = [page for page in file.pages[1:] if page.keyframe is page and page.is_reduced]
        levels += [[page] for page in others if _is_copy(first, page)]
    return sorted(levels, key=lambda pages: -pages[0].keyframe.imagewidth)


def _is_image(series: Any) -> bool:
    return "Y" in series.axes and "X" in series.axes and len(series.shape) >= 2


def _channels(series: Any) -> list[Any]:
    """Pages of one level: the channels where they are separate pages, otherwise the first page."""
    page = series.pages[0]
    if "C" in series.axes and page.keyframe.samplesperpixel == 1:
        count = series.shape[series.axes.index("C")]
        outer = [n for a, n in zip(series.axes, series.shape, strict=True) if a not in "CYXS" and n > 1]
        if count > 1 and not outer:
            return [series.pages[i] for i in range(count)]
    return [page]


def _is_copy(first: Any, page: Any) -> bool:
    across, down = first.imagewidth / page.imagewidth, first.imagelength / page.imagelength
    same = page.dtype == first.dtype and page.samplesperpixel == first.samplesperpixel
    return same and across > 1 and abs(across - down) <= 0.02 * across + max(1 / page.imagewidth, 1 / page.imagelength)


def _separate(page: Any) -> bool:
    return page.planarconfig == 2 and page.samplesperpixel > 1


def _white(page: Any) -> float:
    if page.photometric in (0, 5):
        return 0
    return 1.0 if page.dtype.kind in "fb" else float(np.iinfo(page.dtype).max)


def _down(whole: int, part: int) -> float:
    """How many pixels one stands for; a level is often one pixel smaller than an exact division would make it."""
    ratio = round(whole / part)
    return float(ratio) if abs(whole / ratio - part) < 1 else whole / part


def _brightest(file: Any, page: Any) -> float:
    """The value that means white."""
    if page.dtype.kind in "fb":
        return 1.0
    found = re.search(r'SignificantBits="(\d+)"', file.ome_metadata or "") if file.is_ome else None
    bits = int(found[1]) if found else page.bitspersample
    return float(2 ** (bits if 0 < bits <= page.dtype.itemsize * 8 else page.dtype.itemsize * 8) - 1)


def _by_pillow(page: Any, data: bytes, index: int) -> np.ndarray:
    """Decode one piece with Pillow: JPEG 2000 as it is, the others as the only strip of a small TIFF file."""
    key = page.keyframe
    samples = 1 if _separate(key) else key.samplesperpixel
    if key.is_tiled:
        rows, columns = key.tilelength, key.tilewidth
    else:
        strips = -(-key.imagelength // key.rowsperstrip)
        rows = min(key.rowsperstrip, key.imagelength - index % strips * key.rowsperstrip)
        columns = key.imagewidth
    if key.compression in (33003, 33005, 34712):
        stream = data
    elif key.dtype.itemsize > 1 and samples > 1:
        name = _PILLOW_CODECS[key.compression]
        raise ValueError(f"{samples} samples of {key.bitspersample} bits in {name} are not supported")
    else:
        stream = _small_tiff(page, data, rows, columns, samples)
    with Image.open(io.BytesIO(stream)) as image:
        values = np.asarray(image)
    return values[..., None] if values.ndim == 2 else values


def _small_tiff(page: Any, data: bytes, rows: int, columns: int, samples: int) -> bytes:
    key = page.keyframe
    order = page.parent.byteorder
    photometric = int(key.photometric) if samples > 1 else 1
    fields: list[tuple[int, int, list[int] | bytes]] = [
        (256, 4, [columns]), (257, 4, [rows]), (258, 3, [key.bitspersample] * samples), (259, 3, [key.compression]),
        (262, 3, [photometric]), (273, 4, [0]), (277, 3, [samples]), (278, 4, [rows]), (279, 4, [len(data)]),
        (284, 3, [1]),
    ]  # fmt: skip
    if key.predictor != 1:
        fields.append((317, 3, [int(key.predictor)]))
    if samples == 4:
        fields.append((338, 3, [int(key.extrasamples[0]) if key.extrasamples else 0]))
    if page.jpegtables:
        fields.append((347, 7, page.jpegtables))
    if photometric == 6:
        fields.append((530, 3, [int(s) for s in key.subsampling or (1, 1)]))
    start = 8 + 2 + 12 * len(fields) + 4
    body, entries = b"", b""
    for tag, kind, value in fields:
        raw = value if isinstance(value, bytes) else struct.pack(f"{order}{len(value)}{'IH'[kind == 3]}", *value)
        count = len(value)
        if len(raw) > 4:
            entry = struct.pack(f"{order}I", start + len(body))
            body += raw + b"\0" * (len(raw) % 2)
        else:
            entry = raw.ljust(4, b"\0")
        entries += struct.pack(f"{order}HHI", tag, kind, count) + entry
    where = entries.index(struct.pack(f"{order}HHI", 273, 4, 1)) + 8
    entries = entries[:where] + struct.pack(f"{order}I", start + len(body)) + entries[where + 4 :]
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return head + struct.pack(f"{order}H", len(fields)) + entries + b"\0\0\0\0" + body + data


def _mpp(file: Any, page: Any) -> tuple[float, float] | None:
    """Microns per pixel from OME, Aperio, ImageJ or the resolution tags."""
    if file.is_ome and (pixels := re.search(r"<(?:\w+:)?Pixels\b[^>]*>", file.ome_metadata or "")):
        found = [_ome_length(pixels[0], f"PhysicalSize{axis}") for axis in "XY"]
        if found[0]:
            return found[0], found[1] or found[0]
    if aperio := re.search(r"\bMPP\s*=\s*([\d.]+)", page.description or ""):
        value = float(aperio[1])
        return (value, value) if value > 0 else None
    unit = _RESOLUTION_UNITS.get(int(page.resolutionunit or 1))
    if unit is None and file.is_imagej:
        unit = _UNITS.get(str((file.imagej_metadata or {}).get("unit", "none")).lower())
    sizes = []
    for tag in ("XResolution", "YResolution"):
        dots, per = page.tags.valueof(tag) or (0, 1)
        sizes.append(unit * per / dots if unit and dots else 0.0)
    return (sizes[0], sizes[1] or sizes[0]) if sizes[0] else None


def _ome_length(element: str, name: str) -> float | None:
    value = re.search(rf'\b{name}="([^"]+)"', element)
    unit = re.search(rf'\b{name}Unit="([^"]*)"', element)
    factor = _UNITS.get((unit[1] if unit else "µm").replace("&#181;", "µ").replace("μ", "µ").lower())
    try:
        return float(value[1]) * factor if value and factor else None
    except ValueError:
        return None
