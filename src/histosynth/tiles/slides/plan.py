"""Which tiles of a slide are cut, decided on a small picture of it before any tile is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from histosynth.core.errors import DataError, SettingError, did_you_mean
from histosynth.core.seeds import numpy_rng
from histosynth.tiles.slides.annotations import covered, read_annotations
from histosynth.tiles.slides.listing import Slide
from histosynth.tiles.slides.reader import SlideReader, microns, open_slide, overview
from histosynth.tiles.slides.tissue import find_tissue, shares
from histosynth.tiles.split.assign import SplitConfig, check_shares

_MASK_UM = 8.0  # microns a pixel of the tissue mask ...
_MASK_PER_TILE = 14  # ... but at least this many pixels along a tile's edge ...
_MASK_PIXELS = 6_000_000  # ... and at most this many in all
_SLACK = 0.01  # shares are sampled to about a hundredth; without it a tie would go to either class
_COARSEST = 1.2  # how much coarser than wanted a slide may be; more would only enlarge pixels


@dataclass(frozen=True)
class CutConfig:
    """How slides are cut into tiles."""

    size: int = 224
    """Edge length of a tile in pixels."""
    mpp: float = 0.5
    """Microns per pixel of the tiles (about 0.5 at 20x, 0.25 at 40x)."""
    overlap: float = 0.0
    """How much neighbours overlap: below 1 a share of the edge, otherwise pixels of the tile."""
    slide_mpp: float | None = None
    """Microns per pixel of slides that do not say it."""
    min_tissue: float = 0.5
    """Least share of a tile that is tissue."""
    any_tissue: tuple[str, ...] = ("ADI", "Adipose", "Fat", "BACK", "Background")
    """Annotated classes that need no tissue."""
    ink: bool = True
    """Leave out pen marks (turn off for blue special stains, which look like blue ink)."""
    min_cover: float = 0.75
    """Least share of a tile that its class must cover on annotated slides; two such classes set it aside."""
    label: str = "tissue"
    """Class of the tiles of slides without annotations."""
    border: Literal["skip", "pad"] = "skip"
    """Tiles that stick out of the slide: left out, or padded with white."""
    max_tiles: int | None = None
    """At most this many tiles a slide, drawn at random, as evenly over its classes as they allow."""
    thumbnail: int = 1600
    """Longest side of the picture of each slide, in pixels."""
    seed: int = 0
    """Seed of the draw for `max_tiles`."""
    licence: str = ""
    """Licence of the slides, kept in tileset.json."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Shares and seed of the split by patient."""


@dataclass(frozen=True)
class Plan:
    """The tiles of one slide.

    Attributes:
        tiles: columns x, y (level-0 pixels of the corner), label, tissue (share), cover (share of the class).
        facts: what slides.csv says of the slide.
        colours: #RRGGBB of classes, from the annotations.
        width, height: extent of a tile in level-0 pixels.
        picture: uint8 [h, w, 3], the slide at thumbnail size.
        mask: bool, tissue, at its own size.
        picture_pixel, mask_pixel: horizontal and vertical size of their pixels in level-0 pixels.
    """

    tiles: pd.DataFrame
    facts: dict[str, str | int | float]
    colours: dict[str, str]
    width: float
    height: float
    picture: np.ndarray
    mask: np.ndarray
    picture_pixel: tuple[float, float]
    mask_pixel: tuple[float, float]


