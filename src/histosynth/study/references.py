"""Real tiles that a generator may be shown: those of the training split, and no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from histosynth.core.errors import DataError
from histosynth.core.progress import say
from histosynth.tiles.images import EXTENSIONS, read_rgb
from histosynth.tiles.sources import open_source
from histosynth.tiles.tileset import TileSet, safe_name

_SPLITLESS = "Split it first (histosynth tiles prepare), so that tiles of the test cannot be copied."


@dataclass(frozen=True)
class References:
    """Real tiles that may be shown.

    Attributes:
        table: id, label, path.
        classes: labels that the source knows, with tiles or without.
        read: gives the pixels uint8 [H, W, 3] of a path.
        real: the table of the whole tile set, or None for a plain folder, of which no split is known.
    """

    table: pd.DataFrame
    classes: tuple[str, ...]
    read: Callable[[str], np.ndarray]
    real: pd.DataFrame | None


def open_references(source: Path | str, only: tuple[str, ...] = ()) -> References:
    """The tiles of a source that may be shown: those of the training split, or all of a folder without splits.

    Raises:
        DataError: nothing there, a tile set without splits, or a tile asked for by id that is not of the training.
    """
    source = Path(source)
    if TileSet.is_tileset(source):
        tileset = TileSet.open(source)
        rows, real, classes = tileset.kept, tileset.table, tileset.classes
        if tileset.meta.get("synthetic") or (rows.generator != "").any():
            raise DataError(f"{source} holds synthetic tiles.", "Show PixCell real tiles.")
        if not (rows.split != "").any():
            raise DataError(f"The tile set {source} has no split.", _SPLITLESS)
        _refuse_held_out(rows, only, source)
        rows = rows[rows.split == "train"]

        def read(path: str) -> np.ndarray:
            return read_rgb(tileset.folder / path)[0]
    else:
        rows, read, real = *_from_folder(source), None
        classes = tuple(dict.fromkeys([*rows.label, *rows.attrs.get("empty", ())]))
        _refuse_held_out(rows, only, source)
        held = rows.split.isin(("val", "test"))
        if held.any():
            say(f"{int(held.sum())} tiles of {source} are of val or test and are not shown.")
        rows = rows[~held]
    if only:
        lost = [name for name in only if name not in set(rows.id)]
        if lost:
            raise DataError(f"{source} has no tile {lost[0]!r}.", "Ids are those of the table (a folder: the paths).")
        rows = rows[rows.id.isin(only)]
    if len(rows) == 0:
        raise DataError(f"{source} has no training tile.", "Check its splits.")
    return References(rows[["id", "label", "path"]].reset_index(drop=True), classes, read, real)


def _from_folder(source: Path) -> tuple[pd.DataFrame, Callable[[str], np.ndarray]]:
    if source.is_dir():
        flat = sorted(p.name for p in source.iterdir() if p.suffix.lower() in EXTENSIONS and p.name[0] != ".")
        if flat and not any(p.is_dir() for p in source.iterdir()):
            label = safe_name(source.resolve().name)
            rows = pd.DataFrame({"id": flat, "path": flat, "label": label, "split": ""})
            return rows, lambda path: read_rgb(source / path)[0]
    opened = open_source(source)
    return opened.table.assign(id=opened.table.path), lambda path: opened.rgb(path)[0]


def _refuse_held_out(rows: pd.DataFrame, only: tuple[str, ...], source: Path) -> None:
    wrong = rows[rows.id.isin(only) & rows.split.isin(("val", "test"))]
    if len(wrong):
        first = wrong.iloc[0]
        raise DataError(
            f"The reference tile {first.id!r} of {source} is of the {first.split} split: a copy of it in the training "
            "would spoil every score.",
            "Show tiles of train only.",
        )
