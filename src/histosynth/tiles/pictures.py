"""Sheets of tiles with names at the left and headings above."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from histosynth.core.errors import DataError
from histosynth.core.files import atomic_path

INK, FAINT = (31, 41, 51), (86, 97, 107)


@dataclass(frozen=True)
class Row:
    """One line of a sheet."""

    title: str
    """Name at the left; empty: none."""
    tiles: Tensor
    """uint8 [n, 3, S, S]."""
    note: str = ""
    """A second, smaller line under the name."""


def zoom_for(size: int) -> int:
    """How many times a tile of `size` pixels is enlarged to be seen well; whole numbers keep its pixels as they are."""
    return max(1, round(112 / size))


def sheet(
    rows: Sequence[Row], columns: Sequence[str] = (), gap: int = 2, zoom: int = 1, title: str = "", group: int = 0
) -> Image.Image:
    """Tiles on white, a line a row, with its name at the left and, if `columns` are given, headings above.

    Args:
        group: a wider gap after every so many tiles; 0: none.

    Raises:
        DataError: no row, or tiles of different sizes.
    """
    sizes = {tuple(row.tiles.shape[1:]) for row in rows}
    if len(sizes) != 1:
        raise DataError(f"A sheet got tiles of {len(sizes)} shapes.", "Give at least one row, all tiles of one size.")
    edge = rows[0].tiles.shape[-1] * zoom
    text = max(9, min(edge // 5, 22))
    bold, plain = font(text, True), font(max(8, round(text * 0.72)), False)
    margin = text // 2 if any(r.title for r in rows) or columns or title else 0
    names = [_lines(row, bold, plain, 9 * text, edge) for row in rows]
    left = max((bold.getlength(line) if k == 0 else plain.getlength(line) for n in names for k, line in enumerate(n)),
               default=0)  # fmt: skip
    left = round(left) + 2 * margin if left else 0
    top = (text * 2 if columns else 0) + (text * 2 if title else 0) or (margin if left else 0)
    count = max(len(row.tiles) for row in rows)
    places = [left + k * (edge + gap) + (k // group * 4 * gap if group else 0) for k in range(count)]
    width = places[-1] + edge + margin
    height = top + len(rows) * (edge + gap) - gap + margin
    page = Image.new("RGB", (max(width, round(bold.getlength(title)) + 2 * margin if title else 0), height), "white")
    pen = ImageDraw.Draw(page)
    if title:
        pen.text((margin, text), title, INK, bold, anchor="lm")
    for k, heading in enumerate(columns):
        middle = places[k] + edge / 2
        pen.text((middle, top - text), _shortened(heading, plain, edge), FAINT, plain, anchor="mm")
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = top + i * (edge + gap)
        _write(pen, name, margin, y + edge / 2, bold, plain, text)
        for k, tile in enumerate(row.tiles):
            page.paste(_tile(tile, edge), (places[k], y))
    return page


def save(path: Path | str, image: Image.Image) -> Path:
    """Write a PNG, atomically."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")
    return Path(path)


def heat(values: Tensor, most: float) -> Tensor:
    """Numbers [S, S] from 0 to `most` as colours from black over violet and orange to yellow: uint8 [3, S, S]."""
    import matplotlib
    import torch

    colours = matplotlib.colormaps["inferno"]((values / most).clamp(0, 1).cpu().numpy())[..., :3]
    return torch.from_numpy((colours * 255).round().astype(np.uint8)).permute(2, 0, 1)


@lru_cache(maxsize=32)
def font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """The typeface of the pictures."""
    import matplotlib

    # Pillow's own font lacks most letters with accents; matplotlib ships one that has them
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(fonts / f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size)


def _lines(row: Row, bold: ImageFont.FreeTypeFont, plain: ImageFont.FreeTypeFont, width: int, edge: int) -> list[str]:
    """The name, and as much of the note as fits beside the tile."""
    if not row.title:
        return []
    lines = [_shortened(row.title, bold, width)]
    room = int((edge - bold.size) // (plain.size * 1.25))
    words = list(_wrapped(row.note, plain, width))
    if len(words) > max(room, 0):
        words = [*words[: room - 1], _shortened(" ".join(words[room - 1 :]), plain, width)] if room > 0 else []
    return lines + words


def _wrapped(text: str, face: ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and face.getlength(longer) > width:
            yield _shortened(line, face, width)
            line = word
        else:
            line = longer
    if line:
        yield _shortened(line, face, width)


def _shortened(text: str, face: ImageFont.FreeTypeFont, width: float) -> str:
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _write(
    pen: ImageDraw.ImageDraw,
    lines: Sequence[str],
    x: float,
    middle: float,
    bold: ImageFont.FreeTypeFont,
    plain: ImageFont.FreeTypeFont,
    text: int,
) -> None:
    """The lines of a name, centred at the height `middle`."""
    if not lines:
        return
    below = plain.size * 1.25
    y = middle - (len(lines) - 1) * below / 2
    pen.text((x, y), lines[0], INK, bold, anchor="lm")
    for k, line in enumerate(lines[1:]):
        pen.text((x, y + text * 0.5 + below * (k + 0.6)), line, FAINT, plain, anchor="lm")


def _tile(tile: Tensor, edge: int) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(tile.permute(1, 2, 0).cpu().numpy()))
    return image if image.width == edge else image.resize((edge, edge), Image.Resampling.NEAREST)
