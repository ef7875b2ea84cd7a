"""Sources of tiles (class folders, tables, archives, dataset_tool zips), and their import as a tile set."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from histosynth.core.errors import DataError, SettingError
from histosynth.core.files import atomic_path
from histosynth.core.progress import bar, say
from histosynth.tiles.classes import CLASS_TABLES, class_entry, load_class_table
from histosynth.tiles.images import decode, read_bytes, read_rgb, write_png
from histosynth.tiles.sources.archives import is_archive, open_archive
from histosynth.tiles.sources.stores import ArchiveStore, FolderStore, Store, has_images, parquet_images
from histosynth.tiles.sources.tables import from_csv, from_folders, from_labels, from_parquet, is_image, labels_of
from histosynth.tiles.split.assign import SplitConfig, divide
from histosynth.tiles.split.duplicates import near_duplicate_groups
from histosynth.tiles.split.protocols import protocol_named
from histosynth.tiles.tileset import TileSet, claim, safe_name

_READERS = 4
_MIN_EDGE = 16
_LABELS = "dataset.json"


@dataclass(frozen=True)
class Source:
    """Tiles that are not in a tile set yet. Can be pickled; files are opened when they are read.

    Attributes:
        path: the folder, table or archive.
        table: columns path, label, patient, split, as text ("" = not given); attrs["empty"] lists classes
            without images.
    """

    path: Path
    table: pd.DataFrame
    store: Store

    def read(self, path: str) -> bytes:
        """The bytes of a tile.

        Args:
            path: a value of the column `path`.

        Raises:
            DataError: no such tile, or its bytes are damaged.
        """
        return self.store.read(path)

    def rgb(self, path: str) -> tuple[np.ndarray, str]:
        """A tile as `images.read_rgb` gives it: (uint8 [H, W, 3], format).

        Raises:
            DataError: no such tile, or it is damaged.
        """
        return read_rgb(self.read(path), self.store.name(path))


def open_source(path: Path | str, *, cache: Path | str | None = None, class_names: Sequence[str] = ()) -> Source:
    """List the tiles of a source; no tile is read yet.

    A source is a folder of class folders; a folder that holds one CSV, parquet file or dataset.json; a CSV or
    parquet file (columns path, label, patient, split; parquet may hold the images too); or a zip or tar
    archive of any of these; at the top of the source or below a single folder in it.

    Args:
        path: the source.
        cache: where a compressed tar is kept decompressed; by default a temporary folder that goes with the
            source.
        class_names: labels by class index, for a dataset.json.

    Raises:
        DataError: nothing there, a damaged or unsafe archive, or a table that lacks columns.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist.", "Give a folder of class folders, or one with a CSV.")
    if path.is_dir():
        return _from_folder(path, class_names)
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return Source(path, from_csv(read_bytes(path), str(path)), FolderStore(path.parent))
    if suffix == ".parquet":
        return _from_parquet_files(path, (path,))
    if is_archive(path):
        return _from_archive(path, cache, class_names)
    raise DataError(f"{path} is a file.", "Give the folder that holds the class folders, a table, or an archive.")


def list_tiles(path: Path | str) -> pd.DataFrame:
    """The table of a source: path, label, patient, split; see `open_source`."""
    return open_source(path).table


