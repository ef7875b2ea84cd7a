"""Import real tiles: a folder of class folders, or a folder with a CSV (path, label, patient, split)."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from histosynth.core.errors import DataError, HistosynthError, did_you_mean
from histosynth.core.files import atomic_path
from histosynth.core.progress import bar, say
from histosynth.tiles.images import EXTENSIONS, read_rgb, write_png
from histosynth.tiles.split import SplitConfig, check_no_straddling, near_duplicate_groups, split_by_group
from histosynth.tiles.tileset import SPLITS, TileSet, claim, safe_name

_READERS = 4
_MIN_EDGE = 16
_SPLIT_ALIASES = {"validation": "val", "valid": "val", "training": "train", "testing": "test"}


@dataclass(frozen=True)
class ImportConfig:
    """How tiles are imported."""

    split: SplitConfig = SplitConfig()
    """Shares and seed of the split; ignored when the CSV brings a complete split."""
    licence: str = ""
    """Licence of the tiles, kept in tileset.json."""
    microns_per_pixel: float | None = None
    """Resolution of the tiles, kept in tileset.json."""


def import_tiles(source: Path | str, out: Path | str, config: ImportConfig = ImportConfig()) -> TileSet:
    """Copy tiles into a new tile set as PNG, split by patient.

    Files that cannot be read, exact copies, and equal pixels under two labels are set aside: they stay in
    the table with the reason, and are never used.

    Raises:
        DataError: no tiles, a CSV without the needed columns, a patient in two splits, too few patients.
        RunError: `out` cannot be written, or holds a tile set or other files.
    """
    source, out = Path(source), Path(out)
    listing = list_tiles(source)
    claim(out)
    table = _copy_all(source, listing, out)
    _set_copies_aside(table)
    kept = table[table.kept]
    empty = sorted(set(table.label) - set(kept.label)) + listing.attrs.get("empty", [])
    if kept.empty:
        raise DataError(
            f"None of the {len(table)} files in {source} can be used (first: {table.reason.iloc[0]}).",
            "Give a folder with readable tiles.",
        )
    for label in empty:
        say(f"Class {label!r} has no usable tile and is left out.")
    protocol = _assign_splits(table, out, config.split)
    return TileSet.create(
        out,
        table,
        sorted(set(kept.label)),
        made_by="import",
        source=source.name,
        split_protocol=protocol,
        empty_classes=empty,
        licence=config.licence,
        microns_per_pixel=config.microns_per_pixel,
        split={"val": config.split.val, "test": config.split.test, "seed": config.split.seed},
    )


def list_tiles(source: Path) -> pd.DataFrame:
    """The tiles of a source, before anything is read: path (relative), label, patient, split.

    Raises:
        DataError: nothing there, or a CSV that lacks columns.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist.", "Give a folder of class folders, or one with a CSV.")
    if source.is_file():
        if source.suffix.lower() == ".csv":
            return _from_csv(source)
        raise DataError(f"{source} is a file.", "Give the folder that holds the class folders, or a CSV.")
    tables = sorted(p for p in source.glob("*.csv") if not p.name.startswith("."))
    if len(tables) > 1:
        tables = [p for p in tables if p.name == "tiles.csv"] or tables
    if len(tables) > 1:
        names = ", ".join(p.name for p in tables)
        raise DataError(f"{source} has several CSV files ({names}).", "Give the path of the one to use.")
    if tables:
        return _from_csv(tables[0])
    rows, empty = [], []
    for folder in sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith(".")):
        files = list(_image_files(folder))
        if not files:
            empty.append(folder.name)
        rows += [(str(f.relative_to(source)), folder.name, "", "") for f in files]
    if not rows:
        raise DataError(
            f"{source} has no class folders with images ({', '.join(sorted(EXTENSIONS))}).",
            "Expected SOURCE/<CLASS>/<tile>.png, or a CSV with the columns path, label, patient.",
        )
    labels = {row[1].lower() for row in rows}
    if labels <= {*SPLITS, *_SPLIT_ALIASES}:
        raise DataError(
            f"The folders of {source} are called {', '.join(sorted(labels))}, like splits and not like classes.",
            "Give a CSV with the columns path, label, patient, split, or import one of these folders.",
        )
    listing = pd.DataFrame(rows, columns=["path", "label", "patient", "split"])
    listing.attrs["empty"] = empty
    return listing


def _image_files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS:
                yield Path(parent) / name


def _from_csv(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True)
    except (OSError, ValueError) as error:
        raise DataError(f"The table {path} cannot be read: {error}.", "Save it as UTF-8 CSV.") from error
    table.columns = [str(c).strip().lower() for c in table.columns]
    for column in ("path", "label"):
        if column not in table:
            raise DataError(
                f"The table {path} has no column {column!r} (it has: {', '.join(table.columns)}).",
                f"{did_you_mean(column, table.columns)} Rename it; the columns are path, label, patient, split.",
            )
    if table.empty:
        raise DataError(f"The table {path} has no row.", "Add a row a tile: path, label, patient.")
    for column in ("patient", "split"):
        if column not in table:
            table[column] = ""
    table = table[["path", "label", "patient", "split"]].apply(lambda c: c.str.strip())
    unlabelled = table.label == ""
    if unlabelled.any():
        first = table.path[unlabelled].iloc[0]
        raise DataError(
            f"The table {path} has {unlabelled.sum()} row(s) without a label (first: {first}).",
            "Fill the column label in every row.",
        )
    table["split"] = table.split.str.lower().replace(_SPLIT_ALIASES)
    unknown = sorted(set(table.split) - {*SPLITS, ""})
    if unknown:
        raise DataError(f"The table {path} has the split {unknown[0]!r}.", did_you_mean(unknown[0], SPLITS))
    missing = (table.patient == "").sum()
    if 0 < missing < len(table):
        raise DataError(
            f"The table {path} has {missing} row(s) without a patient.",
            "Fill the column patient in every row, or leave it out altogether.",
        )
    table.attrs["base"] = path.parent
    return table


