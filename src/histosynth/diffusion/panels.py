"""Pictures that show how a training goes and how a tile is made: control panels, and the denoising of tiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from histosynth.core.errors import DataError
from histosynth.tiles.classes import class_entry
from histosynth.tiles.film import evenly
from histosynth.tiles.pictures import Row, save, sheet, zoom_for

_COLUMNS = 11
_FILM_HEIGHT = 720


def control_panel(path: Path, classes: Sequence[str], sides: Mapping[str, Sequence[Tensor]], title: str = "") -> Path:
    """A row a class with its name: tile by tile what stands behind it and what was made of it.

    Args:
        classes: the names of the rows.
        sides: heading -> for each class uint8 [n, 3, S, S]; tile k of all sides stands together.

    Raises:
        DataError: no class, or sides of different numbers.
    """
    numbers = {tuple(len(tiles) for tiles in side) for side in sides.values()}
    if not classes or len(numbers) != 1 or len(next(iter(numbers))) != len(classes):
        raise DataError(f"A panel of {len(classes)} classes got sides of {sorted(numbers)} tiles.", "Give one of each.")
    rows = []
    for k, name in enumerate(classes):
        together = torch.stack([side[k] for side in sides.values()], dim=1).flatten(0, 1)
        rows.append(class_row(name, k, len(classes), together))
    most = max(len(tiles) for tiles in next(iter(sides.values())))
    zoom = zoom_for(rows[0].tiles.shape[-1])
    return save(path, sheet(rows, list(sides) * most, zoom=zoom, title=title, group=len(sides)))


def class_row(name: str, index: int, count: int, tiles: Tensor) -> Row:
    """A line of a sheet with the class's short name and, where there is one, its full one."""
    full = class_entry(name, index, count)["name"]
    return Row(name, tiles, full if full != name else "")


def timeline(
    path: Path, classes: Sequence[str], steps: Sequence[tuple[int, Tensor, Tensor]], columns: int = _COLUMNS
) -> Path:
    """Denoising as a sheet: for each tile a line of what the noisy latents decode to, and under it a line of the
    clean tile that the network expects at that level.

    Args:
        classes: the class of each of the N tiles.
        steps: what `DiffusionGenerator.watch` gave.
        columns: steps shown, evenly chosen.
    """
    chosen = [steps[k] for k in evenly(len(steps), columns)]
    rows = []
    for i, name in enumerate(classes):
        rows.append(class_row(name, i, len(classes), torch.stack([noisy[i] for _, noisy, _ in chosen])))
        rows.append(Row(" ", torch.stack([clean[i] for _, _, clean in chosen]), "expected"))
    heads = [f"level {level}" for level, _, _ in chosen[:-1]] + ["tile"]
    return save(path, sheet(rows, heads, zoom=zoom_for(rows[0].tiles.shape[-1])))


def denoising_frames(classes: Sequence[str], steps: Sequence[tuple[int, Tensor, Tensor]]) -> Iterator[Image.Image]:
    """Frames of a film of the same: for each tile the noisy and the expected one, side by side."""
    size = steps[0][1].shape[-1]
    zoom = max(1, min(zoom_for(size), _FILM_HEIGHT // (size * len(classes))))
    for level, noisy, clean in steps:
        rows = [class_row(n, i, len(classes), torch.stack([noisy[i], clean[i]])) for i, n in enumerate(classes)]
        yield sheet(rows, [f"level {level}" if level else "tile", "expected"], zoom=zoom)
