"""Tables for people at a terminal."""

from __future__ import annotations

from histosynth.core.progress import say
from histosynth.tiles.tileset import TileSet, set_aside


def describe(tileset: TileSet) -> None:
    import pandas as pd
    from rich.console import Console

    kept = tileset.kept
    counts = pd.crosstab(kept.label, kept.split.replace("", "all"), margins=True, margins_name="total")
    print_table(
        ["class", *map(str, counts.columns)],
        [[str(i), *map(str, row)] for i, row in zip(counts.index, counts.to_numpy(), strict=True)],
    )
    for reason, number in set_aside(tileset.table).items():
        say(f"Set aside: {number} {reason}")
    Console().print(f"Tile set: {tileset.folder}", highlight=False)


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    # folded, not cut: paths and commands stay whole
    table = Table(*(Column(name, overflow="fold") for name in columns))
    for row in rows:
        table.add_row(*row)
    Console().print(table)
