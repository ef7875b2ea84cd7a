"""The tile set: a folder that holds real or synthetic tiles in one format.

tiles.parquet          a row a tile (see COLUMNS)
tileset.json           classes with names and colours, microns per pixel, licence, how it was made, digest
images/<CLASS>/<id>.png
cache/                 decoded pixels; can be deleted
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd

from histosynth.core.errors import DataError, RunError, did_you_mean
from histosynth.core.files import atomic_path, ensure_folder, new_array, read_json, write_json
from histosynth.core.progress import bar
from histosynth.tiles.batches import TileArray
from histosynth.tiles.classes import class_entry as class_entry
from histosynth.tiles.images import read_rgb, square

SPLITS = ("train", "val", "test")
COLUMNS = {
    "id": "", "path": "", "label": "", "patient": "", "split": "", "source": "", "sha256": "", "format": "",
    "width": 0, "height": 0, "kept": True, "reason": "",
    "generator": "", "checkpoint": "", "seed": -1, "reference": "",
}  # fmt: skip
# Arrow's errors are kinds of these
PARQUET_DAMAGE = (OSError, ValueError, KeyError, TypeError, IndexError, NotImplementedError, MemoryError)
_DECODERS = 4
_MAP: Literal["c"] = "c"  # copy on write: torch warns of arrays that cannot be written, and the file stays whole
_REMEDY = "Make the tile set again."
# what may lie in the folder of a tile set that is not finished
_PARTS = {
    "images", "tiles.parquet", "cache", "making.json", "cutting", "slides", "slides.csv",
    "preparing", "thresholds.yaml", "stain.json",
}  # fmt: skip


@dataclass(frozen=True)
class TileSet:
    """A tile set that is on disk.

    Attributes:
        folder: where it is.
        table: a row a tile with the columns of `COLUMNS`, rejected tiles (kept = False) included.
        meta: what tileset.json holds.
    """

    folder: Path
    table: pd.DataFrame
    meta: dict[str, Any]

    @classmethod
    def is_tileset(cls, folder: Path | str) -> bool:
        """Whether a folder is a tile set."""
        return (Path(folder) / "tileset.json").is_file()

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Open a tile set.

        Raises:
            DataError: the folder is no tile set, or its table or description is damaged.
        """
        folder = Path(folder)
        if not cls.is_tileset(folder):
            raise DataError(
                f"{folder} is not a tile set (it has no tileset.json).",
                "Make one with `histosynth tiles import SOURCE OUT`.",
            )
        meta = _checked_meta(folder / "tileset.json")
        table = _read_table(folder / "tiles.parquet")
        strange = set(table.label[table.kept]) - {entry["label"] for entry in meta["classes"]}
        if strange:
            raise DataError(f"{folder} has tiles of the class {min(strange)!r}, which tileset.json lacks.", _REMEDY)
        return cls(folder, table, meta)

    @classmethod
    def create(cls, folder: Path | str, table: pd.DataFrame, classes: Sequence[str], **meta: Any) -> Self:
        """Write the table and the description of tiles whose images are already in `folder`.

        tileset.json is written last: a folder without it is an unfinished tile set.
        """
        folder = Path(folder)
        table = complete(table)
        described = [class_entry(c, i, len(classes)) for i, c in enumerate(classes)]
        with atomic_path(folder / "tiles.parquet") as temporary:
            table.to_parquet(temporary, index=False)
        given = meta.pop("classes_info", {})
        described = [entry | given.get(entry["label"], {}) for entry in described]
        write_json(
            folder / "tileset.json",
            {
                "format": 1,
                "classes": described,
                "digest": digest(table),
                "tiles": int(table.kept.sum()),
                **meta,
            },
        )
        return cls.open(folder)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class labels; their order is the class index."""
        return tuple(entry["label"] for entry in self.meta["classes"])

    @property
    def colours(self) -> dict[str, str]:
        """A colour (#RRGGBB) a class, for figures."""
        return {entry["label"]: entry["colour"] for entry in self.meta["classes"]}

    @property
    def digest(self) -> str:
        """Hexadecimal digest of which tiles there are, with labels and splits."""
        return self.meta["digest"]

    @cached_property
    def kept(self) -> pd.DataFrame:
        """The rows of usable tiles."""
        return self.table[self.table.kept].reset_index(drop=True)

    def rows(self, split: str | None = None) -> pd.DataFrame:
        """The rows of usable tiles of one split, or of all.

        Raises:
            DataError: an unknown split.
        """
        if split is None:
            return self.kept
        if split not in SPLITS:
            raise DataError(f"There is no split {split!r}.", did_you_mean(split, SPLITS))
        return self.kept[self.kept.split == split].reset_index(drop=True)

    def array(self, split: str | None = None, *, size: int, cache: Path | None = None) -> TileArray:
        """The tiles of a split, or of all, decoded to `size` pixels; decoded once, then read from a memory map.

        The map holds the splits one after another, so that a split is a part of it and costs no memory. Tiles come
        in the order of the table within a split, and all tiles in the order of the splits.

        Args:
            cache: where the decoded pixels are kept; the tile set's own cache folder by default.

        Raises:
            DataError: an unknown split, or a tile that cannot be read.
        """
        if split is not None and split not in SPLITS:
            raise DataError(f"There is no split {split!r}.", did_you_mean(split, SPLITS))
        place = self.kept.split.map({name: i for i, name in enumerate(SPLITS)}).fillna(len(SPLITS)).to_numpy()
        order = np.argsort(place, kind="stable")
        rows = self.kept.iloc[order]
        pixels = self._pixels(rows, size, cache or self.folder / "cache")
        if split is not None:
            number = SPLITS.index(split)
            part = slice(int((place < number).sum()), int((place <= number).sum()))
            pixels, rows = pixels[part], rows.iloc[part]
        index = {label: i for i, label in enumerate(self.classes)}
        return TileArray(
            pixels, rows.label.map(index).to_numpy(np.int64), rows.id.tolist(), self.classes, rows.patient.tolist()
        )

    def _pixels(self, rows: pd.DataFrame, size: int, cache: Path) -> np.ndarray:
        key = hashlib.sha256(json.dumps([self.digest, size, rows.id.tolist()]).encode()).hexdigest()[:16]
        path = cache / f"pixels-{size}-{key}.npy"
        shape = (len(rows), 3, size, size)
        if path.exists():
            try:
                found = np.load(path, mmap_mode=_MAP)
                if found.shape == shape and found.dtype == np.uint8:
                    return found
            except (OSError, ValueError):
                pass  # a damaged cache is made anew
        files = rows.path.tolist()
        with atomic_path(path) as temporary:
            pixels = new_array(temporary, shape, np.uint8)

            def decode(position: int) -> None:
                image, _ = read_rgb(self.folder / files[position])
                pixels[position] = square(image, size).transpose(2, 0, 1)

            with (
                ThreadPoolExecutor(_DECODERS) as pool,
                bar(f"Decode tiles to {size} px", len(files)) as tick,
            ):
                for _ in pool.map(decode, range(len(files))):
                    tick()
            pixels.flush()
        return np.load(path, mmap_mode=_MAP)


def _checked_meta(path: Path) -> dict[str, Any]:
    """What tileset.json holds; its classes and digest are as they should be."""
    meta = read_json(path)
    classes = meta.get("classes") if isinstance(meta, dict) else None
    if (
        not isinstance(classes, list)
        or not all(isinstance(e, dict) and all(isinstance(e.get(k), str) for k in ("label", "colour")) for e in classes)
        or not isinstance(meta.get("digest"), str)
    ):
        raise DataError(f"{path} does not describe a tile set (classes, digest).", _REMEDY)
    return meta


def _read_table(path: Path) -> pd.DataFrame:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            content = file.read()
        content.validate(full=True)  # text that is none would fail later, and not as an error of pandas
        table = content.to_pandas(ignore_metadata=True)
        missing = [c for c in ("id", "path", "label") if c not in table]
        if missing:
            raise ValueError(f"it has no column {missing[0]!r}")
        return complete(table)
    except PARQUET_DAMAGE as error:
        raise DataError(f"The table {path} cannot be read: {error}.", _REMEDY) from error


def claim(folder: Path | str) -> Path:
    """Make a folder for a new tile set; one that an interrupted call left half-filled is taken up again.

    Raises:
        RunError: the folder holds a tile set or other files, or cannot be written.
    """
    folder = Path(folder)
    remedy = "Choose a new or empty folder."
    if TileSet.is_tileset(folder):
        raise RunError(f"The folder {folder} already holds a tile set.", remedy)
    if folder.is_dir() and (other := sorted(p.name for p in folder.iterdir() if p.name not in _PARTS)):
        raise RunError(f"The folder {folder} holds other files ({', '.join(other[:3])}).", remedy)
    return ensure_folder(folder)


def complete(table: pd.DataFrame) -> pd.DataFrame:
    """Add the columns that are missing, with their empty values, and fix the types."""
    table = table.copy()
    for name, empty in COLUMNS.items():
        table[name] = table[name].fillna(empty) if name in table else empty
        table[name] = table[name].astype(type(empty) if not isinstance(empty, str) else object)
    return table[[*COLUMNS, *(c for c in table.columns if c not in COLUMNS)]].reset_index(drop=True)


def digest(table: pd.DataFrame) -> str:
    """Digest of ids, contents, labels, patients, splits and which tiles are kept; not of the row order."""
    rows = table[["id", "sha256", "label", "patient", "split", "kept"]].astype(str)
    lines = sorted("\x1f".join(row) for row in rows.itertuples(index=False))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def safe_name(text: str) -> str:
    """A file name made of a label or an id: letters, digits, dot, dash and underscore only."""
    cleaned = re.sub(r"[^\w.-]+", "_", text).strip("._") or "tile"
    if cleaned == text and len(text) <= 80:
        return text
    # two names that clean to the same text must not share a file
    return f"{cleaned[:64]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def set_aside(table: pd.DataFrame) -> dict[str, int]:
    """How many tiles were set aside, for each reason."""
    rejected = table[~table.kept]
    reasons: Iterable[str] = rejected.reason.str.split(":").str[0]
    return {str(k): int(v) for k, v in pd.Series(list(reasons), dtype=object).value_counts().items()}