def _from_folder(path: Path, class_names: Sequence[str]) -> Source:
    top = sorted(p.name for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    listings = _listings(top, str(path))
    if listings and listings[0].lower().endswith(".csv"):
        return Source(path, from_csv(read_bytes(path / listings[0]), str(path / listings[0])), FolderStore(path))
    if listings:
        return _from_parquet_files(path, tuple(path / name for name in listings))
    if _LABELS in top and (content := labels_of(read_bytes(path / _LABELS), str(path))):
        return Source(path, from_labels(content, str(path), class_names), FolderStore(path))
    folders = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    names = [name for folder in folders for name in _files(path, folder)]
    if top := _single_top(names):  # where an archive was unpacked
        say(f"{path} holds one folder, {top[:-1]}, with all of the tiles; the folders in it are the classes.")
        return _from_folder(path / top, class_names)
    return Source(path, from_folders(names, map(_printable, folders), str(path)), FolderStore(path))


def _from_archive(path: Path, cache: Path | str | None, class_names: Sequence[str]) -> Source:
    archive = open_archive(path, cache=cache)
    names = list(archive.members)
    prefix = _single_top(names)
    names = [name.removeprefix(prefix) for name in names]
    store = ArchiveStore(archive, prefix)
    listings = _listings([name for name in names if "/" not in name], str(path))
    if len(listings) > 1:
        raise DataError(f"{path} has several parquet files ({', '.join(listings)}).", "Unpack it first.")
    if listings:
        from io import BytesIO

        data, where = store.read(listings[0]), store.name(listings[0])
        read_table = from_csv if listings[0].lower().endswith(".csv") else lambda d, w: from_parquet(BytesIO(d), w)
        return Source(path, read_table(data, where), store)
    if _LABELS in names and (content := labels_of(store.read(_LABELS), str(path))):
        return Source(path, from_labels(content, str(path), class_names), store)
    folders = {f.removeprefix(prefix).partition("/")[0] for f in archive.folders if f"{f}/" != prefix}
    return Source(path, from_folders(names, folders, str(path)), store)


def _from_parquet_files(path: Path, files: tuple[Path, ...]) -> Source:
    if has_images(files[0]):
        table, store = parquet_images(files)
        return Source(path, table, store)
    if len(files) > 1:
        names = ", ".join(p.name for p in files)
        raise DataError(f"{path} has several parquet files ({names}).", "Give the path of the one to use.")
    return Source(path, from_parquet(files[0], str(files[0])), FolderStore(files[0].parent))


def _listings(names: Sequence[str], where: str) -> list[str]:
    """The tables among the files of one folder: one CSV, or else all parquet files; [] if there is none."""
    tables = [name for name in names if name.lower().endswith(".csv")]
    if len(tables) > 1:
        tables = [name for name in tables if name == "tiles.csv"] or tables
    if len(tables) > 1:
        raise DataError(f"{where} has several CSV files ({', '.join(tables)}).", "Give the path of the one to use.")
    if tables:
        return tables
    parquet = sorted(name for name in names if name.lower().endswith(".parquet"))
    return [name for name in parquet if name == "tiles.parquet"] or parquet


def _single_top(names: Sequence[str]) -> str:
    """ "TOP/" if a source holds one folder TOP with all of the classes or the table in it, else ""."""
    counted = [n for n in names if is_image(n) or n.lower().endswith((".csv", ".parquet")) or n.endswith(_LABELS)]
    tops = {name.partition("/")[0] for name in counted}
    if len(tops) != 1 or any("/" not in name for name in counted):
        return ""
    top = tops.pop()
    inner = [name.removeprefix(f"{top}/") for name in counted]
    if any("/" not in name and not is_image(name) for name in inner):
        return f"{top}/"
    known = any(top in table for table in CLASS_TABLES.values())
    return f"{top}/" if not known and all("/" in name for name in inner) else ""


def _files(base: Path, folder: str) -> Iterator[str]:
    for parent, folders, names in os.walk(base / folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(names):
            yield _printable((Path(parent) / name).relative_to(base).as_posix())


def _printable(name: str) -> str:
    """A file name that is no valid text cannot be kept in a table; the changed name is set aside as missing."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def unique_ids(paths: pd.Series) -> list[str]:
    """Short ids from file names; the whole path where two files share a name."""
    stems = [Path(p).stem for p in paths]
    counts = pd.Series(stems, dtype=object).value_counts().to_dict()
    taken: set[str] = set()
    ids = []
    for path, stem in zip(paths, stems, strict=True):
        plain = stem if counts[stem] == 1 else path.removesuffix(Path(path).suffix).replace("/", "__")
        name = wanted = safe_name(plain)
        again = 1
        while name.casefold() in taken:  # also where upper and lower case are one file
            again += 1
            name = f"{wanted}-{again}"
        taken.add(name.casefold())
        ids.append(name)
    return ids


@dataclass(frozen=True)
class ImportConfig:
    """How tiles are imported."""

    split: SplitConfig = SplitConfig()
    """Shares and seed of the split; ignored when the table brings a complete split."""
    licence: str = ""
    """Licence of the tiles, kept in tileset.json."""
    microns_per_pixel: float | None = None
    """Resolution of the tiles, kept in tileset.json."""
    class_table: str = ""
    """Names and colours: a known table such as nct-crc, or a YAML file; by default all known tables are searched."""
    class_names: tuple[str, ...] = ()
    """Labels by class index, for a dataset.json that has only numbers."""


def import_tiles(source: Path | str, out: Path | str, config: ImportConfig = ImportConfig()) -> TileSet:
    """Copy tiles into a new tile set as PNG, split by patient.

    Files that cannot be read, exact copies, and equal pixels under two labels are set aside: they stay in
    the table with the reason, and are never used.

    Args:
        source: anything that `open_source` takes.
        out: folder of the new tile set.
        config: how.

    Raises:
        DataError: no tiles, a table without the needed columns, a patient in two splits, too few patients.
        SettingError: an unknown class table, or a published split, which needs several sources.
        RunError: `out` cannot be written, or holds a tile set or other files.
    """
    known = load_class_table(config.class_table) if config.class_table else None
    if config.split.protocol:
        title = protocol_named(config.split.protocol).title
        raise SettingError(
            f"split.protocol is {config.split.protocol!r} ({title}), but one source is imported.",
            "Use `histosynth tiles prepare SOURCE SOURCE OUT`, which takes several.",
        )
    tiles, out = open_source(source, class_names=config.class_names), Path(out)
    claim(out)
    table, thumbnails = _copy_all(tiles, out)
    set_copies_aside(table)
    kept = table[table.kept]
    empty = sorted(set(table.label) - set(kept.label)) + tiles.table.attrs.get("empty", [])
    if kept.empty:
        raise DataError(
            f"None of the {len(table)} files in {source} can be used (first: {table.reason.iloc[0]}).",
            "Give a folder with readable tiles.",
        )
    for label in empty:
        say(f"Class {label!r} has no usable tile and is left out.")
    table, protocol = _split(table, thumbnails, config.split)
    classes = sorted(set(kept.label))
    described = {c: class_entry(c, i, len(classes), known) for i, c in enumerate(classes)}
    return TileSet.create(
        out,
        table,
        classes,
        made_by="import",
        source=tiles.path.name,
        split_protocol=protocol,
        empty_classes=empty,
        licence=config.licence,
        microns_per_pixel=config.microns_per_pixel,
        split={"val": config.split.val, "test": config.split.test, "seed": config.split.seed},
        classes_info=described,
    )


def _copy_all(source: Source, out: Path) -> tuple[pd.DataFrame, np.ndarray]:
    """Copy the tiles; return their table, and grey thumbnails uint8 [N, 32, 32]."""
    listing = source.table
    paths, labels, ids = listing.path.tolist(), listing.label.tolist(), unique_ids(listing.path)
    thumbnails = np.zeros((len(listing), 32, 32), np.uint8)

    def work(position: int) -> dict[str, object]:
        row, pixels = _copy_one(source, paths[position], labels[position], ids[position], out)
        if pixels is not None:
            grey = Image.fromarray(pixels).convert("L")
            thumbnails[position] = np.asarray(grey.resize((32, 32), Image.Resampling.BOX))
        return row

    with ThreadPoolExecutor(_READERS) as pool, bar("Import tiles", len(listing)) as tick:
        done = []
        for result in pool.map(work, range(len(listing))):
            done.append(result)
            tick()
    table = pd.DataFrame(done)
    for column in ("label", "patient", "split"):
        table[column] = listing[column].to_numpy()
    return table, thumbnails


def _copy_one(
    source: Source, relative: str, label: str, tile_id: str, out: Path
) -> tuple[dict[str, object], np.ndarray | None]:
    target = f"images/{safe_name(label)}/{tile_id}.png"
    row: dict[str, object] = {
        "id": tile_id,
        "path": target,
        "source": relative,
        "sha256": "",
        "kept": False,
        "reason": "",
    }
    try:
        data = source.read(relative)
        image = decode(data, source.store.name(relative))
    except DataError as error:
        return row | {"reason": f"unreadable: {error.message}"}, None
    height, width = image.pixels.shape[:2]
    row |= {"format": image.format, "width": width, "height": height}
    if min(height, width) < _MIN_EDGE:
        return row | {"reason": f"too small: {width} x {height} pixels"}, None
    if image.plain:
        with atomic_path(out / target) as temporary:
            temporary.write_bytes(data)
    else:
        write_png(out / target, image.pixels)
    digest = hashlib.sha256(f"{width}x{height}".encode())
    digest.update(np.ascontiguousarray(image.pixels).data)
    return row | {"sha256": digest.hexdigest(), "kept": True}, image.pixels


def set_copies_aside(table: pd.DataFrame, sides: pd.Series | None = None) -> None:
    """Set exact copies aside, all but one, and equal pixels under two labels; changes kept and reason.

    Of tiles with the same pixels, the first on the best guarded side stays: the test stays whole.

    Args:
        sides: split of each row; the column split by default, or none where the tiles are not split yet.
    """
    if sides is None:
        sides = table.get("split", pd.Series("", table.index))
    guarded = np.argsort(sides.map({"test": 0, "val": 1}).fillna(2).to_numpy(), kind="stable")
    kept = table.iloc[guarded]
    kept = kept[kept.kept]
    for _, same in kept[kept.sha256.duplicated(keep=False)].groupby("sha256", sort=False):
        labels = sorted(set(same.label))
        if len(labels) > 1:  # nobody can say which label is right
            table.loc[same.index, ["kept", "reason"]] = [
                False,
                f"two labels: the same pixels are {' and '.join(labels)}",
            ]
        else:
            reason = f"copy: the same pixels as {same.id.iloc[0]}"
            table.loc[same.index[1:], ["kept", "reason"]] = [False, reason]


def _split(table: pd.DataFrame, thumbnails: np.ndarray, config: SplitConfig) -> tuple[pd.DataFrame, str]:
    kept = table.kept.to_numpy(bool)
    if (table.patient[kept] == "").all():
        say("No patients are given, so the split is by near-duplicate groups; scores may be too good.")
    return divide(table, config, near_duplicate_groups(thumbnails[kept]))
