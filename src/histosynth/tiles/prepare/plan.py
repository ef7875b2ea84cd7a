"""What `tiles prepare` decides between its two passes, on the table alone: copies, splits, quality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from histosynth.core.errors import DataError, SettingError, did_you_mean
from histosynth.core.progress import say
from histosynth.tiles.quality.metrics import METRICS
from histosynth.tiles.quality.thresholds import QualityConfig, Thresholds, learn
from histosynth.tiles.sources.source import Source, open_source, set_copies_aside, unique_ids
from histosynth.tiles.split.assign import SplitConfig, check_no_straddling, divide
from histosynth.tiles.split.duplicates import near_duplicate_groups
from histosynth.tiles.split.protocols import protocol_named, protocol_sides
from histosynth.tiles.tileset import COLUMNS, SPLITS, TileSet, safe_name

# columns of a tile set that this one fills anew
_OWN = {
    "path", "label", "patient", "split", "id", "sha256", "format", "width", "height", "kept", "reason", "source",
    "number", "origin", "duplicate_group", "stain", "source_sha256",
}  # fmt: skip


def open_sources(paths: Sequence[Path | str], cache: Path) -> tuple[list[Source], pd.DataFrame, dict[str, Any]]:
    """Open every source and list its tiles.

    Args:
        paths: what `open_source` takes; a tile set keeps its other columns, such as slide or reference.
        cache: where compressed archives are kept decompressed.

    Returns:
        (the sources; a row a tile with the columns number, origin, source, id, path, label, patient, split; what the
        tile sets among the sources say of themselves: licence, microns_per_pixel, simulated, empty_classes).

    Raises:
        DataError: no source, one that is given twice, or one that cannot be opened.
    """
    if not paths:
        raise DataError("No source was given.", "Give folders, tables or archives of tiles.")
    resolved = [Path(p).resolve() for p in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise DataError(f"The source {path} is given twice.", "Give it once.")
    sources = [open_source(p, cache=cache) for p in paths]
    parts, about, empty = [], [], []
    for number, (name, source) in enumerate(zip(_names(resolved), sources, strict=True)):
        part = source.table.rename(columns={"path": "source"}).assign(number=number, origin=name)
        empty += source.table.attrs.get("empty", [])
        if TileSet.is_tileset(source.path):
            tileset = TileSet.open(source.path)
            about.append(tileset.meta)
            extra = [c for c in tileset.table if c not in _OWN and not c.startswith("q_")]
            known = tileset.kept[["path", "id", *extra]].rename(columns={"path": "source", "id": "old"})
            part = part.merge(known, "left", "source")
        else:
            about.append({})
        parts.append(part)
    table = pd.concat(parts, ignore_index=True)
    named = table.source if len(sources) == 1 else table.origin + "/" + table.source
    table["id"] = unique_ids(named)
    _follow_references(table)
    table["path"] = [f"images/{safe_name(c)}/{i}.png" for c, i in zip(table.label, table.id, strict=True)]
    meta = {key: _same([m.get(key) for m in about]) for key in ("licence", "microns_per_pixel", "simulated")}
    return sources, table.drop(columns="old", errors="ignore"), meta | {"empty_classes": sorted(set(empty))}


def _follow_references(table: pd.DataFrame) -> None:
    """Let synthetic tiles name the new id of the tile that they were conditioned on, in place.

    An id that several real tiles have, or none, is left as it is.
    """
    if "reference" not in table:
        return
    real = table.generator.fillna("") == "" if "generator" in table else True
    named = table[table.old.notna() & real]
    new = named.id.set_axis(named.old)
    new = new[~new.index.duplicated(keep=False)]
    table["reference"] = table.reference.map(new).fillna(table.reference).fillna("")


def check_listing(listing: pd.DataFrame, config: SplitConfig) -> None:
    """Refuse sources that cannot be split, before hours are spent.

    Raises:
        DataError: a patient in two given splits, or sources that the protocol does not know.
    """
    if config.protocol:
        protocol_sides(listing, protocol_named(config.protocol))
    else:
        check_no_straddling(listing.assign(kept=True))


def _names(paths: Sequence[Path]) -> list[str]:
    """File names of the sources, with the folder before them where two are the same."""
    names = [p.name for p in paths]
    return [
        f"{p.parent.name}/{n}" if names.count(n) > 1 and p.parent.name else n for p, n in zip(paths, names, strict=True)
    ]


def _same(values: Sequence[Any]) -> Any:
    """The value that all sources share, or None."""
    return values[0] if all(v == values[0] for v in values) else None


def check_quality(config: QualityConfig) -> None:
    """Refuse rules that cannot be read and splits that do not exist, before hours are spent.

    Raises:
        SettingError: names them.
    """
    for split in config.splits:
        if split not in SPLITS:
            raise SettingError(f"quality.splits names {split!r}.", did_you_mean(split, SPLITS))
    if config.rules != "none":
        Thresholds.load(config.rules)


def decide(
    table: pd.DataFrame, thumbnails: np.ndarray, split: SplitConfig, quality: QualityConfig
) -> tuple[pd.DataFrame, str, Thresholds]:
    """Set copies aside, split, and filter.

    Args:
        table: as `open_sources` gives it, with what was measured; it is changed.
        thumbnails: uint8 [N, 32, 32].

    Returns:
        (the table, the protocol of the split in words, the quality limits).

    Raises:
        DataError: no usable tile, a patient in two splits, or a class that loses all of its training tiles.
    """
    named = split.protocol
    set_copies_aside(table, protocol_sides(table, protocol_named(named)) if named else None)
    usable = table.kept.to_numpy(bool)
    if not usable.any():
        raise DataError(
            f"None of the {len(table)} tiles can be used (first: {table.reason.iloc[0]}).",
            "Give sources with readable tiles.",
        )
    table, protocol = divide(table, split, near_duplicate_groups(thumbnails[usable]))
    return table, protocol, _filter(table, quality)


def _filter(table: pd.DataFrame, config: QualityConfig) -> Thresholds:
    """Set aside what the limits reject; changes `table`."""
    measured = table[[f"q_{m}" for m in METRICS]].rename(columns=lambda c: c[2:])
    train = table.kept & (table.split == "train")
    # the test tiles move no limit: they are not in the table that the limits are learned from
    limits = learn(measured[train].assign(split="train"), table.label[train], config)
    judged = table.kept & table.split.isin(config.splits)
    if config.rules == "none" or not judged.any():
        return limits
    reasons = pd.Series(limits.verdicts(measured[judged], table.label[judged]), index=table.index[judged])
    rejected = reasons[reasons != ""]
    table.loc[rejected.index, "kept"] = False
    table.loc[rejected.index, "reason"] = rejected
    left = set(table.label[table.kept & (table.split == "train")])
    gone = sorted(set(table.label[train]) - left)
    if gone:
        raise DataError(
            f"The quality filter leaves no training tile of class {gone[0]!r}.",
            "Loosen its limits, or use --quality.rules none; what was read and measured is kept.",
        )
    return limits


def finish_table(table: pd.DataFrame, written: pd.DataFrame, microns: float | None) -> pd.DataFrame:
    """The table of the tile set from the rows of all tiles and of those that were written, in the same order.

    Args:
        written: sha256, width, height and stain of the kept tiles.
        microns: microns per pixel of the sources, or None.
    """
    table = table.copy()
    table["source_sha256"] = table.sha256
    edge = table[["width", "height"]].min(axis=1)
    if microns and "mpp" not in table:
        table["mpp"] = microns
    table["stain"] = ""
    for column in ("sha256", "width", "height", "stain"):
        table.loc[table.kept, column] = written[column].to_numpy()
    if "mpp" in table:
        table["mpp"] = table.mpp * edge / table[["width", "height"]].min(axis=1).clip(lower=1)
    table.loc[~table.kept, "path"] = ""  # tiles that were set aside are not written
    last = [c for c in table if c.startswith("q_")]
    first = [c for c in (*COLUMNS, "origin", "duplicate_group", "stain", "source_sha256") if c in table]
    table = table.drop(columns="number")
    return table[[*first, *(c for c in table if c not in {*first, *last}), *last]]


def warn_of_losses(table: pd.DataFrame) -> None:
    """Say which classes lost more than half of their tiles, whatever the reasons were."""
    for label, rows in table.groupby("label", sort=True):
        lost = rows[~rows.kept]
        if len(lost) > len(rows) / 2:
            reason = lost.reason.str.split(":").str[0].value_counts().index[0]
            say(
                f"Warning: class {label!r} lost {len(lost)} of its {len(rows)} tiles, most for the reason {reason!r}. "
                "Look at the column reason of tiles.parquet."
            )
