"""The two passes of `tiles prepare` over the pixels, a chunk of tiles at a time; what workers import and run.

A chunk ends in one parquet file that is whole or absent, so that a repeat knows what is done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from histosynth.core.errors import DataError, RunError
from histosynth.core.files import atomic_path
from histosynth.core.pool import check_stop
from histosynth.tiles.images import square, write_png

MIN_EDGE = 16
_BATCH_PIXELS = 1_000_000  # decoded pixels that wait to be measured or normalised together: 20 tiles of 224 px


class Pixels(Protocol):
    """Where tiles are read from: a `Source`."""

    def rgb(self, path: str) -> tuple[np.ndarray, str]:
        """Pixels uint8 [H, W, 3] and the format of a tile."""
        ...


@dataclass(frozen=True)
class ReadTask:
    """Tiles to read and measure.

    Attributes:
        out: the parquet file of the result, a row a tile in the same order.
        tiles: (number of the source, path in it) of each.
    """

    out: Path
    tiles: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class WriteTask:
    """Tiles to normalise, resize and write.

    Attributes:
        out: the parquet file of the result, a row a tile in the same order.
        tiles: (number of the source, path in it, digest of its pixels at the first reading, file to write).
    """

    out: Path
    tiles: tuple[tuple[int, str, str, Path], ...]


def reader(sources: Sequence[Pixels]) -> Callable[[ReadTask], int]:
    """What does a `ReadTask`; gives the number of tiles."""
    return partial(_read_chunk, sources)


def writer(sources: Sequence[Pixels], profile: Path | None, size: int) -> Callable[[WriteTask], int]:
    """What does a `WriteTask`; gives the number of tiles.

    Args:
        profile: the saved stain profile, or None for no normalisation.
        size: edge length of the tiles that are written, or 0 to keep each as it is.
    """
    from histosynth.tiles.stain import load_normaliser

    normaliser = None if profile is None else load_normaliser(profile)
    return partial(_write_chunk, sources, normaliser, size)


def pixel_digest(image: np.ndarray) -> str:
    """SHA-256 of the size and pixels of a tile, uint8 [H, W, 3]; the file's format does not matter."""
    height, width = image.shape[:2]
    return hashlib.sha256(f"{width}x{height}".encode() + np.ascontiguousarray(image).tobytes()).hexdigest()


def _read_chunk(sources: Sequence[Pixels], task: ReadTask) -> int:
    from histosynth.tiles.quality.metrics import METRICS, measure
    from histosynth.tiles.split.duplicates import EDGE, thumbnails

    rows: list[dict[str, Any]] = []
    metrics = np.full((len(task.tiles), len(METRICS)), np.nan)
    small = np.zeros((len(task.tiles), EDGE * EDGE), np.uint8)
    for places, images in _batches(_decoded(sources, task, rows)):
        found = measure(images)
        metrics[places] = np.stack([found[name] for name in METRICS], axis=1)
        small[places] = thumbnails(images).reshape(len(images), -1)
    frame = pd.DataFrame(rows)
    for column, name in enumerate(METRICS):
        frame[f"q_{name}"] = metrics[:, column]
    frame["thumbnail"] = [row.tobytes() for row in small]
    _save(frame, task.out)
    return len(rows)


def _decoded(sources: Sequence[Pixels], task: ReadTask, rows: list[dict[str, Any]]) -> Iterator[tuple[int, np.ndarray]]:
    """The usable tiles; fills a row for each tile, usable or not."""
    for place, (origin, path) in enumerate(task.tiles):
        check_stop()
        row: dict[str, Any] = {"sha256": "", "format": "", "width": 0, "height": 0, "kept": False, "reason": ""}
        rows.append(row)
        try:
            image, row["format"] = sources[origin].rgb(path)
        except DataError as error:
            row["reason"] = f"unreadable: {error.message}"
            continue
        row["height"], row["width"] = image.shape[:2]
        if min(image.shape[:2]) < MIN_EDGE:
            row["reason"] = f"too small: {row['width']} x {row['height']} pixels"
            continue
        row["kept"], row["sha256"] = True, pixel_digest(image)
        yield place, image


def _batches(tiles: Iterator[tuple[int, np.ndarray]]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Group tiles of one size, a bounded number of pixels at a time: (places, uint8 [N, 3, H, W])."""
    places: list[int] = []
    images: list[np.ndarray] = []
    for place, image in tiles:
        if images and (image.shape != images[0].shape or (len(images) + 1) * image[..., 0].size > _BATCH_PIXELS):
            yield places, _stack(images)
            places, images = [], []
        places.append(place)
        images.append(image)
    if images:
        yield places, _stack(images)


def _stack(images: list[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))


def _write_chunk(sources: Sequence[Pixels], normaliser: Any, size: int, task: WriteTask) -> int:
    rows: list[dict[str, Any]] = [{} for _ in task.tiles]
    for places, images in _batches(_again(sources, task)):
        unchanged = np.ones(len(images), bool)
        if normaliser is not None:
            images, unchanged = normaliser.transform(images)
        for place, image, same in zip(places, images.transpose(0, 2, 3, 1), unchanged, strict=True):
            image = square(image, size) if size else np.ascontiguousarray(image)
            write_png(task.tiles[place][3], image)
            rows[place] = {
                "sha256": pixel_digest(image),
                "width": image.shape[1],
                "height": image.shape[0],
                "stain": "" if normaliser is None else "unchanged" if same else "normalised",
            }
    _save(pd.DataFrame(rows), task.out)
    return len(rows)


def _again(sources: Sequence[Pixels], task: WriteTask) -> Iterator[tuple[int, np.ndarray]]:
    for place, (origin, path, digest, _) in enumerate(task.tiles):
        check_stop()
        image, _ = sources[origin].rgb(path)
        if pixel_digest(image) != digest:
            raise RunError(
                f"The tile {path} is not the same as when it was measured.",
                "Leave the source alone until the end; begin again in a new folder.",
            )
        yield place, image


def _save(frame: pd.DataFrame, path: Path) -> None:
    with atomic_path(path) as temporary:
        frame.to_parquet(temporary, index=False)