def _copy_all(source: Path, listing: pd.DataFrame, out: Path) -> pd.DataFrame:
    base = Path(listing.attrs.get("base", source))
    ids = _unique_ids(listing.path)

    def work(position: int) -> dict[str, object]:
        row = listing.iloc[position]
        return _copy_one(base, row.path, row.label, ids[position], out)

    with ThreadPoolExecutor(_READERS) as pool, bar("Import tiles", len(listing)) as tick:
        done = []
        for result in pool.map(work, range(len(listing))):
            done.append(result)
            tick()
    table = pd.DataFrame(done)
    table["label"], table["patient"], table["split"] = listing.label, listing.patient, listing.split
    return table


def _copy_one(base: Path, relative: str, label: str, tile_id: str, out: Path) -> dict[str, object]:
    target = f"images/{safe_name(label)}/{tile_id}.png"
    row: dict[str, object] = {
        "id": tile_id,
        "path": target,
        "source": relative,
        "sha256": "",
        "kept": False,
        "reason": "",
    }
    path = base / relative
    try:
        image, kind = read_rgb(path)
    except DataError as error:
        return row | {"reason": f"unreadable: {error.message}"}
    height, width = image.shape[:2]
    row |= {"format": kind, "width": width, "height": height}
    if min(height, width) < _MIN_EDGE:
        return row | {"reason": f"too small: {width} x {height} pixels"}
    write = out / target
    if kind == "PNG" and _is_plain_png(path):
        with atomic_path(write) as temporary:
            shutil.copyfile(path, temporary)
    else:
        write_png(write, image)
    pixels = np.ascontiguousarray(image).data
    digest = hashlib.sha256(f"{width}x{height}".encode() + bytes(pixels)).hexdigest()
    return row | {"sha256": digest, "kept": True}


def _is_plain_png(path: Path) -> bool:
    with Image.open(path) as image:
        return image.mode == "RGB" and "transparency" not in image.info and not image.getexif()


def _unique_ids(paths: pd.Series) -> list[str]:
    """Short ids from file names; the whole path where two files share a name."""
    stems = [Path(p).stem for p in paths]
    counts = pd.Series(stems).value_counts()
    seen: dict[str, int] = {}
    ids = []
    for path, stem in zip(paths, stems, strict=True):
        name = safe_name(stem if counts[stem] == 1 else str(Path(path).with_suffix("")).replace(os.sep, "__"))
        seen[name] = seen.get(name, 0) + 1
        ids.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return ids


def _set_copies_aside(table: pd.DataFrame) -> None:
    kept = table[table.kept]
    for _, same in kept.groupby("sha256", sort=False):
        if len(same) == 1:
            continue
        labels = sorted(set(same.label))
        if len(labels) > 1:  # nobody can say which label is right
            table.loc[same.index, ["kept", "reason"]] = [
                False,
                f"two labels: the same pixels are {' and '.join(labels)}",
            ]
        else:
            reason = f"copy: the same pixels as {same.id.iloc[0]}"
            table.loc[same.index[1:], ["kept", "reason"]] = [False, reason]


def _assign_splits(table: pd.DataFrame, out: Path, config: SplitConfig) -> str:
    """Fill the column split (and patient, where there is none); return the protocol in words."""
    kept = table[table.kept]
    given = set(kept.split) - {""}
    if (kept.patient == "").all():
        thumbnails = np.stack([_thumbnail(out / p) for p in kept.path])
        groups = near_duplicate_groups(thumbnails)
        # a given split is kept as it is: look-alikes on two sides are two groups
        table.loc[kept.index, "patient"] = [f"{g}-{s}" if s else g for g, s in zip(groups, kept.split, strict=True)]
        protocol = (
            "by group of near-duplicate tiles, because no patients were given: tiles of one patient may be "
            "on both sides, so the scores may be too good"
        )
        say("No patients are given, so the split is by near-duplicate groups; scores may be too good.")
    else:
        protocol = "by patient"
    kept = table[table.kept]
    if given:
        if not {"train", "test"} <= given or (kept.split == "").any():
            raise DataError(
                f"The split column has only {sorted(given)}, or empty rows.",
                "Give train and test (and val, if you have it) in every row, or drop the column.",
            )
        check_no_straddling(table)
        protocol = f"as given, checked {protocol}"
        if "val" not in given:
            train = kept[kept.split == "train"]
            table.loc[train.index, "split"] = _carve_validation(train, config)
            protocol += "; validation taken from train"
    else:
        table.loc[kept.index, "split"] = split_by_group(kept.patient, kept.label, config)
    check_no_straddling(table)
    return protocol


def _carve_validation(train: pd.DataFrame, config: SplitConfig) -> list[str]:
    """Divide given training tiles into train and val: the two sides of a three-way split that are not val."""
    share = config.val / (1 - config.test)
    halves = SplitConfig(val=share, test=min(0.25, (1 - share) / 2), seed=config.seed)
    return ["val" if s == "val" else "train" for s in split_by_group(train.patient, train.label, halves)]


def _thumbnail(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX))
    except OSError as error:  # written a moment ago, so the disk is at fault
        raise HistosynthError(f"{path} cannot be read back: {error}.", "Check the disk.") from error