def check_config(config: CutConfig) -> None:
    """Refuse settings that cannot be used.

    Raises:
        SettingError: names the setting, its value and the remedy.
    """
    limits = {
        "size": (16, 8192), "mpp": (0.01, 100), "overlap": (0, config.size - 1), "min_tissue": (0, 1),
        "min_cover": (0, 1), "thumbnail": (64, 8192), "slide_mpp": (0.01, 100), "max_tiles": (1, 10**9),
    }  # fmt: skip
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise SettingError(f"{name} is {value}.", f"It must be between {low} and {high}.")
    if config.min_cover == 0:
        raise SettingError("min_cover is 0.", "Every class would cover every tile; choose a share such as 0.5.")
    if config.border not in ("skip", "pad"):
        raise SettingError(f"border is {config.border!r}.", did_you_mean(config.border, ("skip", "pad")))
    if not config.label.strip():
        raise SettingError("label is empty.", "Name the class of slides without annotations.")
    if config.split.protocol:
        raise SettingError(
            f"split.protocol is {config.split.protocol!r}, but slides are split by patient.", "Leave it out."
        )
    check_shares(config.split)


def plan_slide(slide: Slide, config: CutConfig) -> Plan:
    """Decide which tiles of a slide are cut.

    Raises:
        DataError: the slide or its annotations cannot be read, or its resolution is unknown or too coarse.
    """
    reader = open_slide(slide.path)
    try:
        mpp = microns(reader, slide.path.name, slide.mpp or config.slide_mpp)
        if max(mpp) > _COARSEST * config.mpp:
            raise DataError(
                f"{slide.path.name} has {max(mpp):.3g} microns a pixel, coarser than the wanted {config.mpp:g}.",
                f"Choose --mpp {max(mpp):.2g} or more, or leave the slide out.",
            )
        annotations = read_annotations(slide.annotations) if slide.annotations else None
        width, height = config.size * config.mpp / mpp[0], config.size * config.mpp / mpp[1]
        picture, picture_pixel, image, mask_pixel = _pictures(reader, mpp, config)
        smallest = 0.25 * width * height / (mask_pixel[0] * mask_pixel[1])
        mask = find_tissue(image, smallest=smallest, find_ink=config.ink).mask
        x, y = grid(reader, width, height, config)
        tissue = shares(mask, *_scaled(x, y, width, height, mask_pixel))
        tiles = pd.DataFrame({"x": x, "y": y, "tissue": tissue})
        facts: dict[str, str | int | float] = {
            "reader": reader.kind, "width": reader.levels[0].width, "height": reader.levels[0].height,
            "levels": len(reader.levels), "mpp_x": mpp[0], "mpp_y": mpp[1], "grid": len(tiles),
        }  # fmt: skip
    finally:
        reader.close()
    if annotations is None:
        tiles["label"], tiles["cover"] = slide.label or config.label, 1.0
        exempt = np.zeros(len(tiles), bool)
    else:
        labels, cover = covered(annotations, x.astype(float), y.astype(float), width, height)
        tiles["label"], tiles["cover"], both = label_tiles(labels, cover, config.min_cover)
        facts |= {"unlabelled": int(((tiles.label == "") & ~both).sum()), "two_classes": int(both.sum())}
        facts["annotations_skipped"] = ", ".join(f"{n} {what}" for what, n in sorted(annotations.skipped.items()))
        exempt = tiles.label.str.lower().isin([c.lower() for c in config.any_tissue]).to_numpy()
    labelled = (tiles.label != "").to_numpy()
    enough = exempt | (tissue >= config.min_tissue)
    facts["too_little_tissue"] = int((labelled & ~enough).sum())
    tiles = tiles[labelled & enough]
    drawn = _draw(tiles, slide.name, config)
    facts |= {"not_drawn": len(tiles) - len(drawn), "tiles": len(drawn)}
    colours = annotations.colours if annotations else {}
    return Plan(drawn, facts, colours, width, height, picture, mask, picture_pixel, mask_pixel)


