"""The verb that writes a tile set for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from histosynth.core.progress import say
from histosynth.tiles.sources.dataset_tool import write_dataset_zip
from histosynth.tiles.tileset import TileSet


@dataclass(frozen=True)
class ExportConfig:
    """What is exported."""

    size: int | None = None
    """Edge of the tiles in pixels, from the central square; by default they stay as they are."""
    split: str | None = None
    """One side of the split (train, val, test); all by default."""


def export(tiles: Path, out: Path, *, config: Annotated[ExportConfig, Parameter(name="*")] = ExportConfig()) -> None:
    """Write a tile set as a dataset_tool zip (dataset.json with labels), for NVIDIA's StyleGAN training.

    Args:
        tiles: a tile set.
        out: the zip to write.
    """
    path = write_dataset_zip(TileSet.open(tiles), out, size=config.size, split=config.split)
    say(f"Written: {path}")
