"""The verb that prepares tiles for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from histosynth.core.errors import SettingError
from histosynth.core.progress import say
from histosynth.study.verbs.show import describe, print_table
from histosynth.tiles.prepare.pipeline import PrepareConfig, prepare
from histosynth.tiles.tileset import TileSet


def prepare_(
    *paths: Annotated[Path, Parameter(name="SOURCES-AND-OUT")],
    config: Annotated[PrepareConfig, Parameter(name="*")] = PrepareConfig(),
    workers: int | None = None,
) -> None:
    """Filter, split, normalise and resize tiles into a tile set: histosynth tiles prepare SOURCE... OUT

    Goes on where an interrupted call stopped.

    Args:
        paths: folders, tables, archives or tile sets, and at the end the folder of the new tile set.
        workers: number of processes; all processors by default.
    """
    if len(paths) < 2:
        raise SettingError(
            f"{len(paths)} path(s) were given.", "Give at least one source of tiles and, last, the folder to make."
        )
    tileset = prepare(paths[:-1], paths[-1], config, workers)
    show_set_aside(tileset)
    describe(tileset)
    for what in ("split", "quality", "stain"):
        say(f"{what.capitalize()}: {tileset.meta[f'{what}_protocol']}.")


def show_set_aside(tileset: TileSet) -> None:
    """Print how many tiles of each class were set aside, for each reason."""
    import pandas as pd

    lost = tileset.table[~tileset.table.kept]
    if lost.empty:
        return
    # "quality: lap_var 12 below 50 (TUM)" counts as "quality: lap_var", other reasons by their first words
    reasons = lost.reason.str.extract(r"^(quality: \w+|[^:]*)", expand=False)
    counts = pd.crosstab(reasons, lost.label, margins=True, margins_name="total")
    print_table(
        ["set aside", *map(str, counts.columns)],
        [[str(i), *map(str, row)] for i, row in zip(counts.index, counts.to_numpy(), strict=True)],
    )