def grid(reader: SlideReader, width: float, height: float, config: CutConfig) -> tuple[np.ndarray, np.ndarray]:
    """Corners of all tiles of a slide, row by row: two int64 [N] of level-0 pixels.

    The grid starts at the corner of the scanned part. Corners are multiples of the unrounded step, so that
    rounding never adds up.
    """
    overlap = config.overlap if config.overlap < 1 else config.overlap / config.size
    left, top, across, down = reader.bounds
    return_axes = []
    for start, length, extent in ((left, across, width), (top, down, height)):
        step = extent * (1 - overlap)
        if config.border == "pad":
            count = max(1, int(np.ceil((length - extent) / step - 1e-9)) + 1)
        else:  # a pixel of tolerance: 224.4 pixels fit into a slide of 224
            count = max(0, int(np.floor((length - extent + 1) / step)) + 1) if length + 1 >= extent else 0
        return_axes.append(start + np.round(np.arange(count) * step).astype(np.int64))
    x, y = np.meshgrid(*return_axes)
    return x.ravel(), y.ravel()


def label_tiles(
    labels: tuple[str, ...], cover: np.ndarray, min_cover: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The class of each tile: the only one that covers at least `min_cover` of it.

    Args:
        labels: C class names.
        cover: float [N, C].

    Returns:
        (labels, "" where no class or more than one covers enough; cover of the class; whether several do).
    """
    if not labels:
        empty = np.zeros(len(cover))
        return np.full(len(cover), "", object), empty, empty.astype(bool)
    enough = cover >= min_cover - _SLACK
    several = enough.sum(1) > 1
    best = cover.argmax(1)
    found = np.where(enough.sum(1) == 1, np.array(labels, object)[best], "")
    return found, cover.max(1), several


def _draw(tiles: pd.DataFrame, name: str, config: CutConfig) -> pd.DataFrame:
    """At most `max_tiles` of them, as evenly over the labels as their numbers allow, in the grid's order."""
    if config.max_tiles is None or len(tiles) <= config.max_tiles:
        return tiles.reset_index(drop=True)
    counts = tiles.label.value_counts().sort_values(kind="stable")
    left, chosen = config.max_tiles, []
    for place, label in enumerate(sorted(counts.index, key=lambda c: (counts[c], c))):
        # the rarest first: what it cannot use of its share goes to the others
        share = -(-left // (len(counts) - place))
        number = min(int(counts[label]), share)
        rows = np.flatnonzero(tiles.label == label)
        chosen.append(numpy_rng(config.seed, "cut", name, label).permutation(rows)[:number])
        left -= number
    return tiles.iloc[np.sort(np.concatenate(chosen))].reset_index(drop=True)


def _pictures(
    reader: SlideReader, mpp: tuple[float, float], config: CutConfig
) -> tuple[np.ndarray, tuple[float, float], np.ndarray, tuple[float, float]]:
    """The slide at thumbnail size and at the size of the tissue mask, from one pass over the file."""
    first = reader.levels[0]
    um = max(min(_MASK_UM, config.size * config.mpp / _MASK_PER_TILE), 2 * max(mpp))
    um = max(um, np.sqrt(first.width * mpp[0] * first.height * mpp[1] / _MASK_PIXELS))
    thumb = max(1.0, max(first.width, first.height) / config.thumbnail)
    whole, pixel = overview(reader, min(um / max(mpp), thumb))
    small, small_pixel = _reduced(whole, pixel, (um / mpp[0], um / mpp[1]))
    picture, picture_pixel = _reduced(whole, pixel, (thumb, thumb))
    return picture, picture_pixel, small, small_pixel


def _reduced(
    image: np.ndarray, pixel: tuple[float, float], wanted: tuple[float, float]
) -> tuple[np.ndarray, tuple[float, float]]:
    from PIL import Image

    height, width = image.shape[:2]
    across, down = max(1, round(width * pixel[0] / wanted[0])), max(1, round(height * pixel[1] / wanted[1]))
    across, down = min(across, width), min(down, height)
    small = np.asarray(Image.fromarray(image).resize((across, down), Image.Resampling.BOX))
    return small, (pixel[0] * width / across, pixel[1] * height / down)


def _scaled(
    x: np.ndarray, y: np.ndarray, width: float, height: float, pixel: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return x / pixel[0], y / pixel[1], (x + width) / pixel[0], (y + height) / pixel[1]
