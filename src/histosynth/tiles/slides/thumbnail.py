"""The picture of a slide with its tissue outlined and the grid of its tiles drawn on it."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from histosynth.tiles.slides.plan import Plan

_OUTLINE = (20, 20, 20)
_TINT = 50  # opacity of a tile's colour, of 255
_LINE = 22  # height of a line of the legend
_LEAST = 480  # narrower pictures are enlarged, so that the legend fits


def draw_thumbnail(plan: Plan, title: str, colours: dict[str, str]) -> np.ndarray:
    """Draw a slide with its mask and tiles.

    Args:
        plan: what was decided for the slide.
        title: first line of the legend.
        colours: #RRGGBB of each class.

    Returns:
        uint8 [h, w, 3].
    """
    image = Image.fromarray(plan.picture)
    factor = max(1.0, _LEAST / max(image.size))
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    scale_x, scale_y = factor / plan.picture_pixel[0], factor / plan.picture_pixel[1]
    image.paste(Image.new("RGB", image.size, _OUTLINE), mask=_outline(plan.mask, image.size))
    layer = Image.new("RGBA", image.size)
    brush = ImageDraw.Draw(layer)
    for row in plan.tiles.itertuples():
        colour = _rgb(colours[row.label])
        corner = row.x * scale_x, row.y * scale_y
        other = (row.x + plan.width) * scale_x - 1, (row.y + plan.height) * scale_y - 1
        box = (*corner, max(other[0], corner[0]), max(other[1], corner[1]))
        brush.rectangle(box, fill=(*colour, _TINT), outline=(*colour, 255))
    image = Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")
    return np.asarray(_with_legend(image, plan, title, colours))


def _outline(mask: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """The rim of the mask, two pixels wide, as an image mask of that size."""
    from scipy import ndimage

    large = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    rim = large & ~ndimage.binary_erosion(large, iterations=2, border_value=1)
    return Image.fromarray(np.where(rim, 255, 0).astype(np.uint8))


def _with_legend(image: Image.Image, plan: Plan, title: str, colours: dict[str, str]) -> Image.Image:
    counts = plan.tiles.label.value_counts()
    lines = [(None, title)]
    lines += [(_rgb(colours[label]), f"{label}: {counts[label]} tiles") for label in sorted(counts.index)]
    if not len(counts):
        lines.append((None, "no tile"))
    lines.append((_OUTLINE, f"outline: tissue ({plan.mask.mean():.0%} of the slide)"))
    font = ImageFont.load_default(14)
    width = max(image.width, *(40 + int(font.getlength(text)) for _, text in lines))
    sheet = Image.new("RGB", (width, image.height + _LINE * len(lines) + 12), (255, 255, 255))
    sheet.paste(image)
    brush = ImageDraw.Draw(sheet)
    for k, (colour, text) in enumerate(lines):
        top = image.height + 8 + k * _LINE
        if colour:
            brush.rectangle((10, top, 24, top + 14), fill=colour)
        brush.text((32 if colour else 10, top - 2), text, fill=(20, 20, 20), font=font)
    return sheet


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
