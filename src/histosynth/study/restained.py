"""Real tiles beside what was made of them: how much of the layout was kept, how near the colours came, and a sheet."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from histosynth.core.seeds import numpy_rng
from histosynth.evaluate.layout import colour_gap, layout
from histosynth.tiles.images import read_rgb, square
from histosynth.tiles.tileset import TileSet

if TYPE_CHECKING:
    from torch import Tensor

_MEASURED, _SHOWN = 256, 5


def read_tiles(folder: Path, paths: list[str], size: int) -> Tensor:
    """Tiles of a tile set as uint8 [N, 3, size, size]."""
    import torch

    pixels = [square(read_rgb(folder / path)[0], size) for path in paths]
    return torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())


class Pairs:
    """Restained tiles and what stands behind them.

    Args:
        real: the tile set with the real tiles.
        out: folder of the new ones.
        table: their rows, with `reference`, and `second_reference` where a tile was told another one alone.
        size: edge in pixels.
    """

    def __init__(self, real: TileSet, out: Path, table: pd.DataFrame, size: int) -> None:
        self.real, self.out, self.table, self.size = real, out, table, size
        self.files = dict(zip(real.table.id, real.table.path, strict=True))
        told = table.get("second_reference", pd.Series([""]))
        self.told = bool(told.isin(self.files.keys()).all())

    def measure(self) -> dict[str, float]:
        """What `layout` gives, over a seeded choice of the tiles; and colour_gap to the tile that each was told, beside
        colour_gap_before. Without what cannot be measured."""
        order = numpy_rng(0, "measured").permutation(len(self.table))[:_MEASURED]
        sides = self._sides(self.table.iloc[np.sort(order)])
        before, after = sides["real"].numpy(), sides["restained"].numpy()
        found = layout(before, after)
        if self.told:
            target = sides["told"].numpy()
            found["colour_gap_before"] = float(colour_gap(before, target).mean())
            found["colour_gap"] = float(colour_gap(after, target).mean())
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def describe(self, found: dict[str, float]) -> str:
        """The same in words."""
        parts = []
        for name in ("structure", "nuclei"):
            other = found.get(f"layout_{name}_other")
            beside = "" if other is None else f" (another tile: {other:.2f})"
            parts.append(f"{name} {found[f'layout_{name}']:.2f}{beside}")
        text = f"Layout kept, of 1: {', '.join(parts)}."
        if "colour_gap" in found:
            text += (
                f" Mean colour: {found['colour_gap']:.1f} from the tile told, {found['colour_gap_before']:.1f} before."
            )
        return text

    def sheet(self, path: Path) -> None:
        """A row a class: real tiles, the tiles told, and what was made."""
        from histosynth.diffusion.panels import control_panel

        classes = list(dict.fromkeys(self.table.label))
        found = []
        for label in classes:
            rows = self.table[self.table.label == label].drop_duplicates("reference")
            found.append(self._sides(rows.iloc[:_SHOWN]))
        control_panel(path, classes, {side: [sides[side] for sides in found] for side in found[0]})

    def _sides(self, rows: pd.DataFrame) -> dict[str, Tensor]:
        sides = {"real": read_tiles(self.real.folder, [self.files[i] for i in rows.reference], self.size)}
        if self.told:
            told = [self.files[i] for i in rows.second_reference]
            sides["told"] = read_tiles(self.real.folder, told, self.size)
        return sides | {"restained": read_tiles(self.out, rows.path.tolist(), self.size)}
